// SPDX-License-Identifier: Apache-2.0
#include "engine.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "check.h"
#include "huge_pages.h"
#include "kernels/kernels.h"

namespace xattn::detail {

using at::Tensor;

namespace {

constexpr int64_t kScratch = 3 << 16;  // floats of a task's scratch: what fits into a core's cache beside a panel of weights
constexpr int64_t kLeastRows = 14;     // rows from which a product runs at its full speed, about, on weights that are near
constexpr int64_t kMostRows = 112;     // and on those that come from memory for each task anew
constexpr int64_t kNear = 2 << 20;     // bytes
constexpr int64_t kRowsNotToPackFor = 24;  // rows of a product with keys up to which packing these takes longer than it saves
constexpr int64_t kRowsOfATeam = 4;        // per thread: with fewer rows all threads work on the same rows

const float* data(const Tensor& x) {
  return x.const_data_ptr<float>();
}
float* mutable_data(const Tensor& x) {
  return x.mutable_data_ptr<float>();
}

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// ---- Products of either storage --------------------------------------------------------------------------------------------

// A RightSide of float32 or bfloat16: one of the two pointers is null.
struct Right {
  const float* wide = nullptr;
  const Bfloat16* half = nullptr;
  int64_t row_stride = 0, panel_stride = 0;

  Right advanced(int64_t elements) const {
    return {wide ? wide + elements : nullptr, half ? half + elements : nullptr, row_stride, panel_stride};
  }
  Right from_row(int64_t row) const { return advanced(row * row_stride); }
  Right from_panel(int64_t panel) const { return advanced(panel * panel_stride); }
};

Right right(const Tensor& x, int64_t offset, int64_t row_stride, int64_t panel_stride) {
  if (x.scalar_type() == at::kFloat) return {data(x) + offset, nullptr, row_stride, panel_stride};
  return {nullptr, static_cast<const Bfloat16*>(x.const_data_ptr()) + offset, row_stride, panel_stride};
}

Right packed(const Tensor& x, int64_t offset, int64_t k) {
  return right(x, offset, kernels().panel, k * kernels().panel);
}

Right packed(const Packed& p, int64_t which = 0) {
  return packed(p.data, which * kernels().packed_size(p.k, p.n), p.k);
}

Right plain_rows(const Tensor& x, int64_t offset, int64_t row_stride) {
  return right(x, offset, row_stride, kernels().panel);
}

// A Product of either.
struct Step {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;
  Right b;
  float* c = nullptr;
  int64_t c_stride = 0;
  int64_t c_panel_stride = 0;
  const float* bias = nullptr;
};

template <class Element>
ProductOf<Element> as_product(const Step& s, const Element* b) {
  return {.m = s.m,
          .n = s.n,
          .k = s.k,
          .a = s.a,
          .a_stride = s.a_stride,
          .b = {b, s.b.row_stride, s.b.panel_stride},
          .c = s.c,
          .c_stride = s.c_stride,
          .c_panel_stride = s.c_panel_stride,
          .bias = s.bias};
}

void multiply(const Step& s) {
  s.b.half ? kernels().product_bfloat16(as_product(s, s.b.half)) : kernels().product(as_product(s, s.b.wide));
}

// The same with b as rows that are its columns.
void multiply_transposed(const Step& s) {
  s.b.half ? kernels().product_transposed_bfloat16(as_product(s, s.b.half))
           : kernels().product_transposed(as_product(s, s.b.wide));
}

// Rows of b [n, k], packed as columns into place `offset` of `to`.
void pack_transposed(const float* b, int64_t stride, int64_t k, int64_t n, const Tensor& to, int64_t offset) {
  if (to.scalar_type() == at::kFloat) {
    kernels().pack_transposed(b, stride, k, n, mutable_data(to) + offset);
  } else {
    kernels().pack_transposed_bfloat16(b, stride, k, n, static_cast<Bfloat16*>(to.mutable_data_ptr()) + offset);
  }
}

// Matrices [count, n, k], as torch stores weights, each as a right side [k, n].
Packed pack_weights(const Tensor& weights, at::ScalarType storage) {
  const auto w = weights.contiguous();
  const auto count = w.size(0), n = w.size(1), k = w.size(2), size = kernels().packed_size(k, n);
  Packed result{in_huge_pages(at::empty({count * size}, w.options().dtype(storage))), k, n};
  for (int64_t i = 0; i < count; ++i) pack_transposed(data(w) + i * n * k, k, k, n, result.data, i * size);
  return result;
}

Tensor or_zeros(const Tensor& bias, const Tensor& like, int64_t n) {
  return bias.defined() ? bias.contiguous() : at::zeros({n}, like.options());
}

// ---- Work and threads ------------------------------------------------------------------------------------------------------

int64_t threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

template <class F>
void each(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Who does the steps of a task: one thread, or all of them together.
struct Team {
  bool all;

  template <class F>
  void each(int64_t n, const F& f) const {
    if (all) return detail::each(n, f);
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  // f(begin, end) for parts of [0, n).
  template <class F>
  void parts(int64_t n, const F& f) const {
    if (!all) return f(0, n);
    at::parallel_for(0, n, 1, f);
  }

  // A product by ranges of whole panels, into plain rows.
  void multiply(const Step& step) const {
    const auto panel = kernels().panel;
    parts((step.n + panel - 1) / panel, [&](int64_t begin, int64_t end) {
      auto part = step;
      part.n = std::min(step.n, end * panel) - begin * panel;
      part.b = step.b.from_panel(begin);
      part.c += begin * panel;
      if (step.bias) part.bias += begin * panel;
      detail::multiply(part);
    });
  }
};

// A piece of memory, given out from its front.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  float* take(int64_t floats) { return std::exchange(next_, next_ + round_up(floats, 16)); }

 private:
  float* next_;
};

bool is_raw(Order order) {
  return order == Order::fold_into_query || order == Order::prefold;
}
bool is_folded(Order order) {
  return order == Order::fold_into_context || order == Order::prefold_into_context;
}

// ---- Norms -----------------------------------------------------------------------------------------------------------------

EngineNorm engine_norm(const Norm& norm) {
  if (!norm) return {};
  const auto& o = norm->options;
  return {o.kind(), o.size(), o.eps(), norm->weight.contiguous(), norm->bias.defined() ? norm->bias.contiguous() : Tensor()};
}

// The sum of f(x[i]), in as many parts as vectors have lanes.
template <class F>
float sum_of(const float* x, int64_t n, const F& f) {
  constexpr int64_t kParts = 16;
  float parts[kParts] = {};
  const auto whole = n / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
    for (int64_t j = 0; j < kParts; ++j) parts[j] += f(x[i + j]);
  }
  for (auto i = whole; i < n; ++i) parts[i - whole] += f(x[i]);
  float sum = 0;
  for (const auto part : parts) sum += part;
  return sum;
}

// Rows [n, features] of projected queries or keys, in place.
void normalise(const EngineNorm& norm, float* rows, int64_t n, int64_t features) {
  if (norm.kind == NormKind::none) return;
  const auto size = norm.size;
  const auto* weight = data(norm.weight);
  const auto* bias = norm.bias.defined() ? data(norm.bias) : nullptr;
  for (auto* x = rows; x < rows + n * features; x += size) {
    float mean = 0;
    if (norm.kind == NormKind::layer) {
      mean = sum_of(x, size, [](float value) { return value; }) / static_cast<float>(size);
    }
    const auto squares = sum_of(x, size, [mean](float value) { return (value - mean) * (value - mean); });
    const auto factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(size) + norm.eps));
    for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - mean) * factor * weight[i];
    for (int64_t i = 0; bias && i < size; ++i) x[i] += bias[i];
  }
}

