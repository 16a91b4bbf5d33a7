// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/text.h"

// How families of models name the parts of attention layers. All names follow the layer's prefix.
namespace xattn::detail {

/// A weight and a bias in a file, or one of several equal parts of them along the output features.
struct LinearNames {
  std::string weight;
  std::string bias;  ///< may be absent from a file; empty if it always is
  int part = 0;      ///< which part of weight and bias, if there are several
  int parts = 1;
  int bias_parts = 1;  ///< torch.nn.MultiheadAttention packs the biases of separate weights
};

/// Norms of projected queries and keys, in front of ".weight" and ".bias"; a layer has both or none.
struct QkNormNames {
  std::string query;
  std::string key;
  double eps = 1e-6;                            ///< the family's value unless its config.json says otherwise
  std::vector<std::string> eps_in_config = {};  ///< as `num_heads`
  /// If not empty, `eps` holds only for layers with one of these components in their prefix. Other families use the same names
  /// with another eps, so the eps of other layers is unknown.
  std::vector<std::string> eps_known_in = {};
};

/// The projections of an added context and the norm of its keys, in front of ".weight" and ".bias".
struct AddedNames {
  std::string key;
  std::string value;
  std::string key_norm = {};  ///< if not empty, a layer without it does not have this context
};

/// A row of the table in layouts.cpp. Biases and norms of a layer are those present in its file.
///
/// Names in config.json are listed in the order in which they are looked up. "name" may be at the top, in "text_config" or in
/// "decoder"; ".name" is at the top only, and "inner.name" in another part.
struct LayerLayout {
  std::string name;
  std::string used_by;
  std::vector<std::string> prefix_has = {};  ///< the prefix has one of these components: distinguishes layouts of equal names
  std::array<LinearNames, 4> projections;    ///< of query, key, value and output
  bool transposed = false;                   ///< weights are stored [in, out]
  std::optional<double> scale = {};          ///< of the logits; without it 1 / sqrt(head_dim)
  QkNormNames qk_norm = {};
  std::string layer_norms_are = {};             ///< the family that qk norms with biases belong to; this one has none
  std::array<std::string, 2> input_norms = {};  ///< layer norms in front of the projections: of query, and of key and value
  std::array<std::string, 2> bias_kv = {};      ///< a learned key and value
  std::vector<AddedNames> added = {};           ///< contexts that a layer may have beside its first
  /// Names below a layer's prefix that take no part in its attention, such as buffers and the norm of the block around it.
  /// `convert` keeps them, so they are harmless in every layout.
  std::vector<std::string> beside = {};
  std::vector<std::string> beside_cross = {};  ///< the same in cross-attention of this layout only
  std::string causal_mask = {};                ///< likewise a buffer [1, 1, n, n], which only self-attention uses
  std::vector<std::string> num_heads = {};     ///< names in config.json
  std::string num_heads_unknown = {};          ///< config.json does not give it for prefixes that contain this
  std::string scale_root_in_config = {};       ///< the scale is 1 / sqrt of this number (Gemma)
  std::string scaled_in_config = {};           ///< if false, the scale is 1
  std::string by_layer_in_config = {};         ///< if true, the scale is divided by the layer's number, counted from 1
};

/// The whole table, in the order in which layouts are tried.
const std::vector<LayerLayout>& layer_layouts();

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
XATTN_API const LayerLayout& layout_named(std::string_view name);

/// Whether one of these words stands in a prefix between its points.
bool has_component(const std::string& prefix, const std::vector<std::string>& words);

/// One parameter of a CrossAttention and its name in a layout.
struct ParameterName {
  std::string parameter;  ///< "query_linear.weight"
  std::string name;       ///< in a file
  int part = 0;
  int parts = 1;
  bool transposed = false;
};

/// Every parameter that a layer of this layout may have.
std::vector<ParameterName> parameter_names(const LayerLayout& layout);

}  // namespace xattn::detail
