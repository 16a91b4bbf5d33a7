// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "cpu/elementwise.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "frozen/engine.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// Calls f(b, first key, keys, threads) for blocks of the keys of all contexts. operations: for each key. Blocks are
// whole panels except at the end of a context, and all threads get equal numbers of panels; if these are too few for that, all
// threads compute one block after another.
template <class F>
void each_block(const EngineContext& context, int64_t operations, const F& f) {
  const auto& run = kernels();
  const auto panel = run.panel, threads = num_threads();
  const auto most_panels = (run.has_matrix_unit ? run.many_block_rows : 2 * run.block_rows) / panel;
  const auto panels_of = [panel](int64_t length) { return divided_up(length, panel); };
  int64_t panels = 0, keys = 0;
  for (const auto length : context.lengths) panels += panels_of(length), keys += length;
  const auto blocks_of = [&](int64_t begin, int64_t end, const TaskThreads& of_block) {
    for (int64_t b = 0; b < context.B && begin < end; ++b) {
      const auto length = context.lengths[static_cast<size_t>(b)], panels_here = panels_of(length);
      const auto stop = std::min(end, panels_here), blocks = divided_up(stop - begin, most_panels);
      for (int64_t i = 0; i < blocks; ++i) {
        const auto first = (begin + (stop - begin) * i / blocks) * panel,
                   last = (begin + (stop - begin) * (i + 1) / blocks) * panel;
        f(b, first, std::min(length, last) - first, of_block);
      }
      begin = std::max<int64_t>(0, begin - panels_here);
      end -= panels_here;
    }
  };
  const bool is_uneven = panels % threads != 0 && panels < 4 * threads;
  if (is_uneven && keys * operations >= kOperationsOfATask) return blocks_of(0, panels, TaskThreads{.all = true});
  TaskThreads{.all = true}.parts(panels, [&](int64_t begin, int64_t end) { blocks_of(begin, end, TaskThreads{.all = false}); });
}

// K' of each head, packed: [B, G, d x Lk].
Tensor project_keys(const EngineWeights& w, const EngineContext& context, const Tensor& key) {
  const auto& run = kernels();
  const auto inner = w.G * w.d, size = run.packed_size(w.d, context.capacity);
  const auto keys = in_huge_pages(at::empty({context.B, w.G, size}, key.options().dtype(w.storage)));
  each_block(context, 2 * w.Ek * inner, [&](int64_t b, int64_t first, int64_t n, const TaskThreads& threads) {
    const auto k = at::empty({n, inner}, key.options());
    threads.multiply(
        projection(data(key) + (b * context.Lk + first) * w.Ek, n, w.key, w.key_bias, mutable_data(k), context.Lk));
    normalise_rows(w.key_norm, data(k), mutable_data(k), n, inner);
    for (int64_t g = 0; g < w.G; ++g) {
      pack_transposed(data(k) + g * w.d, inner, w.d, n, keys, (b * w.G + g) * size + first * w.d);
    }
  });
  return keys;
}

// Xk Wk or Xv Wv, [B, Lk, n].
Tensor project_rows(const EngineContext& context, const Tensor& x, const Packed& weight, const Tensor& bias) {
  const auto projected = in_huge_pages(at::empty({context.B, context.Lk, weight.n}, x.options()));
  each_block(context, 2 * weight.k * weight.n, [&](int64_t b, int64_t first, int64_t n, const TaskThreads& threads) {
    const auto row = b * context.Lk + first;
    threads.multiply(
        projection(data(x) + row * weight.k, n, weight, bias, mutable_data(projected) + row * weight.n, context.Lk));
  });
  return projected;
}

// x.to(storage), on the kernels' threads.
Tensor stored(const Tensor& x, at::ScalarType storage) {
  if (storage == at::kFloat) return x;
  const auto result = at::empty(x.sizes(), x.options().dtype(storage));
  each_part(x.numel(), kOperationsOfAConversion,
            [from = data(x), to = result.mutable_data_ptr<at::BFloat16>()](int64_t begin, int64_t end) {
              std::copy(from + begin, from + end, to + begin);
            });
  return result;
}

