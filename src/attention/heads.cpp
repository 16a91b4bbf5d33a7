// SPDX-License-Identifier: Apache-2.0
#include "attention/heads.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "attention/merge.h"
#include "cpu/huge_pages.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;

namespace engine {

Tensor empty_weights(
    AttentionWeights wanted, const std::vector<int64_t>& heads, int64_t B, int64_t H, int64_t Lq, int64_t Lk, bool all_keys) {
  if (wanted == AttentionWeights::none) return {};
  if (wanted == AttentionWeights::mean) return at::zeros({B, Lq, Lk}, at::kFloat);
  const auto count = heads.empty() ? H : static_cast<int64_t>(heads.size());
  return all_keys ? in_huge_pages(at::empty({B, count, Lq, Lk}, at::kFloat)) : at::zeros({B, count, Lq, Lk}, at::kFloat);
}

Weighing::Weighing(
    const Mask& mask, int64_t H, int64_t Lq, int64_t Lk, float scale, AttentionWeights wanted, std::vector<int64_t> heads)
    : H_(H),
      Lq_(Lq),
      Lk_(Lk),
      scale_(scale),
      keep_tensor_(mask.keep(Lq, Lk, at::kCPU)),
      bias_tensor_(mask.additive(at::kFloat)),
      all_have_keys_(!mask.may_have_empty_rows(Lq, Lk)),
      wanted_(wanted),
      heads_(std::move(heads)) {
  if (keep_tensor_.defined()) keep_tensor_ = keep_tensor_.contiguous();
  if (bias_tensor_.defined()) bias_tensor_ = bias_tensor_.contiguous();
  keep_ = MaskRows<bool>(keep_tensor_);
  bias_ = MaskRows<float>(bias_tensor_);
}

void Weighing::write_to(const Tensor& weights, const Tensor& log_sum_exp, const Tensor& largest) {
  weights_ = weights.defined() ? mutable_data(weights) : nullptr;
  log_sum_exp_ = {};
  if (log_sum_exp.defined()) log_sum_exp_ = {mutable_data(largest), mutable_data(log_sum_exp)};
}

void Weighing::soften_head(const Segment& s, int64_t h, float* logits, int64_t stride, LogSumExps log_sum_exp) const {
  for (int64_t row = 0, n = 0; row < s.n; row += n) {  // of one query after the other
    const auto i = (s.first + row) % Lq_;
    n = std::min(s.n - row, Lq_ - i);
    const auto sums = log_sum_exp ? log_sum_exp + row : place_of_log_sum_exp(s, h, row);
    kernels().softmax({.rows = n,
                       .n = s.keys,
                       .x = logits + row * stride,
                       .x_stride = stride,
                       .scale = scale_,
                       .bias = bias_.at(s.b, h, i, s.first_key),
                       .bias_stride = bias_.i,
                       .keep = keep_.at(s.b, h, i, s.first_key),
                       .keep_stride = keep_.i,
                       .log_sum_exp = sums.log_sum,
                       .largest = sums.largest});
  }
}

void Weighing::soften_rows(const Segment& s, float* logits, int64_t stride, int64_t begin, int64_t end) const {
  const bool alike = bias_.h == 0 && bias_.i == 0 && keep_.h == 0 && keep_.i == 0;
  const auto step = alike ? end - begin : 1;
  for (auto row = begin; row < end; row += step) {
    const auto h = row % H_, i = (s.first + row / H_) % Lq_;
    const auto sums = s.log_sum_exp ? s.log_sum_exp + row : LogSumExps{};
    kernels().softmax({.rows = step,
                       .n = s.keys,
                       .x = logits + row * stride,
                       .x_stride = stride,
                       .scale = scale_,
                       .bias = bias_.at(s.b, h, i, s.first_key),
                       .keep = keep_.at(s.b, h, i, s.first_key),
                       .log_sum_exp = sums.log_sum,
                       .largest = sums.largest});
  }
}

LogSumExps Weighing::place_of_log_sum_exp(const Segment& s, int64_t h, int64_t row) const {
  const auto at = s.first + row;
  return log_sum_exp_ ? log_sum_exp_ + ((at / Lq_ * H_ + h) * Lq_ + at % Lq_) : LogSumExps{};
}

void Weighing::give_log_sum_exp(const Segment& s, int64_t h, const LogSumExps& log_sum_exp) const {
  for (int64_t row = 0; log_sum_exp_ && row < s.n; ++row) place_of_log_sum_exp(s, h, row).set(0, log_sum_exp[row]);
}

void Weighing::give(const Segment& s, int64_t h, const float* weights, int64_t stride) const {
  if (wanted_ == AttentionWeights::mean) return add_to_mean(s, weights, stride);
  if (heads_.empty()) return copy_weights(s, h, H_, weights, stride);
  const auto count = static_cast<int64_t>(heads_.size());
  for (int64_t i = 0; i < count; ++i) {
    if (heads_[static_cast<size_t>(i)] == h) copy_weights(s, i, count, weights, stride);
  }
}

void Weighing::copy_weights(const Segment& s, int64_t place, int64_t places, const float* weights, int64_t stride) const {
  for (int64_t i = 0; i < s.n; ++i) {
    const auto row = s.first + i;
    std::copy_n(weights + i * stride, s.keys, weights_ + ((row / Lq_ * places + place) * Lq_ + row % Lq_) * Lk_);
  }
}

void Weighing::add_to_mean(const Segment& s, const float* weights, int64_t stride) const {
  const auto share = 1.0f / static_cast<float>(H_);
  for (int64_t i = 0; i < s.n; ++i) {
    auto* to = weights_ + (s.first + i) * Lk_;
    for (int64_t j = 0; j < s.keys; ++j) to[j] += share * weights[i * stride + j];
  }
}

namespace {

constexpr int64_t kKeysAtATime = 2048;

// Whether a call goes through its keys in parts.
bool in_parts(const Heads& heads, const Weighing& weighing) {
  return heads.Lk > 2 * kKeysAtATime && !weighing.gives_weights();
}

// x [B, G, ...]: of this context and of the key/value head that query head h shares.
int64_t place_of(const Tensor& x, const Heads& heads, int64_t b, int64_t h) {
  return b * x.stride(0) + h * heads.G / heads.H * x.stride(1);
}

// weights v of head h into rows of c, or in addition to them.
void mix_head_into(const Heads& heads,
                   const Segment& s,
                   int64_t h,
                   const float* weights,
                   int64_t stride,
                   float* c,
                   int64_t c_stride,
                   bool add) {
  const auto place = place_of(heads.values, heads, s.b, h);
  const bool are_rows = heads.values.dim() == 4;
  const auto values =
      are_rows ? plain_rows(heads.values, place, heads.values.stride(2)) : packed(heads.values, place, heads.Lk);
  multiply({.sizes = {s.n, heads.e, s.keys},
            .a = {weights, stride},
            .b = values.from_row(s.first_key),
            .c = {c, c_stride},
            .accumulate = add,
            .all_rows = s.all_rows});
}

// One head, a part of its keys after the other. mixed [n, e] and log_sum_exp [n] are those of the parts so far: a new part is
// weighed against them by what its keys have of the sum of all.
void attend_head_in_parts(const Heads& heads, const Weighing& weighing, const Segment& s, int64_t h, float* scratch) {
  auto* logits = scratch;
  auto* mixed = logits + s.n * kKeysAtATime;
  const LogSumExps log_sum_exp{mixed + s.n * heads.e, mixed + s.n * (heads.e + 1)};
  const LogSumExps of_part{mixed + s.n * (heads.e + 2), mixed + s.n * (heads.e + 3)};
  for (int64_t first = 0; first < s.keys; first += kKeysAtATime) {
    auto part = s;
    part.first_key = first;
    part.keys = std::min(kKeysAtATime, s.keys - first);
    meet_head(heads, part, h, logits, part.keys);
    weighing.soften_head(part, h, logits, part.keys, first == 0 ? log_sum_exp : of_part);
    for (int64_t row = 0; first > 0 && row < s.n; ++row) {
      const auto all = log_sum(log_sum_exp[row], of_part[row]);
      scale(mixed + row * heads.e, heads.e, share_of(log_sum_exp[row], all));
      scale(logits + row * part.keys, part.keys, share_of(of_part[row], all));
      log_sum_exp.set(row, all);
    }
    mix_head_into(heads, part, h, logits, part.keys, mixed, heads.e, /*add=*/first > 0);
  }
  for (int64_t row = 0; row < s.n; ++row) std::copy_n(mixed + row * heads.e, heads.e, s.mixed + (row * heads.H + h) * heads.e);
  weighing.give_log_sum_exp(s, h, log_sum_exp);
}

// What a head takes of scratch for each row.
int64_t floats_of_a_row(const Heads& heads, const Weighing& weighing, int64_t keys) {
  return in_parts(heads, weighing) ? kKeysAtATime + heads.e + 4 : keys;
}

void attend_head(const Heads& heads, const Weighing& weighing, const Segment& s, int64_t h, float* scratch, bool give) {
  if (in_parts(heads, weighing)) return attend_head_in_parts(heads, weighing, s, h, scratch);
  meet_head(heads, s, h, scratch, s.keys);
  weighing.soften_head(s, h, scratch, s.keys);
  if (give && weighing.gives_weights()) weighing.give(s, h, scratch, s.keys);
  mix_head(heads, s, h, scratch, s.keys);
}

// Rows [first, first + n) of those of a segment.
Segment rows_of(Segment s, int64_t first, int64_t n, const Heads& heads) {
  s.first += first;
  s.n = n;
  s.rows += first * s.stride;
  s.mixed += first * heads.H * heads.e;
  return s;
}

}  // namespace

void meet_head(const Heads& heads, const Segment& s, int64_t h, float* logits, int64_t stride) {
  const auto place = place_of(heads.keys, heads, s.b, h);
  const bool are_rows = heads.keys.dim() == 4;
  (are_rows ? multiply_transposed
            : multiply)({.sizes = {s.n, s.keys, heads.d},
                         .a = {s.rows + h * s.head_stride, s.stride},
                         .b = are_rows ? plain_rows(heads.keys, place, heads.keys.stride(2)).from_row(s.first_key)
                                       : packed(heads.keys, place, heads.d).from_panel(s.first_key / kernels().panel),
                         .c = {logits, stride},
                         .all_rows = s.all_rows});
}

void mix_head(const Heads& heads, const Segment& s, int64_t h, const float* weights, int64_t stride) {
  mix_head_into(heads, s, h, weights, stride, s.mixed + h * heads.e, heads.H * heads.e, /*add=*/false);
}

ScratchSize scratch_of_heads(const Heads& heads, const Weighing& weighing, const TaskThreads& threads) {
  const auto floats = floats_of_a_row(heads, weighing, heads.Lk);
  if (threads.all) return {heads.H * floats};
  // The logits of a block of rows fit into a core's cache beside keys and values of a head.
  const auto most_rows = kMostScratchFloats / std::max<int64_t>(1, floats);
  return {.row = 1, .logits = floats, .rows_at_a_time = std::clamp<int64_t>(most_rows, 1, kernels().block_rows)};
}

void attend_heads(const Heads& heads, const Weighing& weighing, const Segment& s, Scratch scratch, const TaskThreads& threads) {
  const auto floats = floats_of_a_row(heads, weighing, s.keys);
  if (!threads.all) {
    const auto rows = std::min(s.n, scratch_of_heads(heads, weighing, threads).rows_at_a_time);
    auto* logits = scratch.take(rows * floats);
    for (int64_t h = 0; h < heads.H; ++h) {
      for (int64_t row = 0; row < s.n; row += rows) {
        attend_head(heads, weighing, rows_of(s, row, std::min(rows, s.n - row), heads), h, logits, /*give=*/true);
      }
    }
    return;
  }
  auto* logits = scratch.take(heads.H * s.n * floats);
  const bool give_later = weighing.gives_mean();  // several heads add to one place
  engine::each(heads.H, [&](int64_t h) { attend_head(heads, weighing, s, h, logits + h * s.n * floats, !give_later); });
  for (int64_t h = 0; give_later && h < heads.H; ++h) weighing.give(s, h, logits + h * s.n * floats, s.keys);
}

}  // namespace engine

