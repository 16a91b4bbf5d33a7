// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/block.h>
#include <xattn/block_options.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/norm_options.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

// The layers of a Transformer, one after the other. Embeddings of tokens, positions or patches, their norms, and projections to
// a vocabulary are the caller's. `encoder_from` and `decoder_from` (load_stacks.h) make both from files.
namespace xattn {

/// Options of `RelativePositionBias`: `RelativePositionBiasOptions(8).bidirectional(false)`.
struct XATTN_API RelativePositionBiasOptions {
  explicit RelativePositionBiasOptions(int64_t num_heads) : num_heads_(num_heads) {}
  /// Heads, H, each with biases of its own.
  TORCH_ARG(int64_t, num_heads);
  /// Buckets of distances; the distances of a bucket share a bias. Default: 32.
  TORCH_ARG(int64_t, num_buckets) = 32;
  /// From this distance on, all share the last bucket. Default: 128.
  TORCH_ARG(int64_t, max_distance) = 128;
  /// Whether keys behind the query have half of the buckets. Otherwise they share the bucket of distance 0, as in a decoder,
  /// where a causal mask hides them. Default: true.
  TORCH_ARG(bool, bidirectional) = true;
};

/// A learned number for each head and each distance between query and key, which is added to their logit, as in T5. Half of the
/// buckets of a direction are for one distance each, the others for ranges that grow exponentially up to max_distance.
/// Raffel et al., 2020, https://arxiv.org/abs/1910.10683, section 2.1.
class XATTN_API RelativePositionBiasImpl : public torch::nn::Cloneable<RelativePositionBiasImpl> {
 public:
  explicit RelativePositionBiasImpl(int64_t num_heads) : RelativePositionBiasImpl(RelativePositionBiasOptions(num_heads)) {}

  /// Throws c10::ValueError for options without heads, or with too few buckets or distances.
  explicit RelativePositionBiasImpl(const RelativePositionBiasOptions& options_);

  void reset() override;
  /// Sets all biases to zero.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// -> [1, H, Lq, Lk], for `Mask::bias`. Query i and key j, counted from 0, are at a distance of j - i.
  torch::Tensor forward(int64_t Lq, int64_t Lk);

  RelativePositionBiasOptions options;
  torch::Tensor weight;  ///< [num_buckets, H]
};
TORCH_MODULE(RelativePositionBias);

/// Options of `Encoder`. For equal layers: `EncoderOptions(std::vector(6, layer))`.
struct XATTN_API EncoderOptions {
  explicit EncoderOptions(std::vector<CrossAttentionBlockOptions> layers) : layers_(std::move(layers)) {}
  /// The layers, all over the same features: their attention has equal dim_query, dim_key and dim_value, and norm_context if
  /// its norm is placed before. They may differ otherwise.
  TORCH_ARG(std::vector<CrossAttentionBlockOptions>, layers);
  /// The norm behind the last layer. Default: none.
  TORCH_ARG(std::optional<NormOptions>, norm);
  /// Added to the logits of all layers. Default: none.
  TORCH_ARG(std::optional<RelativePositionBiasOptions>, relative_position_bias);
};

/// Layers of self-attention and feed-forward, as in BERT, ViT, and the encoders of BART, Whisper and T5:
///
///   x = layer(x, x, x) for each layer      output = norm(x)
///
/// A query may attend to all keys that the mask allows. Shapes, types, errors and thread safety are those of
/// `CrossAttentionBlock`; no attention weights are computed. For those of one layer, or a frozen one, call its block itself:
/// `encoder->layers->at<xattn::CrossAttentionBlockImpl>(2)`.
class XATTN_API EncoderImpl : public torch::nn::Cloneable<EncoderImpl> {
 public:
  /// Throws c10::ValueError, with the reason, for layers that do not fit each other.
  explicit EncoderImpl(const EncoderOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x [B, L, E] -> [B, L, E]. The mask is that of all layers; padding, for instance.
  torch::Tensor forward(const torch::Tensor& x, const Mask& mask = {});

  EncoderOptions options;                                ///< as given to the constructor; changing them has no effect
  torch::nn::ModuleList layers{nullptr};                 ///< of CrossAttentionBlock
  Norm norm{nullptr};                                    ///< over E; empty without one
  RelativePositionBias relative_position_bias{nullptr};  ///< empty without one

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(Mask())})
};
TORCH_MODULE(Encoder);

