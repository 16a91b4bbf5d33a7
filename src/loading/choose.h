// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_layouts.h>
#include <xattn/layouts.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/text.h"
#include "files/check_file.h"
#include "files/stored_tensor.h"

// Which of the layers or blocks of a file is meant.
namespace xattn::detail {

/// The one found at `prefix`, with or without its point at the end; the only one without a prefix. Throws FileError, listing
/// prefixes, if there is none or several.
template <class Found>
Found choose_one(const std::string& file, const std::vector<Found>& found, const std::optional<std::string>& prefix) {
  const auto is_meant = [&](const Found& one) {
    return prefix ? one.prefix == *prefix || one.prefix == *prefix + "." : found.size() == 1;
  };
  if (const auto chosen = std::ranges::find_if(found, is_meant); chosen != found.end()) return *chosen;
  std::vector<std::string> prefixes;
  for (const auto& one : found) prefixes.push_back(in_quotes(one.prefix));
  fail_file("load", file, "prefix must be one of {}, but {}", joined(prefixes),
            prefix ? "is " + in_quotes(*prefix) : "was not given");
}

/// See `choose_layer` in load.h.
inline FoundLayer choose(const std::string& file,
                         const std::vector<FoundLayer>& layers,
                         const std::optional<std::string>& prefix) {
  check_file(!layers.empty(), "load", file, "must hold an attention layer in a layout that is known, but holds none");
  if (prefix) return choose_one(file, layers, prefix);
  std::vector<FoundLayer> of_kind;
  for (const auto kind : {AttentionKind::cross, AttentionKind::unknown, AttentionKind::self}) {
    if (!of_kind.empty()) break;
    std::ranges::copy_if(layers, std::back_inserter(of_kind), [kind](const FoundLayer& layer) { return layer.kind == kind; });
  }
  return choose_one(file, of_kind, prefix);
}

/// The same of blocks.
inline FoundBlock choose(const std::string& file,
                         const std::vector<FoundBlock>& blocks,
                         const std::optional<std::string>& prefix) {
  check_file(!blocks.empty(), "load", file,
             "must hold a block around cross-attention in a layout that is known, but holds none");
  return choose_one(file, blocks, prefix);
}

/// What these options call a layout; none if empty.
inline const Layout* layout_or_none(const std::string& name) {
  return name.empty() ? nullptr : &layout_named(name);
}

}  // namespace xattn::detail
