// SPDX-License-Identifier: Apache-2.0
#include "attention/heads.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "attention/choose_kernel.h"
#include "attention/mask_parts.h"
#include "attention/merge.h"
#include "cpu/elementwise.h"
#include "cpu/huge_pages.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;

namespace engine {

Tensor empty_weights(const AttentionOptions& options, int64_t B, int64_t H, int64_t Lq, int64_t Lk, bool all_keys) {
  const auto& heads = options.weight_heads;
  if (options.weights == AttentionWeights::none) return {};
  if (options.weights == AttentionWeights::mean) return zeros({B, Lq, Lk});
  const auto count = heads.empty() ? H : static_cast<int64_t>(heads.size());
  return all_keys ? in_huge_pages(at::empty({B, count, Lq, Lk}, at::kFloat)) : zeros({B, count, Lq, Lk});
}

namespace {

// The kernels read a mask row by row.
Tensor contiguous(const Tensor& x) {
  return x.defined() ? x.contiguous() : x;
}

}  // namespace

SoftmaxStage::SoftmaxStage(const AttentionOptions& options, int64_t H, int64_t Lq, int64_t Lk, float scale)
    : H_(H),
      Lq_(Lq),
      Lk_(Lk),
      scale_(scale),
      diagonal_(causal_diagonal(options.mask, Lq, Lk)),
      allowed_tensor_(contiguous(allowed_keys(without_causal(options.mask), Lq, Lk, at::kCPU))),
      bias_tensor_(contiguous(total_bias(options.mask, Lk, at::kFloat))),
      allowed_(allowed_tensor_),
      bias_(bias_tensor_),
      all_have_keys_(!may_have_empty_rows(options.mask, Lq, Lk)),
      wanted_(options.weights),
      heads_(options.weight_heads) {}

void SoftmaxStage::write_to(const Tensor& weights, const Tensor& log_sum_exp, const Tensor& largest) {
  weights_ = weights.defined() ? mutable_data(weights) : nullptr;
  log_sum_exp_ = {};
  if (log_sum_exp.defined()) log_sum_exp_ = {mutable_data(largest), mutable_data(log_sum_exp)};
}

int64_t SoftmaxStage::visible_keys(int64_t i) const {
  return diagonal_ ? std::min(i + *diagonal_ + 1, Lk_) : Lk_;
}

SoftmaxStage::RowGroup SoftmaxStage::group_at(const Segment& s, int64_t row) const {
  if (!is_causal()) return {s.rows - row, s.keys};
  const auto rows = kernels().block_rows, i = (s.first_row + row) % Lq_, end = std::min(Lq_, (i / rows + 1) * rows);
  const auto keys = round_up(std::max<int64_t>(1, visible_keys(end - 1)), kernels().panel);
  return {std::min(s.rows - row, end - i), std::min(s.keys, keys)};
}

void SoftmaxStage::softmax(
    const Segment& s, const SoftmaxRows& rows, float* logits, int64_t stride, const LogSumExps& log_sum_exp) const {
  const auto& [h, i, n, visible_step] = rows;
  kernels().softmax({.rows = n,
                     .n = s.keys,
                     .x = logits,
                     .x_stride = stride,
                     .scale = scale_,
                     .bias = bias_.at(s.context, h, i, s.first_key),
                     .bias_stride = bias_.row_stride,
                     .keep = allowed_.at(s.context, h, i, s.first_key),
                     .keep_stride = allowed_.row_stride,
                     .visible = visible_keys(i) - s.first_key,
                     .visible_step = visible_step,
                     .log_sum_exp = log_sum_exp.log_sum,
                     .largest = log_sum_exp.largest});
}

void SoftmaxStage::softmax_head(const Segment& s, int64_t h, float* logits, int64_t stride, LogSumExps log_sum_exp) const {
  for (int64_t row = 0, n = 0; row < s.rows; row += n) {  // the n rows of one query after another
    const auto i = (s.first_row + row) % Lq_;
    n = std::min(s.rows - row, Lq_ - i);
    softmax(s, {h, i, n, 1}, logits + row * stride, stride, log_sum_exp ? log_sum_exp + row : log_sum_exp_at(s, h, row));
  }
}

void SoftmaxStage::softmax_rows(const Segment& s, float* logits, int64_t stride, int64_t begin, int64_t end) const {
  const bool is_uniform = bias_.is_uniform() && allowed_.is_uniform();
  for (int64_t row = begin, n = 0; row < end; row += n) {
    const auto h = row % H_, i = (s.first_row + row / H_) % Lq_;
    n = !is_uniform ? 1 : is_causal() ? std::min(end - row, H_ - h) : end - row;
    softmax(s, {h, i, n, 0}, logits + row * stride, stride, s.log_sum_exp ? s.log_sum_exp + row : LogSumExps{});
  }
}

LogSumExps SoftmaxStage::log_sum_exp_at(const Segment& s, int64_t h, int64_t row) const {
  const auto at = s.first_row + row;
  return log_sum_exp_ ? log_sum_exp_ + ((at / Lq_ * H_ + h) * Lq_ + at % Lq_) : LogSumExps{};
}

void SoftmaxStage::write_log_sum_exp(const Segment& s, int64_t h, const LogSumExps& log_sum_exp) const {
  for (int64_t row = 0; log_sum_exp_ && row < s.rows; ++row) log_sum_exp_at(s, h, row).set(0, log_sum_exp[row]);
}

void SoftmaxStage::write_weights(const Segment& s, int64_t h, const float* weights, int64_t stride) const {
  if (wanted_ == AttentionWeights::mean) return add_to_mean(s, weights, stride);
  if (heads_.empty()) return copy_weights(s, h, H_, weights, stride);
  const auto count = static_cast<int64_t>(heads_.size());
  for (int64_t i = 0; i < count; ++i) {
    if (heads_[static_cast<size_t>(i)] == h) copy_weights(s, i, count, weights, stride);
  }
}

void SoftmaxStage::copy_weights(const Segment& s, int64_t place, int64_t places, const float* weights, int64_t stride) const {
  for (int64_t i = 0; i < s.rows; ++i) {
    const auto row = s.first_row + i;
    auto* to = weights_ + ((row / Lq_ * places + place) * Lq_ + row % Lq_) * Lk_;
    std::copy_n(weights + i * stride, s.keys, to);
    std::fill(to + s.keys, to + Lk_, 0.0f);
  }
}

void SoftmaxStage::add_to_mean(const Segment& s, const float* weights, int64_t stride) const {
  const auto share = 1.0f / static_cast<float>(H_);
  for (int64_t i = 0; i < s.rows; ++i) {
    auto* to = weights_ + (s.first_row + i) * Lk_;
    for (int64_t j = 0; j < s.keys; ++j) to[j] += share * weights[i * stride + j];
  }
}

namespace {

// Whether the keys are read in parts.
bool in_parts(const Heads& heads, const SoftmaxStage& softmax) {
  return own_kernel(heads.Lk, softmax.returns_weights()) == AttentionKernel::heads_in_parts;
}

// The offset in x [B, G, ...] of this context and of the key/value head that query head h shares.
int64_t offset_of(const Tensor& x, const Heads& heads, int64_t context, int64_t h) {
  return context * x.stride(0) + h * heads.G / heads.H * x.stride(1);
}

// Writes weights times v of head h to rows of c, or adds the product to them.
void multiply_by_values(const Heads& heads,
                        const Segment& s,
                        int64_t h,
                        const float* weights,
                        int64_t stride,
                        float* c,
                        int64_t c_stride,
                        bool accumulate) {
  const auto& v = heads.values;
  const auto offset = offset_of(v, heads, s.context, h);
  const auto values = heads.are_packed ? packed(v, offset, heads.capacity) : plain_rows(v, offset, v.stride(2));
  multiply({.sizes = {s.rows, heads.e, s.keys},
            .a = {weights, stride},
            .b = values.from_row(s.first_key),
            .c = {c, c_stride},
            .accumulate = accumulate,
            .all_rows = s.context_rows});
}

// One head over all keys at once. `logits` [rows, keys] is scratch, and holds the weights afterwards.
void attend_head(const Heads& heads, const SoftmaxStage& softmax, const Segment& s, int64_t h, float* logits) {
  logits_of_head(heads, s, h, logits, s.keys);
  softmax.softmax_head(s, h, logits, s.keys);
  weighted_values_of_head(heads, s, h, logits, s.keys);
}

// One head, one part of its keys at a time. `values` [rows, e] and `log_sum_exp` [rows] are those of the parts so far. A part's
// weights sum to one over its own keys, so old values and new weights are scaled by their share of the new sum.
void attend_head_in_parts(const Heads& heads, const SoftmaxStage& softmax, const Segment& s, int64_t h, float* scratch) {
  auto* logits = scratch;
  auto* values = logits + s.rows * kKeysOfAPart;
  const LogSumExps log_sum_exp{values + s.rows * heads.e, values + s.rows * (heads.e + 1)};
  const LogSumExps of_part{values + s.rows * (heads.e + 2), values + s.rows * (heads.e + 3)};
  for (int64_t first = 0; first < s.keys; first += kKeysOfAPart) {
    auto part = s;
    part.first_key = first;
    part.keys = std::min(kKeysOfAPart, s.keys - first);
    logits_of_head(heads, part, h, logits, part.keys);
    softmax.softmax_head(part, h, logits, part.keys, first == 0 ? log_sum_exp : of_part);
    for (int64_t row = 0; first > 0 && row < s.rows; ++row) {
      const auto all = log_sum(log_sum_exp[row], of_part[row]);
      scale(values + row * heads.e, heads.e, share_of(log_sum_exp[row], all));
      scale(logits + row * part.keys, part.keys, share_of(of_part[row], all));
      log_sum_exp.set(row, all);
    }
    multiply_by_values(heads, part, h, logits, part.keys, values, heads.e, /*accumulate=*/first > 0);
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    std::copy_n(values + row * heads.e, heads.e, s.weighted_values + (row * heads.H + h) * heads.e);
  }
  softmax.write_log_sum_exp(s, h, log_sum_exp);
}

// Scratch for one row of one head, in floats.
int64_t floats_of_a_row(const Heads& heads, const SoftmaxStage& softmax, int64_t keys) {
  return in_parts(heads, softmax) ? kKeysOfAPart + heads.e + 4 : keys;
}

// Rows [first, first + n) of a segment.
Segment rows_of(Segment s, int64_t first, int64_t n, const Heads& heads) {
  s.first_row += first;
  s.rows = n;
  s.queries += first * s.query_stride;
  s.weighted_values += first * heads.H * heads.e;
  return s;
}

// Calls f(block, row) for blocks of at most `most` rows of a segment, from its row `row` on, each in one group of rows.
template <class F>
void each_block(const Heads& heads, const SoftmaxStage& softmax, const Segment& s, int64_t most, const F& f) {
  for (int64_t row = 0, n = 0; row < s.rows; row += n) {
    const auto group = softmax.group_at(s, row);
    n = std::min(most, group.rows);
    auto block = rows_of(s, row, n, heads);
    block.keys = group.keys;
    f(block, row);
  }
}

}  // namespace

void logits_of_head(const Heads& heads, const Segment& s, int64_t h, float* logits, int64_t stride) {
  const auto& k = heads.keys;
  const auto offset = offset_of(k, heads, s.context, h);
  const auto keys = heads.are_packed ? packed(k, offset, heads.d).from_panel(s.first_key / kernels().panel)
                                     : plain_rows(k, offset, k.stride(2)).from_row(s.first_key);
  (heads.are_packed ? multiply : multiply_transposed)({.sizes = {s.rows, s.keys, heads.d},
                                                       .a = {s.queries + h * s.head_stride, s.query_stride},
                                                       .b = keys,
                                                       .c = {logits, stride},
                                                       .all_rows = s.context_rows});
}

void weighted_values_of_head(const Heads& heads, const Segment& s, int64_t h, const float* weights, int64_t stride) {
  multiply_by_values(heads, s, h, weights, stride, s.weighted_values + h * heads.e, heads.H * heads.e, /*accumulate=*/false);
}

ScratchSize scratch_of_heads(const Heads& heads, const SoftmaxStage& softmax, const TaskThreads& threads) {
  const auto floats = floats_of_a_row(heads, softmax, heads.Lk);
  if (threads.all) return {heads.H * floats};
  // The logits of a block of rows fit into a core's cache beside the keys and values of a head.
  const auto most_rows = kMostScratchFloats / std::max<int64_t>(1, floats);
  return {.row = 1, .logits = floats, .rows_at_a_time = std::clamp<int64_t>(most_rows, 1, kernels().block_rows)};
}

void attend_heads(
    const Heads& heads, const SoftmaxStage& softmax, const Segment& s, Scratch scratch, const TaskThreads& threads) {
  const auto floats = floats_of_a_row(heads, softmax, s.keys);
  const auto attend = in_parts(heads, softmax) ? attend_head_in_parts : attend_head;
  if (!threads.all) {
    const auto rows = std::min(s.rows, scratch_of_heads(heads, softmax, threads).rows_at_a_time);
    auto* logits = scratch.take(rows * floats);
    for (int64_t h = 0; h < heads.H; ++h) {
      each_block(heads, softmax, s, rows, [&](const Segment& block, int64_t) {
        attend(heads, softmax, block, h, logits);
        if (softmax.returns_weights()) softmax.write_weights(block, h, logits, block.keys);
      });
    }
    return;
  }
  auto* logits = scratch.take(heads.H * s.rows * floats);
  const auto each_block_of_head = [&](int64_t h, const auto& f) {
    each_block(heads, softmax, s, s.rows,
               [&](const Segment& block, int64_t row) { f(block, h, logits + (h * s.rows + row) * floats); });
  };
  const auto write_weights = [&softmax](const Segment& block, int64_t h, const float* weights) {
    softmax.write_weights(block, h, weights, block.keys);
  };
  engine::each(heads.H, [&](int64_t h) {
    each_block_of_head(h, [&](const Segment& block, int64_t, float* logits_of_block) {
      attend(heads, softmax, block, h, logits_of_block);
      if (softmax.returns_weights() && !softmax.returns_mean()) write_weights(block, h, logits_of_block);
    });
  });
  // All heads add to the same numbers.
  for (int64_t h = 0; softmax.returns_mean() && h < heads.H; ++h) each_block_of_head(h, write_weights);
}

}  // namespace engine

