// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/layouts.h>

#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

// What the tables of layouts.cpp and block_layouts.cpp hold, taken apart.
namespace xattn::detail {

/// "a b" -> "a", "b".
inline std::vector<std::string> words(std::string_view text) {
  std::istringstream in{std::string(text)};
  return {std::istream_iterator<std::string>(in), {}};
}

/// The recipe with the scale beside its source, if the source is of a float8 type and there is one; see TensorRecipe.
TensorRecipe with_scale(TensorRecipe recipe, const std::map<std::string, TensorInfo>& tensors);

/// Names of the scales of activations beside its source.
std::vector<std::string> activation_scales(const TensorRecipe& recipe, const std::map<std::string, TensorInfo>& tensors);

}  // namespace xattn::detail
