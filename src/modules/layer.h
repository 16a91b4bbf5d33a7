// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/cross_attention.h>
#include <xattn/plan.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attention/softmax.h"
#include "modules/norm_weights.h"
#include "modules/room.h"

// A layer of attention in any order of its products, in plain tensor operations: one short function for each entry of the table
// in plan.h, all of them differentiable, for all types and devices. Results that depend on the weights alone or on the context
// alone have their own functions, so that callers can keep them.
namespace xattn::detail {

/// x [B, L, n * size] -> [B, n, L, size].
at::Tensor split_heads(const at::Tensor& x, int64_t n, int64_t size);

/// x [B, n, L, size] -> [B, L, n * size].
at::Tensor merge_heads(const at::Tensor& x);

/// The parameters of a layer; biases are undefined where there is none.
struct LayerWeights {
  at::Tensor query, query_bias;    ///< [H * d, Eq], [H * d]
  at::Tensor key, key_bias;        ///< [G * d, Ek], [G * d]
  at::Tensor value, value_bias;    ///< [G * e, Ev], [G * e]
  at::Tensor output, output_bias;  ///< [Eo, H * e], [Eo]
  at::Tensor bias_k, bias_v;       ///< [1, 1, G * d], [1, 1, G * e]: the key and value of bias_kv; undefined without
  NormWeights query_norm, key_norm;
  int64_t H, G, d, e;
  double scale;
  bool sums_heads = false;  ///< of a decoupled layer: heads are added to those of other contexts before the output projection
};
LayerWeights weights_of(const CrossAttentionImpl& module);

/// The tensors that a query is multiplied by, and the tensors that a context is made with; some may be undefined.
/// w: LayerWeights, const or not.
template <class Weights>
auto query_tensors(Weights& w) {
  return std::vector{&w.query, &w.query_bias, &w.query_norm.weight, &w.query_norm.bias};
}
template <class Weights>
auto context_tensors(Weights& w) {
  return std::vector{&w.key, &w.key_bias, &w.value, &w.value_bias, &w.key_norm.weight, &w.key_norm.bias, &w.bias_k, &w.bias_v};
}
/// Both of these, and those of the output projection.
template <class Weights>
auto all_tensors(Weights& w) {
  auto all = query_tensors(w);
  const auto of_context = context_tensors(w);
  all.insert(all.end(), of_context.begin(), of_context.end());
  all.insert(all.end(), {&w.output, &w.output_bias});
  return all;
}

/// The product of two projections of each head, and the product of the second with the bias of the first.
struct WeightProduct {
  at::Tensor weight;  ///< logits: scale * Wk' Wq, [H, Ek, Eq]   values: Wo Wv, [H, Eo, Ev]
  at::Tensor bias;    ///< logits: scale * Wk' bq, [H, Ek]       values: Wo bv, [H, Eo]; undefined without that bias
};
WeightProduct product_for_logits(const LayerWeights& weights);
WeightProduct product_for_values(const LayerWeights& weights);

/// The products of weights that the orders of a layer use.
struct WeightProducts {
  WeightProduct logits, values;
};

/// Everything that a call needs from a layer.
struct Layer {
  /// Computes the products of weights that these orders use.
  Layer(const Orders& orders_, LayerWeights weights_);
  Layer(const Orders& orders_, LayerWeights weights_, WeightProducts products_)
      : orders(orders_), weights(std::move(weights_)), products(std::move(products_)) {}

  Orders orders;
  LayerWeights weights;
  WeightProducts products;
};

/// Keys and values as the orders of a layer read them.
struct LayerContext {
  at::Tensor keys;                  ///< standard: K, [B, G, Lk, d]; raw: Xk; folded: [B, H * Lk, Eq]
  at::Tensor key_bias;              ///< added to the logits, [B, 1, H * Lk]; undefined where there is none
  at::Tensor values;                ///< standard: V, [B, G, Lk, e]; raw: Xv; folded: [B, H * Lk, Eo]
  int64_t Lk = 0;                   ///< without the key of bias_kv
  std::shared_ptr<Room> room = {};  ///< behind the last key; null if there is none
};

/// Whether keys and values of a context are one tensor.
inline bool is_one(const LayerContext& context) {
  return context.values.is_same(context.keys);
}

/// Copies the tensors that a context would share with the caller, so that the caller's later changes do not affect it.
inline void copy_shared(LayerContext& context, const at::Tensor& key, const at::Tensor& value) {
  const bool one = is_one(context);
  if (context.keys.is_alias_of(key)) context.keys = context.keys.clone();
  if (one) {
    context.values = context.keys;
  } else if (context.values.is_alias_of(value)) {
    context.values = context.values.clone();
  }
}

/// key [B, Lk, Ek], value [B, Lk, Ev].
LayerContext make_context(const Layer& layer, const at::Tensor& key, const at::Tensor& value);

/// A query and its projection, for all layers that share the projection.
struct LayerQuery {
  at::Tensor x;          ///< [B, Lq, Eq]
  at::Tensor projected;  ///< Q, [B, H, Lq, d]; undefined if the orders of no layer read it
};
LayerQuery make_query(const LayerWeights& weights, const at::Tensor& x, bool is_projected);

/// query [B, Lq, Eq] -> output [B, Lq, Eo], with weights and log-sum-exp if requested. Only the standard order reads
/// `options.path`. A bias of the keys adds the same number to all logits of a row; the log-sum-exp of `prefold` omits it.
AttentionResult attend(const Layer& layer,
                       const at::Tensor& query,
                       const LayerContext& context,
                       const AttentionOptions& options);

/// The same without the output projection: output [B, H, Lq, e]. REQUIRES: the order of the values ends in heads, and
/// `query.projected` is defined if the order of the logits reads it.
RelativeAttention attend_heads(const Layer& layer,
                               const LayerQuery& query,
                               const LayerContext& context,
                               const AttentionOptions& options);

}  // namespace xattn::detail