// ---- The key/value side ----------------------------------------------------------------------------------------------------

// The last panel of a matrix that has so many columns, n rows of it, behind these with zeros.
void fill_up(float* panels, int64_t panel_stride, int64_t n, int64_t columns) {
  const auto panel = kernels().panel, used = columns % panel;
  if (used == 0) return;
  auto* last = panels + columns / panel * panel_stride;
  for (int64_t row = 0; row < n; ++row) std::fill(last + row * panel + used, last + (row + 1) * panel, 0.0f);
}

// f(b, first key, keys) for blocks of the keys that count, of whole panels except at the end; as many panels for each thread.
template <class F>
void each_block(const EngineSide& side, const F& f) {
  constexpr int64_t kMostPanels = 7;  // with AVX-512 two blocks of the rows that a product works on at a time
  const auto panel = kernels().panel;
  const auto panels_of = [panel](int64_t length) { return (length + panel - 1) / panel; };
  int64_t panels = 0;
  for (const auto length : side.lengths) panels += panels_of(length);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < side.B && begin < end; ++b) {
      const auto length = side.lengths[static_cast<size_t>(b)], its_panels = panels_of(length),
                 stop = std::min(end, its_panels);
      for (int64_t at = begin; at < stop; at += kMostPanels) {
        const auto first = at * panel;
        f(b, first, std::min(length, std::min(stop, at + kMostPanels) * panel) - first);
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
              .bias = data(w.key_bias)});
    normalise(w.key_norm, mutable_data(k), n, inner);
    for (int64_t g = 0; g < w.G; ++g) {
      pack_transposed(data(k) + g * w.d, inner, w.d, n, keys, (b * w.G + g) * size + first * w.d);
    }
  });
  return keys;
}

