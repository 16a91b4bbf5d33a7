// SPDX-License-Identifier: Apache-2.0
#include "modules/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/matmul.h>

#include <optional>
#include <tuple>
#include <utility>

#include "attention/mask_parts.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_product.h"
#include "cpu/on_kernels.h"
#include "plan/order_traits.h"

namespace xattn::detail {

using at::Tensor;

namespace {

// [..., G, a, b] -> [..., H, a, b], repeated for the H/G heads that share a key/value head.
Tensor for_every_head(const Tensor& x, int64_t H) {
  return x.size(-3) == H ? x : x.repeat_interleave(H / x.size(-3), -3);
}

// x [B, H, L, a], w [H, a, b] -> [B, H, L, b]: all rows of a head are rows of one product.
Tensor times_each_head(const Tensor& x, const Tensor& w) {
  const auto B = x.size(0), H = x.size(1), L = x.size(2);
  return matrix_product(x.transpose(0, 1).reshape({H, B * L, x.size(3)}), w).view({H, B, L, w.size(2)}).transpose(0, 1);
}

// The same as [B, H * L, b].
Tensor times_each_head_in_rows(const Tensor& x, const Tensor& w) {
  const auto B = x.size(0);
  if (B == 1 || at::GradMode::is_enabled() || !run_on_kernels({x, w})) return times_each_head(x, w).flatten(1, 2);
  return matrix_product(x, w.unsqueeze(0).expand({B, -1, -1, -1})).flatten(1, 2);  // saves a copy
}

// x [B, H, Lq, a], y [B, a, b] -> [B, H, Lq, b]: all heads are rows of one product, in the order in which they lie in memory.
Tensor times_shared(const Tensor& x, const Tensor& y, Tensor (*multiply)(const Tensor&, const Tensor&) = matrix_product) {
  const auto H = x.size(1), Lq = x.size(2);
  const auto rows_first = x.transpose(1, 2);  // [B, Lq, H, a]
  if (!rows_first.is_contiguous()) return multiply(x.flatten(1, 2), y).unflatten(1, {H, Lq});
  return multiply(rows_first.flatten(1, 2), y).unflatten(1, {Lq, H}).transpose(1, 2);
}

// Returns x with the parameter in its graph: a parameter that x does not depend on then receives a gradient of zeros, not none.
// Optimizers treat the two differently.
Tensor with_zero_gradient(const Tensor& x, const Tensor& parameter) {
  if (!at::GradMode::is_enabled() || !parameter.defined() || !parameter.requires_grad()) return x;
  return x + parameter.narrow(0, 0, 0).sum();  // an empty sum
}

// The parameters of each head, [H, d, Eq], [G, d, Ek], [G, e, Ev], and of the output by heads, [H, Eo, e].
Tensor query_heads(const LayerWeights& w) {
  return w.query.view({w.H, w.d, -1});
}
Tensor key_heads(const LayerWeights& w) {
  return w.key.view({w.G, w.d, -1});
}
Tensor value_heads(const LayerWeights& w) {
  return w.value.view({w.G, w.e, -1});
}
Tensor output_heads(const LayerWeights& w) {
  return w.output.view({-1, w.H, w.e}).transpose(0, 1);
}
Tensor value_bias_heads(const LayerWeights& w) {
  return for_every_head(w.value_bias.view({w.G, 1, w.e}), w.H);  // [H, 1, e]
}

// ---- Logits ----------------------------------------------------------------------------------------------------------------

// x [B, L, n * size] -> [B, n, L, size], and normalised.
Tensor normalised_heads(const Tensor& x, int64_t n, int64_t size, const NormWeights& norm) {
  if (norm.size == n * size) return split_heads(normalised(x, norm), n, size);  // across heads
  return normalised(x.view({x.size(0), x.size(1), n, size}), norm).transpose(1, 2);
}

Tensor project_key(const LayerWeights& w, const Tensor& key) {
  return normalised_heads(project(key, w.key, w.key_bias), w.G, w.d, w.key_norm);  // [B, G, Lk, d]
}

// x [B, G, Lk, size], bias [1, 1, G * size] -> [B, G, Lk + 1, size]; x without a bias.
Tensor with_last_row(const Tensor& x, const Tensor& bias) {
  if (!bias.defined()) return x;
  const auto row = bias.view({1, x.size(1), 1, x.size(3)}).expand({x.size(0), -1, -1, -1});
  return at::cat({x, row.to(x.scalar_type())}, 2);
}

// (Xq Wq) Wk'
Tensor fold_into_query(const LayerWeights& w, const LayerQuery& query) {
  const auto rows = times_each_head(scaled(query.projected, w.scale), for_every_head(key_heads(w), w.H));
  return with_zero_gradient(rows, w.key_bias);  // [B, H, Lq, Ek]
}

// Xq (Wq Wk')
Tensor times_product(const LayerWeights& w, const WeightProduct& product, const Tensor& query) {
  const auto rows = project(query, product.weight.flatten(0, 1), product.bias.defined() ? product.bias.flatten() : Tensor());
  return with_zero_gradient(split_heads(rows, w.H, w.key.size(1)), w.key_bias);  // [B, H, Lq, Ek]
}

// Wq (Wk' Xk'), and bq (Wk' Xk')
std::pair<Tensor, Tensor> fold_into_context(const LayerWeights& w, const Tensor& key) {
  const auto B = key.size(0), Lk = key.size(1);
  const auto k = scaled(for_every_head(project_key(w, key), w.H), w.scale);  // [B, H, Lk, d]
  Tensor bias;
  if (w.query_bias.defined()) bias = times_each_head_in_rows(k, w.query_bias.view({w.H, w.d, 1})).view({B, 1, w.H * Lk});
  return {times_each_head_in_rows(k, query_heads(w)), bias};
}

// -> logits [B, H, Lq, Lk]
Tensor logits_of(const Layer& layer, const LayerQuery& query, const LayerContext& context) {
  const auto& w = layer.weights;
  switch (layer.orders.logits) {
    case Order::standard: {
      const auto B = query.x.size(0), Lq = query.x.size(1), Lk = context.keys.size(2);
      const auto rows = scaled(query.projected, w.scale).reshape({B, w.G, w.H / w.G * Lq, w.d});
      return logits_product(rows, context.keys.transpose(-2, -1)).view({B, w.H, Lq, Lk});
    }
    case Order::fold_into_query: return times_shared(fold_into_query(w, query), context.keys.transpose(1, 2), logits_product);
    case Order::prefold:
      return times_shared(times_product(w, layer.products.logits, query.x), context.keys.transpose(1, 2), logits_product);
    case Order::fold_into_context: break;
  }
  // [B, Lq, Eq] [B, Eq, H * Lk]
  const auto logits = logits_product(query.x, context.keys.transpose(1, 2), context.key_bias);
  return logits.unflatten(2, {w.H, -1}).transpose(1, 2);
}

// ---- Values ----------------------------------------------------------------------------------------------------------------

Tensor project_value(const LayerWeights& w, const Tensor& value) {
  return split_heads(project(value, w.value, w.value_bias), w.G, w.e);  // [B, G, Lk, e]
}

// (Xv Wv) Wo
Tensor fold_values_into_context(const LayerWeights& w, const Tensor& value) {
  const auto v = for_every_head(project_value(w, value), w.H);  // [B, H, Lk, e]
  return times_each_head_in_rows(v, output_heads(w).transpose(1, 2));
}

// The factor of bv in each row: the sum of the row's weights. It is one (undefined here), unless the row has no keys or some of
// its weights were dropped.
Tensor row_sums(const Tensor& weights, const Tensor& empty_rows, double dropout) {
  if (dropout > 0) return weights.sum(-1, /*keepdim=*/true);
  return empty_rows.defined() ? at::logical_not(empty_rows).to(weights.scalar_type()) : Tensor();
}

// Orders that end in heads: weights [B, H, Lq, Lk], sums [B, H, Lq, 1] -> weighted values [B, H, Lq, e]
Tensor weighted_values(const Layer& layer, const Tensor& weights, const Tensor& sums, const Tensor& values) {
  const auto& w = layer.weights;
  const auto B = weights.size(0), Lq = weights.size(2), Lk = weights.size(3);
  if (layer.orders.values == Order::standard) {
    return matrix_product(weights.reshape({B, w.G, w.H / w.G * Lq, Lk}), values).view({B, w.H, Lq, w.e});
  }
  const auto heads = times_each_head(times_shared(weights, values), for_every_head(value_heads(w), w.H).transpose(1, 2));
  if (!w.value_bias.defined()) return heads;
  return heads + (sums.defined() ? sums * value_bias_heads(w) : value_bias_heads(w));
}

// Other orders: weights [B, H, Lq, Lk], sums [B, H, Lq, 1] -> output [B, Lq, Eo]
Tensor output_of(const Layer& layer, const Tensor& weights, const Tensor& sums, const Tensor& values) {
  const auto& w = layer.weights;
  if (layer.orders.values == Order::prefold) {
    const auto& product = layer.products.values;
    const auto flat = product.weight.transpose(0, 1).flatten(1);                                   // [Eo, H * Ev]
    const auto output = project(merge_heads(times_shared(weights, values)), flat, w.output_bias);  // [B, Lq, Eo]
    if (!w.value_bias.defined()) return output;
    if (!sums.defined()) return output + product.bias.sum(0);
    return output + at::matmul(sums.squeeze(3).expand({-1, w.H, -1}).transpose(1, 2), product.bias);
  }
  return matrix_product(merge_heads(weights), values, w.output_bias);  // [B, Lq, H * Lk] [B, H * Lk, Eo]
}

// q bk of each head and row, [B, H, Lq]: the term that a fold into the query omits from all logits of a row.
Tensor logits_of_key_bias(const LayerWeights& w, const LayerQuery& query) {
  const auto bias = for_every_head(w.key_bias.view({w.G, 1, w.d}), w.H);  // [H, 1, d]
  return (query.projected * bias).sum(-1) * w.scale;
}

// Orders other than the standard one for both chains -> output [B, H, Lq, e] if they end in heads, else [B, Lq, Eo].
RelativeAttention attend_in_steps(const Layer& layer,
                                  const LayerQuery& query,
                                  const LayerContext& context,
                                  const AttentionOptions& options) {
  const auto& w = layer.weights;
  const auto type = product_type(query.x);
  const auto logits = logits_of(layer, query, context);  // [B, H, Lq, Lk]
  auto softmax = softmax_over_keys(logits, type, options.mask, options.log_sum_exp, softmax_of_rows);
  if (options.log_sum_exp && w.key_bias.defined() && layer.orders.logits == Order::fold_into_query) {
    softmax.log_sum_exp = softmax.log_sum_exp + logits_of_key_bias(w, query);
  }
  const auto& weights = softmax.weights;
  const auto dropped = (options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights).to(type);
  const auto sums = row_sums(dropped, softmax.empty_rows, options.dropout);
  const auto output = ends_in_heads(layer.orders.values) ? weighted_values(layer, dropped, sums, context.values)
                                                         : output_of(layer, dropped, sums, context.values);
  return {{output, requested_weights(weights, options, type), softmax.log_sum_exp}, softmax.largest};
}

}  // namespace

Tensor split_heads(const Tensor& x, int64_t n, int64_t size) {
  return x.view({x.size(0), x.size(1), n, size}).transpose(1, 2);
}

Tensor merge_heads(const Tensor& x) {
  return contiguous(x.transpose(1, 2)).flatten(2);
}

LayerWeights weights_of(const CrossAttentionImpl& m) {
  return {.query = m.query_linear->weight,
          .query_bias = m.query_linear->bias,
          .key = m.key_linear->weight,
          .key_bias = m.key_linear->bias,
          .value = m.value_linear->weight,
          .value_bias = m.value_linear->bias,
          .output = m.output_linear->weight,
          .output_bias = m.output_linear->bias,
          .bias_k = m.bias_k,
          .bias_v = m.bias_v,
          .query_norm = norm_weights(m.query_norm),
          .key_norm = norm_weights(m.key_norm),
          .H = m.options.num_heads(),
          .G = *m.options.kv_heads(),
          .d = *m.options.head_dim(),
          .e = *m.options.value_head_dim(),
          .scale = *m.options.scale()};
}

WeightProduct product_for_logits(const LayerWeights& w) {
  const auto k = for_every_head(key_heads(w), w.H).transpose(1, 2) * w.scale;  // [H, Ek, d]
  WeightProduct product{matrix_product(k, query_heads(w)), {}};
  if (w.query_bias.defined()) product.bias = matrix_product(k, w.query_bias.view({w.H, w.d, 1})).squeeze(2);
  return product;
}

WeightProduct product_for_values(const LayerWeights& w) {
  const auto o = output_heads(w);  // [H, Eo, e]
  WeightProduct product{matrix_product(o, for_every_head(value_heads(w), w.H)), {}};
  if (w.value_bias.defined()) product.bias = matrix_product(o, value_bias_heads(w).transpose(1, 2)).squeeze(2);
  return product;
}

Layer::Layer(const Orders& orders_, LayerWeights weights_) : orders(orders_), weights(std::move(weights_)) {
  if (uses_product(orders.logits)) products.logits = product_for_logits(weights);
  if (uses_product(orders.values)) products.values = product_for_values(weights);
}

LayerQuery make_query(const LayerWeights& w, const Tensor& x, bool is_projected) {
  if (!is_projected) return {x, {}};
  // A learned query, expanded over the batch, is projected once.
  const bool is_one = x.size(0) > 1 && x.stride(0) == 0 && !is_recorded({x});
  const auto projected = project(is_one ? x.narrow(0, 0, 1) : x, w.query, w.query_bias);
  const auto heads = normalised_heads(projected, w.H, w.d, w.query_norm);
  return {x, is_one ? heads.expand({x.size(0), -1, -1, -1}) : heads};
}

LayerContext make_context(const Layer& layer, const Tensor& key, const Tensor& value) {
  const auto& w = layer.weights;
  LayerContext context{key, {}, value, key.size(1)};
  if (layer.orders.logits == Order::standard) context.keys = with_last_row(project_key(w, key), w.bias_k);
  if (layer.orders.logits == Order::fold_into_context) std::tie(context.keys, context.key_bias) = fold_into_context(w, key);
  if (layer.orders.values == Order::standard) context.values = with_last_row(project_value(w, value), w.bias_v);
  if (layer.orders.values == Order::fold_into_context) context.values = fold_values_into_context(w, value);
  return context;
}

RelativeAttention attend_heads(const Layer& layer,
                               const LayerQuery& query,
                               const LayerContext& context,
                               const AttentionOptions& options) {
  if (layer.orders != Orders{}) return attend_in_steps(layer, query, context, options);
  auto how = options;
  how.scale = layer.weights.scale;
  const auto& q = query.projected;
  if (layer.weights.bias_k.defined()) how.mask = with_bias_kv(options.mask, q.size(2), context.Lk, q.device());
  // LibTorch's kernels return only the log-sum-exp itself, which is inexact beside a large bias.
  const bool is_inexact = how.log_sum_exp && has_bias(how.mask) && !run_on_kernels({q, context.keys, context.values});
  if (is_inexact) how.path = AttentionPath::definition;
  return attend_unchecked(q, context.keys, context.values, how);
}

AttentionResult attend(const Layer& layer, const Tensor& x, const LayerContext& context, const AttentionOptions& options) {
  const auto query = [&] { return make_query(layer.weights, x, projects_query(layer.orders.logits)); };
  if (!ends_in_heads(layer.orders.values)) return absolute(attend_in_steps(layer, query(), context, options));
  // The projected query is freed before the next product.
  auto result = absolute(attend_heads(layer, query(), context, options));
  result.output = project(merge_heads(result.output), layer.weights.output, layer.weights.output_bias);
  return result;
}

}  // namespace xattn::detail
