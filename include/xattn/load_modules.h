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

// Modules made from files, with their weights.
namespace xattn {

struct LayerOptions {
  std::optional<std::string> prefix = {};  ///< of the layer, with or without the point at its end; see choose_layer
  std::string layout = {};                 ///< found by names if empty; see find_layers.h
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file if not given
  std::optional<double> qk_norm_eps = {};  ///< from config.json, or that of the layout's family, if not given
  AttentionWeights attention_weights = AttentionWeights::mean;
  /// Type of the parameters: float64, float32, bfloat16 or float16. If not given, the widest type among the layer's tensors, but
  /// at least float16.
  std::optional<torch::ScalarType> dtype = {};
  bool allow_unexpected = false;     ///< ignore names that the layer's layout does not explain
  bool without_input_norms = false;  ///< the caller applies the norms in front of the layer: see `input_norms`
};

/// A CrossAttention with a file's widths, biases, norms, scale and weights. The number of heads is never among the weights: it
/// comes from the options, from a norm of single heads, or from a config.json beside the file; else a FileError lists the numbers
/// that are possible. What config.json says of the scale is computed (query_pre_attn_scalar of Gemma, the switches of GPT-2), or
/// refused (soft caps of logits).
///
/// Whatever else belongs to the layer may change what it computes. A FileError names what the layout does not explain, norms in
/// front of the projections, added contexts, low-rank weights, tensors of sizes that do not fit together, weights of types
/// without arithmetic, such as quantized ones, and an eps of norms that nothing tells: Wan's layers are spelled as others in
/// diffusers, and only "blocks" in the prefix tells them apart.
[[nodiscard]] XATTN_API CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options = {});

/// The same with the contexts that the file's layer has beside its first (IP-Adapters, Wan's image-to-video models), each added
/// with this scale. Throws FileError if it has none.
[[nodiscard]] XATTN_API DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                                               const LayerOptions& options = {},
                                                                               double scale = 1);

struct BlockOptionsFromFile {
  std::optional<std::string> prefix = {};  ///< of the block, with or without the point at its end; see choose_block
  std::string layout = {};                 ///< of the attention, as in LayerOptions
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file, like the next three, if not given
  std::optional<NormPlacement> norm_placement = {};
  std::optional<Activation> activation = {};
  std::optional<double> norm_eps = {};     ///< that of the block layout's family if neither tells
  std::optional<double> qk_norm_eps = {};  ///< as in LayerOptions
  AttentionWeights attention_weights = AttentionWeights::mean;
  std::optional<torch::ScalarType> dtype = {};  ///< as in LayerOptions
  bool allow_unexpected = false;                ///< ignore names that the layouts of block and attention do not explain
};

/// A CrossAttentionBlock with a file's widths, norms, gates, feed-forward branch and weights. What these do not tell comes from the
/// options, from a config.json beside the file, or from the family if all files with these names agree; else a FileError says
/// what to give. BART has its norms after, Whisper before, with the same names. What is refused is as for `cross_attention_from`.
///
///   auto block = xattn::cross_attention_block_from(xattn::open_checkpoint("whisper/model.safetensors"),
///                                                  {.prefix = "model.decoder.layers.0."});
[[nodiscard]] XATTN_API CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint,
                                                                       const BlockOptionsFromFile& options = {});

/// The norms in front of a layer's projections (Flamingo, Perceiver), which are no part of a CrossAttention: those of the query
/// and of the context, each the identity if the layer has none. `cross_attention_from` refuses a layer with such norms unless
/// its options say `without_input_norms`.
[[nodiscard]] XATTN_API std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer);

}  // namespace xattn