namespace {

// k and v [B, G, Lk, ...] as they are for a few rows, else packed.
engine::Heads heads_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  using namespace engine;
  const auto& run = kernels();
  const auto B = k.size(0), G = k.size(1), Lk = k.size(2), d = k.size(3), e = v.size(3);
  Heads heads{.H = q.size(1), .G = G, .d = d, .e = e, .Lk = Lk, .keys = with_rows(k), .values = with_rows(v)};
  if (q.size(2) * heads.H / G <= kMostRowsUnpacked) return heads;
  const auto keys = heads.keys, values = heads.values;
  heads.keys = in_huge_pages(at::empty({B, G, run.packed_size(d, Lk)}, k.options()));
  heads.values = in_huge_pages(at::empty({B, G, run.packed_size(Lk, e)}, v.options()));
  each(2 * B * G, [&](int64_t i) {
    const auto b = i / 2 / G, g = i / 2 % G;
    const auto source = [b, g](const Tensor& x) { return data(x) + b * x.stride(0) + g * x.stride(1); };
    const auto target = [b, g](const Tensor& x) { return mutable_data(x) + b * x.stride(0) + g * x.stride(1); };
    if (i % 2 == 0) {
      run.pack_transposed(source(keys), keys.stride(2), d, Lk, target(heads.keys), Storage::float32);
    } else {
      run.pack(source(values), values.stride(2), Lk, e, target(heads.values), Storage::float32);
    }
  });
  return heads;
}

}  // namespace