// V of each head, packed: [B, G, Lk x e].
Tensor project_values(const EngineWeights& w, const EngineContext& context, const Tensor& value) {
  const auto& run = kernels();
  const auto size = run.packed_size(context.capacity, w.e), stride = context.capacity * run.panel;
  const auto values = in_huge_pages(at::empty({context.B, w.G, size}, value.options()));
  // If heads are whole panels, one product computes all.
  const auto products = w.e % run.panel == 0 ? 1 : w.G, columns = w.G / products * w.e;
  each_block(context, 2 * w.Ev * w.G * w.e, [&](int64_t b, int64_t first, int64_t n, const TaskThreads& threads) {
    for (int64_t i = 0; i < products; ++i) {
      auto* c = mutable_data(values) + (b * w.G + i) * size + first * run.panel;
      threads.multiply({.sizes = {n, columns, w.Ev},
                        .a = {data(value) + (b * context.Lk + first) * w.Ev, w.Ev},
                        .b = products == 1 ? packed(w.value) : packed(w.value_fold(), i),
                        .c = {c, run.panel, /*in_panels=*/true, stride},
                        .bias = data(w.value_bias) + i * w.e,
                        .all_rows = context.Lk});
      pad_last_panel(c, stride, n, columns);
    }
  });
  return stored(values, w.storage);
}

// Xk', packed: [B, Ek x Lk].
Tensor transpose_keys(const EngineWeights& w, const EngineContext& context, const Tensor& key) {
  const auto size = kernels().packed_size(w.Ek, context.capacity);
  const auto keys = in_huge_pages(at::empty({context.B, size}, key.options()));
  each_block(context, /*operations=*/0, [&](int64_t b, int64_t first, int64_t n, const TaskThreads&) {
    pack_transposed(data(key) + (b * context.Lk + first) * w.Ek, w.Ek, w.Ek, n, keys, b * size + first * w.Ek);
  });
  return keys;
}

// Xv, packed: [B, Lk x Ev].
Tensor pack_values(const EngineWeights& w, const EngineContext& context, const Tensor& value) {
  const auto& run = kernels();
  const auto size = run.packed_size(context.capacity, w.Ev);
  const auto values = in_huge_pages(at::empty({context.B, size}, value.options()));
  each_block(context, /*operations=*/0, [&](int64_t b, int64_t first, int64_t n, const TaskThreads&) {
    const auto* from = data(value) + (b * context.Lk + first) * w.Ev;
    auto* to = mutable_data(values) + b * size + first * run.panel;
    for (int64_t column = 0; column < w.Ev; column += run.panel) {
      run.pack(from + column, w.Ev, n, std::min(run.panel, w.Ev - column), to + column * context.capacity, Storage::float32);
    }
  });
  return values;
}

// Xk or Xv as they are, with room behind them: [B, capacity, features].
Tensor with_room(const EngineContext& context, const Tensor& x) {
  if (context.capacity == context.Lk) return x;
  const auto rows = in_huge_pages(at::empty({context.B, context.capacity, x.size(2)}, x.options()));
  copy_to(x, rows.narrow(1, 0, context.Lk));
  return rows;
}

