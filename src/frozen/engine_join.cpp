// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"
#include "frozen/engine.h"

// Contexts of the engine that are joined, grown and reordered, by copies between packed matrices. A panel of packed keys has one
// column for each key. Appending writes columns behind the last key; products of a shorter context with these are discarded.
namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

bool is_packed(const EngineContext& context, Order order) {
  return !is_raw(order) || context.layout == ContextLayout::packed;
}

// Keys that are not folded: packed [B, (G,) panels, features, panel], or as given [B, keys, features].
Tensor keys_of(const EngineWeights& w, const EngineContext& context) {
  const auto order = context.orders.logits;
  if (!is_packed(context, order)) return context.keys;
  const auto panel = kernels().panel;
  return context.keys.unflatten(-1, {divided_up(context.capacity, panel), is_raw(order) ? w.Ek : w.d, panel});
}

// Values that are not folded, with keys on the last axis but one: [B, (G,) panels, keys, panel], or [B, keys, features].
Tensor values_of(const EngineWeights& w, const EngineContext& context) {
  const auto order = context.orders.values;
  if (!is_packed(context, order)) return context.values;
  const auto panel = kernels().panel;
  return context.values.unflatten(-1, {divided_up(is_raw(order) ? w.Ev : w.e, panel), context.capacity, panel});
}

// Copies the first n rows of `from` to rows of `to` from `first` on.
void copy_rows(const Tensor& from, const Tensor& to, int64_t first, int64_t n) {
  copy_to(from.narrow(-2, 0, n), to.narrow(-2, first, n));
}

// The same for columns of packed matrices [..., panels, features, panel]. Each panel of `from` goes to two of `to`, unless
// `first` begins one. Columns behind the last may be overwritten.
void copy_columns(const Tensor& from, const Tensor& to, int64_t first, int64_t n) {
  const auto panel = kernels().panel, panels = divided_up(n, panel), begin = first / panel, shift = first % panel;
  const auto copy_part = [&](int64_t to_panel, int64_t count, int64_t to_column, int64_t from_column, int64_t columns) {
    copy_to(from.narrow(-3, 0, count).narrow(-1, from_column, columns),
            to.narrow(-3, to_panel, count).narrow(-1, to_column, columns));
  };
  if (n == 0) return;
  copy_part(begin, panels, shift, 0, panel - shift);
  const auto spilling = std::min(panels, to.size(-3) - begin - 1);
  if (shift > 0 && spilling > 0) copy_part(begin + 1, spilling, 0, panel - shift, shift);
}

// Copies n keys and their values behind the first `first` of `to`, of the chains that are not folded. Values behind a batch
// entry's own keys become zeros, because their memory may hold NaN, which a mask does not stop.
void copy_keys(const EngineWeights& w, const EngineContext& from, const EngineContext& to, int64_t first, int64_t n) {
  const auto& [logits, values] = from.orders;
  if (!is_folded(logits)) {
    const auto copy_some = is_packed(from, logits) ? copy_columns : copy_rows;
    copy_some(keys_of(w, from), keys_of(w, to), first, n);
  }
  if (is_folded(values)) return;
  const auto place = values_of(w, to);
  if (!is_one(to)) copy_rows(values_of(w, from), place, first, n);
  for (int64_t b = 0; b < from.B; ++b) {
    const auto length = from.lengths[static_cast<size_t>(b)];
    if (length >= n) continue;
    const auto gap = place.select(0, b).narrow(-2, first + length, n - length);
    copy_to(at::zeros({1}, gap.options()).expand(gap.sizes()), gap);
  }
}

