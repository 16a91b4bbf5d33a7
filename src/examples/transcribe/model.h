// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/frozen_block.h>
#include <xattn/frozen_linear.h>
#include <xattn/norm.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace transcribe {

/// A window of sound as the decoder reads it: a context for the cross-attention of each layer, made once, read at every token.
using Contexts = std::vector<xattn::FrozenContext>;

/// Whisper: a Transformer encoder over a log-mel spectrogram, and a Transformer decoder that attends to its output.
/// Radford et al., 2022, https://arxiv.org/abs/2212.04356. All layers are frozen blocks of this library. Immutable.
class Model {
 public:
  /// Reads a folder in the form of Hugging Face, with weights in one file or in shards, or OpenAI's own .pt file; of storage see
  /// xattn::FreezeOptions. Throws xattn::FileError if it is of another architecture, or something is missing or damaged.
  explicit Model(const std::string& path, std::optional<torch::ScalarType> storage = {});

  /// mel [bins, window()] -> memory [1, window() / 2, E]
  torch::Tensor encode(const torch::Tensor& mel) const;

  /// memory [1, Lk, E] -> its contexts, for about as many queries.
  Contexts contexts(const torch::Tensor& memory, int64_t expected_queries) const;

  int64_t bins() const { return conv_weights_[0].size(1); }
  int64_t window() const { return 2 * encoder_positions_.size(0); }  ///< frames of a spectrogram that it hears at once
  int64_t longest() const { return decoder_positions_.size(0); }     ///< tokens of a text with its prompt
  int64_t vocabulary_size() const { return to_logits_.out_features(); }
  int64_t decoder_layers() const { return static_cast<int64_t>(decoder_.size()); }
  int64_t heads() const { return decoder_.front().cross.options().attention().num_heads(); }
  const std::string& folder() const { return folder_; }  ///< of the files

 private:
  friend class Decoding;
  struct DecoderLayer {
    xattn::FrozenBlock self, cross;
  };

  std::string folder_;
  std::array<torch::Tensor, 2> conv_weights_, conv_biases_;
  torch::Tensor encoder_positions_;  // [window / 2, E]
  std::vector<xattn::FrozenBlock> encoder_;
  xattn::Norm encoder_norm_{nullptr};
  torch::Tensor token_embedding_;    // [V, E]; undefined if it is the weight of to_logits_, as in OpenAI's models
  torch::Tensor decoder_positions_;  // [longest, E]
  std::vector<DecoderLayer> decoder_;
  xattn::Norm decoder_norm_{nullptr};
  xattn::FrozenLinear to_logits_;
};

/// Heads of cross-attention, by layer: those of a layer in ascending order.
using Heads = std::map<size_t, std::vector<int64_t>>;

/// Texts about one sound that grow token by token, all of one length. What was said before is kept in a growing context for the
/// self-attention of each layer. The model and the sound must outlive it.
class Decoding {
 public:
  Decoding(const Model& model, const Contexts& sound) : model_(model), sound_(sound), words_(sound.size()) {}

  /// Adds tokens int64 [n, T] to n texts. Returns the logits of the token behind each, [n, T, V].
  torch::Tensor append(const torch::Tensor& tokens);

  /// Reads a whole text, int64 [1, T], in a Decoding of its own, as far as the last layer with some of these heads. Returns
  /// their attention to the sound, [heads, T, Lk]. There must be at least one.
  torch::Tensor attention(const torch::Tensor& tokens, const Heads& heads);

  /// Goes on with these texts, int64 [n]. Their contexts are selected; that of the sound serves all of them as it is.
  void select(const torch::Tensor& texts);

 private:
  std::pair<torch::Tensor, std::vector<torch::Tensor>> run(const torch::Tensor& tokens, size_t layers, const Heads& heads);

  const Model& model_;
  const Contexts& sound_;
  std::vector<xattn::FrozenContext> words_;
  int64_t length_ = 0;
};

}  // namespace transcribe
