// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/block.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/image_encoder.h"

namespace caption {

struct ModelOptions {
  int64_t vocabulary;  ///< numbers of words in use
  int64_t longest;     ///< words of a caption
};

/// One layer of a Transformer decoder, as Vaswani et al. have it: each word asks the words before it, then the image.
class DecoderLayerImpl : public torch::nn::Module {
 public:
  DecoderLayerImpl(int64_t features, int64_t heads);

  /// x [B, n, T, E], n sentences about each image; mask over the words, for B * n; image: `cross_attention->context(...)`.
  /// Returns x [B, n, T, E] and where each word looked, [B, n, T, Lk], the mean over heads.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x,
                                                   const xattn::Mask& mask,
                                                   const xattn::Context& image);

  xattn::CrossAttentionBlock self_attention{nullptr};
  xattn::CrossAttentionBlock cross_attention{nullptr};
};
TORCH_MODULE(DecoderLayer);

/// Image captioning: a CNN, and a Transformer decoder of two layers that looks at its features.
class ModelImpl : public torch::nn::Module {
 public:
  static constexpr int64_t kFeatures = 96;
  static constexpr int64_t kHeads = 4;
  static constexpr int64_t kLayers = 2;

  explicit ModelImpl(const ModelOptions& options);

  /// Where the places of the image are read from, once for each image: boards [B, 1, 24, 24] -> [B, 9, 96].
  torch::Tensor see(const torch::Tensor& boards);

  /// What the decoder needs of images, made once and used for every word and every beam: one context for each layer.
  std::vector<xattn::Context> look(const torch::Tensor& features);

  /// n sentences about each image: words int64 [B, n, T], each beginning with kEnd, padded with 0 behind.
  /// Returns the scores of the word behind each, [B, n, T, vocabulary], and where it looked for it, [B, n, T, 9].
  std::tuple<torch::Tensor, torch::Tensor> tell(const torch::Tensor& words, const std::vector<xattn::Context>& images);

  /// Recognises digits without a decoder: features [B, 9, 96] -> scores of 0 to 9 and of the empty cell, [B, 9, 11]. Its loss
  /// teaches the CNN to read, and it shows how many captions could be right if the decoder made no mistake.
  torch::Tensor recognise(const torch::Tensor& features);

  ModelOptions options;
  examples::ImageEncoder image_encoder{nullptr};
  torch::Tensor place;  ///< [9, 96], learned
  torch::nn::Embedding embedding{nullptr};
  torch::Tensor position;  ///< [longest + 1, 96], learned
  std::vector<DecoderLayer> layers;
  torch::nn::Linear classifier{nullptr};
  torch::nn::Linear recogniser{nullptr};
};
TORCH_MODULE(Model);

}  // namespace caption
