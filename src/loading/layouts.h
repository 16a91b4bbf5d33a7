// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>
#include <xattn/find_layers.h>
#include <xattn/layout.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/text.h"

// How families of models name the parts of attention layers. All names follow the layer's prefix.
namespace xattn::detail {

inline constexpr std::string_view kReference = "reference";  ///< the layout of this library's own files

/// The whole table, in the order in which layouts are tried.
const std::vector<Layout>& layer_layouts();

/// The row of this name in a table of layouts. Throws c10::ValueError, listing the names, if there is none.
template <class Row>
const Row& row_named(const std::vector<Row>& table, std::string_view name) {
  std::vector<std::string> names;
  for (const auto& row : table) {
    if (row.name == name) return row;
    names.push_back(row.name);
  }
  check_value(false, "layouts", "layout must be one of {}, but is {}.", joined(names), name);
  return table.front();  // not reached
}

/// The layout of this name. Throws c10::ValueError, listing the names, if there is none.
XATTN_API const Layout& layout_named(std::string_view name);

/// The layout of a layer that was found: its own, or one of the table.
XATTN_API const Layout& layout_of(const FoundLayer& layer);

/// Whether one of these words stands in a prefix between its points.
bool has_component(const std::string& prefix, const std::vector<std::string>& words);

/// The number that a component of a name is, as 12 in "layers.12.norm"; nothing if it is none.
std::optional<int64_t> number_of(const std::string& component);

/// One parameter of a CrossAttention and its name in a layout.
struct ParameterName {
  std::string parameter;  ///< "query_linear.weight"
  std::string name;       ///< in a file
  int part = 0;
  int parts = 1;
  bool transposed = false;
};

/// Every parameter that a layer of this layout may have.
std::vector<ParameterName> parameter_names(const Layout& layout);

}  // namespace xattn::detail
