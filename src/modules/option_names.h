// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention.h>
#include <xattn/block_options.h>

#include <array>
#include <string_view>

// The names of option values, as in code after "NormKind::".
namespace xattn::detail {

inline std::string_view name_of(NormKind norm) {
  return std::array{"none", "rms", "layer"}.at(static_cast<size_t>(norm));
}

inline std::string_view name_of(AttentionWeights weights) {
  return std::array{"none", "mean", "per_head"}.at(static_cast<size_t>(weights));
}

inline std::string_view name_of(NormPlacement placement) {
  return std::array{"before", "after"}.at(static_cast<size_t>(placement));
}

inline std::string_view name_of(BlockGate gate) {
  return std::array{"none", "scalar", "per_feature"}.at(static_cast<size_t>(gate));
}

inline std::string_view name_of(Activation activation) {
  return std::array{"relu", "gelu", "gelu_tanh", "silu"}.at(static_cast<size_t>(activation));
}

}  // namespace xattn::detail
