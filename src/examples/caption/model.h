// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/context.h>
#include <xattn/frozen_block.h>
#include <xattn/stacks.h>

#include <cstdint>
#include <tuple>
#include <variant>
#include <vector>

#include "common/image_encoder.h"

namespace caption {

struct ModelOptions {
  int64_t vocabulary;  ///< Vocabulary::size()
  int64_t longest;     ///< words of a caption
};

/// An image as the cross-attention of a layer reads it: made by the module, or by its frozen copy.
using ImageContext = std::variant<xattn::Context, xattn::FrozenContext>;

/// Image captioning: a CNN, and a Transformer decoder (Vaswani et al., 2017) of two layers, in which each word attends to the
/// words before it, then to the image.
class ModelImpl : public torch::nn::Module {
 public:
  static constexpr int64_t kFeatures = 96;
  static constexpr int64_t kHeads = 4;
  static constexpr int64_t kLayers = 2;

  explicit ModelImpl(const ModelOptions& options);

  /// Attends with frozen copies of the layers from now on. For inference alone: they do not follow further training.
  void freeze();

  /// The features of the places of images: boards [B, 1, 24, 24] -> [B, 9, 96].
  torch::Tensor encode(const torch::Tensor& boards);

  /// One context for each layer, made once for an image and used for every word and every beam.
  std::vector<ImageContext> contexts(const torch::Tensor& features);

  /// n sentences about each image: words int64 [B, n, T], each beginning with kEnd, padded with 0 at the end.
  /// Returns for each word the scores of the next one, [B, n, T, vocabulary], and its attention weights, [B, n, T, 9].
  std::tuple<torch::Tensor, torch::Tensor> predict(const torch::Tensor& words, const std::vector<ImageContext>& images);

  /// Recognises digits without the decoder: features [B, 9, 96] -> scores of 0 to 9 and of the empty cell, [B, 9, 11]. Its loss
  /// trains the CNN, and its accuracy shows how many captions could be right if the decoder made no mistake.
  torch::Tensor recognise(const torch::Tensor& features);

  ModelOptions options;
  examples::ImageEncoder image_encoder{nullptr};
  torch::Tensor place;  ///< [9, 96], learned
  torch::nn::Embedding embedding{nullptr};
  torch::Tensor position;  ///< [longest + 1, 96], learned
  std::vector<xattn::DecoderLayer> layers;
  torch::nn::Linear classifier{nullptr};
  torch::nn::Linear recogniser{nullptr};

 private:
  struct FrozenLayer {
    xattn::FrozenBlock self, cross;
  };
  std::vector<FrozenLayer> frozen_;  // of `layers`, after `freeze`
};
TORCH_MODULE(Model);

/// The most probable captions of B images.
struct Decoded {
  torch::Tensor words;            ///< int64 [B, T], kEnd behind the last word, padded with 0
  torch::Tensor log_probability;  ///< [B], the sum over the words
};

/// Captions of images as `contexts` returns them, word by word. With one beam each next word is the most probable one (greedy
/// search); with n beams, the n most probable beginnings are kept. The beams share the contexts: nothing of an image is copied
/// or computed again.
Decoded decode(Model& model, const std::vector<ImageContext>& images, int64_t beams);

}  // namespace caption
