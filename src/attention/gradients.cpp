// SPDX-License-Identifier: Apache-2.0
#include "attention/gradients.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "attention/heads.h"
#include "attention/merge.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

constexpr int64_t kKeysOfABlock = 1024;

// An empty tensor of x's shape [B, n, L, size], stored as [B, L, n, size]: the gradient of a result of split_heads.
Tensor like_heads(const Tensor& x, bool is_requested) {
  if (!is_requested) return {};
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

// The forward pass kept only the log-sum-exp of each row. With the recomputed weights P of a block of rows and keys:
//   dV = P' dO,  dP = dO V',  dS = P * (dP - row sums of dO * O) * scale,  dQ = dS K,  dK = dS' Q
// as in Dao et al., FlashAttention, 2022, https://arxiv.org/abs/2205.14135, appendix B.4.
class Gradients {
 public:
  Gradients(const AttentionBackward& call, const AttentionGradients& into)
      : q_(with_rows(call.q)),
        k_(with_rows(call.k)),
        v_(with_rows(call.v)),
        output_(with_rows(call.output)),
        log_sum_exp_(call.log_sum_exp.contiguous()),
        largest_(call.largest.contiguous()),
        output_grad_(with_rows(call.output_grad)),
        into_(into),
        scale_(static_cast<float>(call.scale)),
        softmax_({.mask = call.mask}, H_, Lq_, Lk_, scale_),
        blocks_((Lk_ + kKeysOfABlock - 1) / kKeysOfABlock),
        keys_of_a_block_((Lk_ + blocks_ - 1) / blocks_),
        rows_of_a_step_(std::clamp<int64_t>(kScratchFloats / (2 * keys_of_a_block_), 1, Lq_)) {}

  void run() const {
    const auto heads = B_ * G_, operations = 2 * H_ / G_ * Lq_ * Lk_ * (3 * d_ + 2 * e_);
    const auto heads_of_a_task = std::max<int64_t>(1, kOperationsOfATask / operations);
    const auto tasks = divided_up(heads, heads_of_a_task), threads = std::min(tasks, num_threads());
    const auto size = floats_of_a_task();
    const auto memory = at::empty({threads, size}, q_.options());
    run_tasks(tasks, threads, [&](int64_t task, int64_t thread) {
      const auto end = std::min(heads, (task + 1) * heads_of_a_task);
      for (auto i = task * heads_of_a_task; i < end; ++i)
        run_head(i / G_, i % G_, Scratch(mutable_data(memory) + thread * size));
    });
  }

 private:
  // Keys and values of a block as right sides of products.
  struct RightSides {
    RightSide key_columns;    // [d, keys]
    RightSide key_rows;       // [keys, d]
    RightSide value_columns;  // [e, keys]
  };

  // For few query rows, packing keys and values takes longer than it saves.
  bool is_packed() const { return Lq_ * H_ / G_ > kMostRowsUnpacked; }

  int64_t floats_of_a_task() const {
    const auto& run = kernels();
    const auto rows = rows_of_a_step_, keys = keys_of_a_block_;
    int64_t floats = 2 * rows * keys + run.packed_size(rows, std::max(d_, e_)) + 2 * rows;
    if (is_packed()) floats += run.packed_size(d_, keys) + run.packed_size(keys, d_) + run.packed_size(e_, keys);
    return floats + Scratch::kPadding;
  }

  // All query heads that share one key/value head.
  void run_head(int64_t b, int64_t g, Scratch scratch) const {
    const auto& run = kernels();
    const Rows key(k_, b, g), value(v_, b, g);
    float *key_columns = nullptr, *key_rows = nullptr, *value_columns = nullptr;
    if (is_packed()) {
      key_columns = scratch.take(run.packed_size(d_, keys_of_a_block_));
      key_rows = scratch.take(run.packed_size(keys_of_a_block_, d_));
      value_columns = scratch.take(run.packed_size(e_, keys_of_a_block_));
    }
    for (int64_t first = 0; first < Lk_; first += keys_of_a_block_) {
      const auto keys = std::min(keys_of_a_block_, Lk_ - first);
      RightSides sides{run.rows(key.at(first), key.stride), run.rows(key.at(first), key.stride),
                       run.rows(value.at(first), value.stride)};
      if (is_packed()) {
        run.pack_transposed(key.at(first), key.stride, d_, keys, key_columns, Storage::float32);
        run.pack(key.at(first), key.stride, keys, d_, key_rows, Storage::float32);
        run.pack_transposed(value.at(first), value.stride, e_, keys, value_columns, Storage::float32);
        sides = {run.packed(key_columns, d_), run.packed(key_rows, keys), run.packed(value_columns, e_)};
      }
      for (int64_t h = g * H_ / G_; h < (g + 1) * H_ / G_; ++h) {
        for (int64_t row = 0; row < Lq_; row += rows_of_a_step_) {
          const Segment s{.context = b,
                          .first_row = b * Lq_ + row,
                          .rows = std::min(rows_of_a_step_, Lq_ - row),
                          .keys = keys,
                          .queries = Rows(q_, b, h).at(row),
                          .query_stride = q_.stride(2),
                          .head_stride = 0,
                          .weighted_values = nullptr,
                          .log_sum_exp = {},
                          .context_rows = Lq_,
                          .first_key = first};
          run_block(s, h, g, sides, scratch);
        }
      }
    }
  }

  void run_block(const Segment& s, int64_t h, int64_t g, const RightSides& sides, Scratch scratch) const {
    const auto row = s.first_row % Lq_;
    const Rows grad(output_grad_, s.context, h);
    const bool is_first = row == 0 && h == g * H_ / G_;
    auto* weights = scratch.take(s.rows * s.keys);
    auto* logits_grad = scratch.take(s.rows * s.keys);
    times_columns(s, s.queries, s.query_stride, sides.key_columns, d_, weights);
    recompute_weights(s, h, weights, scratch);
    if (into_.v.defined()) add_to_keys(s, weights, grad.at(row), grad.stride, is_first, into_.v, g, scratch);
    if (!into_.q.defined() && !into_.k.defined()) return;
    times_columns(s, grad.at(row), grad.stride, sides.value_columns, e_, logits_grad);
    differentiate_softmax(s, h, weights, logits_grad);
    if (into_.q.defined()) {
      multiply({.sizes = {s.rows, d_, s.keys},
                .a = {logits_grad, s.keys},
                .b = sides.key_rows,
                .c = {mutable_data(into_.q) + s.context * into_.q.stride(0) + h * into_.q.stride(1) + row * into_.q.stride(2),
                      into_.q.stride(2)},
                .accumulate = s.first_key > 0,
                .all_rows = s.rows});
    }
    if (into_.k.defined()) add_to_keys(s, logits_grad, s.queries, s.query_stride, is_first, into_.k, g, scratch);
  }

  // c [n, keys] = a [n, size] times the transposed keys or values
  void times_columns(
      const Segment& s, const float* a, int64_t a_stride, const RightSide& columns, int64_t size, float* c) const {
    (is_packed() ? multiply : multiply_transposed)(
        {.sizes = {s.rows, s.keys, size}, .a = {a, a_stride}, .b = columns, .c = {c, s.keys}, .all_rows = s.rows});
  }

  // Adds the product x' rows, with x [n, keys] and rows [n, size], to the rows of these keys in `into`.
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
    auto* packed = scratch.take(run.packed_size(s.rows, size));
    run.pack(rows, stride, s.rows, size, packed, Storage::float32);
    auto* place = mutable_data(into) + s.context * into.stride(0) + g * into.stride(1) + s.first_key * into.stride(2);
    multiply({.sizes = {s.keys, size, s.rows},
              .a = {x, 1, s.keys},
              .b = run.packed(packed, s.rows),
              .c = {place, into.stride(2)},
              .accumulate = !is_first,
              .all_rows = s.keys});
  }

  LogSumExp log_sum_exp_of(const Segment& s, int64_t h, int64_t row) const {
    const auto at = (s.context * H_ + h) * Lq_ + s.first_row % Lq_ + row;
    return {data(largest_)[at], data(log_sum_exp_)[at]};
  }

  // Turns the logits of a block into weights by a softmax over the block, scaled by the block's share of the whole row.
  void recompute_weights(const Segment& s, int64_t h, float* logits, Scratch scratch) const {
    auto* largest = scratch.take(s.rows);
    const LogSumExps of_block{largest, scratch.take(s.rows)};
    softmax_.softmax_head(s, h, logits, s.keys, of_block);
    if (blocks_ == 1) return;
    for (int64_t i = 0; i < s.rows; ++i) scale(logits + i * s.keys, s.keys, share_of(of_block[i], log_sum_exp_of(s, h, i)));
  }

  // Turns the gradient of the weights into that of the unscaled logits.
  void differentiate_softmax(const Segment& s, int64_t h, const float* weights, float* grad) const {
    const auto row = s.first_row % Lq_;
    const Rows output(output_, s.context, h), output_grad(output_grad_, s.context, h);
    for (int64_t i = 0; i < s.rows; ++i, weights += s.keys, grad += s.keys) {
      const auto *x = output.at(row + i), *dx = output_grad.at(row + i);
      float sum = 0;
      for (int64_t j = 0; j < e_; ++j) sum += x[j] * dx[j];
      for (int64_t j = 0; j < s.keys; ++j) grad[j] = weights[j] * (grad[j] - sum) * scale_;
    }
  }

  const Tensor q_, k_, v_;
  const Tensor output_, log_sum_exp_, largest_;
  const Tensor output_grad_;
  const AttentionGradients& into_;
  const int64_t B_ = q_.size(0), H_ = q_.size(1), Lq_ = q_.size(2), d_ = q_.size(3);
  const int64_t G_ = k_.size(1), Lk_ = k_.size(2), e_ = v_.size(3);
  const float scale_;
  const SoftmaxStage softmax_;
  const int64_t blocks_;           // of keys
  const int64_t keys_of_a_block_;  // the last block may have fewer
  const int64_t rows_of_a_step_;   // query rows whose logits are held at a time
};

}  // namespace

AttentionGradients differentiate_on_kernels(const AttentionBackward& call) {
  AttentionGradients gradients{like_heads(call.q, call.wants_q), like_heads(call.k, call.wants_k),
                               like_heads(call.v, call.wants_v)};
  Gradients(call, gradients).run();
  return gradients;
}

}  // namespace xattn::detail
