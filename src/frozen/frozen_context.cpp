// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/cat.h>
#include <xattn/frozen.h>

#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "frozen/engine.h"
#include "frozen/state.h"

namespace xattn {

using at::Tensor;
using detail::check_value;
using detail::kFrozen;

const FrozenContext::State& FrozenContext::state() const {
  check_value(state_ != nullptr, kFrozen, "context must be made by Frozen::context, but is empty.");
  return *state_;
}

const Orders& FrozenContext::orders() const {
  return state().parts.orders;
}
const Mask& FrozenContext::mask() const {
  return state().mask;
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
  int64_t bytes = 0;
  for (const auto* x : {&parts.keys, &parts.key_bias, &parts.values})
    bytes += x->defined() ? static_cast<int64_t>(x->nbytes()) : 0;
  return parts.values.is_alias_of(parts.keys) ? bytes / 2 : bytes;
}

FrozenContext FrozenContext::slice(int64_t begin, int64_t end) const {
  check_value(0 <= begin && begin < end && end <= batch_size(), kFrozen, "slice must lie in [0, {}], but is [{}, {}).",
              batch_size(), begin, end);
  auto sliced = std::make_shared<State>(state());
  sliced->mask = state().mask.slice(begin, end);
  sliced->change_tensors([&](const Tensor& x) { return x.narrow(0, begin, end - begin); });
  sliced->parts.B = end - begin;
  auto& lengths = sliced->parts.lengths;
  if (!lengths.empty()) lengths = {lengths.begin() + begin, lengths.begin() + end};
  return FrozenContext(std::move(sliced));
}

FrozenContext FrozenContext::to(at::Device device) const {
  auto moved = std::make_shared<State>(state());
  moved->mask = state().mask.to(device);
  moved->change_tensors([device](const Tensor& x) { return x.to(device); });
  return FrozenContext(std::move(moved));
}

FrozenContext FrozenContext::cat(const std::vector<FrozenContext>& contexts) {
  check_value(!contexts.empty(), kFrozen, "contexts must be at least one, but are none.");
  const auto& first = contexts.front().state();
  auto joined = std::make_shared<State>(first);
  auto& parts = joined->parts;
  std::vector<std::pair<Mask, int64_t>> masks;
  parts.B = 0;
  parts.lengths.clear();
  for (const auto& context : contexts) {
    const auto& state = context.state();
    check_value(state.owner == first.owner && state.parts.orders == first.parts.orders && state.parts.Lk == first.parts.Lk &&
                    state.batched && state.parts.layout == first.parts.layout,
                kFrozen, "contexts must be batches of one Frozen, of one length and orders, but they differ.");
    masks.emplace_back(state.mask, state.parts.B);
    parts.B += state.parts.B;
    parts.lengths.insert(parts.lengths.end(), state.parts.lengths.begin(), state.parts.lengths.end());
  }
  joined->mask = Mask::cat(masks);
  const auto joined_tensor = [&contexts](Tensor detail::EngineContext::* part) {
    std::vector<Tensor> all;
    for (const auto& context : contexts) all.push_back(context.state().parts.*part);
    return all.front().defined() ? at::cat(all) : Tensor();
  };
  parts.keys = joined_tensor(&detail::EngineContext::keys);
  parts.key_bias = joined_tensor(&detail::EngineContext::key_bias);
  const bool one = first.parts.values.is_same(first.parts.keys);
  parts.values = one ? parts.keys : joined_tensor(&detail::EngineContext::values);
  return FrozenContext(std::move(joined));
}

}  // namespace xattn
