// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "attention/heads.h"
#include "attention/merge.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

constexpr int64_t kKeysOfABlock = 1024;

// [B, L, n, size] as it lies, [B, n, L, size] as it is seen: as the gradient of what split_heads returns.
Tensor like_heads(const Tensor& x, bool is_wanted) {
  if (!is_wanted) return {};
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// Rows of one head, [n, size].
struct Rows {
  const float* data;
  int64_t stride, size;

  Rows(const Tensor& x, int64_t b, int64_t h)
      : data(engine::data(x) + b * x.stride(0) + h * x.stride(1)), stride(x.stride(2)), size(x.size(3)) {}
  const float* at(int64_t row) const { return data + row * stride; }
};

// With P the weights of a block of rows by a part of the keys, of which nothing was kept but the log-sum-exp of whole rows:
//   dV = P' dO,  dP = dO V',  dS = P * (dP - rows' sums of dO * O) * scale,  dQ = dS K,  dK = dS' Q
// as in Dao et al., FlashAttention, 2022, https://arxiv.org/abs/2205.14135, appendix B.4.
class Gradients {
 public:
  Gradients(const Tensor& q,
            const Tensor& k,
            const Tensor& v,
            const AttentionResult& result,
            const Tensor& largest,
            const Tensor& grad,
            const AttentionOptions& options,
            const AttentionGradients& into)
      : q_(with_rows(q)),
        k_(with_rows(k)),
        v_(with_rows(v)),
        output_(with_rows(result.output)),
        log_sum_exp_(result.log_sum_exp.contiguous()),
        largest_(largest.contiguous()),
        grad_(with_rows(grad)),
        into_(into),
        scale_(static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3)))))),
        weighing_(options.mask, q.size(1), q.size(2), k.size(2), scale_, AttentionWeights::none, {}),
        parts_((Lk_ + kKeysOfABlock - 1) / kKeysOfABlock),
        keys_((Lk_ + parts_ - 1) / parts_),
        rows_(std::clamp<int64_t>(kScratchFloats / (2 * keys_), 1, Lq_)) {}

  void run() const {
    const auto heads = B_ * G_, operations = 2 * H_ / G_ * Lq_ * Lk_ * (3 * d_ + 2 * e_);
    const auto heads_of_a_task = std::max<int64_t>(1, kOperationsOfATask / operations);
    const auto slots = heads > heads_of_a_task ? std::min(heads, num_threads()) : 1;
    const auto size = floats_of_a_task();
    const auto memory = at::empty({slots, size}, q_.options());
    at::parallel_for(0, heads, heads_of_a_task, [&](int64_t begin, int64_t end) {
      const auto slot = slots == 1 ? 0 : at::get_thread_num();
      for (auto i = begin; i < end; ++i) run_head(i / G_, i % G_, Scratch(mutable_data(memory) + slot * size));
    });
  }

 private:
  // Right sides made of keys and values; null where so few rows meet them that they stay as they are.
  struct Packs {
    float *key_columns = nullptr, *key_rows = nullptr, *value_columns = nullptr;
  };

  bool is_packed() const { return Lq_ * H_ / G_ > kMostRowsUnpacked; }

  int64_t floats_of_a_task() const {
    const auto& run = kernels();
    int64_t floats = 2 * rows_ * keys_ + run.packed_size(rows_, std::max(d_, e_)) + 2 * rows_;
    if (is_packed()) floats += run.packed_size(d_, keys_) + run.packed_size(keys_, d_) + run.packed_size(e_, keys_);
    return floats + Scratch::kPadding;
  }

  // All that meets one head of the keys and values.
  void run_head(int64_t b, int64_t g, Scratch scratch) const {
    const auto& run = kernels();
    const Rows key(k_, b, g), value(v_, b, g);
    Packs packs;
    if (is_packed()) {
      packs.key_columns = scratch.take(run.packed_size(d_, keys_));
      packs.key_rows = scratch.take(run.packed_size(keys_, d_));
      packs.value_columns = scratch.take(run.packed_size(e_, keys_));
    }
    for (int64_t first = 0; first < Lk_; first += keys_) {
      const auto keys = std::min(keys_, Lk_ - first);
      if (is_packed()) {
        run.pack_transposed(key.at(first), key.stride, d_, keys, packs.key_columns, Storage::float32);
        run.pack(key.at(first), key.stride, keys, d_, packs.key_rows, Storage::float32);
        run.pack_transposed(value.at(first), value.stride, e_, keys, packs.value_columns, Storage::float32);
      }
      for (int64_t h = g * H_ / G_; h < (g + 1) * H_ / G_; ++h) {
        for (int64_t row = 0; row < Lq_; row += rows_) {
          const Segment s{.b = b,
                          .first = b * Lq_ + row,
                          .n = std::min(rows_, Lq_ - row),
                          .keys = keys,
                          .rows = Rows(q_, b, h).at(row),
                          .stride = q_.stride(2),
                          .head_stride = 0,
                          .mixed = nullptr,
                          .log_sum_exp = {},
                          .all_rows = Lq_,
                          .first_key = first};
          run_block(s, h, g, packs, scratch);
        }
      }
    }
  }

  void run_block(const Segment& s, int64_t h, int64_t g, const Packs& packs, Scratch scratch) const {
    const auto row = s.first % Lq_;
    const Rows key(k_, s.b, g), value(v_, s.b, g), grad(grad_, s.b, h);
    const bool is_first = row == 0 && h == g * H_ / G_;
    auto* weights = scratch.take(s.n * s.keys);
    auto* logits_grad = scratch.take(s.n * s.keys);
    times_columns(s, s.rows, s.stride, key, packs.key_columns, weights);
    weigh(s, h, weights, scratch);
    if (into_.v.defined()) add_to_keys(s, weights, grad.at(row), grad.stride, is_first, into_.v, g, scratch);
    if (!into_.q.defined() && !into_.k.defined()) return;
    times_columns(s, grad.at(row), grad.stride, value, packs.value_columns, logits_grad);
    differentiate_softmax(s, h, weights, logits_grad);
    if (into_.q.defined()) {
      multiply({.sizes = {s.n, d_, s.keys},
                .a = {logits_grad, s.keys},
                .b = right(packs.key_rows, key.at(s.first_key), s.keys, key.stride),
                .c = {mutable_data(into_.q) + s.b * into_.q.stride(0) + h * into_.q.stride(1) + row * into_.q.stride(2),
                      into_.q.stride(2)},
                .accumulate = s.first_key > 0,
                .all_rows = s.n});
    }
    if (into_.k.defined()) add_to_keys(s, logits_grad, s.rows, s.stride, is_first, into_.k, g, scratch);
  }

  // The rows of a right side [k, n]: packed, or as they lie.
  static RightSide right(const float* packed, const float* rows, int64_t k, int64_t stride) {
    return packed ? kernels().packed(packed, k) : kernels().rows(rows, stride);
  }

  // a [n, size] times keys or values as columns -> [n, keys]
  static void times_columns(
      const Segment& s, const float* a, int64_t a_stride, const Rows& columns, const float* packed, float* c) {
    (packed ? multiply : multiply_transposed)({.sizes = {s.n, s.keys, columns.size},
                                               .a = {a, a_stride},
                                               .b = right(packed, columns.at(s.first_key), columns.size, columns.stride),
                                               .c = {c, s.keys},
                                               .all_rows = s.n});
  }

  // x' rows, with x [n, keys] and rows [n, size], to the rows of these keys in `into`.
  void add_to_keys(const Segment& s,
                   const float* x,
                   const float* rows,
                   int64_t stride,
                   bool is_first,
                   const Tensor& into,
                   int64_t g,
                   Scratch scratch) const {
    const auto& run = kernels();
    const auto size = into.size(3);
    auto* packed = scratch.take(run.packed_size(s.n, size));
    run.pack(rows, stride, s.n, size, packed, Storage::float32);
    multiply(
        {.sizes = {s.keys, size, s.n},
         .a = {x, 1, s.keys},
         .b = right(packed, nullptr, s.n, 0),
         .c = {mutable_data(into) + s.b * into.stride(0) + g * into.stride(1) + s.first_key * into.stride(2), into.stride(2)},
         .accumulate = !is_first,
         .all_rows = s.keys});
  }

  LogSumExp log_sum_exp_of(const Segment& s, int64_t h, int64_t row) const {
    const auto at = (s.b * H_ + h) * Lq_ + s.first % Lq_ + row;
    return {data(largest_)[at], data(log_sum_exp_)[at]};
  }

  // Logits -> their weights among all keys of their rows.
  void weigh(const Segment& s, int64_t h, float* logits, Scratch scratch) const {
    auto* largest = scratch.take(s.n);
    const LogSumExps of_part{largest, scratch.take(s.n)};
    weighing_.soften_head(s, h, logits, s.keys, of_part);
    if (parts_ == 1) return;
    for (int64_t i = 0; i < s.n; ++i) scale(logits + i * s.keys, s.keys, share_of(of_part[i], log_sum_exp_of(s, h, i)));
  }

  // grad: of the weights -> of the logits before their scale
  void differentiate_softmax(const Segment& s, int64_t h, const float* weights, float* grad) const {
    const auto row = s.first % Lq_;
    const Rows output(output_, s.b, h), output_grad(grad_, s.b, h);
    for (int64_t i = 0; i < s.n; ++i, weights += s.keys, grad += s.keys) {
      const auto *x = output.at(row + i), *dx = output_grad.at(row + i);
      float sum = 0;
      for (int64_t j = 0; j < e_; ++j) sum += x[j] * dx[j];
      for (int64_t j = 0; j < s.keys; ++j) grad[j] = weights[j] * (grad[j] - sum) * scale_;
    }
  }

  const Tensor q_, k_, v_, output_, log_sum_exp_, largest_, grad_;
  const AttentionGradients& into_;
  const int64_t B_ = q_.size(0), H_ = q_.size(1), Lq_ = q_.size(2), d_ = q_.size(3);
  const int64_t G_ = k_.size(1), Lk_ = k_.size(2), e_ = v_.size(3);
  const float scale_;
  const Weighing weighing_;
  const int64_t parts_, keys_, rows_;  // of the keys; keys of one; rows at a time
};

}  // namespace

AttentionGradients differentiate_on_kernels(const Tensor& q,
                                            const Tensor& k,
                                            const Tensor& v,
                                            const AttentionResult& result,
                                            const Tensor& largest,
                                            const Tensor& grad,
                                            const AttentionOptions& options,
                                            const std::array<bool, 3>& wanted) {
  AttentionGradients gradients{like_heads(q, wanted[0]), like_heads(k, wanted[1]), like_heads(v, wanted[2])};
  Gradients(q, k, v, result, largest, grad, options, gradients).run();
  return gradients;
}

}  // namespace xattn::detail
