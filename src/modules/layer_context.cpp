// SPDX-License-Identifier: Apache-2.0
#include "modules/layer_context.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "plan/order_traits.h"

namespace xattn::detail {

using at::Tensor;

namespace {

constexpr int64_t kKeys = 2;  // the axis of the keys in `rows_of`

// Keys or values with an axis for their heads, [B, heads, Lk, features]; one head for raw ones. The row of bias_kv is left out.
Tensor rows_of(const Layer& layer, Order order, const Tensor& x, int64_t Lk) {
  if (is_raw(order)) return x.unsqueeze(1);
  if (is_folded(order)) return x.view({x.size(0), layer.weights.H, Lk, x.size(2)});
  return x.narrow(kKeys, 0, Lk);
}

// The inverse. like: keys or values of `Lk` keys, from which a row of bias_kv is taken.
Tensor from_rows(Order order, const Tensor& rows, const Tensor& like, int64_t Lk) {
  if (is_raw(order)) return rows.squeeze(1);
  if (is_folded(order)) return rows.flatten(1, 2);
  return like.size(kKeys) == Lk ? rows : at::cat({rows, like.narrow(kKeys, Lk, 1)}, kKeys);
}

// change(rows) for the rows [B, heads, Lk, ...] of each tensor of a context, which has n keys afterwards.
template <class Change>
LayerContext changed(const Layer& layer, const LayerContext& context, int64_t n, const Change& change) {
  const auto Lk = context.Lk;
  const auto change_rows = [&](Order order, const Tensor& x) {
    return from_rows(order, change(rows_of(layer, order, x, Lk)), x, Lk);
  };
  LayerContext result{change_rows(layer.orders.logits, context.keys), {}, {}, n};
  if (const auto& bias = context.key_bias; bias.defined()) {
    const auto rows = change(bias.view({bias.size(0), layer.weights.H, Lk, 1}));
    result.key_bias = rows.flatten(1).unsqueeze(1);
  }
  result.values = is_one(context) ? result.keys : change_rows(layer.orders.values, context.values);
  return result;
}

// The first keys of a new buffer [B, heads, capacity, features].
Tensor empty_rows(int64_t B, const Tensor& like, int64_t Lk, int64_t capacity) {
  return at::empty({B, like.size(1), capacity, like.size(3)}, like.options()).narrow(kKeys, 0, Lk);
}

// Rows joined along the keys, in a buffer of this capacity.
Tensor join_with_room(const std::vector<Tensor>& all, int64_t Lk, int64_t capacity) {
  const OrdinaryTensors ordinary;
  auto joined = empty_rows(all.front().size(0), all.front(), Lk, capacity);
  int64_t first = 0;
  for (const auto& rows : all) {
    joined.narrow(kKeys, first, rows.size(kKeys)).copy_(rows);
    first += rows.size(kKeys);
  }
  return joined;
}

// Keys or values followed by more, which are written to the room behind them. The write does not count as a change of x, whose
// own rows stay as they are: a graph of gradients may have kept them.
Tensor extended(Order order, const Tensor& x, const Tensor& more) {
  const OrdinaryTensors ordinary;
  const int64_t axis = is_raw(order) ? 1 : kKeys;
  auto sizes = x.sizes().vec();
  auto& length = sizes[static_cast<size_t>(axis)];
  const auto first = std::exchange(length, length + more.size(axis));
  auto longer = x.as_strided(sizes, x.strides());
  longer.variable_data().narrow(axis, first, more.size(axis)).copy_(more);
  return longer;
}

}  // namespace

bool can_grow(const Layer& layer, const std::vector<LayerContext>& contexts) {
  if (is_folded(layer.orders.logits) || is_folded(layer.orders.values) || layer.weights.bias_k.defined()) return false;
  return !at::GradMode::is_enabled() || std::ranges::none_of(contexts, [](const LayerContext& context) {
    return context.keys.requires_grad() || context.values.requires_grad();
  });
}

LayerContext join(const Layer& layer, const std::vector<LayerContext>& parts, int64_t capacity) {
  LayerContext joined{};
  for (const auto& part : parts) joined.Lk += part.Lk;
  const bool grows = capacity > joined.Lk && can_grow(layer, parts);
  if (grows) joined.room = std::make_shared<Room>(joined.Lk, capacity);
  const auto join_rows = [&](Order order, Tensor LayerContext::* x) {
    std::vector<Tensor> all;
    for (const auto& part : parts) all.push_back(rows_of(layer, order, part.*x, part.Lk));
    return from_rows(order, grows ? join_with_room(all, joined.Lk, capacity) : at::cat(all, kKeys), parts.front().*x,
                     parts.front().Lk);
  };
  joined.keys = join_rows(layer.orders.logits, &LayerContext::keys);
  if (parts.front().key_bias.defined()) {
    std::vector<Tensor> all;
    for (const auto& part : parts) all.push_back(part.key_bias.view({part.keys.size(0), layer.weights.H, part.Lk}));
    joined.key_bias = at::cat(all, 2).flatten(1).unsqueeze(1);
  }
  joined.values = std::ranges::all_of(parts, is_one) ? joined.keys : join_rows(layer.orders.values, &LayerContext::values);
  return joined;
}

LayerContext append(const Layer& layer, const LayerContext& context, const LayerContext& more) {
  if (!can_grow(layer, {context, more})) return join(layer, {context, more});
  const auto Lk = context.Lk + more.Lk;
  const bool fits = !is_one(context) || is_one(more);
  if (!fits || !context.room || !context.room->claim(context.Lk, Lk)) {
    return join(layer, {context, more}, Room::for_growth(Lk));
  }
  auto longer = context;
  longer.Lk = Lk;
  longer.keys = extended(layer.orders.logits, context.keys, more.keys);
  longer.values = is_one(context) ? longer.keys : extended(layer.orders.values, context.values, more.values);
  return longer;
}

LayerContext truncate(const Layer& layer, const LayerContext& context, int64_t n) {
  auto first = changed(layer, context, n, [n](const Tensor& rows) { return rows.narrow(kKeys, 0, n); });
  first.room = context.room;
  return first;
}

LayerContext select_entries(const Layer& layer, const LayerContext& context, const Tensor& indices) {
  const auto Lk = context.Lk;
  if (!context.room || !can_grow(layer, {context})) {
    LayerContext selected{context.keys.index_select(0, indices), {}, {}, Lk};
    if (context.key_bias.defined()) selected.key_bias = context.key_bias.index_select(0, indices);
    selected.values = is_one(context) ? selected.keys : context.values.index_select(0, indices);
    return selected;
  }
  const OrdinaryTensors ordinary;
  const auto capacity = context.room->capacity();
  auto selected = changed(layer, context, Lk, [&](const Tensor& rows) {
    auto entries = empty_rows(indices.size(0), rows, Lk, capacity);
    at::index_select_out(entries, rows, 0, indices);
    return entries;
  });
  selected.room = std::make_shared<Room>(Lk, capacity);
  return selected;
}

void check_length(std::string_view caller, int64_t n, int64_t length) {
  check_value(n >= 0 && n <= length, caller, "n must lie in [0, {}], the length of the context, but is {}.", length, n);
}

}  // namespace xattn::detail
