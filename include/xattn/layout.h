// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace xattn {

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
  std::vector<std::string> eps_in_config = {};  ///< as `Layout::num_heads`
  /// If not empty, `eps` holds only for layers with one of these components in their prefix, unless config.json names a class of
  /// diffusers. Other families use the same names with another eps, so the eps of other layers and classes is unknown.
  std::vector<std::string> eps_known_in = {};
};

/// The projections of an added context and the norm of its keys, in front of ".weight" and ".bias".
struct AddedNames {
  std::string key;
  std::string value;
  std::string key_norm = {};  ///< if not empty, a layer without it does not have this context
};

/// How a family of models names the parts of its attention layers, and what they compute: a row of the library's table
/// (`layouts`), or one of your own, for files that no row fits. All names follow a layer's prefix, which is empty or ends in a
/// point. Only `name` and `projections` have to be given. Biases and norms of a layer are those present in its file.
///
/// Names in config.json are listed in the order in which they are looked up. "name" may be at the top, in "text_config" or in
/// "decoder"; ".name" is at the top only, and "inner.name" in another part.
///
///   const xattn::Layout mine{.name = "mine", .projections = {xattn::LinearNames{"wq.weight", "wq.bias"},
///                                                            {"wkv.weight", "wkv.bias", 0, 2, 2},  // keys, then values
///                                                            {"wkv.weight", "wkv.bias", 1, 2, 2},
///                                                            {"wo.weight", "wo.bias"}}};
///   auto attention = xattn::cross_attention_from(checkpoint, {.layout = mine, .num_heads = 8});
struct Layout {
  std::string name;
  std::string used_by = {};
  std::vector<std::string> prefix_has = {};  ///< the prefix has one of these components: distinguishes layouts of equal names
  std::vector<std::string> has = {};         ///< likewise: names that every layer of this layout has
  std::vector<std::string> lacks = {};       ///< likewise: names that no layer of this layout has
  std::array<LinearNames, 4> projections;    ///< of query, key, value and output; query and key may share one weight
  bool transposed = false;                   ///< weights are stored [in, out]
  std::optional<double> scale = {};          ///< of the logits; without it 1 / sqrt(head_dim)
  QkNormNames qk_norm = {};
  std::string layer_norms_are = {};  ///< the family that qk norms with biases belong to; this one has none
  /// Layers with one of these components in their prefix use these names for another computation, `other`, and are refused.
  std::vector<std::string> other_in = {};
  std::string other = {};
  std::array<std::string, 2> input_norms = {};  ///< layer norms in front of the projections: of query, and of key and value
  std::array<std::string, 2> bias_kv = {};      ///< a learned key and value
  std::vector<AddedNames> added = {};           ///< contexts that a layer may have beside its first
  /// Names below a layer's prefix that take no part in its attention, such as buffers and the norm of the block around it. A
  /// name that ends in a point stands for all names that begin with it. Those of the table are harmless in every layout,
  /// because `convert` keeps them.
  std::vector<std::string> beside = {};
  std::vector<std::string> beside_here = {};   ///< the same in this layout only
  std::vector<std::string> beside_cross = {};  ///< the same in cross-attention of this layout only
  std::string causal_mask = {};                ///< likewise a buffer [1, 1, n, n], which only self-attention uses
  std::string bias_of_first = {};              ///< of positions: self-attention in each layer of a stack reads the first's
  std::vector<std::string> num_heads = {};     ///< names in config.json
  std::string num_heads_unknown = {};          ///< config.json does not give it for prefixes that contain this
  std::string scale_root_in_config = {};       ///< the scale is 1 / sqrt of this number (Gemma)
  std::string scaled_in_config = {};           ///< if false, the scale is 1
  std::string by_layer_in_config = {};         ///< if true, the scale is divided by the layer's number, counted from 1
};

/// The layout that the layers of a file must have: whichever of the table fits, one of the table by its name, or one of your
/// own. Immutable; safe to share between threads.
class XATTN_API LayoutChoice {
 public:
  LayoutChoice() = default;  ///< any layout of the table
  /// A layout of the table; an empty name is any. Names are checked where the choice is used.
  LayoutChoice(const char* name) : name_(name) {}             // NOLINT(google-explicit-constructor)
  LayoutChoice(std::string name) : name_(std::move(name)) {}  // NOLINT(google-explicit-constructor)
  /// Throws c10::ValueError unless it has a name, the names of four weights, and parts that exist.
  LayoutChoice(Layout own);  // NOLINT(google-explicit-constructor)

  bool is_any() const { return name_.empty(); }
  const std::string& name() const { return name_; }
  const std::shared_ptr<const Layout>& own() const { return own_; }  ///< null unless it is one of your own

 private:
  std::string name_;
  std::shared_ptr<const Layout> own_;
};

}  // namespace xattn