// A context like another, with uninitialised tensors for the chains that are not folded.
EngineContext empty_like(const EngineWeights& w, const EngineContext& like, bool one, int64_t Lk, int64_t capacity) {
  auto context = like;
  const auto& [logits, values] = like.orders;
  context.Lk = Lk;
  context.capacity = is_folded(logits) || is_folded(values) ? Lk : std::max(capacity, Lk);
  context.room = context.capacity > Lk ? std::make_shared<Room>(Lk, context.capacity) : nullptr;
  const auto empty = [&](Order order, const Tensor& x, int64_t packed_size) {
    auto sizes = x.sizes().vec();
    is_packed(like, order) ? sizes.back() = packed_size : sizes[1] = context.capacity;
    return in_huge_pages(at::empty(sizes, x.options()));
  };
  const auto& run = kernels();
  if (!is_folded(logits)) {
    context.keys = empty(logits, like.keys, run.packed_size(is_raw(logits) ? w.Ek : w.d, context.capacity));
  }
  if (one) {
    context.values = context.keys;
  } else if (!is_folded(values)) {
    context.values = empty(values, like.values, run.packed_size(context.capacity, is_raw(values) ? w.Ev : w.e));
  }
  return context;
}

// ---- Folded chains: the heads of a batch entry follow each other, each with as many keys as the entry has -------------------

// Calls f(part, b, first key, keys, keys that are taken) for each entry of each part.
template <class F>
void each_entry(const std::vector<EngineContext>& parts, int64_t Lk, const F& f) {
  int64_t first = 0;
  for (const auto& part : parts) {
    const auto left = std::max<int64_t>(0, std::min(part.Lk, Lk - first));
    for (int64_t b = 0; b < part.B; ++b) {
      const auto n = part.lengths[static_cast<size_t>(b)];
      f(part, b, first, n, std::min(n, left));
    }
    first += left;
  }
}

void join_folded_keys(const EngineWeights& w, const std::vector<EngineContext>& parts, EngineContext& joined) {
  const auto B = joined.B, H = w.H, Lk = joined.Lk, panel = kernels().panel, panels = divided_up(H * Lk, panel);
  const auto options = parts.front().keys.options();
  const auto rows = zeros({B, panels * panel, w.Eq}, w.storage);
  joined.key_bias = zeros({B, H * Lk}).to(options.device());
  each_entry(parts, Lk, [&](const EngineContext& part, int64_t b, int64_t first, int64_t n, int64_t taken) {
    const auto part_panels = divided_up(H * part.Lk, panel);
    const auto columns = at::empty({part_panels * panel, w.Eq}, options);
    copy_to(part.keys.select(0, b).view({part_panels, w.Eq, panel}).transpose(1, 2), columns.view({part_panels, panel, w.Eq}));
    const auto of_heads = [H](const Tensor& x, int64_t keys) { return x.narrow(0, 0, H * keys).unflatten(0, {H, keys}); };
    copy_to(of_heads(columns, n).narrow(1, 0, taken), of_heads(rows.select(0, b), Lk).narrow(1, first, taken));
    copy_to(of_heads(part.key_bias.select(0, b), n).narrow(1, 0, taken),
            of_heads(joined.key_bias.select(0, b), Lk).narrow(1, first, taken));
  });
  joined.keys = in_huge_pages(at::empty({B, panels * w.Eq * panel}, options));
  copy_to(rows.view({B, panels, panel, w.Eq}).transpose(2, 3), joined.keys.view({B, panels, w.Eq, panel}));
}

void join_folded_values(const EngineWeights& w, const std::vector<EngineContext>& parts, EngineContext& joined) {
  const auto B = joined.B, H = w.H, Lk = joined.Lk, panel = kernels().panel, panels = divided_up(w.Eo, panel);
  joined.values = zeros({B, panels * H * Lk * panel}, w.storage).to(parts.front().values.device());
  const auto to = joined.values.view({B, panels, H, Lk, panel});
  each_entry(parts, Lk, [&](const EngineContext& part, int64_t b, int64_t first, int64_t n, int64_t taken) {
    const auto from = part.values.select(0, b).narrow(0, 0, panels * H * n * panel).view({panels, H, n, panel});
    copy_to(from.narrow(2, 0, taken), to.select(0, b).narrow(2, first, taken));
  });
}

