// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "frozen/row_norm.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// f(b, first key, keys) for blocks of the keys that count, of whole panels except at the end; as many panels for each thread.
template <class F>
void each_block(const EngineSide& side, const F& f) {
  // Of a block: with AVX-512 two of those that a product works on at a time, with a unit for matrices one.
  const auto panel = kernels().panel, most_panels = (kernels().has_unit() ? 320 : 224) / panel;
  const auto panels_of = [panel](int64_t length) { return (length + panel - 1) / panel; };
  int64_t panels = 0;
  for (const auto length : side.lengths) panels += panels_of(length);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < side.B && begin < end; ++b) {
      const auto length = side.lengths[static_cast<size_t>(b)], its_panels = panels_of(length),
                 stop = std::min(end, its_panels);
      const auto blocks = (stop - begin + most_panels - 1) / most_panels;
      for (int64_t i = 0; i < blocks; ++i) {
        const auto first = (begin + (stop - begin) * i / blocks) * panel,
                   last = (begin + (stop - begin) * (i + 1) / blocks) * panel;
        f(b, first, std::min(length, last) - first);
      }
      begin = std::max<int64_t>(0, begin - its_panels);
      end -= its_panels;
    }
  });
}

// K' of each head, packed: [B, G, d x Lk].
Tensor project_keys(const EngineWeights& w, const EngineSide& side, const Tensor& key) {
  const auto& run = kernels();
  const auto inner = w.G * w.d, size = run.packed_size(w.d, side.Lk);
  const auto keys = in_huge_pages(at::empty({side.B, w.G, size}, w.query.data.options()));
  each_block(side, [&](int64_t b, int64_t first, int64_t n) {
    const auto k = at::empty({n, inner}, key.options());
    multiply({.m = n,
              .n = inner,
              .k = w.Ek,
              .a = data(key) + (b * side.Lk + first) * w.Ek,
              .a_stride = w.Ek,
              .b = packed(w.key),
              .c = mutable_data(k),
              .c_stride = inner,
              .bias = data(w.key_bias),
              .all_rows = side.Lk});
    normalise(w.key_norm, mutable_data(k), n, inner);
    for (int64_t g = 0; g < w.G; ++g) {
      pack_transposed(data(k) + g * w.d, inner, w.d, n, keys, (b * w.G + g) * size + first * w.d);
    }
  });
  return keys;
}

// Xk Wk or Xv Wv, [B, Lk, n].
Tensor project_rows(const EngineSide& side, const Tensor& x, const Packed& weight, const Tensor& bias) {
  const auto projected = in_huge_pages(at::empty({side.B, side.Lk, weight.n}, x.options()));
  each_block(side, [&](int64_t b, int64_t first, int64_t n) {
    const auto row = b * side.Lk + first;
    multiply({.m = n,
              .n = weight.n,
              .k = weight.k,
              .a = data(x) + row * weight.k,
              .a_stride = weight.k,
              .b = packed(weight),
              .c = mutable_data(projected) + row * weight.n,
              .c_stride = weight.n,
              .bias = data(bias),
              .all_rows = side.Lk});
  });
  return projected;
}

// V of each head, packed: [B, G, Lk x e].
Tensor project_values(const EngineWeights& w, const EngineSide& side, const Tensor& value) {
  const auto& run = kernels();
  const auto size = run.packed_size(side.Lk, w.e);
  const auto values = in_huge_pages(at::empty({side.B, w.G, size}, value.options()));
  // Heads of whole panels are one product.
  const auto products = w.e % run.panel == 0 ? 1 : w.G, columns = w.G / products * w.e;
  each_block(side, [&](int64_t b, int64_t first, int64_t n) {
    for (int64_t i = 0; i < products; ++i) {
      auto* c = mutable_data(values) + (b * w.G + i) * size + first * run.panel;
      multiply({.m = n,
                .n = columns,
                .k = w.Ev,
                .a = data(value) + (b * side.Lk + first) * w.Ev,
                .a_stride = w.Ev,
                .b = products == 1 ? packed(w.value) : packed(w.value_fold, i),
                .c = c,
                .c_stride = run.panel,
                .c_panel_stride = side.Lk * run.panel,
                .bias = data(w.value_bias) + i * w.e,
                .all_rows = side.Lk});
      fill_up(c, side.Lk * run.panel, n, columns);
    }
  });
  return values.to(w.query.data.scalar_type());
}

// Xk', packed: [B, Ek x Lk].
Tensor transpose_keys(const EngineWeights& w, const EngineSide& side, const Tensor& key) {
  const auto size = kernels().packed_size(w.Ek, side.Lk);
  const auto keys = in_huge_pages(at::empty({side.B, size}, key.options()));
  each_block(side, [&](int64_t b, int64_t first, int64_t n) {
    pack_transposed(data(key) + (b * side.Lk + first) * w.Ek, w.Ek, w.Ek, n, keys, b * size + first * w.Ek);
  });
  return keys;
}

// Xv, packed: [B, Lk x Ev].
Tensor pack_values(const EngineWeights& w, const EngineSide& side, const Tensor& value) {
  const auto& run = kernels();
  const auto size = run.packed_size(side.Lk, w.Ev);
  const auto values = in_huge_pages(at::empty({side.B, size}, value.options()));
  each_block(side, [&](int64_t b, int64_t first, int64_t n) {
    const auto* from = data(value) + (b * side.Lk + first) * w.Ev;
    auto* to = mutable_data(values) + b * size + first * run.panel;
    for (int64_t column = 0; column < w.Ev; column += run.panel) {
      run.pack(from + column, w.Ev, n, std::min(run.panel, w.Ev - column), to + column * side.Lk);
    }
  });
  return values;
}

