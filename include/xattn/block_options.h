// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <xattn/cross_attention_options.h>
#include <xattn/export.h>
#include <xattn/norm_options.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace xattn {

/// Where a block applies its norms. Xiong et al., On Layer Normalization in the Transformer Architecture, 2020,
/// https://arxiv.org/abs/2002.04745.
enum class NormPlacement {
  before,  ///< to the input of each branch (pre-norm); training then needs no warm-up of the learning rate
  after,   ///< to each residual sum (post-norm), as in Vaswani et al.
};

/// The factor of a branch before it is added. Alayrac et al., Flamingo, 2022, https://arxiv.org/abs/2204.14198.
enum class BlockGate {
  none,         ///< nothing
  scalar,       ///< tanh of one number, [1] (Flamingo, Mllama)
  per_feature,  ///< tanh of a number for each feature, [Eq] (Idefics)
};

/// The activation between the two linear layers of a block's feed-forward branch.
enum class Activation {
  relu,
  gelu,       ///< exact
  gelu_tanh,  ///< the tanh approximation (GPT-2)
  silu,
};

/// Options of `CrossAttentionBlock`: the attention's options in the constructor, everything else by name.
///
///   CrossAttentionBlockOptions(CrossAttentionOptions(512, 768, 768, 512).num_heads(8)).gate(BlockGate::scalar)
struct XATTN_API CrossAttentionBlockOptions {
  explicit CrossAttentionBlockOptions(CrossAttentionOptions attention) : attention_(std::move(attention)) {}

  /// The attention. Its dim_output must be its dim_query, because its output is added to the query.
  TORCH_ARG(CrossAttentionOptions, attention);
  /// Kind of both norms. Default: layer.
  TORCH_ARG(NormKind, norm) = NormKind::layer;
  /// Where the norms are applied. Default: before.
  TORCH_ARG(NormPlacement, norm_placement) = NormPlacement::before;
  /// Whether attention_norm is also applied to keys and values, which then have the query's features. For self-attention with
  /// norms before, as in ViT, GPT and Whisper. Default: false.
  TORCH_ARG(bool, norm_context) = false;
  /// Added under the square root of the norms. Default: 1e-5.
  TORCH_ARG(double, norm_eps) = 1e-5;
  /// Whether norms of kind layer have biases. Default: true.
  TORCH_ARG(bool, norm_bias) = true;
  /// Gate of each branch. Gates start at zero: with norms before (or none), a new block is the identity and can be inserted
  /// into a trained model, where its gates are the first to be trained. Default: none.
  TORCH_ARG(BlockGate, gate) = BlockGate::none;
  /// Hidden features of the feed-forward branch; 0 leaves the branch out. Default: 4 * dim_query.
  TORCH_ARG(std::optional<int64_t>, feed_forward);
  /// Its activation. Default: gelu.
  TORCH_ARG(Activation, activation) = Activation::gelu;
  /// Whether the activated features are multiplied by a second projection of the same input, as in newer T5 models, Mllama and
  /// Idefics: a gated linear unit, with half as many parameters again. Shazeer, GLU Variants Improve Transformer, 2020,
  /// https://arxiv.org/abs/2002.05202. Default: false.
  TORCH_ARG(bool, feed_forward_glu) = false;
  /// Whether its linear layers have biases. Default: true.
  TORCH_ARG(bool, feed_forward_bias) = true;
  /// Probability of dropping an element of either branch before its gate, in training. Default: 0.
  TORCH_ARG(double, dropout) = 0;
};

}  // namespace xattn
