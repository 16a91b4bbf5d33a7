// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/plan.h>

#include <vector>

#include "cpu/packed.h"
#include "modules/layer.h"
#include "plan/order_traits.h"

// Attention in any order of its products, in float32 on the CPU, by this library's own kernels: what `Frozen` runs there. A call
// goes through the whole chain for a few rows at a time, so that what lies between two products stays in the cache, and allocates
// its results and one scratch tensor (and, for some raw contexts, each thread a panel of keys). A row's bits depend neither on the
// number of threads nor on what the rows beside it hold; on how many they are, where the processor multiplies many rows by a unit
// for matrices.
namespace xattn::detail {

/// A norm of projected rows, of which each head or the whole row is one vector.
struct EngineNorm {
  NormKind kind = NormKind::none;
  int64_t size = 0;  ///< of a vector
  double eps = 0;
  at::Tensor weight, bias;  ///< [size]; no bias where undefined
};

/// The weights of a layer as the engine multiplies by them. Immutable; safe to share between threads.
struct EngineWeights {
  /// Products as far as they are defined, computed without the scale. Throws unless all are float32 on the CPU.
  /// storage: float32, or bfloat16 for what is multiplied with and for contexts made of it; sums are float32 all the same.
  EngineWeights(const LayerWeights& weights, const WeightProducts& products, at::ScalarType storage);

  int64_t H, G, d, e, Eq, Ek, Ev, Eo;
  float scale;
  at::Tensor query_bias, key_bias, value_bias, output_bias;  ///< zeros where the layer has none
  at::Tensor output_bias_after_value;                        ///< bo + bv Wo: exact where a row's weights sum to one
  bool has_query_bias, has_value_bias;
  EngineNorm query_norm, key_norm;

  Packed query, key, value, output;  ///< [Eq, H * d], [Ek, G * d], [Ev, G * e], [H * e, Eo]
  Packed query_fold, key_fold;       ///< Wq and Wk of each head, [d, Eq] and [d, Ek], one below the other
  Packed value_fold;                 ///< Wv of each head, G times [Ev, e]

  Packed logits_product;           ///< Wq Wk' of all heads, [Eq, H * Ek]
  at::Tensor logits_product_bias;  ///< bq Wk', [H * Ek]
  Packed logits_product_of_heads;  ///< Wk Wq' of each head, H times [Ek, Eq]
  Packed values_product;           ///< Wv Wo of all heads, [H * Ev, Eo]
  Packed values_product_of_heads;  ///< of each head, H times [Ev, Eo]
  at::Tensor values_product_bias;  ///< bv Wo of each head, [H, Eo]
};

/// The key/value side as the engine reads it. Immutable; safe to share between threads.
struct EngineSide {
  Orders orders;
  int64_t B = 0, Lk = 0;
  std::vector<int64_t> lengths;  ///< keys of each batch entry; those behind them were never looked at
  at::Tensor keys;               ///< packed: K' of each head, [B, G, d x Lk]; Xk', [B, Ek x Lk]; folded, [B, Eq x H * Lk]
  at::Tensor key_bias;           ///< folded: added to the logits, [B, H * Lk]
  at::Tensor values;             ///< packed: V of each head, [B, G, Lk x e]; Xv, [B, Lk x Ev]; folded, [B, H * Lk x Eo]
  Raw raw = Raw::packed;
};

/// key [B, Lk, Ek], value [B, Lk, Ev]; lengths as in EngineSide; the query rows of one batch entry that it will serve in all.
EngineSide make_side(const Orders& orders,
                     const EngineWeights& weights,
                     const at::Tensor& key,
                     const at::Tensor& value,
                     std::vector<int64_t> lengths,
                     int64_t query_rows);

/// What is made of a constant query [Lq, Eq] for these orders: what its rows are multiplied with keys as, [Lq, ...].
at::Tensor fold_query(const Orders& orders, const EngineWeights& weights, const at::Tensor& query);

struct EngineCall {
  at::Tensor query;         ///< [B * n, Lq, Eq]: n queries for each of B contexts; or undefined
  at::Tensor folded_query;  ///< else, from fold_query
  Mask mask = {};           ///< without the lengths of the side
  AttentionWeights weights = AttentionWeights::none;
  std::vector<int64_t> weight_heads = {};  ///< with per_head; all if empty
};

/// -> output [B * n, Lq, Eo] and weights as asked, [B * n, (H,) Lq, Lk].
AttentionResult attend(const EngineWeights& weights, const EngineSide& side, const EngineCall& call);

/// make_side and attend in one. Where there is little to do, each thread does whole batch entries by itself.
AttentionResult forward(const Orders& orders,
                        const EngineWeights& weights,
                        const at::Tensor& key,
                        const at::Tensor& value,
                        const std::vector<int64_t>& lengths,
                        const EngineCall& call);

}  // namespace xattn::detail