// Wq (Wk' Xk') or (Wq Wk') Xk' of every head beside each other, packed: [B, Eq x H * length]; and what becomes of bq, [B, H * Lk].
void fold_keys(const EngineWeights& w, EngineSide& side, const Tensor& key) {
  const auto& run = kernels();
  const bool by_product = side.orders.logits == Order::prefold;  // never
  const auto projected = by_product ? key : project_rows(side, key, w.key, w.key_bias);
  const auto& bias = by_product ? w.logits_product_bias : w.query_bias;
  const auto features = projected.size(2), terms = by_product ? w.Ek : w.d, columns = w.H * side.Lk;
  const auto rows = in_huge_pages(at::empty({side.B, columns, w.Eq}, key.options()));
  side.key_bias = at::empty({side.B, columns}, key.options());
  each(w.H * side.B, [&](int64_t i) {  // of one head after the other, as its weights are then in the cache
    const auto h = i / side.B, b = i % side.B, n = side.lengths[static_cast<size_t>(b)], first = b * columns + h * n;
    const auto* x = data(projected) + b * side.Lk * features + (by_product ? 0 : h * w.G / w.H * w.d);
    multiply({.m = n,
              .n = w.Eq,
              .k = terms,
              .a = x,
              .a_stride = features,
              .b = by_product ? packed(w.logits_product_of_heads, h) : packed(w.query_fold).from_row(h * w.d),
              .c = mutable_data(rows) + first * w.Eq,
              .c_stride = w.Eq,
              .all_rows = side.Lk});
    multiply_transposed({.m = 1,
                         .n = n,
                         .k = terms,
                         .a = data(bias) + h * terms,
                         .a_stride = terms,
                         .b = {x, nullptr, features, 0},
                         .c = mutable_data(side.key_bias) + first,
                         .c_stride = n});
  });
  const auto size = run.packed_size(w.Eq, columns);
  side.keys = in_huge_pages(at::empty({side.B, size}, w.query.data.options()));
  const auto block = 2 * run.panel, blocks = (columns + block - 1) / block;
  each(side.B * blocks, [&](int64_t i) {
    const auto b = i / blocks, first = i % blocks * block;
    const auto n = std::min(block, w.H * side.lengths[static_cast<size_t>(b)] - first);
    if (n <= 0) return;
    pack_transposed(data(rows) + (b * columns + first) * w.Eq, w.Eq, w.Eq, n, side.keys, b * size + first * w.Eq);
  });
}

// (Xv Wv) Wo, or Xv (Wv Wo), of every head below each other, packed: [B, H * length x Eo].
Tensor fold_values(const EngineWeights& w, const EngineSide& side, const Tensor& value) {
  const auto& run = kernels();
  const bool by_product = side.orders.values == Order::prefold;  // never
  const auto projected = by_product ? value : project_rows(side, value, w.value, w.value_bias);
  const auto features = projected.size(2), size = run.packed_size(w.H * side.Lk, w.Eo);
  const auto values = in_huge_pages(at::empty({side.B, size}, value.options()));
  each(w.H * side.B, [&](int64_t i) {
    const auto h = i / side.B, b = i % side.B, n = side.lengths[static_cast<size_t>(b)], rows = w.H * n;
    const auto* a = data(projected) + b * side.Lk * features;
    const auto weight = by_product ? packed(w.values_product_of_heads, h) : packed(w.output).from_row(h * w.e);
    auto* c = mutable_data(values) + b * size + h * n * run.panel;
    multiply({.m = n,
              .n = w.Eo,
              .k = by_product ? w.Ev : w.e,
              .a = by_product ? a : a + h * w.G / w.H * w.e,
              .a_stride = features,
              .b = weight,
              .c = c,
              .c_stride = run.panel,
              .c_panel_stride = rows * run.panel,
              .bias = by_product ? data(w.values_product_bias) + h * w.Eo : nullptr,
              .all_rows = side.Lk});
    fill_up(c, rows * run.panel, n, w.Eo);
  });
  return values.to(w.query.data.scalar_type());
}

}  // namespace

EngineSide make_side(const Orders& orders,
                     const EngineWeights& w,
                     const Tensor& key,
                     const Tensor& value,
                     std::vector<int64_t> lengths,
                     int64_t query_rows) {
  EngineSide side;
  side.orders = orders;
  side.B = key.size(0);
  side.Lk = key.size(1);
  side.lengths = std::move(lengths);
  const auto Xk = key.resolve_neg().contiguous(), Xv = value.is_same(key) ? Xk : value.resolve_neg().contiguous();
  if (is_raw(orders.logits) || is_raw(orders.values)) side.raw = raw_for(query_rows, w.H);
  switch (orders.logits) {
    case Order::standard: side.keys = project_keys(w, side, Xk); break;
    case Order::fold_into_query:
    case Order::prefold: side.keys = side.raw != Raw::packed ? Xk : transpose_keys(w, side, Xk); break;
    case Order::fold_into_context: fold_keys(w, side, Xk); break;
  }
  switch (orders.values) {
    case Order::standard: side.values = project_values(w, side, Xv); break;
    case Order::fold_into_query:
    case Order::prefold: side.values = side.raw != Raw::packed ? Xv : pack_values(w, side, Xv); break;
    case Order::fold_into_context: side.values = fold_values(w, side, Xv); break;
  }
  return side;
}

}  // namespace xattn::detail
