// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <atomic>
#include <cstdint>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

// Collective operations of the ranks of a process group, with gradients.
namespace xattn::detail {

/// A process group that counts the bytes passed to it and reports failures as c10::DistBackendError.
class Ranks : public torch::CustomClassHolder {
 public:
  explicit Ranks(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

  int64_t rank() const { return group_->getRank(); }
  int64_t size() const { return group_->getSize(); }
  int64_t bytes() const { return bytes_; }

  /// Reduces a contiguous x over all ranks in place.
  void sum(at::Tensor& x) { reduce(x, c10d::ReduceOp::SUM); }
  void max(at::Tensor& x) { reduce(x, c10d::ReduceOp::MAX); }

  /// The tensors of all ranks, which must have the same size.
  std::vector<at::Tensor> gather(const at::Tensor& x);

 private:
  void reduce(at::Tensor& x, c10d::ReduceOp::RedOpType operation);
  template <class Start>
  void run(const at::Tensor& x, const Start& start);

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::atomic<int64_t> bytes_ = 0;
};

using RanksPtr = c10::intrusive_ptr<Ranks>;

/// Replaces tensors that are equal on all ranks by ones whose backward adds up the gradients of all ranks. Undefined tensors
/// are skipped.
void sum_gradients(const std::vector<at::Tensor*>& tensors, const RanksPtr& ranks);

/// Concatenates the rows [B, L, ...] of all ranks, which have these `lengths`; backward keeps this rank's part of a gradient
/// that is equal on all ranks.
at::Tensor all_rows(const at::Tensor& own, const std::vector<int64_t>& lengths, const RanksPtr& ranks);

/// This rank's rows of x [B, L, ...], which is equal on all ranks; backward gathers the gradients of all rows.
at::Tensor own_rows(const at::Tensor& x, const std::vector<int64_t>& lengths, const RanksPtr& ranks);

struct Merged {
  at::Tensor output;  ///< [B, H, Lq, e], at least float32
  at::Tensor share;   ///< [B, H, Lq, 1], the sum of a row's weights over this rank's keys; no gradient
};

/// Attention over the keys of all ranks, from the attention over each rank's own keys: output [B, H, Lq, e] and log-sum-exp
/// [B, H, Lq], which is relative to `largest`, and -inf for a row without keys here. Differentiable in both; backward exchanges
/// nothing.
Merged merge(const at::Tensor& output, const at::Tensor& log_sum_exp, const at::Tensor& largest, const RanksPtr& ranks);

}  // namespace xattn::detail
