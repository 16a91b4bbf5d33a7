// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <xattn/attention.h>
#include <xattn/export.h>
#include <xattn/norm_options.h>
#include <xattn/plan.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace xattn {

/// The features that one query/key norm spans.
enum class NormScope {
  per_head,      ///< the d features of each head; all heads share one weight [d]
  across_heads,  ///< all heads together, before they are split: weight [H * d] for queries, [G * d] for keys
};

/// Options of `CrossAttention`: the four sizes of the reference in the constructor, everything else by name.
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
  /// Features of the output, Eo, and of all heads together unless head_dim is given.
  TORCH_ARG(int64_t, dim_output);

  /// Heads, H. Default: 1, as in the reference.
  TORCH_ARG(int64_t, num_heads) = 1;
  /// Key/value heads, G; each serves num_heads / kv_heads query heads (grouped-query attention). Default: num_heads.
  TORCH_ARG(std::optional<int64_t>, kv_heads);
  /// Features of one query/key head, d. Default: dim_output / num_heads.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  /// Features of one value head, e. Default: head_dim. Other sizes have a fused kernel on the CPU only in float32.
  TORCH_ARG(std::optional<int64_t>, value_head_dim);

  /// Whether the four projections have a bias. Default: true.
  TORCH_ARG(bool, query_bias) = true;
  TORCH_ARG(bool, key_bias) = true;
  TORCH_ARG(bool, value_bias) = true;
  TORCH_ARG(bool, output_bias) = true;

  /// Whether to append a learned key and value to each context, without projection. No mask hides them, and returned weights
  /// have a column for them, Lk + 1 in all (bias_k and bias_v of torch.nn.MultiheadAttention). Default: false.
  TORCH_ARG(bool, bias_kv) = false;

  /// Multiplies the logits; 1 for none (T5). Default: 1 / sqrt(head_dim).
  TORCH_ARG(std::optional<double>, scale);
  /// Probability of dropping an attention weight in training. Returned weights are taken before dropout. Default: 0.
  TORCH_ARG(double, dropout) = 0;

  /// Normalises projected queries and keys. Default: none.
  TORCH_ARG(NormKind, qk_norm) = NormKind::none;
  /// The features that one query/key norm spans. Default: per_head.
  TORCH_ARG(NormScope, qk_norm_scope) = NormScope::per_head;
  /// Added under the square root of the query/key norms. Default: 1e-6.
  TORCH_ARG(double, qk_norm_eps) = 1e-6;

  /// Which weights `forward` and `attend` return unless a call overrides it (CallOptions). `none` is the fastest. Default:
  /// mean, which gives the reference's weights with one head.
  TORCH_ARG(AttentionWeights, attention_weights) = AttentionWeights::mean;

  /// Heads whose weights `per_head` returns, in this order: [B, n, Lq, Lk]. Default: empty, which means all.
  TORCH_ARG(std::vector<int64_t>, weight_heads);

  /// The order in which `forward` multiplies: `PlanMode::standard` is that of the reference, `PlanMode::pin` fixes any other,
  /// `PlanMode::by` chooses the cheapest by measured rates. Results and gradients differ only by rounding. Default: automatic,
  /// the cheapest for the sizes of each call by built-in rates.
  TORCH_ARG(PlanMode, plan) = PlanMode::automatic;

 public:
  bool operator==(const CrossAttentionOptions&) const = default;
};

}  // namespace xattn
