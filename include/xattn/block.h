// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>

#include <optional>
#include <tuple>
#include <utility>

namespace xattn {

/// Where the norms of a block stand. Xiong et al., On Layer Normalization in the Transformer Architecture, 2020,
/// https://arxiv.org/abs/2002.04745.
enum class NormPlacement {
  before,  ///< at the entrance of each branch (pre-norm); training then needs no warm-up of the learning rate
  after,   ///< behind each residual sum (post-norm), as Vaswani et al. have it
};

/// What a branch is multiplied by before it is added. Alayrac et al., Flamingo, 2022, https://arxiv.org/abs/2204.14198.
enum class BlockGate {
  none,         ///< nothing
  scalar,       ///< tanh of one number, [1] (Flamingo, Mllama)
  per_feature,  ///< tanh of a number for each feature, [Eq] (Idefics)
};

/// Between the two linear layers of a block's feed-forward branch.
enum class Activation {
  relu,
  gelu,       ///< exact
  gelu_tanh,  ///< its approximation by tanh (GPT-2)
  silu,
};

/// Options of `CrossAttentionBlock`: those of its attention, everything else by name.
///
///   CrossAttentionBlockOptions(CrossAttentionOptions(512, 768, 768, 512).num_heads(8)).gate(BlockGate::scalar)
struct XATTN_API CrossAttentionBlockOptions {
  explicit CrossAttentionBlockOptions(CrossAttentionOptions attention) : attention_(std::move(attention)) {}

  /// The attention. Its dim_output must be its dim_query, because its output is added to the query.
  TORCH_ARG(CrossAttentionOptions, attention);
  /// Kind of both norms. Default: layer.
  TORCH_ARG(NormKind, norm) = NormKind::layer;
  /// Where they stand. Default: before.
  TORCH_ARG(NormPlacement, norm_placement) = NormPlacement::before;
  /// Added under the root of the norms. Default: 1e-5.
  TORCH_ARG(double, norm_eps) = 1e-5;
  /// Whether norms of kind layer have biases. Default: true.
  TORCH_ARG(bool, norm_bias) = true;
  /// Gate of each branch. It starts at zero: with norms before (or none), a new block changes nothing, so that it can be put
  /// into a trained model; its gates are then the first to learn. Default: none.
  TORCH_ARG(BlockGate, gate) = BlockGate::none;
  /// Hidden features of the feed-forward branch; 0 leaves the branch out. Default: 4 * dim_query.
  TORCH_ARG(std::optional<int64_t>, feed_forward);
  /// Its activation. Default: gelu.
  TORCH_ARG(Activation, activation) = Activation::gelu;
  /// Whether the activated features are multiplied by a second projection of the same input, as in newer T5, Mllama, Idefics: a
  /// gated linear unit, with half as many parameters again. Shazeer, GLU Variants Improve Transformer, 2020,
  /// https://arxiv.org/abs/2002.05202. Default: false.
  TORCH_ARG(bool, feed_forward_glu) = false;
  /// Whether its linear layers have biases. Default: true.
  TORCH_ARG(bool, feed_forward_bias) = true;
  /// Probability of dropping an element of either branch before its gate, in training. Default: 0.
  TORCH_ARG(double, dropout) = 0;
};

/// Cross attention as a layer of a Transformer: attention, then a feed-forward network, each added to what it read.
///
///   before:  x = query + gate * attention(norm(query), key, value)      output = x + gate * feed_forward(norm(x))
///   after:   x = norm(query + gate * attention(query, key, value))      output = norm(x + gate * feed_forward(x))
///
///   feed_forward(x) = feed_forward_out(activation(feed_forward_in(x)))   gate = tanh(parameter), 1 without one
///   with glu:         feed_forward_out(activation(feed_forward_in(x)) * feed_forward_multiplier(x))
///
/// Each branch has a norm and a gate of its own. Keys and values are taken as they come: no norm is applied to them. With norms
/// after and relu it equals the second and third part of torch.nn.TransformerDecoderLayer.
///
///   xattn::CrossAttentionBlock block(xattn::CrossAttentionOptions(128, 256, 256, 128).num_heads(4));
///   auto [output, weights] = block->forward(query, key, value);
///
/// Shapes, types, errors and thread safety are those of `CrossAttention`; under autocast the output has the query's type.
class XATTN_API CrossAttentionBlockImpl : public torch::nn::Cloneable<CrossAttentionBlockImpl> {
 public:
  explicit CrossAttentionBlockImpl(const CrossAttentionOptions& attention)
      : CrossAttentionBlockImpl(CrossAttentionBlockOptions(attention)) {}

  /// Throws c10::ValueError, with the reason, for a combination of options that cannot be.
  explicit CrossAttentionBlockImpl(const CrossAttentionBlockOptions& options_);

  void reset() override;

  /// Initialises attention and linear layers as torch.nn.Linear does, norms to one and gates to zero.
  void reset_parameters();

  /// Prints what a user would type to build the module again.
  void pretty_print(std::ostream& stream) const override;

  /// `attend` applied to `context`.
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eq] and the weights that the options of the
  /// attention ask for: [B, Lq, Lk], [B, H, Lq, Lk] or undefined.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const Mask& mask = {});

  /// The key/value side, made once: key [B, Lk, Ek], value [B, Lk, Ev].
  Context context(const torch::Tensor& key, const torch::Tensor& value, const Mask& mask = {});

  /// The block for query [B, Lq, Eq] and a context that it made, with the weights that it has now.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query, const Context& context);

  /// With every default resolved: feed_forward has a value.
  CrossAttentionBlockOptions options;

  Norm attention_norm{nullptr};                        ///< over Eq; the identity for NormKind::none
  CrossAttention attention{nullptr};                   ///< Eq, Ek, Ev -> Eq
  Norm feed_forward_norm{nullptr};                     ///< likewise; empty, as the next three, without feed-forward branch
  torch::nn::Linear feed_forward_in{nullptr};          ///< Eq -> hidden
  torch::nn::Linear feed_forward_multiplier{nullptr};  ///< Eq -> hidden; empty without feed_forward_glu
  torch::nn::Linear feed_forward_out{nullptr};         ///< hidden -> Eq
  torch::Tensor attention_gate;                        ///< before tanh; undefined for BlockGate::none
  torch::Tensor feed_forward_gate;                     ///< the same; also undefined without feed-forward branch

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Mask())})
};

/// Holder of a CrossAttentionBlockImpl with the semantics of a shared pointer.
TORCH_MODULE(CrossAttentionBlock);

}  // namespace xattn
