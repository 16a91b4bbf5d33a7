// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/block_options.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>

#include <string>
#include <tuple>

namespace xattn {

class FrozenBlock;

/// Cross attention as a layer of a Transformer: attention, then a feed-forward network, each added to its input.
///
///   before:  x = query + gate * attention(norm(query), key, value)      output = x + gate * feed_forward(norm(x))
///   after:   x = norm(query + gate * attention(query, key, value))      output = norm(x + gate * feed_forward(x))
///
///   feed_forward(x) = feed_forward_out(activation(feed_forward_in(x)))   gate = tanh(parameter), 1 without one
///   with glu:         feed_forward_out(activation(feed_forward_in(x)) * feed_forward_multiplier(x))
///
/// Each branch has its own norm and gate. Keys and values are not normalised unless norm_context applies the query's norm to
/// them too, as in self-attention, `forward(x, x, x)`. With norms after the branches and relu, the block equals the second and
/// third parts of torch.nn.TransformerDecoderLayer.
///
///   xattn::CrossAttentionBlock block(xattn::CrossAttentionOptions(128, 256, 256, 128).num_heads(4));
///   auto [output, weights] = block->forward(query, key, value);
///
/// Shapes, types, errors and thread safety are those of `CrossAttention`; under autocast the output has the query's type.
class XATTN_API CrossAttentionBlockImpl : public torch::nn::Cloneable<CrossAttentionBlockImpl> {
 public:
  explicit CrossAttentionBlockImpl(const CrossAttentionOptions& attention_)
      : CrossAttentionBlockImpl(CrossAttentionBlockOptions(attention_)) {}

  /// Throws c10::ValueError, with the reason, for options that are incompatible with each other.
  explicit CrossAttentionBlockImpl(const CrossAttentionBlockOptions& options_);

  void reset() override;

  /// Initialises attention and linear layers as torch.nn.Linear does, norms to one and gates to zero.
  void reset_parameters();

  /// Prints what a user would type to build the module again.
  void pretty_print(std::ostream& stream) const override;

  /// `attend` applied to `context`.
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eq] and the requested weights: [B, Lq, Lk],
  /// [B, H, Lq, Lk], [B, n, Lq, Lk] of n weight_heads, or undefined; with bias_kv, of Lk + 1 keys.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const Mask& mask = {},
                                                   const CallOptions& call = {});

  /// Makes a context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev].
  [[nodiscard]] Context context(const torch::Tensor& key,
                                const torch::Tensor& value,
                                const Mask& mask = {},
                                const ContextOptions& options = {});

  /// Applies the block to query [B * n, Lq, Eq] and a context that it made with its current weights. Each of the B entries of
  /// the context serves n consecutive queries, such as the beams of a search. Returns the output [B * n, Lq, Eq] and the
  /// weights.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query,
                                                  const Context& context,
                                                  const CallOptions& call = {});

  /// Returns a copy for inference, as CrossAttention::freeze does: see frozen_block.h.
  [[nodiscard]] FrozenBlock freeze() const;
  [[nodiscard]] FrozenBlock freeze(const FreezeOptions& options) const;

  /// `CrossAttention::explain` for the attention that `forward` would run now.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask = {}, const CallOptions& call = {}) const;

  /// The options, with every default resolved: feed_forward has a value. Options of the attention are read from
  /// `attention->options`; a call throws if `options.attention()` has been changed.
  CrossAttentionBlockOptions options;

  Norm attention_norm{nullptr};                ///< over Eq; the identity for NormKind::none
  CrossAttention attention{nullptr};           ///< Eq, Ek, Ev -> Eq
  Norm feed_forward_norm{nullptr};             ///< the same; this and the next three are empty without a feed-forward branch
  torch::nn::Linear feed_forward_in{nullptr};  ///< Eq -> hidden
  torch::nn::Linear feed_forward_multiplier{nullptr};  ///< Eq -> hidden; empty without feed_forward_glu
  torch::nn::Linear feed_forward_out{nullptr};         ///< hidden -> Eq
  torch::Tensor attention_gate;                        ///< before tanh; undefined for BlockGate::none
  torch::Tensor feed_forward_gate;                     ///< the same; also undefined without a feed-forward branch

 private:
  friend class FrozenBlock;
  void check_options() const;
  CrossAttentionOptions attention_options_;  // as the module was made

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Mask())}, {4, torch::nn::AnyValue(CallOptions())})
};

/// Holder of a CrossAttentionBlockImpl with the semantics of a shared pointer.
TORCH_MODULE(CrossAttentionBlock);

}  // namespace xattn