namespace {

// k and v [B, G, Lk, ...], packed unless there are few query rows.
engine::Heads heads_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  using namespace engine;
  const auto& run = kernels();
  const auto B = k.size(0), H = q.size(1), G = k.size(1), Lk = k.size(2), d = k.size(3), e = v.size(3);
  const auto keys = with_rows(k), values = with_rows(v);
  if (q.size(2) * H / G <= kMostRowsUnpacked) return {H, G, d, e, Lk, keys, values, /*are_packed=*/false, Lk};
  const auto packed_keys = in_huge_pages(at::empty({B, G, run.packed_size(d, Lk)}, k.options()));
  const auto packed_values = in_huge_pages(at::empty({B, G, run.packed_size(Lk, e)}, v.options()));
  each(2 * B * G, [&](int64_t i) {
    const auto b = i / 2 / G, g = i / 2 % G;
    const auto source = [b, g](const Tensor& x) { return data(x) + b * x.stride(0) + g * x.stride(1); };
    const auto target = [b, g](const Tensor& x) { return mutable_data(x) + b * x.stride(0) + g * x.stride(1); };
    if (i % 2 == 0) {
      run.pack_transposed(source(keys), keys.stride(2), d, Lk, target(packed_keys), Storage::float32);
    } else {
      run.pack(source(values), values.stride(2), Lk, e, target(packed_values), Storage::float32);
    }
  });
  return {H, G, d, e, Lk, packed_keys, packed_values, /*are_packed=*/true, Lk};
}

}  // namespace