// Xk Wk or Xv Wv, [B, Lk, n].
Tensor project(const EngineSide& side, const Tensor& x, const Packed& weight, const Tensor& bias) {
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
              .bias = data(bias)});
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
                .bias = data(w.value_bias) + i * w.e});
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

// Wq (Wk' Xk') or (Wq Wk') Xk' of every head beside each other, packed: [B, Eq x H * length]; and what becomes of bq, [B, H * Lk].
void fold_keys(const EngineWeights& w, EngineSide& side, const Tensor& key) {
  const auto& run = kernels();
  const bool by_product = side.orders.logits == Order::prefold_into_context;
  const auto projected = by_product ? key : project(side, key, w.key, w.key_bias);
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
              .c_stride = w.Eq});
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
  const bool by_product = side.orders.values == Order::prefold_into_context;
  const auto projected = by_product ? value : project(side, value, w.value, w.value_bias);
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
              .bias = by_product ? data(w.values_product_bias) + h * w.Eo : nullptr});
    fill_up(c, rows * run.panel, n, w.Eo);
  });
  return values.to(w.query.data.scalar_type());
}

// ---- A call ----------------------------------------------------------------------------------------------------------------

// One restriction of the mask, [B|1, H|1, Lq|1, Lk], with strides of 0 for axes of one.
template <class T>
struct MaskRows {
  const T* data = nullptr;
  int64_t b = 0, h = 0, i = 0;

  explicit MaskRows(const Tensor& x) {
    if (!x.defined()) return;
    data = x.const_data_ptr<T>();
    const auto stride = [&x](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
    b = stride(0), h = stride(1), i = stride(2);
  }
  const T* at(int64_t batch, int64_t head, int64_t row) const { return data ? data + batch * b + head * h + row * i : nullptr; }
};

class Attend {
 public:
  Attend(const EngineWeights& w, const EngineSide& side, const EngineCall& call)
      : w_(w),
        side_(side),
        query_(call.query.defined() ? call.query.contiguous() : Tensor()),
        folded_(call.folded_query),
        queries_(query_.defined() && side.B > 0 ? query_.size(0) / side.B : 1),
        Lq_(query_.defined() ? query_.size(1) : folded_.size(0)),
        rows_(queries_ * Lq_),
        keep_tensor_(call.mask.keep(Lq_, side.Lk, at::kCPU)),
        bias_tensor_(call.mask.additive()),
        wanted_(call.weights),
        weight_heads_(call.weight_heads) {
    if (keep_tensor_.defined()) keep_tensor_ = keep_tensor_.contiguous();
    if (bias_tensor_.defined()) bias_tensor_ = bias_tensor_.to(at::kFloat).contiguous();
    keep_ = MaskRows<bool>(keep_tensor_);
    bias_ = MaskRows<float>(bias_tensor_);
    const bool kind_has_empty_rows = call.mask.empty_rows(Lq_, side.Lk, at::kCPU).defined();
    all_have_keys_ = !kind_has_empty_rows && std::ranges::all_of(side.lengths, [](int64_t length) { return length > 0; });
  }

