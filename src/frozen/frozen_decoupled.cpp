// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen_decoupled.h>

#include <xattn/decoupled.h>

#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "frozen/state.h"
#include "modules/decoupled_parts.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"

namespace xattn {

using at::Tensor;
using detail::check_value;

namespace {

constexpr auto kFrozenDecoupled = "frozen_decoupled";

std::string caller_of(size_t context) {
  return detail::caller_of(kFrozenDecoupled, context);
}

}  // namespace

struct FrozenDecoupled::State {
  DecoupledCrossAttentionOptions options;
  std::vector<Frozen> layers;  // of the first context and of the added ones, with the projections of query and output in common
};

FrozenDecoupled::FrozenDecoupled(const DecoupledCrossAttentionImpl& module, const FreezeOptions& how) {
  const detail::Inference inference;
  module.check_options();
  check_value(!how.query.defined(), kFrozenDecoupled, "query must be left out, but is given.");
  if (how.plan) detail::check_ends_in_heads(kFrozenDecoupled, *how.plan);
  auto options = module.options;
  options.attention(module.attention->options);
  State state{options, {}};
  for (size_t i = 0; i <= module.added_projections.size(); ++i) {
    const auto* first = i > 0 ? &state.layers.front().state() : nullptr;
    state.layers.push_back(
        Frozen(Frozen::State::make(module.attention->options, detail::weights_of(module, i), how, {}, first)));
  }
  state_ = std::make_shared<const State>(std::move(state));
}

const FrozenDecoupled::State& FrozenDecoupled::state() const {
  check_value(state_ != nullptr, kFrozenDecoupled, "layer must be made by DecoupledCrossAttention::freeze, but is empty.");
  return *state_;
}

const Frozen& FrozenDecoupled::layer(size_t context) const {
  return state().layers[context];
}

std::tuple<Tensor, Tensor> FrozenDecoupled::forward(const Tensor& query,
                                                    const Tensor& key,
                                                    const Tensor& value,
                                                    const std::vector<KeyValue>& added,
                                                    const Mask& mask,
                                                    const CallOptions& call) const {
  const detail::Inference inference;
  const auto& s = state();
  detail::check_count(kFrozenDecoupled, added.size(), s.options.added().size());
  const auto& first = layer(0).state();
  auto inputs = detail::context_inputs(kFrozenDecoupled, first.weights, key, value, mask);
  const bool is_batched = inputs.is_batched;
  const auto B = inputs.B();
  const auto Xq = detail::query_input(kFrozenDecoupled, first.weights, query, is_batched, B);
  const auto Lq = Xq.size(1);
  int64_t dropped_keys = 0;
  std::vector<Frozen::Part> parts;
  for (size_t i = 0; i <= added.size(); ++i) {
    const auto& of_context = layer(i).state();
    if (i > 0) {
      const auto& [added_key, added_value, added_mask] = added[i - 1];
      inputs = detail::context_inputs(caller_of(i), of_context.weights, added_key, added_value, added_mask);
      detail::check_batch(kFrozenDecoupled, i, inputs.is_batched, inputs.B(), is_batched, B);
    }
    const auto scale = i == 0 ? 1 : s.options.added()[i - 1].scale();
    detail::check_mask(caller_of(i), of_context.weights, inputs, Lq);
    if (scale == 0) continue;
    const auto dropped = detail::drop_padding(of_context.weights, inputs);
    if (i == 0) dropped_keys = dropped;
    const auto returned = i == 0 ? detail::returned_weights(first.options, call) : AttentionWeights::none;
    const auto orders = detail::orders_of(of_context.request(B, Lq, inputs.Lk(), returned));
    const auto layout = detail::context_layout(Lq, first.options.num_heads());
    parts.push_back({FrozenContext(FrozenContext::State::make(layer(i).state_, orders, inputs, layout)), scale});
  }
  return detail::results(Frozen::attend_to(Xq, parts, call), is_batched, dropped_keys);
}

FrozenContext FrozenDecoupled::context(const Tensor& key,
                                       const Tensor& value,
                                       const Mask& mask,
                                       const ContextOptions& how) const {
  return layer(0).context_for(kFrozenDecoupled, key, value, mask, how);
}

FrozenContext FrozenDecoupled::added_context(
    size_t index, const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) const {
  const auto count = state().options.added().size();
  check_value(index < count, kFrozenDecoupled, "index must be below the number of added contexts, {}, but is {}.", count,
              index);
  return layer(index + 1).context_for(caller_of(index + 1), key, value, mask, how);
}

std::tuple<Tensor, Tensor> FrozenDecoupled::attend(const Tensor& query,
                                                   const FrozenContext& context,
                                                   const std::vector<FrozenContext>& added,
                                                   const CallOptions& call) const {
  const detail::Inference inference;
  const auto& s = state();
  detail::check_count(kFrozenDecoupled, added.size(), s.options.added().size());
  std::vector<Frozen::Part> parts;
  for (size_t i = 0; i <= added.size(); ++i) {
    const auto& of_call = i == 0 ? context : added[i - 1];
    check_value(of_call.state().owner == layer(i).state_, caller_of(i),
                "context must be made by the layer that attends to it, but is another's.");
    if (i > 0) {
      detail::check_batch(kFrozenDecoupled, i, of_call.is_batched(), of_call.batch_size(), context.is_batched(),
                          context.batch_size());
    }
    const auto scale = i == 0 ? 1 : s.options.added()[i - 1].scale();
    if (scale != 0) parts.push_back({of_call, scale});
  }
  const auto Xq = layer(0).query_for(kFrozenDecoupled, query, context);
  for (size_t i = 0; i <= added.size(); ++i) {
    layer(i).check_context(caller_of(i), i == 0 ? context : added[i - 1], Xq.size(1));
  }
  return detail::results(Frozen::attend_to(Xq, parts, call), context.is_batched());
}

FrozenDecoupled FrozenDecoupled::with_scales(const std::vector<double>& scales) const {
  auto changed = state();
  auto& added = changed.options.added();
  check_value(scales.size() == added.size(), kFrozenDecoupled, "scales must be one for each added context, {}, but are {}.",
              added.size(), scales.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    check_value(std::isfinite(scales[i]), kFrozenDecoupled, "scales[{}] must be finite, but is {}.", i, scales[i]);
    added[i].scale(scales[i]);
  }
  FrozenDecoupled result;
  result.state_ = std::make_shared<const State>(std::move(changed));
  return result;
}

std::string FrozenDecoupled::explain(int64_t B, int64_t Lq, const std::vector<int64_t>& lengths) const {
  const auto count = state().layers.size();
  check_value(lengths.size() == count, kFrozenDecoupled, "lengths must be those of {} contexts, but are {}.", count,
              lengths.size());
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    text += i == 0 ? "first context: " : detail::formatted("added context {}: ", i - 1);
    text += layer(i).explain(B, Lq, lengths[i]);
  }
  return text;
}

const DecoupledCrossAttentionOptions& FrozenDecoupled::options() const {
  return state().options;
}

int64_t FrozenDecoupled::bytes() const {
  const auto& layers = state().layers;
  const auto& first = layer(0).state().weights;
  auto shared = detail::bytes_of(first.output) + detail::bytes_of(first.output_bias);
  for (const auto* x : query_tensors(first)) shared += detail::bytes_of(*x);
  // An engine counts what its layer alone holds.
  int64_t bytes = uses_kernels() ? 0 : -shared * (std::ssize(layers) - 1);
  for (const auto& each : layers) bytes += each.bytes();
  return bytes;
}

bool FrozenDecoupled::uses_kernels() const {
  return layer(0).uses_kernels();
}

FrozenDecoupled DecoupledCrossAttentionImpl::freeze() const {
  return freeze({});
}

FrozenDecoupled DecoupledCrossAttentionImpl::freeze(const FreezeOptions& how) const {
  return FrozenDecoupled(*this, how);
}

}  // namespace xattn
