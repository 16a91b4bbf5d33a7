// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <xattn/attention.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "frozen/engine.h"
#include "modules/layer.h"

namespace xattn {

namespace detail {

inline constexpr auto kFrozen = "frozen";  ///< the caller in messages

/// The state of a call: no gradients, and no autocast.
struct Inference {
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

/// Whether frozen layers with such weights run on this library's kernels.
bool runs_on_kernels(const at::Tensor& weight);

/// Throws for a storage that does not exist, and for one where the kernels do not run.
void check_storage(std::string_view caller, const std::optional<at::ScalarType>& storage, bool kernels);

}  // namespace detail

struct Frozen::State {
  CrossAttentionOptions options;
  detail::LayerWeights weights;  // where the engine runs, sizes without numbers
  PlanMode plan;
  detail::WeightProducts products = {};
  std::optional<detail::EngineWeights> engine = {};
  at::Tensor query = {};                              // [Lq, Eq], or undefined
  std::array<at::Tensor, kOrders> folded_query = {};  // for each order of the logits
  bool sums_heads = false;                            // a context of a decoupled layer

  // From the parameters of a module. first: of a decoupled layer, if this is of an added context.
  static std::shared_ptr<const State> make(const CrossAttentionOptions& options,
                                           detail::LayerWeights weights,
                                           const FreezeOptions& freeze,
                                           const at::Tensor& query,
                                           bool sums_heads,
                                           const State* first);

  PlanRequest request(int64_t B, int64_t Lq, int64_t Lk, AttentionWeights returned) const;
  PlanRequest request_for_context(std::string_view caller, int64_t B, int64_t Lk, int64_t expected) const;
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
