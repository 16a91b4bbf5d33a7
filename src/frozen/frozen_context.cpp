// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <xattn/frozen.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/describe.h"
#include "cpu/elementwise.h"
#include "frozen/engine.h"
#include "frozen/state.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/layer_context.h"
#include "plan/order_traits.h"

namespace xattn {

using at::Tensor;
using detail::check_value;
using detail::kFrozen;

std::pair<std::vector<int64_t>, Mask> detail::split_lengths(const Mask& mask, int64_t B, int64_t Lk) {
  auto lengths = detail::host_lengths(mask);
  if (lengths.empty()) return {std::vector<int64_t>(static_cast<size_t>(B), Lk), mask};
  if (lengths.size() == 1) lengths.resize(static_cast<size_t>(B), lengths.front());
  return {lengths, detail::without_lengths(mask)};
}

std::shared_ptr<FrozenContext::State> FrozenContext::State::make(std::shared_ptr<const Frozen::State> owner,
                                                                 const Orders& orders,
                                                                 const detail::ContextInputs& inputs,
                                                                 detail::ContextLayout layout,
                                                                 int64_t capacity) {
  const auto B = inputs.B(), Lk = inputs.Lk();
  auto context = std::make_shared<State>(State{std::move(owner), {}, inputs.mask, inputs.is_batched});
  auto& parts = context->parts;
  if (const auto& engine = context->owner->engine) {
    auto [lengths, rest] = detail::split_lengths(inputs.mask, B, Lk);
    context->mask = rest;
    parts = detail::make_engine_context(orders, *engine, inputs.key, inputs.value, std::move(lengths), layout, capacity);
    return context;
  }
  parts.orders = orders;
  parts.B = B;
  const auto layer = context->layer();
  const auto made = detail::make_context(layer, inputs.key, inputs.value);
  parts = capacity > Lk && detail::can_grow(layer, {made}) ? detail::join(layer, {made}, capacity) : made;
  return context;
}

Mask FrozenContext::State::whole_mask() const {
  const auto& lengths = parts.lengths;
  if (std::ranges::all_of(lengths, [this](int64_t length) { return length == parts.Lk; })) return mask;
  return mask & Mask::lengths(at::tensor(lengths, at::kLong), parts.Lk);
}

void FrozenContext::State::join(const std::vector<FrozenContext>& contexts, int64_t keys) {
  std::vector<detail::EngineContext> all;
  for (const auto& context : contexts) all.push_back(context.state().parts);
  if (owner->engine) {
    parts = detail::join(*owner->engine, all, keys, /*capacity=*/0);
  } else {
    parts = detail::join(layer(), {all.begin(), all.end()});
  }
  shared = false;
}

const FrozenContext::State& FrozenContext::state() const {
  check_value(state_ != nullptr, kFrozen, "context must be made by Frozen::context, but is empty.");
  return *state_;
}

const Orders& FrozenContext::orders() const {
  return state().parts.orders;
}
Mask FrozenContext::mask() const {
  return state().whole_mask();
}
int64_t FrozenContext::batch_size() const {
  return state().parts.B;
}
int64_t FrozenContext::length() const {
  return state().parts.Lk;
}
bool FrozenContext::is_batched() const {
  return state().batched;
}

int64_t FrozenContext::bytes() const {
  const auto& parts = state().parts;
  if (state().shared) return 0;
  int64_t bytes = 0;
  for (const auto* x : {&parts.keys, &parts.key_bias, &parts.values}) {
    if (!x->defined()) continue;
    // Without the engine, keys with room behind them are a part of a buffer.
    const auto numbers = parts.room ? x->size(0) * x->stride(0) : x->numel();
    bytes += numbers * static_cast<int64_t>(x->element_size());
  }
  return parts.values.is_alias_of(parts.keys) ? bytes / 2 : bytes;
}

FrozenContext FrozenContext::slice(int64_t begin, int64_t end) const {
  check_value(0 <= begin && begin <= end && end <= batch_size(), kFrozen, "slice must lie in [0, {}], but is [{}, {}).",
              batch_size(), begin, end);
  auto sliced = std::make_shared<State>(state());
  sliced->mask = state().mask.slice(begin, end);
  sliced->change_tensors([&](const Tensor& x) { return x.narrow(0, begin, end - begin); });
  sliced->parts.B = end - begin;
  sliced->parts.room.reset();
  auto& lengths = sliced->parts.lengths;
  if (!lengths.empty()) lengths = {lengths.begin() + begin, lengths.begin() + end};
  return FrozenContext(std::move(sliced));
}

FrozenContext FrozenContext::to(at::Device device) const {
  auto moved = std::make_shared<State>(state());
  moved->mask = state().mask.to(device);
  moved->change_tensors([device](const Tensor& x) { return x.to(device); });
  moved->parts.room.reset();
  moved->shared = state().shared && device == state().parts.keys.device();
  return FrozenContext(std::move(moved));
}

FrozenContext FrozenContext::cat(const std::vector<FrozenContext>& contexts) {
  check_value(!contexts.empty(), kFrozen, "contexts must be at least one, but are none.");
  const auto& first = contexts.front().state();
  auto joined = std::make_shared<State>(first);
  auto& parts = joined->parts;
  std::vector<std::pair<Mask, int64_t>> masks;
  std::vector<detail::EngineContext> all;
  parts.B = 0;
  parts.lengths.clear();
  for (const auto& context : contexts) {
    const auto& state = context.state();
    check_value(state.owner == first.owner && state.parts.orders == first.parts.orders && state.parts.Lk == first.parts.Lk &&
                    state.batched && state.parts.layout == first.parts.layout,
                kFrozen, "contexts must be batches of one Frozen, of one length and orders, but they differ.");
    masks.emplace_back(state.mask, state.parts.B);
    const bool has_room = state.owner->engine && state.parts.capacity > state.parts.Lk;
    all.push_back(has_room ? detail::join(*state.owner->engine, {state.parts}, state.parts.Lk, /*capacity=*/0) : state.parts);
    parts.B += state.parts.B;
    parts.lengths.insert(parts.lengths.end(), state.parts.lengths.begin(), state.parts.lengths.end());
  }
  joined->mask = Mask::cat(masks);
  const auto join_tensors = [&](Tensor detail::EngineContext::* part) {
    const auto& like = all.front().*part;
    if (!like.defined()) return Tensor();
    auto sizes = like.sizes().vec();
    sizes[0] = parts.B;
    const auto whole = at::empty(sizes, like.options());
    int64_t begin = 0;
    for (const auto& each : all) {
      detail::copy_to(each.*part, whole.narrow(0, begin, each.B));
      begin += each.B;
    }
    return whole;
  };
  parts.keys = join_tensors(&detail::EngineContext::keys);
  parts.key_bias = join_tensors(&detail::EngineContext::key_bias);
  const bool one = std::ranges::all_of(all, detail::is_one);
  parts.values = one ? parts.keys : join_tensors(&detail::EngineContext::values);
  parts.capacity = parts.Lk;
  parts.room.reset();
  joined->shared = false;
  return FrozenContext(std::move(joined));
}

FrozenContext FrozenContext::join(const std::vector<FrozenContext>& contexts) {
  check_value(!contexts.empty(), kFrozen, "contexts must be at least one, but are none.");
  const detail::Inference inference;
  const auto& first = contexts.front().state();
  std::vector<std::pair<Mask, int64_t>> masks;
  int64_t keys = 0;
  for (const auto& context : contexts) {
    const auto& state = context.state();
    check_value(state.owner == first.owner && state.parts.B == first.parts.B && state.batched == first.batched &&
                    state.parts.keys.device() == first.parts.keys.device(),
                kFrozen, "contexts must be of one Frozen, batch and device to be joined, but they differ.");
    check_value(state.parts.orders == first.parts.orders && state.parts.layout == first.parts.layout, kFrozen,
                "contexts must be in one order to be joined, but they differ. Make them for the same expected_queries and "
                "capacity.");
    masks.emplace_back(state.whole_mask(), state.parts.Lk);
    keys += state.parts.Lk;
  }
  auto joined = std::make_shared<State>(first);
  joined->mask = detail::join_keys(masks);
  joined->join(contexts, keys);
  return FrozenContext(std::move(joined));
}

FrozenContext FrozenContext::append(const Tensor& key, const Tensor& value, const Mask& mask) const {
  const detail::Inference inference;
  const auto& own = state();
  const auto& weights = own.owner->weights;
  auto inputs = detail::context_inputs(kFrozen, weights, key, value, mask);
  detail::check_appended(kFrozen, inputs, own.batched, own.parts.B);
  detail::check_type(own.parts.keys.device() == inputs.key.device(), kFrozen,
                     "context must be on {}, as the weights, to be appended to, but is on {}.",
                     detail::name_of(inputs.key.device()), detail::name_of(own.parts.keys.device()));
  detail::check_mask(kFrozen, weights, inputs, std::nullopt);
  detail::normalise(inputs, own.norm);
  const auto more = State::make(own.owner, own.parts.orders, inputs, own.parts.layout);
  auto longer = std::make_shared<State>(own);
  longer->mask = detail::join_keys({{own.whole_mask(), own.parts.Lk}, {mask & detail::causal_part(own.mask), more->parts.Lk}});
  if (own.owner->engine) {
    longer->parts = detail::append(*own.owner->engine, own.parts, more->parts);
  } else {
    longer->parts = detail::append(own.layer(), own.parts, more->parts);
  }
  longer->shared = false;
  return FrozenContext(std::move(longer));
}

FrozenContext FrozenContext::truncate(int64_t n) const {
  const detail::Inference inference;
  const auto& own = state();
  detail::check_length(kFrozen, n, own.parts.Lk);
  auto first = std::make_shared<State>(own);
  auto& parts = first->parts;
  const auto& [logits, values] = parts.orders;
  if (!own.owner->engine) {
    parts = detail::truncate(own.layer(), own.parts, n);
  } else if (detail::is_folded(logits) || detail::is_folded(values)) {
    first->mask = own.whole_mask();
    first->join({*this}, n);
  } else {
    parts.Lk = n;
    for (auto& length : parts.lengths) length = std::min(length, n);
  }
  first->mask = detail::first_keys(first->mask, n);
  return FrozenContext(std::move(first));
}

FrozenContext FrozenContext::select(const Tensor& indices) const {
  const detail::Inference inference;
  const auto& own = state();
  check_value(own.batched, kFrozen, "context must be batched to select entries, but is unbatched.");
  const auto entries = detail::checked_indices(kFrozen, indices, own.parts.B);
  auto selected = std::make_shared<State>(own);
  selected->mask = detail::select_entries(own.mask, entries);
  if (own.owner->engine) {
    selected->parts = detail::select_entries(*own.owner->engine, own.parts, entries.cpu().contiguous());
  } else {
    selected->parts = detail::select_entries(own.layer(), own.parts, entries.to(own.parts.keys.device()));
  }
  selected->parts.B = entries.size(0);
  selected->shared = false;
  return FrozenContext(std::move(selected));
}

}  // namespace xattn
