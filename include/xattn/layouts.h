// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/cross_attention_options.h>
#include <xattn/export.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace xattn {

/// Where a projection lies in a file: a weight and a bias, or one of several equal parts of them along the output features.
/// Names are those behind the layer's prefix.
struct ProjectionNames {
  std::string_view weight;
  std::string_view bias;  ///< may be absent from a file; empty if it always is
  int part = 0;           ///< of weight and bias, where they have several, counted from 0
  int parts = 1;
  int bias_parts = 1;  ///< torch.nn.MultiheadAttention packs the biases of weights that are apart
};

/// Where the projections of an added context lie, which the same query asks: names in front of ".weight" and ".bias".
struct AddedNames {
  std::string_view key;
  std::string_view value;
  std::string_view key_norm;  ///< empty if there is none; else a layer without it does not have this context
};

/// How a family of models spells an attention layer. Which biases and norms a layer has is told by the names in its file. A
/// layout is a row of the table in layouts.cpp; add a row there to read one more spelling.
struct Layout {
  std::string_view name;  ///< for --layout
  std::string_view used_by;
  /// Components of which a layer's prefix must have one, separated by spaces, to tell layouts of equal names apart.
  std::string_view prefix_has = {};
  ProjectionNames query;
  ProjectionNames key;
  ProjectionNames value;
  ProjectionNames output;
  bool transposed = false;                      ///< weights are stored [in, out]
  std::optional<double> scale = {};             ///< of the logits; without it 1 / sqrt(head_dim)
  std::string_view query_norm = {};             ///< of the projected queries, in front of ".weight"
  std::string_view key_norm = {};               ///< of the projected keys
  double qk_norm_eps = 1e-6;                    ///< what the family uses unless its config says otherwise
  std::string_view layer_norms_are = {};        ///< not of this family, if its norms are of kind rms: whose, and why refused
  std::string_view qk_norm_eps_in_config = {};  ///< names in config.json, as for num_heads
  std::string_view query_input = {};            ///< a layer norm of the layer's own in front of its query projection
  std::string_view context_input = {};          ///< the same in front of its key and value projections
  std::string_view bias_k = {};                 ///< one more key and value, which no mask hides
  std::string_view bias_v = {};
  std::array<AddedNames, 4> added = {};  ///< contexts that a layer may have beside its first, in order; see decoupled.h
  /// Names of tensors behind a layer's prefix that take no part in its attention, separated by spaces: buffers of its class, or
  /// the norm behind it, which is of its block. They stay when a layer is spelled anew, and so hold for every layout.
  std::string_view beside = {};
  std::string_view beside_cross = {};  ///< likewise, but of this layout and in cross-attention alone
  std::string_view causal_mask = {};   ///< as `beside`, for a buffer [1, 1, n, n], which only self-attention uses
  /// Names in config.json that tell it, separated by spaces; the first that is there counts. A name without a point may be at
  /// the top, in "text_config" or in "decoder"; ".name" is at the top alone, "inner.name" in another part.
  std::string_view num_heads = {};
  std::string_view num_heads_untold = {};      ///< a word in prefixes of layers whose number that is not
  std::string_view scale_root_in_config = {};  ///< the scale is 1 / sqrt of the number of this name (Gemma)
  std::string_view scaled_in_config = {};      ///< where this is false the scale is 1
  std::string_view by_layer_in_config = {};  ///< where this is true the scale is divided by the layer's number, counted from 1
};

/// All that is known, in the order in which they are tried.
XATTN_API std::span<const Layout> layouts();

/// The layout of this name. Throws c10::ValueError, listing the names, if there is none.
XATTN_API const Layout& layout_named(std::string_view name);

enum class AttentionKind {
  cross,    ///< its name says so, or its query and key widths differ
  self,     ///< its name says so
  unknown,  ///< nothing tells
};

/// An attention layer found among the tensors of a file.
struct XATTN_API FoundLayer {
  std::string prefix;  ///< in front of its names; empty, or with a point at the end
  const Layout* layout;
  AttentionKind kind;
  CrossAttentionOptions options;              ///< widths, biases and norms, with the fewest heads that the widths allow
  bool heads_known;                           ///< whether options.num_heads() is right: a norm of each head tells its size
  std::vector<const AddedNames*> added = {};  ///< those of the layout that are there
  /// Biases and norms of other sizes than the weights beside them, as in "q_proj.bias must have shape [16], but has [7]": the
  /// options say that there are none.
  std::vector<std::string> misshapen = {};

