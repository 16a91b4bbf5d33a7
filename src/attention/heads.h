// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>

#include <array>
#include <vector>

#include "attention/merge.h"
#include "cpu/threads.h"

// Attention between projected heads: what the standard order does between its projections, and what becomes of logits in all.
namespace xattn::detail::engine {

/// Rows of one context among all B * n * Lq of a call, and where their results go.
struct Segment {
  int64_t b, first, n;
  int64_t keys;            ///< of the context: those that count, or those of one part of them
  const float* rows;       ///< what meets the keys
  int64_t stride;          ///< from row to row
  int64_t head_stride;     ///< from head to head, where the rows are projected queries
  float* mixed;            ///< [n, H, e], or whatever the order of the values leaves
  LogSumExps log_sum_exp;  ///< [n, H]; null if not wanted
  int64_t all_rows;        ///< of the context, among which these n are
  int64_t first_key = 0;
};

/// One restriction of a mask, [B|1, H|1, Lq|1, Lk], with strides of 0 for axes of one.
template <class T>
struct MaskRows {
  const T* data = nullptr;
  int64_t b = 0, h = 0, i = 0;

  explicit MaskRows(const at::Tensor& x) {
    if (!x.defined()) return;
    data = x.const_data_ptr<T>();
    const auto stride = [&x](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
    b = stride(0), h = stride(1), i = stride(2);
  }
  const T* at(int64_t batch, int64_t head, int64_t row, int64_t key = 0) const {
    return data ? data + batch * b + head * h + row * i + key : nullptr;
  }
};

/// Room for the weights that are wanted: undefined, [B, Lq, Lk] of zeros, or [B, H, Lq, Lk], zeros unless `all_keys` are written.
at::Tensor empty_weights(
    AttentionWeights wanted, const std::vector<int64_t>& heads, int64_t B, int64_t H, int64_t Lq, int64_t Lk, bool all_keys);

/// What a call makes of logits: weights by its scale and mask, and of these what the caller wants to see.
class Weighing {
 public:
  Weighing(
      const Mask& mask, int64_t H, int64_t Lq, int64_t Lk, float scale, AttentionWeights wanted, std::vector<int64_t> heads);

  /// Where `give` writes to; nowhere if undefined. log_sum_exp and what it is relative to, [B, H, Lq].
  void write_to(const at::Tensor& weights, const at::Tensor& log_sum_exp = {}, const at::Tensor& largest = {});

  /// Whether every row has a key as far as the mask's kind shows.
  bool all_have_keys() const { return all_have_keys_; }
  bool gives_weights() const { return weights_ != nullptr; }
  bool gives_mean() const { return weights_ && wanted_ == AttentionWeights::mean; }

  /// Softmax of one head's logits [n, keys], rows `stride` apart, in place; log_sum_exp [n], or null: as `write_to` says.
  void soften_head(const Segment& s, int64_t h, float* logits, int64_t stride, LogSumExps log_sum_exp = {}) const;
  /// Of rows [begin, end) of logits [n * H, keys], `stride` apart.
  void soften_rows(const Segment& s, float* logits, int64_t stride, int64_t begin, int64_t end) const;
  /// One head's log-sum-exp [n] to the caller, if he wants it.
  void give_log_sum_exp(const Segment& s, int64_t h, const LogSumExps& log_sum_exp) const;
  /// One head's weights to the caller, as far as he wants them; adds to the mean.
  void give(const Segment& s, int64_t h, const float* weights, int64_t stride) const;

 private:
  LogSumExps place_of_log_sum_exp(const Segment& s, int64_t h, int64_t row) const;
  void copy_weights(const Segment& s, int64_t place, int64_t places, const float* weights, int64_t stride) const;
  void add_to_mean(const Segment& s, const float* weights, int64_t stride) const;

  int64_t H_, Lq_, Lk_;
  float scale_;
  at::Tensor keep_tensor_, bias_tensor_;
  MaskRows<bool> keep_{at::Tensor()};
  MaskRows<float> bias_{at::Tensor()};
  bool all_have_keys_;
  AttentionWeights wanted_;
  std::vector<int64_t> heads_;
  float* weights_ = nullptr;
  LogSumExps log_sum_exp_;
};

/// Projected keys and values of every head; float32, or bfloat16.
struct Heads {
  int64_t H, G, d, e, Lk;
  at::Tensor keys;    ///< packed, [B, G, d x Lk], or plain rows of consecutive numbers, [B, G, Lk, d]
  at::Tensor values;  ///< packed, [B, G, Lk x e], or such rows, [B, G, Lk, e]
};

/// q k' of head h, [n, keys], rows `stride` apart.
void meet_head(const Heads& heads, const Segment& s, int64_t h, float* logits, int64_t stride);
/// weights v of head h, [n, keys] -> its part of s.mixed.
void mix_head(const Heads& heads, const Segment& s, int64_t h, const float* weights, int64_t stride);

/// From projected queries to mixed values, one head after the other, so that its logits stay in the cache. Where no weights are
/// wanted, a long context is gone through in parts: see merge.h.
void attend_heads(const Heads& heads, const Weighing& weighing, const Segment& s, Scratch scratch, const TaskThreads& threads);
/// The scratch that it needs.
ScratchSize scratch_of_heads(const Heads& heads, const Weighing& weighing, const TaskThreads& threads);

}  // namespace xattn::detail::engine

namespace xattn::detail {

/// `attention` of float32 on the CPU, without gradients and dropout, from one pass whatever is returned.
/// q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e], none empty; any strides. largest: if not null, becomes [B, H, Lq], each row's
/// largest logit, and the log-sum-exp is what comes on top of it.
AttentionResult attend_on_kernels(const at::Tensor& q,
                                  const at::Tensor& k,
                                  const at::Tensor& v,
                                  const AttentionOptions& options,
                                  at::Tensor* largest = nullptr);

/// Gradients of q, k and v; undefined where not wanted.
struct AttentionGradients {
  at::Tensor q, k, v;
};

/// Of what `attend_on_kernels` has returned, with its log-sum-exp on top of `largest`, for the same arguments, from the gradient of
/// its output.
AttentionGradients differentiate_on_kernels(const at::Tensor& q,
                                            const at::Tensor& k,
                                            const at::Tensor& v,
                                            const AttentionResult& result,
                                            const at::Tensor& largest,
                                            const at::Tensor& grad,
                                            const AttentionOptions& options,
                                            const std::array<bool, 3>& wanted);

}  // namespace xattn::detail
