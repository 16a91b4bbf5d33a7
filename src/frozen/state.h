// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <xattn/attention.h>
#include <xattn/context.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "frozen/engine.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/norm_weights.h"
#include "modules/room.h"
#include "plan/order_traits.h"

namespace xattn {

namespace detail {

inline constexpr auto kFrozen = "frozen";  ///< the caller in messages

/// The state of a call: ordinary results without gradients, and no autocast.
struct Inference {
  const OrdinaryTensors ordinary{};
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

/// Whether frozen layers with such weights run on this library's kernels.
bool runs_on_kernels(const at::Tensor& weight);

/// Throws for a storage that does not exist, and for one where the kernels do not run.
void check_storage(std::string_view caller, const std::optional<at::ScalarType>& storage, bool kernels);

/// The number of keys of each batch entry, as far as the mask has it in host memory, and the rest of the mask.
std::pair<std::vector<int64_t>, Mask> split_lengths(const Mask& mask, int64_t B, int64_t Lk);

}  // namespace detail

struct Frozen::State {
  CrossAttentionOptions options;
  detail::LayerWeights weights;  // where the engine runs, sizes without numbers
  PlanMode plan;
  detail::WeightProducts products = {};
  std::optional<detail::EngineWeights> engine = {};
  at::Tensor query = {};                              // [Lq, Eq], or undefined
  std::array<at::Tensor, kOrders> folded_query = {};  // for each order of the logits

  // From the parameters of a module. first: of a decoupled layer, if this is of an added context.
  static std::shared_ptr<const State> make(const CrossAttentionOptions& options,
                                           detail::LayerWeights weights,
                                           const FreezeOptions& freeze,
                                           const at::Tensor& query,
                                           const State* first);

  PlanRequest request(int64_t B, int64_t Lq, int64_t Lk, AttentionWeights returned) const;
  // query [B, Lq, Eq], or undefined for the constant one.
  detail::EngineCall call(const Orders& orders, const at::Tensor& query, const AttentionOptions& how) const;
  AttentionOptions attention_options(const Mask& mask, const CallOptions& call) const;
};

// One context of a call, and the factor of its heads.
struct Frozen::Part {
  FrozenContext context;
  double scale = 1;
};

struct FrozenContext::State {
  std::shared_ptr<const Frozen::State> owner;
  detail::EngineContext parts;  // a LayerContext where the engine does not run
  Mask mask;                    // without the lengths of `parts`
  bool batched;
  bool shared = false;            // whether keys and values are the caller's tensors
  detail::NormWeights norm = {};  // of a block, which keys and values pass first

  // layout: of raw keys and values on the kernels.
  static std::shared_ptr<State> make(std::shared_ptr<const Frozen::State> owner,
                                     const Orders& orders,
                                     const detail::ContextInputs& inputs,
                                     detail::ContextLayout layout,
                                     int64_t capacity = 0);

  detail::Layer layer() const { return {parts.orders, owner->weights, {}}; }
  // The mask with the lengths of `parts`.
  Mask whole_mask() const;
  // Replaces the keys by those of these contexts, one behind the other, without what follows the first `keys`.
  void join(const std::vector<FrozenContext>& contexts, int64_t keys);

  template <class Change>
  void change_tensors(const Change& change) {
    const bool one = detail::is_one(parts);
    parts.keys = change(parts.keys);
    parts.values = one ? parts.keys : change(parts.values);
    if (parts.key_bias.defined()) parts.key_bias = change(parts.key_bias);
  }
};

}  // namespace xattn