  // Into a result of its sizes.
  void run(const AttentionResult& result) {
    output_ = mutable_data(result.output);
    weights_ = result.weights.defined() ? mutable_data(result.weights) : nullptr;

    const auto rows = side_.B * rows_, workers = threads();
    if (rows == 0) return;
    const Team team{workers > 1 && rows < kRowsOfATeam * workers};
    const auto least = std::clamp(kLeastRows * bytes_of_a_task() / kNear, kLeastRows, kMostRows);
    const auto most = std::max(least, kScratch / floats_of_a_row(team));
    const auto rounds = (rows + most * workers - 1) / (most * workers);
    const auto share = team.all ? rows : (rows + rounds * workers - 1) / (rounds * workers);
    const auto tasks = (rows + share - 1) / share;
    const auto size = share * floats_of_a_row(team) + 16 * 16;
    const auto slots = team.all ? 1 : std::min(tasks, workers);
    const auto scratch = at::empty({slots, size}, at::kFloat);
    const auto work = [&](int64_t task, int64_t slot) {
      run_rows(task * share, std::min(rows, (task + 1) * share), Scratch(mutable_data(scratch) + slot * size), team);
    };
    if (tasks == 1) {
      work(0, 0);
    } else {
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) work(task, slots == 1 ? 0 : at::get_thread_num());
      });
    }
  }

 private:
  // What every task reads besides its rows: weights, and a context.
  int64_t bytes_of_a_task() const {
    const auto bytes = [](const Tensor& x) { return static_cast<int64_t>(x.nbytes()); };
    int64_t total = (bytes(side_.keys) + bytes(side_.values)) / std::max<int64_t>(1, side_.B);
    const auto order = side_.orders.logits;
    if (query_.defined() && !is_folded(order)) {
      total += order == Order::prefold ? bytes(w_.logits_product.data) : bytes(w_.query.data);
      if (order == Order::fold_into_query) total += bytes(w_.key_fold.data);
    }
    if (is_folded(side_.orders.values)) return total;
    if (side_.orders.values == Order::prefold) return total + bytes(w_.values_product.data);
    return total + bytes(w_.output.data) + (side_.orders.values == Order::standard ? 0 : bytes(w_.value_fold.data));
  }

  // Whether one head after the other is done from logits to mixed values.
  bool by_heads() const { return side_.orders == Orders{}; }

  // Whether the mixed values of a head take the place of its projected query, which nobody reads any more.
  bool in_place() const { return by_heads() && w_.d == w_.e && query_.defined(); }

  // What run_rows takes for each row.
  int64_t floats_of_a_row(const Team& team) const {
    const auto& w = w_;
    int64_t floats = by_heads() && !team.all ? side_.Lk : w.H * side_.Lk;
    if (!is_folded(side_.orders.logits) && query_.defined())
      floats += w.H * w.d + (is_raw(side_.orders.logits) ? w.H * w.Ek : 0);
    if (!is_folded(side_.orders.values) && !in_place()) floats += w.H * w.e + (is_raw(side_.orders.values) ? w.H * w.Ev : 0);
    return floats + w.H + 16;
  }

  // The whole chain for rows [begin, end) of all B * n * Lq.
  void run_rows(int64_t begin, int64_t end, Scratch scratch, const Team& team) const {
    const auto& w = w_;
    const auto n = end - begin;
    auto* output = output_ + begin * w.Eo;
    int64_t stride = 0;
    const bool raw = is_raw(side_.orders.values), folded = is_folded(side_.orders.values);
    const auto width = w.H * (raw ? w.Ev : w.e);
    auto* mixed = folded ? nullptr : scratch.take(n * width);
    const auto* rows = query_.defined() ? logits_rows(begin, n, in_place() ? mixed : nullptr, scratch, team, stride) : nullptr;
    if (!rows) stride = folded_.size(1);
    auto* log_sum_exp = all_have_keys_ || !raw ? nullptr : scratch.take(n * w.H);
    for (int64_t first = begin; first < end;) {  // the part of each context
      const auto b = first / rows_, last = std::min(end, (b + 1) * rows_);
      const Segment segment{.b = b,
                            .first = first,
                            .n = last - first,
                            .keys = side_.lengths[static_cast<size_t>(b)],
                            .rows = rows ? rows + (first - begin) * stride : data(folded_) + first % rows_ * stride,
                            .stride = stride,
                            .mixed = folded ? output + (first - begin) * w.Eo : mixed + (first - begin) * width,
                            .log_sum_exp = log_sum_exp ? log_sum_exp + (first - begin) * w.H : nullptr};
      run_segment(segment, scratch, team);
      first = last;
    }
    if (!folded) finish(mixed, log_sum_exp, n, output, scratch, team);
  }

  // What meets the keys: projected, in `place` if that is given, folded, or the query itself.
  const float* logits_rows(int64_t begin, int64_t n, float* place, Scratch& scratch, const Team& team, int64_t& stride) const {
    const auto& w = w_;
    const auto* query = data(query_) + begin * w.Eq;
    const auto order = side_.orders.logits;
    stride = w.Eq;
    if (is_folded(order)) return query;
    stride = w.H * (order == Order::standard ? w.d : w.Ek);
    auto* rows = place ? place : scratch.take(n * stride);
    if (order == Order::prefold) {
      team.multiply({.m = n,
                     .n = stride,
                     .k = w.Eq,
                     .a = query,
                     .a_stride = w.Eq,
                     .b = packed(w.logits_product),
                     .c = rows,
                     .c_stride = stride,
                     .bias = data(w.logits_product_bias)});
      return rows;
    }
    const auto inner = w.H * w.d;
    auto* projected = order == Order::standard ? rows : scratch.take(n * inner);
    team.multiply({.m = n,
                   .n = inner,
                   .k = w.Eq,
                   .a = query,
                   .a_stride = w.Eq,
                   .b = packed(w.query),
                   .c = projected,
                   .c_stride = inner,
                   .bias = data(w.query_bias)});
    team.parts(n, [&](int64_t from, int64_t to) { normalise(w.query_norm, projected + from * inner, to - from, inner); });
    if (order == Order::standard) return rows;
    team.each(w.H, [&](int64_t h) {
      multiply({.m = n,
                .n = w.Ek,
                .k = w.d,
                .a = projected + h * w.d,
                .a_stride = inner,
                .b = packed(w.key_fold).from_row(h * w.G / w.H * w.d),
                .c = rows + h * w.Ek,
                .c_stride = stride});
    });
    return rows;
  }

  // Rows of one context, and where their results go.
  struct Segment {
    int64_t b, first, n, keys;
    const float* rows;
    int64_t stride;
    float* mixed;
    float* log_sum_exp;
  };

  void run_segment(const Segment& s, Scratch scratch, const Team& team) const {
    if (s.keys == 0) return clear(s);
    if (by_heads()) return run_heads(s, scratch, team);
    auto* logits = scratch.take(s.n * w_.H * s.keys);  // [n, H, keys]
    meet(s, logits, team);
    team.parts(s.n * w_.H, [&](int64_t begin, int64_t end) { softmax(s, logits, begin, end); });
    if (weights_) {
      for (int64_t h = 0; h < w_.H; ++h) give_weights(s, h, logits + h * s.keys, w_.H * s.keys);
    }
    mix(s, logits, team);
  }

  // Standard orders: one head after the other, so that its logits stay in the cache.
  void run_heads(const Segment& s, Scratch scratch, const Team& team) const {
    const auto& w = w_;
    const auto size = s.n * s.keys;
    auto* all = scratch.take(team.all ? w.H * size : size);
    const bool share_weights = team.all && wanted_ == AttentionWeights::mean;  // several heads add to one place
    team.each(w.H, [&](int64_t h) {
      auto* logits = team.all ? all + h * size : all;
      meet_head(s, h, logits, s.keys);
      for (int64_t row = 0, n = 0; row < s.n; row += n) {  // of one query after the other
        const auto i = (s.first + row) % Lq_;
        n = std::min(s.n - row, Lq_ - i);
        kernels().softmax({.rows = n,
                           .n = s.keys,
                           .x = logits + row * s.keys,
                           .x_stride = s.keys,
                           .scale = w.scale,
                           .bias = bias_.at(s.b, h, i),
                           .bias_stride = bias_.i,
                           .keep = keep_.at(s.b, h, i),
                           .keep_stride = keep_.i});
      }
      if (weights_ && !share_weights) give_weights(s, h, logits, s.keys);
      mix_head(s, h, logits, s.keys);
    });
    for (int64_t h = 0; share_weights && h < w.H; ++h) give_weights(s, h, all + h * size, s.keys);
  }

  void meet_head(const Segment& s, int64_t h, float* logits, int64_t stride) const {
    const auto g = h * w_.G / w_.H, size = kernels().packed_size(w_.d, side_.Lk);
    multiply({.m = s.n,
              .n = s.keys,
              .k = w_.d,
              .a = s.rows + h * w_.d,
              .a_stride = s.stride,
              .b = packed(side_.keys, (s.b * w_.G + g) * size, w_.d),
              .c = logits,
              .c_stride = stride});
  }

  void mix_head(const Segment& s, int64_t h, const float* weights, int64_t stride) const {
    const auto g = h * w_.G / w_.H, size = side_.values.size(2);
    multiply({.m = s.n,
              .n = w_.e,
              .k = s.keys,
              .a = weights,
              .a_stride = stride,
              .b = packed(side_.values, (s.b * w_.G + g) * size, side_.Lk),
              .c = s.mixed + h * w_.e,
              .c_stride = w_.H * w_.e});
  }

  // logits [n, H, keys]
  void meet(const Segment& s, float* logits, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.logits;
    if (order == Order::standard) {
      return team.each(w.H, [&](int64_t h) { meet_head(s, h, logits + h * s.keys, w.H * s.keys); });
    }
    const auto first = s.b * side_.keys.stride(0);
    if (side_.keys_are_rows) {
      return team.parts(s.keys, [&](int64_t begin, int64_t end) {
        multiply_transposed({.m = s.n * w.H,
                             .n = end - begin,
                             .k = w.Ek,
                             .a = s.rows,
                             .a_stride = w.Ek,
                             .b = right(side_.keys, first + begin * w.Ek, w.Ek, 0),
                             .c = logits + begin,
                             .c_stride = s.keys});
      });
    }
    if (is_raw(order)) {
      return team.multiply({.m = s.n * w.H,
                            .n = s.keys,
                            .k = w.Ek,
                            .a = s.rows,
                            .a_stride = w.Ek,
                            .b = packed(side_.keys, first, w.Ek),
                            .c = logits,
                            .c_stride = s.keys});
    }
    team.multiply({.m = s.n,
                   .n = w.H * s.keys,
                   .k = w.Eq,
                   .a = s.rows,
                   .a_stride = s.stride,
                   .b = packed(side_.keys, first, w.Eq),
                   .c = logits,
                   .c_stride = w.H * s.keys,
                   .bias = data(side_.key_bias) + s.b * w.H * side_.Lk});
  }

  // Rows [begin, end) of logits [n * H, keys].
  void softmax(const Segment& s, float* logits, int64_t begin, int64_t end) const {
    const auto& w = w_;
    const bool alike = bias_.h == 0 && bias_.i == 0 && keep_.h == 0 && keep_.i == 0;
    const auto step = alike ? end - begin : 1;
    for (auto row = begin; row < end; row += step) {
      const auto h = row % w.H, i = (s.first + row / w.H) % Lq_;
      kernels().softmax({.rows = step,
                         .n = s.keys,
                         .x = logits + row * s.keys,
                         .x_stride = s.keys,
                         .scale = w.scale,
                         .bias = bias_.at(s.b, h, i),
                         .keep = keep_.at(s.b, h, i),
                         .log_sum_exp = s.log_sum_exp ? s.log_sum_exp + row : nullptr});
    }
  }

  void mix(const Segment& s, const float* weights, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.values;
    if (order == Order::standard) {
      return team.each(w.H, [&](int64_t h) { mix_head(s, h, weights + h * s.keys, w.H * s.keys); });
    }
    if (is_raw(order)) {
      return team.multiply({.m = s.n * w.H,
                            .n = w.Ev,
                            .k = s.keys,
                            .a = weights,
                            .a_stride = s.keys,
                            .b = plain_rows(side_.values, s.b * side_.Lk * w.Ev, w.Ev),
                            .c = s.mixed,
                            .c_stride = w.Ev});
    }
    const auto rows = w.H * s.keys;
    team.multiply({.m = s.n,
                   .n = w.Eo,
                   .k = rows,
                   .a = weights,
                   .a_stride = rows,
                   .b = packed(side_.values, s.b * side_.values.size(1), rows),
                   .c = s.mixed,
                   .c_stride = w.Eo,
                   .bias = data(w.output_bias)});
  }

  // From what the weights mixed to the output.
  void finish(float* mixed, const float* log_sum_exp, int64_t n, float* output, Scratch& scratch, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.values;
    const bool bias_is_in = order == Order::standard;
    const auto* bias = data(bias_is_in || log_sum_exp ? w.output_bias : w.output_bias_after_value);
    if (order == Order::prefold) {
      const auto inner = w.H * w.Ev;
      team.multiply({.m = n,
                     .n = w.Eo,
                     .k = inner,
                     .a = mixed,
                     .a_stride = inner,
                     .b = packed(w.values_product),
                     .c = output,
                     .c_stride = w.Eo,
                     .bias = bias});
      if (log_sum_exp) add_bias(log_sum_exp, n, data(w.values_product_bias), w.Eo, output, 0);
      return;
    }
    const auto inner = w.H * w.e;
    if (order == Order::fold_into_query) {
      const auto* raw = mixed;
      mixed = scratch.take(n * inner);
      team.each(w.H, [&](int64_t h) {
        multiply({.m = n,
                  .n = w.e,
                  .k = w.Ev,
                  .a = raw + h * w.Ev,
                  .a_stride = w.H * w.Ev,
                  .b = packed(w.value_fold, h * w.G / w.H),
                  .c = mixed + h * w.e,
                  .c_stride = inner});
      });
      if (log_sum_exp) add_bias(log_sum_exp, n, data(w.value_bias), w.e, mixed, w.e);
    }
    team.multiply({.m = n,
                   .n = w.Eo,
                   .k = inner,
                   .a = mixed,
                   .a_stride = inner,
                   .b = packed(w.output),
                   .c = output,
                   .c_stride = w.Eo,
                   .bias = bias});
  }

  // To each row, the bias of every head that has a key there: at `step` from the head before, or all in one place.
  void add_bias(const float* log_sum_exp, int64_t n, const float* bias, int64_t size, float* x, int64_t step) const {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t h = 0; h < w_.H; ++h) {
        if (std::isinf(log_sum_exp[row * w_.H + h])) continue;
        const auto* from = bias + (step == 0 ? h : h * w_.G / w_.H) * size;
        auto* to = x + row * (step == 0 ? size : w_.H * size) + h * step;
        for (int64_t j = 0; j < size; ++j) to[j] += from[j];
      }
    }
  }

  // A context without keys.
  void clear(const Segment& s) const {
    if (is_folded(side_.orders.values)) {
      for (int64_t i = 0; i < s.n; ++i) std::copy_n(data(w_.output_bias), w_.Eo, s.mixed + i * w_.Eo);
      return;
    }
    std::fill_n(s.mixed, s.n * w_.H * (is_raw(side_.orders.values) ? w_.Ev : w_.e), 0.0f);
    if (s.log_sum_exp) std::fill_n(s.log_sum_exp, s.n * w_.H, -std::numeric_limits<float>::infinity());
  }

  // What was asked for of one head's weights, rows `stride` apart.
  void give_weights(const Segment& s, int64_t h, const float* weights, int64_t stride) const {
    if (wanted_ == AttentionWeights::mean) return add_to_mean(s, weights, stride);
    if (weight_heads_.empty()) return copy_weights(s, h, w_.H, weights, stride);
    const auto count = static_cast<int64_t>(weight_heads_.size());
    for (int64_t i = 0; i < count; ++i) {
      if (weight_heads_[static_cast<size_t>(i)] == h) copy_weights(s, i, count, weights, stride);
    }
  }

  void copy_weights(const Segment& s, int64_t place, int64_t places, const float* weights, int64_t stride) const {
    for (int64_t i = 0; i < s.n; ++i) {
      const auto row = s.first + i;
      std::copy_n(weights + i * stride, s.keys, weights_ + ((row / Lq_ * places + place) * Lq_ + row % Lq_) * side_.Lk);
    }
  }

  void add_to_mean(const Segment& s, const float* weights, int64_t stride) const {
    const auto share = 1.0f / static_cast<float>(w_.H);
    for (int64_t i = 0; i < s.n; ++i) {
      auto* to = weights_ + (s.first + i) * side_.Lk;
      for (int64_t j = 0; j < s.keys; ++j) to[j] += share * weights[i * stride + j];
    }
  }

  const EngineWeights& w_;
  const EngineSide& side_;
  Tensor query_, folded_;
  int64_t queries_, Lq_, rows_;  // queries for a context, rows of one, rows for a context
  Tensor keep_tensor_, bias_tensor_;
  MaskRows<bool> keep_{Tensor()};
  MaskRows<float> bias_{Tensor()};
  AttentionWeights wanted_;
  const std::vector<int64_t>& weight_heads_;
  bool all_have_keys_ = false;
  float* output_ = nullptr;
  float* weights_ = nullptr;
};

}  // namespace

