// SPDX-License-Identifier: Apache-2.0
#include "modules/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/matmul.h>

#include <optional>

#include "attention/mask_parts.h"
#include "attention/softmax.h"
#include "cpu/matrix_product.h"
#include "plan/order_traits.h"

namespace xattn::detail {

using at::Tensor;

namespace {

// [G, a, b] -> [H, a, b]: the H/G heads that share a key/value head have the same.
Tensor for_every_head(const Tensor& x, int64_t H) {
  const auto G = x.size(0);
  return H == G ? x : x.unsqueeze(1).expand({G, H / G, -1, -1}).reshape({H, x.size(1), x.size(2)});
}

// x [B, H, L, a], w [H, a, b] -> [B, H, L, b]: all rows of a head are rows of one product.
Tensor times_each_head(const Tensor& x, const Tensor& w) {
  const auto B = x.size(0), H = x.size(1), L = x.size(2);
  return matrix_product(x.transpose(0, 1).reshape({H, B * L, x.size(3)}), w).view({H, B, L, w.size(2)}).transpose(0, 1);
}

// x [B, H, Lq, a], y [B, a, b] -> [B, H, Lq, b]: all heads are rows of one product, in the order in which they lie in memory.
Tensor times_shared(const Tensor& x, const Tensor& y, Tensor (*multiply)(const Tensor&, const Tensor&) = matrix_product) {
  const auto H = x.size(1), Lq = x.size(2);
  const auto rows_first = x.transpose(1, 2);  // [B, Lq, H, a]
  if (!rows_first.is_contiguous()) return multiply(x.flatten(1, 2), y).unflatten(1, {H, Lq});
  return multiply(rows_first.flatten(1, 2), y).unflatten(1, {Lq, H}).transpose(1, 2);
}

// A parameter that the result does not depend on has the gradient zero, which an optimizer does not take for none.
Tensor with_zero_gradient(const Tensor& x, const Tensor& parameter) {
  return parameter.defined() && parameter.requires_grad() ? x + parameter.narrow(0, 0, 0).sum() : x;
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

// ---- Logits: what the query gives, what the context gives, and where they meet ---------------------------------------------

Tensor project_query(const LayerWeights& w, const Tensor& query) {
  auto norm = w.query_norm;
  return split_heads(project(query, w.query, w.query_bias), w.H, w.d, w.norm_scope, norm);  // [B, H, Lq, d]
}

Tensor project_key(const LayerWeights& w, const Tensor& key) {
  auto norm = w.key_norm;
  return split_heads(project(key, w.key, w.key_bias), w.G, w.d, w.norm_scope, norm);  // [B, G, Lk, d]
}

// [B, G, Lk, size], [1, 1, G * size] -> [B, G, Lk + 1, size].
Tensor with_one_more(const Tensor& x, const Tensor& bias) {
  if (!bias.defined()) return x;
  const auto row = bias.view({1, x.size(1), 1, x.size(3)}).expand({x.size(0), -1, -1, -1});
  return at::cat({x, row.to(x.scalar_type())}, 2);
}

// (Xq Wq) Wk'
Tensor fold_into_query(const LayerWeights& w, const Tensor& query) {
  const auto rows = times_each_head(project_query(w, query) * w.scale, for_every_head(key_heads(w), w.H));
  return with_zero_gradient(rows, w.key_bias);  // [B, H, Lq, Ek]
}

// Xq (Wq Wk')
Tensor times_product(const LayerWeights& w, const Folded& product, const Tensor& query) {
  const auto rows = project(query, product.weight.flatten(0, 1), product.bias.defined() ? product.bias.flatten() : Tensor());
  return with_zero_gradient(split_heads(rows, w.H, w.key.size(1)), w.key_bias);  // [B, H, Lq, Ek]
}

// Wq (Wk' Xk'), and bq (Wk' Xk')
std::pair<Tensor, Tensor> fold_into_context(const LayerWeights& w, const Tensor& key) {
  const auto B = key.size(0), Lk = key.size(1);
  const auto k = project_key(w, key).repeat_interleave(w.H / w.G, 1) * w.scale;  // [B, H, Lk, d]
  Tensor bias;
  if (w.query_bias.defined()) bias = at::matmul(k, w.query_bias.view({w.H, w.d, 1})).reshape({B, 1, w.H * Lk});
  return {times_each_head(k, query_heads(w)).flatten(1, 2), bias};
}

// (Wq Wk') Xk', and (bq Wk') Xk'
std::pair<Tensor, Tensor> product_times(const LayerWeights& w, const Folded& product, const Tensor& key) {
  const auto B = key.size(0), Lk = key.size(1);
  const auto flat = product.weight.transpose(1, 2).flatten(0, 1);  // [H * Eq, Ek]
  const auto Eq = w.query.size(1);
  const auto keys = split_heads(project(key, flat, {}), w.H, Eq).reshape({B, w.H * Lk, Eq});
  Tensor bias;
  if (product.bias.defined()) bias = project(key, product.bias, {}).transpose(1, 2).reshape({B, 1, w.H * Lk});
  return {with_zero_gradient(keys, w.key_bias), bias};
}

// query [B, Lq, Eq], keys [B, H * Lk, Eq] -> [B, H, Lq, Lk]
Tensor meet_folded(const LayerWeights& w, const Tensor& query, const Side& side) {
  auto logits = logits_product(query, side.keys.transpose(1, 2));  // [B, Lq, H * Lk]
  if (side.key_bias.defined()) logits = logits + side.key_bias;
  return logits.unflatten(2, {w.H, -1}).transpose(1, 2);
}

Tensor logits_of(Order order, const LayerWeights& w, const Products& products, const Tensor& query, const Side& side) {
  switch (order) {
    case Order::standard: {
      const auto B = query.size(0), Lq = query.size(1), Lk = side.keys.size(2);
      const auto rows = (project_query(w, query) * w.scale).reshape({B, w.G, w.H / w.G * Lq, w.d});
      return logits_product(rows, side.keys.transpose(-2, -1)).view({B, w.H, Lq, Lk});
    }
    case Order::fold_into_query: return times_shared(fold_into_query(w, query), side.keys.transpose(1, 2), logits_product);
    case Order::prefold:
      return times_shared(times_product(w, products.logits, query), side.keys.transpose(1, 2), logits_product);
    case Order::fold_into_context:
    case Order::prefold_into_context: break;
  }
  return meet_folded(w, query, side);
}

// ---- Values ----------------------------------------------------------------------------------------------------------------

Tensor project_value(const LayerWeights& w, const Tensor& value) {
  return split_heads(project(value, w.value, w.value_bias), w.G, w.e);  // [B, G, Lk, e]
}

// (Xv Wv) Wo
Tensor fold_values_into_context(const LayerWeights& w, const Tensor& value) {
  const auto v = project_value(w, value).repeat_interleave(w.H / w.G, 1);  // [B, H, Lk, e]
  return times_each_head(v, output_heads(w).transpose(1, 2)).flatten(1, 2);
}

// Xv (Wv Wo)
Tensor value_times_product(const LayerWeights& w, const Folded& product, const Tensor& value) {
  const auto bias = product.bias.defined() ? product.bias.flatten() : Tensor();
  return split_heads(project(value, product.weight.flatten(0, 1), bias), w.H, w.output.size(0)).flatten(1, 2);
}

// bv follows the sum of a row's weights: one, unless the row has no keys or some of its weights were dropped. Undefined is one.
Tensor row_sums(const Tensor& weights, const Tensor& empty_rows, double dropout) {
  if (dropout > 0) return weights.sum(-1, /*keepdim=*/true);
  return empty_rows.defined() ? at::logical_not(empty_rows).to(weights.scalar_type()) : Tensor();
}

bool ends_in_heads(Order values) {
  return values == Order::standard || values == Order::fold_into_query;
}

// weights [B, H, Lq, Lk], sums [B, H, Lq, 1] -> [B, H, Lq, e]
Tensor mixed_of(Order order, const LayerWeights& w, const Tensor& weights, const Tensor& sums, const Tensor& values) {
  const auto B = weights.size(0), Lq = weights.size(2), Lk = weights.size(3);
  if (order == Order::standard) {
    return matrix_product(weights.reshape({B, w.G, w.H / w.G * Lq, Lk}), values).view({B, w.H, Lq, w.e});
  }
  const auto mixed = times_each_head(times_shared(weights, values), for_every_head(value_heads(w), w.H).transpose(1, 2));
  if (!w.value_bias.defined()) return mixed;
  return mixed + (sums.defined() ? sums * value_bias_heads(w) : value_bias_heads(w));
}

// The orders that do not end in heads: weights [B, H, Lq, Lk], sums [B, H, Lq, 1] -> [B, Lq, Eo]
Tensor output_of(Order order,
                 const LayerWeights& w,
                 const Products& products,
                 const Tensor& weights,
                 const Tensor& sums,
                 const Tensor& values) {
  if (order == Order::prefold) {
    const auto flat = products.values.weight.transpose(0, 1).flatten(1);                           // [Eo, H * Ev]
    const auto output = project(merge_heads(times_shared(weights, values)), flat, w.output_bias);  // [B, Lq, Eo]
    if (!w.value_bias.defined()) return output;
    if (!sums.defined()) return output + products.values.bias.sum(0);
    return output + at::matmul(sums.squeeze(3).expand({-1, w.H, -1}).transpose(1, 2), products.values.bias);
  }
  const auto output = matrix_product(merge_heads(weights), values);  // [B, Lq, H * Lk] [B, H * Lk, Eo]
  return w.output_bias.defined() ? output + w.output_bias : output;
}

// q bk of each head and row, [B, H, Lq]: what a fold into the query leaves out of all logits of a row.
Tensor logits_of_key_bias(const LayerWeights& w, const Tensor& query) {
  const auto bias = for_every_head(w.key_bias.view({w.G, 1, w.d}), w.H);  // [H, 1, d]
  return (project_query(w, query) * bias).sum(-1) * w.scale;
}

// Orders of which one at least is not the standard one -> output [B, H, Lq, e], or [B, Lq, Eo] from those that do not end in heads.
AttentionResult attend_apart(const Orders& orders,
                             const LayerWeights& w,
                             const Products& products,
                             const Tensor& query,
                             const Side& side,
                             const AttentionOptions& options,
                             Tensor* largest = nullptr) {
  const auto type = product_type(query);
  const auto logits = logits_of(orders.logits, w, products, query, side);  // [B, H, Lq, Lk]
  const auto base = largest ? LogSumExpBase::largest_logit : LogSumExpBase::zero;
  auto [weights, log_sum_exp, largest_of_rows, empty_rows] =
      softmax_over_keys(logits, type, options.mask, options.log_sum_exp ? std::optional(base) : std::nullopt);
  if (largest) *largest = largest_of_rows;
  if (log_sum_exp.defined() && w.key_bias.defined() && orders.logits == Order::fold_into_query) {
    log_sum_exp = log_sum_exp + logits_of_key_bias(w, query);
  }
  const auto dropped = options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights;
  const auto mixing = dropped.to(type);
  const auto sums = row_sums(mixing, empty_rows, options.dropout);
  const auto output = ends_in_heads(orders.values) ? mixed_of(orders.values, w, mixing, sums, side.values)
                                                   : output_of(orders.values, w, products, mixing, sums, side.values);
  return {output, wanted_weights(weights, options, type), log_sum_exp};
}

}  // namespace

Tensor project(const torch::nn::Linear& module, const Tensor& x) {
  return project(x, module->weight, module->bias);
}

Tensor split_heads(const Tensor& x, int64_t n, int64_t size) {
  return x.view({x.size(0), x.size(1), n, size}).transpose(1, 2);
}

Tensor split_heads(const Tensor& x, int64_t n, int64_t size, NormScope scope, Norm& norm) {
  if (!norm) return split_heads(x, n, size);
  if (scope == NormScope::across_heads) return split_heads(norm(x), n, size);
  return norm(x.view({x.size(0), x.size(1), n, size})).transpose(1, 2);
}

Tensor with_zeros(const Tensor& x, int64_t n) {
  return x.defined() && n > 0 ? at::constant_pad_nd(x, {0, n}) : x;
}

Tensor merge_heads(const Tensor& x) {
  return x.transpose(1, 2).flatten(2);
}

std::vector<Tensor> context_weights(const torch::nn::Linear& key_linear,
                                    const torch::nn::Linear& value_linear,
                                    const Norm& key_norm,
                                    const Tensor& bias_k,
                                    const Tensor& bias_v) {
  std::vector<Tensor> weights = {key_linear->weight, key_linear->bias, value_linear->weight,
                                 value_linear->bias, bias_k,           bias_v};
  if (key_norm) weights.insert(weights.end(), {key_norm->weight, key_norm->bias});
  return weights;
}

LayerWeights::LayerWeights(const CrossAttentionImpl& m)
    : query(m.query_linear->weight),
      query_bias(m.query_linear->bias),
      key(m.key_linear->weight),
      key_bias(m.key_linear->bias),
      value(m.value_linear->weight),
      value_bias(m.value_linear->bias),
      output(m.output_linear->weight),
      output_bias(m.output_linear->bias),
      bias_k(m.bias_k),
      bias_v(m.bias_v),
      query_norm(m.query_norm),
      key_norm(m.key_norm),
      norm_scope(m.options.qk_norm_scope()),
      H(m.options.num_heads()),
      G(*m.options.kv_heads()),
      d(*m.options.head_dim()),
      e(*m.options.value_head_dim()),
      scale(*m.options.scale()) {}

Folded fold_logits(const LayerWeights& w) {
  const auto k = for_every_head(key_heads(w), w.H).transpose(1, 2) * w.scale;  // [H, Ek, d]
  Folded folded{matrix_product(k, query_heads(w)), {}};
  if (w.query_bias.defined()) folded.bias = matrix_product(k, w.query_bias.view({w.H, w.d, 1})).squeeze(2);
  return folded;
}

Folded fold_values(const LayerWeights& w) {
  const auto o = output_heads(w);  // [H, Eo, e]
  Folded folded{matrix_product(o, for_every_head(value_heads(w), w.H)), {}};
  if (w.value_bias.defined()) folded.bias = matrix_product(o, value_bias_heads(w).transpose(1, 2)).squeeze(2);
  return folded;
}

Products make_products(const Orders& orders, const LayerWeights& weights) {
  Products products;
  if (uses_product(orders.logits)) products.logits = fold_logits(weights);
  if (uses_product(orders.values)) products.values = fold_values(weights);
  return products;
}

Side make_side(const Orders& orders, const LayerWeights& w, const Products& products, const Tensor& key, const Tensor& value) {
  Side side{key, {}, value, key.size(1)};
  if (orders.logits == Order::standard) side.keys = with_one_more(project_key(w, key), w.bias_k);
  if (orders.logits == Order::fold_into_context) std::tie(side.keys, side.key_bias) = fold_into_context(w, key);
  if (orders.logits == Order::prefold_into_context) {
    std::tie(side.keys, side.key_bias) = product_times(w, products.logits, key);
  }
  if (orders.values == Order::standard) side.values = with_one_more(project_value(w, value), w.bias_v);
  if (orders.values == Order::fold_into_context) side.values = fold_values_into_context(w, value);
  if (orders.values == Order::prefold_into_context) side.values = value_times_product(w, products.values, value);
  return side;
}

AttentionResult attend_heads(const Orders& orders,
                             const LayerWeights& w,
                             const Products& products,
                             const Tensor& query,
                             const Side& side,
                             const AttentionOptions& options,
                             Tensor* largest) {
  if (orders == Orders{}) {
    auto how = options;
    if (w.bias_k.defined()) how.mask = with_bias_kv(options.mask, query.size(1), side.Lk, query.device());
    const auto q = project_query(w, query);
    if (!largest) return attention(q, side.keys, side.values, how);
    auto [result, largest_of_rows] = attention_by_largest(q, side.keys, side.values, how);
    *largest = largest_of_rows;
    return result;
  }
  return attend_apart(orders, w, products, query, side, options, largest);
}

AttentionResult attend(const Orders& orders,
                       const LayerWeights& w,
                       const Products& products,
                       const Tensor& query,
                       const Side& side,
                       const AttentionOptions& options) {
  if (!ends_in_heads(orders.values)) return attend_apart(orders, w, products, query, side, options);
  auto result = attend_heads(orders, w, products, query, side, options);
  result.output = project(merge_heads(result.output), w.output, w.output_bias);
  return result;
}

}  // namespace xattn::detail
