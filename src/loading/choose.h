// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "files/check_file.h"
#include "loading/recipes.h"

// Chooses the layer, block or stack of a file that a prefix names.
namespace xattn::detail {

/// Checks on a file of this path; see FileCheck.
inline FileCheck load_check(const std::string& path) {
  return {"load", path};
}

/// The prefix with the point at its end; an empty one stays empty.
inline std::string with_point(const std::string& prefix) {
  return prefix.empty() || prefix.ends_with('.') ? prefix : prefix + ".";
}

/// Whether a name in this map begins with the prefix.
template <class Map>
bool any_below(const std::string& prefix, const Map& names) {
  const auto first = names.lower_bound(prefix);
  return first != names.end() && first->first.starts_with(prefix);
}

/// "prefix must be one of "a.", "b.", but is "c"", or "but was not given".
std::string must_be_one_of(std::vector<std::string> prefixes, const std::optional<std::string>& given);

/// The layer, block or stack found at `prefix`, with or without the point at its end; null if there is none.
template <class Found>
const Found* find_at(const std::vector<Found>& found, const std::string& prefix) {
  const auto is_meant = [&](const Found& one) { return one.prefix == prefix || one.prefix == prefix + "."; };
  const auto one = std::ranges::find_if(found, is_meant);
  return one == found.end() ? nullptr : &*one;
}

/// The layers of the likeliest kind: cross-attention, else the unknown, else self-attention.
std::vector<FoundLayer> likeliest(const std::vector<FoundLayer>& layers);

/// The layer, block or stack found at `prefix`; without a prefix, the only one of the likeliest kind. Throws FileError if there
/// is none. In messages, `file` is the path, and `what` is looked for: "an encoder".
template <class Found>
Found choose(const std::string& file,
             const std::vector<Found>& found,
             std::string_view what,
             const std::optional<std::string>& prefix) {
  load_check(file)(!found.empty(), "must hold {} in a layout that is known, but holds none", what);
  if (const auto* one = prefix ? find_at(found, *prefix) : nullptr) return *one;
  auto possible = found;
  if constexpr (std::is_same_v<Found, FoundLayer>) possible = prefix ? found : likeliest(found);
  if (!prefix && possible.size() == 1) return possible.front();
  std::vector<std::string> prefixes;
  for (const auto& one : possible) prefixes.push_back(one.prefix);
  load_check(file).fail("{}", must_be_one_of(std::move(prefixes), prefix));
}

/// Throws FileError if no layer of this layout was found below a prefix for a known reason: quantized or low-rank weights.
void explain_none(const Checkpoint& checkpoint, const std::string& prefix, const LayoutChoice& layout);

/// Throws FileError unless the tensor has a floating point type.
void refuse_quantized(const Checkpoint& checkpoint, const std::string& name);

}  // namespace xattn::detail