EngineWeights::EngineWeights(const LayerWeights& l, const Products& products, at::ScalarType storage)
    : H(l.H), G(l.G), d(l.d), e(l.e), Eq(l.query.size(1)), Ek(l.key.size(1)), Ev(l.value.size(1)), Eo(l.output.size(0)) {
  for (const auto* weight : {&l.query, &l.key, &l.value, &l.output}) {
    check_type(weight->is_cpu() && weight->scalar_type() == at::kFloat, "engine",
               "weights must be float32 on the CPU, but are {} on {}.", type_of(*weight), weight->device().str());
  }
  scale = static_cast<float>(l.scale);
  query_bias = or_zeros(l.query_bias, l.query, H * d);
  key_bias = or_zeros(l.key_bias, l.key, G * d);
  value_bias = or_zeros(l.value_bias, l.value, G * e);
  output_bias = or_zeros(l.output_bias, l.output, Eo);
  query_norm = engine_norm(l.query_norm);
  key_norm = engine_norm(l.key_norm);
  const auto value_bias_of_heads = value_bias.view({G, 1, e}).expand({G, H / G, e}).reshape({H * e});
  output_bias_after_value =
      output_bias.to(at::kDouble).addmv(l.output.to(at::kDouble), value_bias_of_heads.to(at::kDouble)).to(at::kFloat);

  const auto pack_each = [storage](const Tensor& weights) { return pack_weights(weights, storage); };
  const auto pack = [&](const Tensor& weight) { return pack_each(weight.unsqueeze(0)); };
  query = pack(l.query);
  key = pack(l.key);
  value = pack(l.value);
  output = pack(l.output);
  key_fold = pack(l.key.t());
  query_fold = pack(l.query.t());
  value_fold = pack_each(l.value.view({G, e, Ev}));
  if (const auto& product = products.logits; product.weight.defined()) {  // [H, Ek, Eq]
    logits_product = pack(product.weight.flatten(0, 1));
    logits_product_of_heads = pack_each(product.weight.transpose(1, 2));
    logits_product_bias = or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), l.query, H * Ek);
  }
  if (const auto& product = products.values; product.weight.defined()) {  // [H, Eo, Ev]
    values_product = pack(product.weight.transpose(0, 1).flatten(1));
    values_product_of_heads = pack_each(product.weight);
    values_product_bias = or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), l.value, H * Eo);
  }
}

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
  const auto Xk = key.contiguous(), Xv = value.contiguous();
  switch (orders.logits) {
    case Order::standard: side.keys = project_keys(w, side, Xk); break;
    case Order::fold_into_query:
    case Order::prefold:
      side.keys_are_rows = query_rows * w.H <= kRowsNotToPackFor;
      side.keys = side.keys_are_rows ? Xk : transpose_keys(w, side, Xk);
      break;
    case Order::fold_into_context:
    case Order::prefold_into_context: fold_keys(w, side, Xk); break;
  }
  switch (orders.values) {
    case Order::standard: side.values = project_values(w, side, Xv); break;
    case Order::fold_into_query:
    case Order::prefold: side.values = Xv; break;
    case Order::fold_into_context:
    case Order::prefold_into_context: side.values = fold_values(w, side, Xv); break;
  }
  return side;
}

