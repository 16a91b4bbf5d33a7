// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/export.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "loading/block_layouts.h"
#include "loading/layouts.h"

// From the names of a file to the parameters of a module, and back.
namespace xattn::detail {

using Infos = std::map<std::string, TensorInfo>;

bool has_arithmetic(at::ScalarType type);  ///< whether it is float64, float32, bfloat16 or float16

/// A tensor of a module, made from a part of a tensor in a file.
///
/// A weight of a float8 type may have a scale beside it, which multiplies it: one number, one for each row, or one for each
/// block of rows and columns. Blocks have 128 of each, the last perhaps fewer, or else all have equally many. The scale's name
/// is that of the weight with "weight" replaced by
///   scale_weight      ComfyUI
///   weight_scale      compressed-tensors, FBGEMM, ComfyUI's newer files
///   weight_scale_inv  DeepSeek, FineGrainedFP8 of transformers: the inverse of the factor with which the weight was made, and
///                     so it multiplies, too (transformers, integrations/finegrained_fp8.py, Fp8Dequantize)
/// Scales of activations (input_scale, scale_input, activation_scale, input_scale_ub) are ignored: they change no weight, and
/// inputs are not rounded to float8 here.
struct XATTN_API TensorRecipe {
  std::string source = {};  ///< full name in the file
  int part = 0;
  int parts = 1;
  bool transposed = false;
  bool flat = false;       ///< has one axis, whatever the source's are: gates are [], [1], [D] or [1, 1, D]
  std::string scale = {};  ///< full name of the tensor that multiplies the source; empty if there is none

  std::vector<int64_t> shape(const TensorInfo& source_info) const;
  /// The type that `make` returns: the source's, or float32 or float64 with a scale.
  at::ScalarType type(const Infos& tensors) const;
  /// The reason why source and scale do not fit together; empty if they do, or if there is no scale.
  std::string misfit(const Infos& tensors) const;
  /// The part of the source, multiplied by the scale, in float64 if `type` is float64. Throws c10::ValueError, with the reason,
  /// if source and scale do not fit together.
  at::Tensor make(const LazyTensors& tensors, std::optional<at::ScalarType> type = {}) const;
  /// The inverse for a recipe without a scale: copies `value` into its part of the source, which must be contiguous.
  void write(const at::Tensor& value, const at::Tensor& source_tensor) const;
};

using Recipes = std::map<std::string, TensorRecipe>;  ///< by the name of a parameter

/// The recipe with the scale beside its source, if there is one.
TensorRecipe with_scale(TensorRecipe recipe, const Infos& tensors);

/// How to make each parameter of a CrossAttention ("query_linear.weight") from a file with this layer.
XATTN_API Recipes recipes(const FoundLayer& layer, const Infos& tensors);

/// Likewise for its added contexts, by the names in a DecoupledCrossAttention ("added0.key_linear.weight").
XATTN_API Recipes added_recipes(const FoundLayer& layer, const Infos& tensors);

/// Likewise for a CrossAttentionBlock.
XATTN_API Recipes recipes(const FoundBlock& block, const Infos& tensors);

/// The block of this layout around an attention layer, if it is present and its shapes fit together.
std::optional<FoundBlock> match_block(const BlockLayout& layout, const FoundLayer& attention, const Infos& tensors);

/// The parameters of a CrossAttention, by the names that this layout has for them below `prefix`. Throws c10::ValueError for a
/// layer that the layout cannot express, such as one with a bias where the layout has no name for it.
XATTN_API NamedTensors spell(const NamedTensors& parameters, const Layout& layout, const std::string& prefix = {});

/// The role of a name below a layer's prefix.
enum class NameRole {
  parameter,   ///< a weight, bias or norm of the layer, or the scale of a weight
  added,       ///< the same, for an added context
  input_norm,  ///< of a norm in front of the projections; see `input_norms` in load_modules.h
  beside,      ///< known to take no part: see Layout::beside; scales of activations
  around,      ///< of the model around a stack, such as embeddings: see StackLayout::beside
  unexplained,
};

/// The role of each name below the layer's prefix, by the name without it. Low-rank weights for the layer in kohya's spelling,
/// and the bias of positions that it reads from the first layer of its stack, are listed by their full names, as unexplained.
XATTN_API std::map<std::string, NameRole> name_roles(const FoundLayer& layer, const Infos& tensors);

/// Likewise below a block's prefix.
XATTN_API std::map<std::string, NameRole> name_roles(const FoundBlock& block, const Infos& tensors);

/// The names with this role.
std::vector<std::string> names_of(NameRole role, const std::map<std::string, NameRole>& roles);

/// Advice on names that no layout explains, for the end of a message: "; low-rank weights must ..." or nothing.
XATTN_API std::string advice_on(const std::vector<std::string>& names);

}  // namespace xattn::detail