RelativeAttention attend_on_kernels(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  using namespace engine;
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), Lk = k.size(2), e = v.size(3);
  const auto queries = with_rows(q);
  const auto heads = heads_of(queries, k, v);
  const auto scale = static_cast<float>(scale_of(options, q.size(3)));
  SoftmaxStage softmax(options, H, Lq, Lk, scale);

  const auto output = in_huge_pages(at::empty({B, Lq, H, e}, q.options()));
  RelativeAttention attended;
  auto& result = attended.result;
  result.output = output.transpose(1, 2);
  result.weights = empty_weights(options, B, H, Lq, Lk, /*all_keys=*/true);
  if (options.log_sum_exp) {
    result.log_sum_exp = at::empty({B, H, Lq}, q.options());
    attended.largest = at::empty_like(result.log_sum_exp);
  }
  softmax.write_to(result.weights, result.log_sum_exp, attended.largest);

  const auto bytes = static_cast<int64_t>(heads.keys.nbytes() + heads.values.nbytes()) / B;
  const auto run = [&](int64_t begin, int64_t end, Scratch scratch, const TaskThreads& threads) {
    for (int64_t first = begin, last = begin; first < end; first = last) {  // the rows of each context
      const auto b = first / Lq, i = first % Lq;
      last = std::min(end, (b + 1) * Lq);
      const Segment segment{.context = b,
                            .first_row = first,
                            .rows = last - first,
                            .keys = Lk,
                            .queries = data(queries) + b * queries.stride(0) + i * queries.stride(2),
                            .query_stride = queries.stride(2),
                            .head_stride = queries.stride(1),
                            .weighted_values = mutable_data(output) + first * H * e,
                            .log_sum_exp = {},
                            .context_rows = Lq};
      attend_heads(heads, softmax, segment, scratch, threads);
    }
  };
  each_share_of_rows({.rows = B * Lq,
                      .has_many_rows = has_many_rows(Lq, Lk, heads.d),
                      .is_uneven = softmax.is_causal(),
                      .reads = {.weights = 0, .context = bytes},
                      .apart = scratch_of_heads(heads, softmax, {.all = false}),
                      .together = scratch_of_heads(heads, softmax, {.all = true})},
                     run);
  return attended;
}

}  // namespace xattn::detail
