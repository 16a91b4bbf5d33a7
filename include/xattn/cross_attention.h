// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/cross_attention_options.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/plan.h>

#include <string>
#include <tuple>
#include <vector>

namespace xattn {

class Frozen;
struct FreezeOptions;

/// Cross attention from a query to a context of keys and values.
///
///   Q, K, V = query_linear(query), key_linear(key), value_linear(value), split into heads
///   weights = softmax(scale * Q K')                 [B, H, Lq, Lk]
///   output  = output_linear(weights V)              [B, Lq, Eo]
///
/// Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762. With default options it equals the
/// PyTorch reference in src/modules/README.md: same parameter names, initial weights for a seed, outputs and gradients.
///
///   xattn::CrossAttention attention(128, 256, 256, 512);
///   auto [output, weights] = attention->forward(query, key, value);
///
/// Self-attention is `forward(x, x, x)`. Inputs are all batched, [B, L, E], or all unbatched, [L, E]; unbatched calls take
/// masks of B = 1 and return no batch axis. Lq and Lk may be 0. Types: float64, float32, bfloat16, float16; inputs have the
/// parameters' type unless autocast is on. Bad input throws c10::ValueError or c10::TypeError, naming the argument.
///
/// `forward` multiplies in the cheapest order for its sizes, options and number of threads (plan.h). The choice never depends
/// on values: the same call gives the same bits. Under autocast the order is always the standard one, because autocast chooses
/// types for it.
///
/// Thread safety: as for any torch::nn::Module. `context` and `attend` change nothing and may run in several threads at once as
/// long as the module is not being trained, loaded or moved. On CUDA no call waits for the device.
class XATTN_API CrossAttentionImpl : public torch::nn::Cloneable<CrossAttentionImpl> {
 public:
  CrossAttentionImpl(int64_t dim_query, int64_t dim_key, int64_t dim_value, int64_t dim_output)
      : CrossAttentionImpl(CrossAttentionOptions(dim_query, dim_key, dim_value, dim_output)) {}

  /// Throws c10::ValueError, with the reason, for options that are incompatible with each other.
  explicit CrossAttentionImpl(const CrossAttentionOptions& options_);

  void reset() override;

  /// Initialises the projections like torch.nn.Linear, the norms to one, bias_k and bias_v like torch.nn.MultiheadAttention.
  void reset_parameters();

  /// Prints what a user would type to build the module again.
  void pretty_print(std::ostream& stream) const override;

  /// `attend` applied to `context`, in the order that is cheapest for both together.
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eo] and the requested weights: [B, Lq, Lk],
  /// [B, H, Lq, Lk], [B, n, Lq, Lk] of n weight_heads, or undefined; with bias_kv, of Lk + 1 keys.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const Mask& mask = {},
                                                   const CallOptions& call = {});

  /// Makes a context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev]. It is projected or, for a known number of
  /// expected queries, kept in the form that is cheapest for them: as given, projected or folded.
  [[nodiscard]] Context context(const torch::Tensor& key,
                                const torch::Tensor& value,
                                const Mask& mask = {},
                                const ContextOptions& options = {});

  /// Attends with query [B * n, Lq, Eq] to a context that this module made with its current weights. Each of the B entries of
  /// the context serves n consecutive queries, such as the beams of a search. Returns the output [B * n, Lq, Eo] and the
  /// weights.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query,
                                                  const Context& context,
                                                  const CallOptions& call = {});

  /// Returns a copy for inference, like `torch.jit.freeze`: immutable, with packed weights and planned calls, safe to share
  /// between threads (frozen.h). The module does not change; to stop training it, call requires_grad_(false) on its parameters.
  [[nodiscard]] Frozen freeze() const;
  [[nodiscard]] Frozen freeze(const FreezeOptions& options) const;

  /// Describes what `forward` would do now with B x Lq queries and B x Lk keys: every order with its cost, and the choice.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask = {}, const CallOptions& call = {}) const;

  /// The options, with every default resolved: kv_heads, head_dim, value_head_dim and scale have values.
  CrossAttentionOptions options;

  torch::nn::Linear query_linear{nullptr};   ///< Eq -> H * d
  torch::nn::Linear key_linear{nullptr};     ///< Ek -> G * d
  torch::nn::Linear value_linear{nullptr};   ///< Ev -> G * e
  torch::nn::Linear output_linear{nullptr};  ///< H * e -> Eo
  Norm query_norm{nullptr};                  ///< empty without qk_norm
  Norm key_norm{nullptr};                    ///< empty without qk_norm
  torch::Tensor bias_k;                      ///< [1, 1, G * d]; undefined without bias_kv
  torch::Tensor bias_v;                      ///< [1, 1, G * e]; undefined without bias_kv

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Mask())}, {4, torch::nn::AnyValue(CallOptions())})
};

/// Holder of a CrossAttentionImpl with the semantics of a shared pointer; `CrossAttention attention = nullptr` is empty.
TORCH_MODULE(CrossAttention);

}  // namespace xattn
