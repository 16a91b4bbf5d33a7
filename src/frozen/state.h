// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "frozen/engine.h"
#include "modules/layer.h"

namespace xattn {

namespace detail {
inline constexpr auto kFrozen = "frozen";  ///< the caller in messages
}  // namespace detail

struct Frozen::State {
  CrossAttentionOptions options;
  detail::LayerWeights weights;
  PlanMode plan;
  detail::WeightProducts products = {};
  std::optional<detail::EngineWeights> engine = {};
  at::Tensor query = {};                              // [Lq, Eq], or undefined
  std::array<at::Tensor, kOrders> folded_query = {};  // for each order of the logits

  PlanRequest request(int64_t B, int64_t Lq, int64_t Lk, AttentionWeights returned) const;
  PlanRequest request_for_context(int64_t B, int64_t Lk, int64_t expected) const;
  // query [B, Lq, Eq], or undefined for the constant one.
  detail::EngineCall call(const Orders& orders, const at::Tensor& query, const AttentionOptions& how) const;
  AttentionOptions attention_options(const Mask& mask, const CallOptions& call) const;
};

struct FrozenContext::State {
  std::shared_ptr<const Frozen::State> owner;
  detail::EngineContext parts;  // its keys and values are those of a LayerContext where the engine does not run
  Mask mask;                    // without the lengths of `parts`
  bool batched;

  template <class Change>
  void change_tensors(const Change& change) {
    const bool one = parts.values.is_same(parts.keys);
    parts.keys = change(parts.keys);
    parts.values = one ? parts.keys : change(parts.values);
    if (parts.key_bias.defined()) parts.key_bias = change(parts.key_bias);
  }
};

}  // namespace xattn