/// Options of `DecoderLayer`.
struct XATTN_API DecoderLayerOptions {
  DecoderLayerOptions(CrossAttentionBlockOptions self, CrossAttentionBlockOptions cross)
      : self_(std::move(self)), cross_(std::move(cross)) {}
  /// Self-attention, usually without a feed-forward branch.
  TORCH_ARG(CrossAttentionBlockOptions, self);
  /// Attention to the memory, and the feed-forward branch.
  TORCH_ARG(CrossAttentionBlockOptions, cross);
};

/// A layer of a `Decoder`: a block of self-attention, then a block of attention to a memory.
class XATTN_API DecoderLayerImpl : public torch::nn::Cloneable<DecoderLayerImpl> {
 public:
  explicit DecoderLayerImpl(const DecoderLayerOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x [B, L, E], memory [B, Lk, Ek] -> [B, L, E]. The masks are those of both blocks; self_mask is not made causal here.
  torch::Tensor forward(const torch::Tensor& x,
                        const torch::Tensor& memory,
                        const Mask& self_mask = {},
                        const Mask& memory_mask = {});

  DecoderLayerOptions options;  ///< as given to the constructor; changing them has no effect
  CrossAttentionBlock self{nullptr};
  CrossAttentionBlock cross{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(Mask())}, {3, torch::nn::AnyValue(Mask())})
};
TORCH_MODULE(DecoderLayer);

/// Options of `Decoder`.
struct XATTN_API DecoderOptions {
  explicit DecoderOptions(std::vector<DecoderLayerOptions> layers) : layers_(std::move(layers)) {}
  /// The layers, as those of an encoder; all attend to the same memory.
  TORCH_ARG(std::vector<DecoderLayerOptions>, layers);
  /// The norm behind the last layer. Default: none.
  TORCH_ARG(std::optional<NormOptions>, norm);
  /// Added to the logits of all self-attention. Default: none.
  TORCH_ARG(std::optional<RelativePositionBiasOptions>, relative_position_bias);
  /// Whether self-attention is causal: a query attends to no key after its own position. Default: true.
  TORCH_ARG(bool, causal) = true;
};

/// Layers of self-attention, attention to a memory, and feed-forward, as in the decoders of BART, Whisper and T5 and in the
/// text models of BLIP. Self-attention is causal unless the options say otherwise. Otherwise as `Encoder`.
///
///   auto logits = to_vocabulary(decoder->forward(embedded, encoder->forward(image)));
///
/// `forward` computes all positions. To decode one token at a time, freeze the blocks `self` and `cross` of every layer, and
/// append to the contexts of the first: src/modules/README.md, "Decoding word by word".
class XATTN_API DecoderImpl : public torch::nn::Cloneable<DecoderImpl> {
 public:
  /// Throws c10::ValueError, with the reason, for layers that do not fit each other.
  explicit DecoderImpl(const DecoderOptions& options_);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x [B, L, E], memory [B, Lk, Ek] -> [B, L, E]. self_mask restricts self-attention beyond causality, memory_mask the
  /// attention to the memory.
  torch::Tensor forward(const torch::Tensor& x,
                        const torch::Tensor& memory,
                        const Mask& self_mask = {},
                        const Mask& memory_mask = {});

  DecoderOptions options;                                ///< only `causal` may be changed later
  torch::nn::ModuleList layers{nullptr};                 ///< of DecoderLayer
  Norm norm{nullptr};                                    ///< over E; empty without one
  RelativePositionBias relative_position_bias{nullptr};  ///< empty without one

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(Mask())}, {3, torch::nn::AnyValue(Mask())})
};
TORCH_MODULE(Decoder);

}  // namespace xattn
