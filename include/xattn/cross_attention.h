// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/attention.h>
#include <xattn/context.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/plan.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace xattn {

/// What one query/key norm spans.
enum class NormScope {
  per_head,      ///< each head of d features by itself, all heads with the same weight [d]
  across_heads,  ///< all heads together, before they are split: weight [H * d] for queries, [G * d] for keys
};

/// Options of `CrossAttention`: the four sizes of the reference, everything else by name.
///
///   CrossAttentionOptions(320, 768, 768, 320).num_heads(8).qkv_bias(false)
struct XATTN_API CrossAttentionOptions {
  CrossAttentionOptions(int64_t dim_query, int64_t dim_key, int64_t dim_value, int64_t dim_output)
      : dim_query_(dim_query), dim_key_(dim_key), dim_value_(dim_value), dim_output_(dim_output) {}

  /// Sets query_bias, key_bias and value_bias at once.
  CrossAttentionOptions& qkv_bias(bool on) { return query_bias(on).key_bias(on).value_bias(on); }

  /// Features of the query, Eq.
  TORCH_ARG(int64_t, dim_query);
  /// Features of the key, Ek.
  TORCH_ARG(int64_t, dim_key);
  /// Features of the value, Ev.
  TORCH_ARG(int64_t, dim_value);
  /// Features of the output, Eo; and of all heads together, unless head_dim says otherwise.
  TORCH_ARG(int64_t, dim_output);

  /// Heads, H. Default: 1, the reference.
  TORCH_ARG(int64_t, num_heads) = 1;
  /// Key/value heads, G; each serves num_heads / kv_heads query heads (grouped-query attention). Default: num_heads.
  TORCH_ARG(std::optional<int64_t>, kv_heads);
  /// Features of one query/key head, d. Default: dim_output / num_heads.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  /// Features of one value head, e. Default: head_dim. A size of its own gives up the fused kernel in training on the CPU.
  TORCH_ARG(std::optional<int64_t>, value_head_dim);

  /// Whether the four projections have a bias. Default: true.
  TORCH_ARG(bool, query_bias) = true;
  TORCH_ARG(bool, key_bias) = true;
  TORCH_ARG(bool, value_bias) = true;
  TORCH_ARG(bool, output_bias) = true;

  /// One more key and value that are learned, behind the projections and the last key of each context; no mask hides them, and
  /// returned weights have a column for them, Lk + 1 in all (bias_k and bias_v of torch.nn.MultiheadAttention). Default: false.
  TORCH_ARG(bool, bias_kv) = false;

  /// Multiplies the logits; 1 for none (T5). Default: 1 / sqrt(head_dim).
  TORCH_ARG(std::optional<double>, scale);
  /// Probability of dropping an attention weight in training. Returned weights are those before dropout. Default: 0.
  TORCH_ARG(double, dropout) = 0;

  /// Normalises projected queries and keys. Default: none.
  TORCH_ARG(NormKind, qk_norm) = NormKind::none;
  /// What one query/key norm spans. Default: per_head.
  TORCH_ARG(NormScope, qk_norm_scope) = NormScope::per_head;
  /// Added under the root of the query/key norms. Default: 1e-6.
  TORCH_ARG(double, qk_norm_eps) = 1e-6;

  /// Which weights `forward` and `attend` return. `none` is the fastest. Default: mean, the reference's own with one head.
  TORCH_ARG(AttentionWeights, attention_weights) = AttentionWeights::mean;

  /// Of which heads `per_head` returns the weights, in this order: [B, n, Lq, Lk]. Default: empty, which is all.
  TORCH_ARG(std::vector<int64_t>, weight_heads);

  /// In which order `forward` multiplies. `PlanMode::standard` is the reference's; `PlanMode::pin` any other; `PlanMode::by` the
  /// cheapest by rates that were measured. Results differ by rounding alone, and gradients do. Default: automatic, the cheapest
  /// for the sizes of each call by built-in rates.
  TORCH_ARG(PlanMode, plan) = PlanMode::automatic;
};

class Frozen;
struct FreezeOptions;
namespace detail {
struct LayerWeights;
struct Products;
struct Side;
}  // namespace detail