  /// The numbers of heads that the widths allow; weights do not tell which it was.
  std::vector<int64_t> possible_heads() const;

  /// The options with this many heads. Throws c10::ValueError, listing the numbers that are possible, if this one is not.
  CrossAttentionOptions with_heads(int64_t num_heads) const;
};

/// All attention layers of a file, in order of prefix, by names and shapes alone. `only`: as this layout alone spells them.
XATTN_API std::vector<FoundLayer> find_layers(const std::map<std::string, TensorInfo>& tensors, const Layout* only = nullptr);

/// A tensor of a module, made from a part of a tensor in a file.
///
/// A weight of a float8 type may have a scale beside it, by which it is multiplied: one number, one for each row, or one for
/// each block of rows and columns; blocks have 128 of each, the last one may have fewer, or else all have equally many. Its name
/// is that of the weight with "weight" replaced by
///   scale_weight      ComfyUI
///   weight_scale      compressed-tensors, FBGEMM, ComfyUI's newer files
///   weight_scale_inv  DeepSeek, FineGrainedFP8 of transformers: the inverse of what the weight was multiplied by when it was
///                     made, and so it multiplies, too (transformers, integrations/finegrained_fp8.py, Fp8Dequantize)
/// Scales of activations (input_scale, scale_input, activation_scale, input_scale_ub) change no weight, and are passed over: here inputs are
/// never rounded to float8.
struct XATTN_API TensorRecipe {
  std::string source = {};  ///< full name in the file
  int part = 0;
  int parts = 1;
  bool transposed = false;
  bool flat = false;       ///< of one axis, whatever the source's are: gates are [], [1], [D] or [1, 1, D]
  std::string scale = {};  ///< full name of the tensor that multiplies the source; empty if there is none

  std::vector<int64_t> shape(const TensorInfo& source_info) const;
  /// Of what `make` returns: the source's type, with a scale float32 or float64.
  at::ScalarType type(const std::map<std::string, TensorInfo>& tensors) const;
  /// Why source and scale do not fit together; empty if they do, or if there is no scale.
  std::string misfit(const std::map<std::string, TensorInfo>& tensors) const;
  /// The part of a source without a scale. Throws c10::ValueError if there is one.
  at::Tensor apply(const at::Tensor& source_tensor) const;
  /// The same with the scale. In float64 if `type` is that. Throws c10::ValueError, with the reason, if they do not fit.
  at::Tensor make(const LazyTensors& tensors, std::optional<at::ScalarType> type = {}) const;
};

/// How to make each parameter of a CrossAttention from a file with this layer, by the parameter's name ("query_linear.weight").
XATTN_API std::map<std::string, TensorRecipe> recipes(const FoundLayer& layer,
                                                      const std::map<std::string, TensorInfo>& tensors);

/// The same for its added contexts, by the names in a DecoupledCrossAttention ("added0.key_linear.weight").
XATTN_API std::map<std::string, TensorRecipe> added_recipes(const FoundLayer& layer,
                                                            const std::map<std::string, TensorInfo>& tensors);

/// What a name behind a layer's prefix is.
enum class NameRole {
  parameter,   ///< a weight, bias or norm of the layer, or the scale of a weight
  added,       ///< the same of an added context
  input_norm,  ///< of a norm in front of the projections; see `input_norms` in load.h
  beside,      ///< known to take no part: Layout::beside, or a scale of activations
  unexplained,
};

/// Every name behind the layer's prefix, without it, and what it is.
XATTN_API std::map<std::string, NameRole> name_roles(const FoundLayer& layer, const std::map<std::string, TensorInfo>& tensors);

/// Those that the layout does not explain, of which some may change what the layer computes.
XATTN_API std::vector<std::string> unexplained_names(const FoundLayer& layer, const std::map<std::string, TensorInfo>& tensors);

/// What to do about names that no layout explains, as low-rank weights, which Python merges: "; ..." for the end of a message,
/// or nothing.
XATTN_API std::string advice_on(const std::vector<std::string>& names);

/// The other way: parameters of a CrossAttention, by name, as this layout spells them behind `prefix`. Throws c10::ValueError
/// for a layer that the layout has no words for, as a bias where it has none.
XATTN_API NamedTensors spell(const NamedTensors& parameters, const Layout& layout, const std::string& prefix = {});

}  // namespace xattn
