// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "attention/merge.h"
#include "attention/softmax.h"
#include "cpu/threads.h"

// Attention between projected heads on this library's kernels. For a few query rows, one head at a time:
//
//   logits_of_head           S = q k'                                 [rows, keys], in scratch that stays in the cache
//   SoftmaxStage             P = softmax(scale * S + bias, over the keys that the mask allows), in place
//   weighted_values_of_head  P v                                      [rows, e], into the result
//
// A long context is read in parts of `kKeysOfAPart` keys, and the weighted values of the parts are merged (merge.h). Under a
// causal mask, all three stages stop at the last key that the rows attend to. Frozen layers run the same stages between their
// own projections.
namespace xattn::detail::engine {

/// Query rows of one context, the keys that they attend to, and where their weighted values go.
struct Segment {
  int64_t context;         ///< index of the context in the batch
  int64_t first_row;       ///< index of the first row among all B * n * Lq query rows of the call, n queries for each context
  int64_t rows;            ///< number of rows
  int64_t keys;            ///< number of keys: those of the context, or of a part of it
  const float* queries;    ///< left side of the logits: projected queries, or their form in the order of the logits
  int64_t query_stride;    ///< from row to row
  int64_t head_stride;     ///< from head to head, if the rows are projected queries
  float* weighted_values;  ///< [rows, H, e], or the shape that the order of the values uses
  LogSumExps log_sum_exp;  ///< output, [rows, H]; null if not requested
  int64_t context_rows;    ///< query rows of the whole context, of all its segments
  int64_t first_key = 0;
};

/// One restriction of a mask, [B|1, H|1, Lq|1, Lk]; an axis of size 1 has a stride of 0.
template <class T>
struct MaskRows {
  const T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  explicit MaskRows(const at::Tensor& x) {
    if (!x.defined()) return;
    data = x.const_data_ptr<T>();
    const auto stride = [&x](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
    batch_stride = stride(0), head_stride = stride(1), row_stride = stride(2);
  }
  /// True if all heads and query rows of a batch entry have the same restriction.
  bool is_uniform() const { return head_stride == 0 && row_stride == 0; }
  const T* at(int64_t batch, int64_t head, int64_t row, int64_t key) const {
    return data ? data + batch * batch_stride + head * head_stride + row * row_stride + key : nullptr;
  }
};

/// Output buffer for the requested weights: undefined, [B, Lq, Lk] of zeros, or [B, H, Lq, Lk], which is uninitialised if
/// `all_keys` will be written, and zeros otherwise.
at::Tensor empty_weights(const AttentionOptions& options, int64_t B, int64_t H, int64_t Lq, int64_t Lk, bool all_keys);

/// The softmax of one call: it turns logits into weights and writes the requested results to their buffers.
class SoftmaxStage {
 public:
  SoftmaxStage(const AttentionOptions& options, int64_t H, int64_t Lq, int64_t Lk, float scale);

  /// Sets the buffers for weights, and for the log-sum-exp and the largest logit that it is relative to, both [B, H, Lq].
  /// Undefined ones are skipped.
  void write_to(const at::Tensor& weights, const at::Tensor& log_sum_exp = {}, const at::Tensor& largest = {});

  /// True if the kind of the mask shows that every row has a key.
  bool all_have_keys() const { return all_have_keys_; }
  bool returns_weights() const { return weights_ != nullptr; }
  bool returns_mean() const { return weights_ && wanted_ == AttentionWeights::mean; }
  bool is_causal() const { return diagonal_.has_value(); }

  /// Consecutive rows whose logits are computed over the same number of keys. Under a causal mask, a query is divided into
  /// groups of `Kernels::block_rows` rows, and the keys of a group end at the panel with the last key that it attends to. They
  /// depend on a row's place in its query alone, and so do the row's bits, however rows are divided among threads.
  struct RowGroup {
    int64_t rows, keys;
  };
  /// The group of row `row` of a segment, from this row on.
  RowGroup group_at(const Segment& s, int64_t row) const;

  /// Softmax of one head's logits [rows, keys], `stride` apart, in place. Its log-sum-exp [rows] goes to `log_sum_exp`, or to
  /// the buffer of `write_to` by default.
  void softmax_head(const Segment& s, int64_t h, float* logits, int64_t stride, LogSumExps log_sum_exp = {}) const;
  /// Softmax of rows [begin, end) of logits [rows * H, keys], `stride` apart, in place; writes the segment's log-sum-exp.
  void softmax_rows(const Segment& s, float* logits, int64_t stride, int64_t begin, int64_t end) const;
  /// Copies one head's log-sum-exp [rows] to the buffer.
  void write_log_sum_exp(const Segment& s, int64_t h, const LogSumExps& log_sum_exp) const;
  /// Copies one head's weights [rows, keys] to the buffer, with zeros behind them, if that head is requested; or adds them to
  /// the mean.
  void write_weights(const Segment& s, int64_t h, const float* weights, int64_t stride) const;

 private:
  // Rows of logits that one call of the kernel computes: of one head from row i of a query on, or with the same mask.
  struct SoftmaxRows {
    int64_t head, i, count;
    int64_t visible_step;  // how many keys more each row sees under a causal mask: 1, or 0 if all are for row i
  };
  void softmax(const Segment& s, const SoftmaxRows& rows, float* logits, int64_t stride, const LogSumExps& log_sum_exp) const;
  // How many of the first keys of the context row i of a query sees; negative for rows before the diagonal's first key.
  int64_t visible_keys(int64_t i) const;
  LogSumExps log_sum_exp_at(const Segment& s, int64_t h, int64_t row) const;
  void copy_weights(const Segment& s, int64_t place, int64_t places, const float* weights, int64_t stride) const;
  void add_to_mean(const Segment& s, const float* weights, int64_t stride) const;

  int64_t H_, Lq_, Lk_;
  float scale_;
  std::optional<int64_t> diagonal_;          // of a causal mask
  at::Tensor allowed_tensor_, bias_tensor_;  // of the rest of the mask
  MaskRows<bool> allowed_;
  MaskRows<float> bias_;
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
  bool are_packed;    ///< both, or neither
  int64_t capacity;   ///< if they are packed: the keys that the panels have room for, which stands for Lk in their sizes
};

/// q k' of head h, [rows, keys], `stride` apart.
void logits_of_head(const Heads& heads, const Segment& s, int64_t h, float* logits, int64_t stride);
/// Weights [rows, keys] of head h times v -> its part of s.weighted_values.
void weighted_values_of_head(const Heads& heads, const Segment& s, int64_t h, const float* weights, int64_t stride);

/// All stages for a segment: from projected queries to weighted values, weights and log-sum-exp.
void attend_heads(
    const Heads& heads, const SoftmaxStage& softmax, const Segment& s, Scratch scratch, const TaskThreads& threads);
/// The scratch that `attend_heads` uses.
ScratchSize scratch_of_heads(const Heads& heads, const SoftmaxStage& softmax, const TaskThreads& threads);

}  // namespace xattn::detail::engine

namespace xattn::detail {

/// `attention` for float32 on the CPU, without gradients and dropout; weights come from the same pass.
/// q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e], none of them empty; any strides.
RelativeAttention attend_on_kernels(const at::Tensor& q,
                                    const at::Tensor& k,
                                    const at::Tensor& v,
                                    const AttentionOptions& options);

}  // namespace xattn::detail