// The entries of x [B, ...] with these indices, int64 on the CPU. Only the first n along an axis (-1 is the last) are copied; memory
// behind them stays uninitialised.
Tensor entries_of(const Tensor& x, const Tensor& indices, int64_t axis, int64_t n) {
  if (!x.is_cpu() || !x.is_contiguous() || x.numel() == 0) return in_huge_pages(x.index_select(0, indices.to(x.device())));
  auto sizes = x.sizes().vec();
  sizes[0] = indices.numel();
  const auto selected = in_huge_pages(at::empty(sizes, x.options()));
  const auto along = sizes.end() + axis;
  const auto pieces = c10::multiply_integers(sizes.begin() + 1, along);
  const auto step = c10::multiply_integers(along + 1, sizes.end()) * x.element_size(), piece = *along * step;  // bytes
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* to = static_cast<std::byte*>(selected.mutable_data_ptr());
  each_part(sizes[0] * pieces, kOperationsOfAnAddition * n * step / 4 + 1,
            [&, entries = indices.const_data_ptr<int64_t>()](int64_t begin, int64_t end) {
              for (auto i = begin; i < end; ++i) {
                std::copy_n(from + (entries[i / pieces] * pieces + i % pieces) * piece, n * step, to + i * piece);
              }
            });
  return selected;
}

}  // namespace

EngineContext join(const EngineWeights& w, const std::vector<EngineContext>& parts, int64_t keys, int64_t capacity) {
  auto joined = empty_like(w, parts.front(), std::ranges::all_of(parts, is_one), keys, capacity);
  if (is_folded(joined.orders.logits)) join_folded_keys(w, parts, joined);
  if (is_folded(joined.orders.values)) join_folded_values(w, parts, joined);
  int64_t first = 0;
  for (const auto& part : parts) {
    const auto n = std::min(part.Lk, keys - first);
    copy_keys(w, part, joined, first, n);
    first += n;
  }
  joined.lengths.assign(static_cast<size_t>(joined.B), keys);
  return joined;
}

EngineContext append(const EngineWeights& w, const EngineContext& context, const EngineContext& more) {
  const auto Lk = context.Lk + more.Lk;
  const bool is_full = std::ranges::all_of(context.lengths, [&](int64_t length) { return length == context.Lk; });
  const bool fits = is_full && (!is_one(context) || is_one(more));
  if (!fits || !context.room || !context.room->claim(context.Lk, Lk)) {
    return join(w, {context, more}, Lk, Room::for_growth(Lk));
  }
  auto longer = context;
  longer.Lk = Lk;
  longer.lengths.assign(static_cast<size_t>(context.B), Lk);
  copy_keys(w, more, longer, context.Lk, more.Lk);
  return longer;
}

EngineContext select_entries(const EngineWeights& w, const EngineContext& context, const Tensor& indices) {
  const auto logits = context.orders.logits, values = context.orders.values;
  const auto Lk = context.Lk;
  const auto all = [&](const Tensor& x) { return entries_of(x, indices, -1, x.size(-1)); };
  // Of keys and values that are not folded: of their panels, or of their rows.
  const auto keys = [&](const Tensor& x) {
    if (!is_packed(context, logits)) return entries_of(x, indices, -2, Lk);
    return entries_of(x, indices, -3, divided_up(Lk, kernels().panel)).flatten(-3);
  };
  const auto rows = [&](const Tensor& x) {
    const auto entries = entries_of(x, indices, -2, Lk);
    return is_packed(context, values) ? entries.flatten(-3) : entries;
  };
  auto selected = context;
  selected.keys = is_folded(logits) ? all(context.keys) : keys(keys_of(w, context));
  selected.values = is_one(context) ? selected.keys : is_folded(values) ? all(context.values) : rows(values_of(w, context));
  if (context.key_bias.defined()) selected.key_bias = all(context.key_bias);
  selected.B = indices.size(0);
  selected.lengths.clear();
  for (int64_t i = 0; i < selected.B; ++i) {
    selected.lengths.push_back(context.lengths[static_cast<size_t>(indices.const_data_ptr<int64_t>()[i])]);
  }
  if (context.room) selected.room = std::make_shared<Room>(Lk, context.capacity);
  return selected;
}

}  // namespace xattn::detail