/// Cross attention: a query asks, a context of keys and values answers.
///
///   Q, K, V = query_linear(query), key_linear(key), value_linear(value), split into heads
///   weights = softmax(scale * Q K')                 [B, H, Lq, Lk]
///   output  = output_linear(weights V)              [B, Lq, Eo]
///
/// Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762. With default options it equals the PyTorch
/// reference of README.md: same parameter names, same initialisation from the same seed, same outputs and gradients.
///
///   xattn::CrossAttention attention(128, 256, 256, 512);
///   auto [output, weights] = attention->forward(query, key, value);
///
/// Self-attention is `forward(x, x, x)`. Inputs are batched, [B, L, E], or all unbatched, [L, E], with masks as for B = 1 and
/// results without the batch axis. Lq and Lk may be 0. Types: float64, float32, bfloat16, float16; inputs have the parameters'
/// type, unless autocast is on. Bad input throws c10::ValueError or c10::TypeError, naming the argument.
///
/// `forward` multiplies in the cheapest order that its sizes, options and number of threads allow (plan.h), which never depends on
/// values: the same call gives the same bits. Under autocast the order is the standard one, whose types autocast is made for.
///
/// Thread safety: as for any torch::nn::Module. `context` and `attend` change nothing and may run in several threads at once as
/// long as nobody trains, loads or moves the module. On CUDA no call waits for the device.
class XATTN_API CrossAttentionImpl : public torch::nn::Cloneable<CrossAttentionImpl> {
 public:
  CrossAttentionImpl(int64_t dim_query, int64_t dim_key, int64_t dim_value, int64_t dim_output)
      : CrossAttentionImpl(CrossAttentionOptions(dim_query, dim_key, dim_value, dim_output)) {}

  /// Throws c10::ValueError, with the reason, for a combination of options that cannot be.
  explicit CrossAttentionImpl(const CrossAttentionOptions& options_);

  void reset() override;

  /// Initialises the projections as torch.nn.Linear does, the norms to one, bias_k and bias_v as torch.nn.MultiheadAttention.
  void reset_parameters();

  /// Prints what a user would type to build the module again.
  void pretty_print(std::ostream& stream) const override;

  /// `attend` applied to `context`, in the order that is cheapest for both together.
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eo] and the weights that the options ask for:
  /// [B, Lq, Lk], [B, H, Lq, Lk] or undefined.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const Mask& mask = {});

  /// The key/value side, made once: key [B, Lk, Ek], value [B, Lk, Ev].
  Context context(const torch::Tensor& key, const torch::Tensor& value, const Mask& mask = {});

  /// Attends with query [B, Lq, Eq] to a context that this module made, with the weights that it has now.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query, const Context& context);

  /// For inference: a copy that is immutable, laid out and planned, and free to be shared by threads. See frozen.h.
  Frozen freeze() const;
  Frozen freeze(const FreezeOptions& options) const;

  /// What `forward` would do with B x Lq queries and B x Lk keys, now: every order with its cost, and the choice. As text.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask = {});

  /// With every default resolved: kv_heads, head_dim, value_head_dim and scale have values.
  CrossAttentionOptions options;

  torch::nn::Linear query_linear{nullptr};   ///< Eq -> H * d
  torch::nn::Linear key_linear{nullptr};     ///< Ek -> G * d
  torch::nn::Linear value_linear{nullptr};   ///< Ev -> G * e
  torch::nn::Linear output_linear{nullptr};  ///< H * e -> Eo
  Norm query_norm{nullptr};                  ///< empty without qk_norm
  Norm key_norm{nullptr};                    ///< empty without qk_norm
  torch::Tensor bias_k;                      ///< [1, 1, G * d]; undefined without bias_kv
  torch::Tensor bias_v;                      ///< [1, 1, G * e]; likewise

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Mask())})

 private:
  friend class ContextParallel;
  std::vector<torch::Tensor> context_weights() const;
  PlanRequest request(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, bool inputs_train) const;
  Orders orders_for(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value, const Mask& mask) const;
  std::tuple<torch::Tensor, torch::Tensor> attend(const Orders& orders,
                                                  const detail::LayerWeights& weights,
                                                  const detail::Products& products,
                                                  const torch::Tensor& query,
                                                  const detail::Side& side,
                                                  const Mask& mask,
                                                  bool is_batched) const;
};

/// Holder of a CrossAttentionImpl with the semantics of a shared pointer; `CrossAttention attention = nullptr` is the empty one.
TORCH_MODULE(CrossAttention);

}  // namespace xattn