AttentionResult attend_on_kernels(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Tensor* largest) {
  using namespace engine;
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), Lk = k.size(2), e = v.size(3);
  const auto queries = with_rows(q);
  const auto heads = heads_of(queries, k, v);
  const auto scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  Weighing weighing(options.mask, H, Lq, Lk, static_cast<float>(scale), options.weights, options.weight_heads);

  const auto mixed = in_huge_pages(at::empty({B, Lq, H, e}, q.options()));
  AttentionResult result{
      mixed.transpose(1, 2), empty_weights(options.weights, options.weight_heads, B, H, Lq, Lk, /*all_keys=*/true), {}};
  Tensor largest_of_rows;
  if (options.log_sum_exp) {
    result.log_sum_exp = at::empty({B, H, Lq}, q.options());
    largest_of_rows = at::empty_like(result.log_sum_exp);
  }
  weighing.write_to(result.weights, result.log_sum_exp, largest_of_rows);

  const auto bytes = static_cast<int64_t>(heads.keys.nbytes() + heads.values.nbytes()) / B;
  const auto run = [&](int64_t begin, int64_t end, Scratch scratch, const TaskThreads& threads) {
    for (int64_t first = begin, last = begin; first < end; first = last) {
      const auto b = first / Lq, i = first % Lq;
      last = std::min(end, (b + 1) * Lq);
      const Segment segment{.b = b,
                            .first = first,
                            .n = last - first,
                            .keys = Lk,
                            .rows = data(queries) + b * queries.stride(0) + i * queries.stride(2),
                            .stride = queries.stride(2),
                            .head_stride = queries.stride(1),
                            .mixed = mutable_data(mixed) + first * H * e,
                            .log_sum_exp = {},
                            .all_rows = Lq};
      attend_heads(heads, weighing, segment, scratch, threads);
    }
  };
  each_share_of_rows({.rows = B * Lq,
                      .has_many_rows = has_many_rows(Lq, Lk, heads.d),
                      .reads = {.weights = 0, .context = bytes},
                      .apart = scratch_of_heads(heads, weighing, {.all = false}),
                      .together = scratch_of_heads(heads, weighing, {.all = true})},
                     run);
  if (largest) {
    *largest = largest_of_rows;
  } else if (options.log_sum_exp) {
    result.log_sum_exp.add_(largest_of_rows);
  }
  return result;
}

}  // namespace xattn::detail
