// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace xattn {

/// The attention weights that one call of `forward` or `attend` returns. Fields that are set override the module's options.
///
///   auto [output, weights] = attention->forward(query, key, value, {}, {.weights = AttentionWeights::per_head});
struct CallOptions {
  std::optional<AttentionWeights> weights = {};           ///< default: `attention_weights` of the module
  std::optional<std::vector<int64_t>> weight_heads = {};  ///< with per_head; default: `weight_heads` of the module
};

}  // namespace xattn
