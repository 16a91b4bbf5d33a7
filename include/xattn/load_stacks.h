// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/block_options.h>
#include <xattn/checkpoint.h>
#include <xattn/export.h>
#include <xattn/layout.h>
#include <xattn/stacks.h>

#include <cstdint>
#include <optional>
#include <string>

// Encoders and decoders created from files, with their weights.
namespace xattn {

struct StackOptionsFromFile {
  /// In front of the names of the stack's layers, with or without the trailing dot: "model.encoder." of
  /// "model.encoder.layers.0.fc1.weight", "bert.encoder." of BERT, "vit." of ViT, "vision_model." of BLIP. The file's only
  /// encoder or decoder if not given.
  std::optional<std::string> prefix = {};
  LayoutChoice layout = {};               ///< of the attention, as in LayerOptions
  std::optional<int64_t> num_heads = {};  ///< from config.json beside the file, like the next three, if not given
  std::optional<NormPlacement> norm_placement = {};
  std::optional<Activation> activation = {};
  std::optional<double> norm_eps = {};          ///< of all norms; that of the family if neither has it
  double dropout = 0;                           ///< of all blocks, as in CrossAttentionBlockOptions
  bool causal = true;                           ///< of a decoder; false for BLIP's encoder of questions
  std::optional<torch::ScalarType> dtype = {};  ///< as in LayerOptions
  bool allow_unexpected = false;                ///< ignore names that the stack's layouts do not explain
};

/// An encoder with all layers of a file, the norm behind them, and T5's relative position bias:
///
///   BERT, RoBERTa; ViT; BLIP's vision model; BART, Marian, mBART, M2M-100, Pegasus, Whisper, also as OpenAI and MLX name it;
///   T5, Flan-T5, mT5; torch.nn.TransformerEncoder
///
/// What stands in front of the first layer is the caller's, and so are poolers: embeddings of tokens, positions and patches
/// with their norms (BART's layernorm_embedding), Whisper's convolutions. A model that attends causally needs a causal mask.
///
/// Sizes may differ between layers; their number is that of the file. Everything that the tensors do not show comes from the
/// options, from a config.json beside the file, or from the family if all files with these names agree; otherwise a FileError
/// names the missing option. A FileError also names layers that are missing or incomplete, names below the prefix that no
/// layout explains, other kinds of positions than absolute ones (in config.json), and everything that `cross_attention_from`
/// refuses. Without a config.json, models with these names that compute something else (the original DETR, which adds positions
/// in each layer; BROS, YOSO) cannot be told apart, and load.
///
///   auto encoder = xattn::encoder_from(xattn::open_checkpoint("t5/model.safetensors"), {.prefix = "encoder"});
[[nodiscard]] XATTN_API Encoder encoder_from(const Checkpoint& checkpoint, const StackOptionsFromFile& options = {});

/// A decoder, likewise: BART, Marian, mBART, M2M-100, Pegasus, Whisper; T5, Flan-T5, mT5; torch.nn.TransformerDecoder; BERT
/// with cross-attention, and the text models of BLIP. The projection to a vocabulary is the caller's, and so is T5's factor in
/// front of it.
[[nodiscard]] XATTN_API Decoder decoder_from(const Checkpoint& checkpoint, const StackOptionsFromFile& options = {});

}  // namespace xattn