Tensor fold_query(const Orders& orders, const EngineWeights& w, const Tensor& query) {
  const auto n = query.size(0), inner = w.H * w.d, width = w.H * w.Ek;
  const auto Xq = query.contiguous();
  if (is_folded(orders.logits)) return Xq;
  const auto projected = at::empty({n, inner}, query.options());
  multiply({.m = n,
            .n = inner,
            .k = w.Eq,
            .a = data(Xq),
            .a_stride = w.Eq,
            .b = packed(w.query),
            .c = mutable_data(projected),
            .c_stride = inner,
            .bias = data(w.query_bias)});
  normalise(w.query_norm, mutable_data(projected), n, inner);
  if (orders.logits == Order::standard) return projected;
  const auto folded = at::empty({n, width}, query.options());
  for (int64_t h = 0; h < w.H; ++h) {
    multiply({.m = n,
              .n = w.Ek,
              .k = w.d,
              .a = data(projected) + h * w.d,
              .a_stride = inner,
              .b = packed(w.key_fold).from_row(h * w.G / w.H * w.d),
              .c = mutable_data(folded) + h * w.Ek,
              .c_stride = width});
  }
  return folded;
}

namespace {

// For B queries in all, of Lq rows; zeros where keys may be left out.
AttentionResult empty_result(const EngineWeights& w, int64_t B, int64_t Lq, int64_t Lk, bool all_keys, const EngineCall& call) {
  const auto heads = call.weight_heads.empty() ? w.H : static_cast<int64_t>(call.weight_heads.size());
  AttentionResult result;
  result.output = in_huge_pages(at::empty({B, Lq, w.Eo}, at::kFloat));
  if (call.weights == AttentionWeights::mean) result.weights = at::zeros({B, Lq, Lk}, at::kFloat);
  if (call.weights == AttentionWeights::per_head) {
    result.weights =
        all_keys ? in_huge_pages(at::empty({B, heads, Lq, Lk}, at::kFloat)) : at::zeros({B, heads, Lq, Lk}, at::kFloat);
  }
  return result;
}

bool all_are(const std::vector<int64_t>& lengths, int64_t Lk) {
  return std::ranges::all_of(lengths, [Lk](int64_t length) { return length == Lk; });
}

int64_t rows_of(const EngineCall& call) {
  return call.query.defined() ? call.query.size(1) : call.folded_query.size(0);
}

// Operations that are done before threads have met.
bool is_little(const EngineWeights& w, int64_t B, int64_t Lq, int64_t Lk) {
  constexpr int64_t kLittle = 20'000'000;
  return 2 * B * (Lq * w.H * (w.Eq * w.d + w.e * w.Eo) + Lk * w.G * (w.Ek * w.d + w.Ev * w.e)) < kLittle;
}

}  // namespace

