// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "files/check_file.h"
#include "loading/find_stacks.h"

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

/// See `choose_layer` and `choose_block`. `file` is its path, for messages.
FoundLayer choose(const std::string& file, const std::vector<FoundLayer>& layers, const std::optional<std::string>& prefix);
FoundBlock choose(const std::string& file, const std::vector<FoundBlock>& blocks, const std::optional<std::string>& prefix);
FoundStack choose(const std::string& file,
                  const std::vector<FoundStack>& stacks,
                  StackKind kind,
                  const std::optional<std::string>& prefix);

/// Throws FileError if no layer of this layout was found below a prefix for a known reason: quantized or low-rank weights.
void explain_none(const Checkpoint& checkpoint, const std::string& prefix, const LayoutChoice& layout);

/// Throws FileError unless the tensor has a floating point type.
void refuse_quantized(const Checkpoint& checkpoint, const std::string& name);

}  // namespace xattn::detail
