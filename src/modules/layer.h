// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/linear.h>
#include <xattn/attention.h>
#include <xattn/cross_attention.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/plan.h>

#include <vector>

// Attention in any order of its products, in plain tensor operations: one line of the table in plan.h for each order, all
// differentiable, for all types and devices. What can be made of the context alone is made apart from the rest, and what can be
// made of the weights alone is made apart from both.
namespace xattn::detail {

/// As the module does it: [..., in] -> [..., out].
at::Tensor project(const torch::nn::Linear& module, const at::Tensor& x);

/// [B, L, n * size] -> [B, n, L, size], normalised on the way if there is a norm.
at::Tensor split_heads(const at::Tensor& x, int64_t n, int64_t size, NormScope scope, Norm& norm);
at::Tensor split_heads(const at::Tensor& x, int64_t n, int64_t size);

/// With n more columns of zeros; an undefined tensor stays so.
at::Tensor with_zeros(const at::Tensor& x, int64_t n);

/// [B, n, L, size] -> [B, L, n * size].
at::Tensor merge_heads(const at::Tensor& x);

/// The parameters that make a context; undefined where there is none.
std::vector<at::Tensor> context_weights(const torch::nn::Linear& key_linear,
                                        const torch::nn::Linear& value_linear,
                                        const Norm& key_norm,
                                        const at::Tensor& bias_k = {},
                                        const at::Tensor& bias_v = {});

/// The parameters of a layer; biases are undefined where there is none.
struct LayerWeights {
  explicit LayerWeights(const CrossAttentionImpl& module);

  at::Tensor query, query_bias;    ///< [H * d, Eq], [H * d]
  at::Tensor key, key_bias;        ///< [G * d, Ek], [G * d]
  at::Tensor value, value_bias;    ///< [G * e, Ev], [G * e]
  at::Tensor output, output_bias;  ///< [Eo, H * e], [Eo]
  at::Tensor bias_k, bias_v;  ///< [1, 1, G * d], [1, 1, G * e]: a key and a value behind the last; undefined if there is none
  Norm query_norm, key_norm;  ///< empty if there is none
  NormScope norm_scope;
  int64_t H, G, d, e;
  double scale;
};

/// A product of two projections of each head, with what becomes of the first one's bias.
struct Folded {
  at::Tensor weight;  ///< logits: scale * Wk' Wq, [H, Ek, Eq]   values: Wo Wv, [H, Eo, Ev]
  at::Tensor bias;    ///< logits: scale * Wk' bq, [H, Ek]       values: Wo bv, [H, Eo]; undefined without that bias
};
Folded fold_logits(const LayerWeights& weights);
Folded fold_values(const LayerWeights& weights);

/// The products of weights that these orders use; made now, or ahead.
struct Products {
  Folded logits, values;
};
Products make_products(const Orders& orders, const LayerWeights& weights);

/// The key/value side as these orders read it.
struct Side {
  at::Tensor keys;      ///< standard: K, [B, G, Lk, d]; folded into the query: Xk; into the context: [B, H * Lk, Eq]
  at::Tensor key_bias;  ///< added to the logits, [B, 1, H * Lk]; undefined where there is none
  at::Tensor values;    ///< standard: V, [B, G, Lk, e]; folded into the query: Xv; into the context: [B, H * Lk, Eo]
  int64_t Lk;           ///< without a key of bias_k
};
/// key [B, Lk, Ek], value [B, Lk, Ev].
Side make_side(const Orders& orders,
               const LayerWeights& weights,
               const Products& products,
               const at::Tensor& key,
               const at::Tensor& value);

/// The same up to the output projection, for values in the standard order or folded into the query: output [B, H, Lq, e]. The
/// log-sum-exp is that of the definition, with the bias of the keys, but for `prefold` of the logits; with `largest`, which is not
/// null then, relative to what that becomes: see `attention_by_largest`.
AttentionResult attend_heads(const Orders& orders,
                             const LayerWeights& weights,
                             const Products& products,
                             const at::Tensor& query,
                             const Side& side,
                             const AttentionOptions& options,
                             at::Tensor* largest = nullptr);

/// How a call attends; `path` is not looked at where the order is not the standard one.
/// query [B, Lq, Eq] -> output [B, Lq, Eo], weights and log-sum-exp as asked. A bias of the keys adds the same number to all
/// logits of a row: products made ahead leave it out of the log-sum-exp.
AttentionResult attend(const Orders& orders,
                       const LayerWeights& weights,
                       const Products& products,
                       const at::Tensor& query,
                       const Side& side,
                       const AttentionOptions& options);

}  // namespace xattn::detail
