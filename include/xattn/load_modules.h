// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/block.h>
#include <xattn/checkpoint.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/export.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/load.h>

#include <optional>
#include <string>
#include <utility>

// Modules created from files, with their weights.
namespace xattn {

struct LayerOptions {
  std::optional<std::string> prefix = {};  ///< of the layer, with or without the trailing dot; see choose_layer
  LayoutChoice layout = {};                ///< detected from names if not given; see layout.h
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file if not given
  std::optional<double> qk_norm_eps = {};  ///< from config.json, or that of the layout's family, if not given
  AttentionWeights attention_weights = AttentionWeights::mean;
  /// Type of the parameters: float64, float32, bfloat16 or float16. If not given, the widest type among the layer's tensors,
  /// but at least float16.
  std::optional<torch::ScalarType> dtype = {};
  /// Ignore names that the layer's layout does not explain, and drop added contexts, such as an IP-Adapter's.
  bool allow_unexpected = false;
  bool without_input_norms = false;  ///< the caller applies the norms in front of the layer: see `input_norms`
};

/// A CrossAttention with a file's widths, biases, norms, scale and weights. No tensor shows the number of heads: it comes from
/// the options, from a per-head norm, or from a config.json beside the file; otherwise a FileError lists the possible numbers.
/// A layer in this library's own layout has the number that `save_safetensors` wrote into the file's metadata, and without it
/// the reference's one head. Scales in config.json are applied (query_pre_attn_scalar of Gemma, the switches of GPT-2). What
/// config.json reveals and is not computed throws FileError: soft caps of logits and, except in cross-attention, rotary
/// embeddings, attention to some of the keys, and logits that depend on positions.
///
/// Anything else that belongs to the layer may change its results. A FileError therefore names tensors that the layout does not
/// explain, norms in front of the projections, added contexts, low-rank weights, tensors of inconsistent sizes, weights of
/// types without arithmetic, such as quantized ones, and norms of unknown eps: Wan's layers are named like others in diffusers,
/// and only "blocks" in the prefix or the class in config.json distinguishes them.
[[nodiscard]] XATTN_API CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options = {});

/// Why a config.json beside the file makes the function above throw for this layer, whatever the options; empty if it does not.
[[nodiscard]] XATTN_API std::string refused_by_config(const Checkpoint& checkpoint, const FoundLayer& layer);

/// The same as `cross_attention_from` with the further contexts of the file's layer (IP-Adapters, Wan's image-to-video models), each added with this
/// scale. Throws FileError if it has none.
[[nodiscard]] XATTN_API DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                                               const LayerOptions& options = {},
                                                                               double scale = 1);

struct BlockOptionsFromFile {
  std::optional<std::string> prefix = {};  ///< of the block, with or without the trailing dot; see choose_block
  LayoutChoice layout = {};                ///< of the attention, as in LayerOptions
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file, like the next three, if not given
  std::optional<NormPlacement> norm_placement = {};
  std::optional<Activation> activation = {};
  std::optional<double> norm_eps = {};     ///< that of the block layout's family if neither has it
  std::optional<double> qk_norm_eps = {};  ///< as in LayerOptions
  AttentionWeights attention_weights = AttentionWeights::mean;
  std::optional<torch::ScalarType> dtype = {};  ///< as in LayerOptions
  bool allow_unexpected = false;                ///< ignore names that the layouts of block and attention do not explain
};

/// A CrossAttentionBlock with a file's widths, norms, gates, feed-forward branch and weights. Everything else comes from the
/// options, from a config.json beside the file, or from the family if all files with these names agree; otherwise a FileError
/// names the missing options. BART has its norms after, Whisper before, with the same names. Throws FileError for the same
/// layers as `cross_attention_from`.
///
///   auto block = xattn::cross_attention_block_from(xattn::open_checkpoint("whisper/model.safetensors"),
///                                                  {.prefix = "model.decoder.layers.0."});
[[nodiscard]] XATTN_API CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint,
                                                                       const BlockOptionsFromFile& options = {});

/// The norms in front of a layer's projections (Flamingo, Perceiver), which are not part of a CrossAttention: those of the
/// query and of the context, each the identity if the layer has none. `cross_attention_from` throws for a layer with such norms
/// unless `without_input_norms` is set.
[[nodiscard]] XATTN_API std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer);

}  // namespace xattn