AttentionResult attend(const EngineWeights& weights, const EngineSide& side, const EngineCall& call) {
  const auto B = call.query.defined() ? call.query.size(0) : side.B;
  const auto result = empty_result(weights, B, rows_of(call), side.Lk, all_are(side.lengths, side.Lk), call);
  Attend(weights, side, call).run(result);
  return result;
}

AttentionResult forward(const Orders& orders,
                        const EngineWeights& w,
                        const Tensor& key,
                        const Tensor& value,
                        const std::vector<int64_t>& lengths,
                        const EngineCall& call) {
  const auto B = key.size(0), Lk = key.size(1), Lq = rows_of(call);
  const auto result = empty_result(w, B, Lq, Lk, all_are(lengths, Lk), call);
  if (threads() == 1 || B < threads() || !is_little(w, B, Lq, Lk)) {
    Attend(w, make_side(orders, w, key, value, lengths, Lq), call).run(result);
    return result;
  }
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    const auto part = [&](const Tensor& x) { return x.defined() ? x.narrow(0, begin, end - begin) : x; };
    auto its_call = call;
    its_call.query = part(call.query);
    its_call.mask = call.mask.slice(begin, end);
    const auto side = make_side(orders, w, part(key), part(value), {lengths.begin() + begin, lengths.begin() + end}, Lq);
    Attend(w, side, its_call).run({part(result.output), part(result.weights), {}});
  });
  return result;
}

}  // namespace xattn::detail
