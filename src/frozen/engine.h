// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/packed.h"
#include "frozen/packed_layers.h"
#include "modules/layer.h"
#include "modules/room.h"
#include "plan/order_traits.h"

// Attention in any order of its products, in float32 on the CPU, by this library's own kernels, as used by `Frozen`. A call
// computes a few rows at a time from query to output, so that intermediate results stay in the cache. It allocates its results
// and one scratch tensor (and, for some raw contexts, a panel of keys per thread). The bits of a row depend neither on the
// number of threads nor on the contents of other rows. They depend on the number of rows if the processor has a matrix unit.
namespace xattn::detail {

/// A right side that is packed at its first use. Safe to share between threads.
class PackedOnUse {
 public:
  template <class Pack>
  const Packed& get(const Pack& pack) const {
    std::call_once(once_, [&] {
      packed_ = pack();
      bytes_ = bytes_of(packed_.data);
    });
    return packed_;
  }
  int64_t bytes() const { return bytes_; }

 private:
  mutable std::once_flag once_;
  mutable Packed packed_;
  mutable std::atomic<int64_t> bytes_ = 0;
};

/// The transpose of a packed matrix.
Packed transposed(const Packed& p);

/// The packed weights of a layer. Immutable but for the copies that orders with folds read, which are packed at their first
/// use; safe to share between threads. Copies share storage.
struct EngineWeights {
  /// The products may be undefined; they do not include the scale. Throws unless all are float32 on the CPU.
  /// storage: float32, or bfloat16 for packed weights and the contexts made with them. Sums are float32 in both cases.
  /// pinned: the only orders that will run; weights that they do not read are left out.
  EngineWeights(const LayerWeights& weights,
                const WeightProducts& products,
                at::ScalarType storage,
                const std::optional<Orders>& pinned);

  /// Those of an added context of a decoupled layer, which shares the projections of query and output.
  EngineWeights(const EngineWeights& first,
                const LayerWeights& added,
                const WeightProducts& products,
                const std::optional<Orders>& pinned);

  int64_t H, G, d, e, Eq, Eo, Ek, Ev;
  float scale;
  at::ScalarType storage;
  at::Tensor query_bias, key_bias, value_bias, output_bias;  ///< zeros where the layer has none
  at::Tensor output_bias_after_value;                        ///< bo + bv Wo: exact where a row's weights sum to one
  NormWeights query_norm, key_norm;

  Packed query, key, value, output;  ///< [Eq, H * d], [Ek, G * d], [Ev, G * e], [H * e, Eo]

  Packed logits_product;           ///< Wq Wk' of all heads, [Eq, H * Ek]
  at::Tensor logits_product_bias;  ///< bq Wk', [H * Ek]
  Packed values_product;           ///< Wv Wo of all heads, [H * Ev, Eo]
  at::Tensor values_product_bias;  ///< bv Wo of each head, [H, Eo]

  /// Wq and Wk of each head, [d, Eq] and [d, Ek], stacked; Wv of each head, G times [Ev, e].
  const Packed& query_fold() const;
  const Packed& key_fold() const;
  const Packed& value_fold() const;

  /// Size in memory, in bytes; of an added context, without what it shares with the first.
  int64_t bytes() const;

 private:
  bool is_added = false;
  struct Folds {
    PackedOnUse query, key, value;
  };
  void set_context_weights(const LayerWeights& weights, const WeightProducts& products, const std::optional<Orders>& pinned);
  std::shared_ptr<Folds> folds;
};

/// A context as the engine reads it. Immutable; safe to share between threads. Keys and values that are not folded have room
/// for `capacity` keys, which stands for Lk in the sizes below; what lies behind the first Lk keys has no influence.
///
///   keys      packed: K' of each head, [B, G, d x Lk]; Xk', [B, Ek x Lk]; folded, [B, Eq x H * Lk]
///   key_bias  folded: added to the logits, [B, H * Lk]
///   values    packed: V of each head, [B, G, Lk x e]; Xv, [B, Lk x Ev]; folded, [B, H * Lk x Eo]
struct EngineContext : LayerContext {
  using LayerContext::operator=;  ///< replaces keys and values; the rest stays
  Orders orders;
  int64_t B = 0;
  std::vector<int64_t> lengths;                  ///< keys of each batch entry; later keys are not read
  ContextLayout layout = ContextLayout::packed;  ///< of keys and values in orders that leave them as they are
  int64_t capacity = 0;                          ///< keys that the tensors have room for, at least Lk
};

/// key [B, Lk, Ek], value [B, Lk, Ev]; lengths as in EngineContext; layout: of raw keys and values. There is room for `capacity`
/// keys unless a chain is folded.
EngineContext make_engine_context(const Orders& orders,
                                  const EngineWeights& weights,
                                  const at::Tensor& key,
                                  const at::Tensor& value,
                                  std::vector<int64_t> lengths,
                                  ContextLayout layout,
                                  int64_t capacity = 0);

/// Contexts as values: each function returns a new context and leaves its arguments as they are. `join` puts contexts of one
/// batch and layout one behind the other and takes the first `keys` of them, in memory for `capacity` keys unless a chain is
/// folded. Its lengths are all of these keys: it puts zeros for the values behind a part's own lengths, which the caller masks.
EngineContext join(const EngineWeights& weights, const std::vector<EngineContext>& parts, int64_t keys, int64_t capacity);
/// Keys of another context behind those of the first: written to its room if it can claim that, otherwise joined.
EngineContext append(const EngineWeights& weights, const EngineContext& context, const EngineContext& more);
/// The batch entries with these indices, int64 [n] on the CPU, contiguous. The room is kept, and not copied.
EngineContext select_entries(const EngineWeights& weights, const EngineContext& context, const at::Tensor& indices);

/// The left context of the logits for a constant query [Lq, Eq] in these orders, [Lq, ...].
at::Tensor fold_query(const Orders& orders, const EngineWeights& weights, const at::Tensor& query);

/// A further context of a decoupled layer, and the factor of its heads.
struct EngineAdded {
  const EngineWeights* weights;
  const EngineContext* context;
  Mask mask;
  float scale;
};

struct EngineCall {
  at::Tensor query;         ///< [B * n, Lq, Eq]: n queries for each of B contexts; or undefined
  at::Tensor folded_query;  ///< from fold_query, if there is no query
  AttentionOptions how;     ///< mask, without the lengths of the context, and returned weights; nothing else of it is read
  std::vector<EngineAdded> added = {};  ///< if there are any, all values end in heads, and the query is given
};

/// -> output [B * n, Lq, Eo] and weights as requested, [B * n, (H,) Lq, Lk].
AttentionResult attend(const EngineWeights& weights, const EngineContext& context, const EngineCall& call);

/// Calls make_engine_context and attend. In a small call each thread computes whole batch entries by itself.
AttentionResult forward(const Orders& orders,
                        const EngineWeights& weights,
                        const at::Tensor& key,
                        const at::Tensor& value,
                        const std::vector<int64_t>& lengths,
                        const EngineCall& call);

}  // namespace xattn::detail