// Wq (Wk' Xk') of all heads context by context, packed: context.keys [B, Eq x H * length]; and bq (Wk' Xk'): context.key_bias [B, H * Lk].
void fold_keys(const EngineWeights& w, EngineContext& context, const Tensor& key) {
  const auto& run = kernels();
  const auto projected = project_rows(context, key, w.key, w.key_bias);
  const auto features = w.G * w.d, columns = w.H * context.Lk;
  const auto rows = in_huge_pages(at::empty({context.B, columns, w.Eq}, key.options()));
  context.key_bias = at::empty({context.B, columns}, key.options());
  each(w.H * context.B, [&](int64_t i) {  // all contexts for one head, whose weights stay in the cache
    const auto h = i / context.B, b = i % context.B, n = context.lengths[static_cast<size_t>(b)], first = b * columns + h * n;
    const auto* x = data(projected) + b * context.Lk * features + h * w.G / w.H * w.d;
    multiply({.sizes = {n, w.Eq, w.d},
              .a = {x, features},
              .b = packed(w.query_fold()).from_row(h * w.d),
              .c = {mutable_data(rows) + first * w.Eq, w.Eq},
              .all_rows = context.Lk});
    multiply_transposed({.sizes = {1, n, w.d},
                         .a = {data(w.query_bias) + h * w.d, w.d},
                         .b = run.rows(x, features),
                         .c = {mutable_data(context.key_bias) + first, n}});
  });
  const auto size = run.packed_size(w.Eq, columns);
  context.keys = in_huge_pages(at::empty({context.B, size}, key.options().dtype(w.storage)));
  const auto block = 2 * run.panel, blocks = divided_up(columns, block);
  each(context.B * blocks, [&](int64_t i) {
    const auto b = i / blocks, first = i % blocks * block;
    const auto n = std::min(block, w.H * context.lengths[static_cast<size_t>(b)] - first);
    if (n <= 0) return;
    pack_transposed(data(rows) + (b * columns + first) * w.Eq, w.Eq, w.Eq, n, context.keys, b * size + first * w.Eq);
  });
}

// (Xv Wv) Wo of all heads stacked, packed: [B, H * length x Eo].
Tensor fold_values(const EngineWeights& w, const EngineContext& context, const Tensor& value) {
  const auto& run = kernels();
  const auto projected = project_rows(context, value, w.value, w.value_bias);
  const auto features = w.G * w.e, size = run.packed_size(w.H * context.Lk, w.Eo);
  const auto values = in_huge_pages(at::empty({context.B, size}, value.options()));
  each(w.H * context.B, [&](int64_t i) {
    const auto h = i / context.B, b = i % context.B, n = context.lengths[static_cast<size_t>(b)], rows = w.H * n;
    auto* c = mutable_data(values) + b * size + h * n * run.panel;
    multiply({.sizes = {n, w.Eo, w.e},
              .a = {data(projected) + b * context.Lk * features + h * w.G / w.H * w.e, features},
              .b = packed(w.output).from_row(h * w.e),
              .c = {c, run.panel, /*in_panels=*/true, rows * run.panel},
              .all_rows = context.Lk});
    pad_last_panel(c, rows * run.panel, n, w.Eo);
  });
  return stored(values, w.storage);
}

}  // namespace

EngineContext make_engine_context(const Orders& orders,
                                  const EngineWeights& w,
                                  const Tensor& key,
                                  const Tensor& value,
                                  std::vector<int64_t> lengths,
                                  ContextLayout layout,
                                  int64_t capacity) {
  EngineContext context;
  context.orders = orders;
  context.B = key.size(0);
  context.Lk = key.size(1);
  context.lengths = std::move(lengths);
  const auto Xk = contiguous(key.resolve_neg()), Xv = value.is_same(key) ? Xk : contiguous(value.resolve_neg());
  const bool raw_keys = is_raw(orders.logits), raw_values = is_raw(orders.values);
  if (raw_keys || raw_values) context.layout = layout;
  context.capacity = context.Lk;
  if (capacity > context.Lk && !is_folded(orders.logits) && !is_folded(orders.values)) {
    context.capacity = capacity;
    context.room = std::make_shared<Room>(context.Lk, capacity);
  }
  const bool packs = context.layout == ContextLayout::packed;
  if (raw_keys) {
    context.keys = packs ? transpose_keys(w, context, Xk) : with_room(context, Xk);
  } else if (orders.logits == Order::standard) {
    context.keys = project_keys(w, context, Xk);
  } else {
    fold_keys(w, context, Xk);
  }
  if (raw_values) {
    const bool one = raw_keys && Xv.is_same(Xk);
    context.values = packs ? pack_values(w, context, Xv) : one ? context.keys : with_room(context, Xv);
  } else {
    context.values = orders.values == Order::standard ? project_values(w, context, Xv) : fold_values(w, context, Xv);
  }
  return context;
}

}  // namespace xattn::detail
