// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <atomic>
#include <cstdint>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

// What the ranks of a process group do together, as steps that autograd knows how to undo. All are collective.
namespace xattn::detail {

/// A process group that counts what passes through it, and whose failures are told.
class Ranks : public torch::CustomClassHolder {
 public:
  explicit Ranks(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

  int64_t rank() const { return group_->getRank(); }
  int64_t size() const { return group_->getSize(); }
  int64_t bytes() const { return bytes_; }

  /// In place, over all ranks; x is contiguous.
  void sum(at::Tensor& x) { reduce(x, c10d::ReduceOp::SUM); }
  void max(at::Tensor& x) { reduce(x, c10d::ReduceOp::MAX); }

  /// The tensors of all ranks, of one size.
  std::vector<at::Tensor> gather(const at::Tensor& x);

 private:
  void reduce(at::Tensor& x, c10d::ReduceOp::RedOpType operation);
  template <class Start>
  void run(const at::Tensor& x, const Start& start);

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::atomic<int64_t> bytes_ = 0;
};

using RanksPtr = c10::intrusive_ptr<Ranks>;

/// The same tensors, which are equal on all ranks; backward adds up their gradients, which are not. Undefined ones stay so.
std::vector<at::Tensor> with_summed_gradients(const std::vector<at::Tensor>& tensors, const RanksPtr& ranks);

/// The rows [B, L, ...] of all ranks behind each other, of `lengths` each; backward keeps this rank's part of a gradient that all
/// ranks have.
at::Tensor all_rows(const at::Tensor& own, const std::vector<int64_t>& lengths, const RanksPtr& ranks);

/// This rank's rows of x [B, L, ...], which all ranks have; backward brings the gradients of all rows together.
at::Tensor own_rows(const at::Tensor& x, const std::vector<int64_t>& lengths, const RanksPtr& ranks);

struct Merged {
  at::Tensor output;  ///< [B, H, Lq, e], at least float32
  at::Tensor share;   ///< [B, H, Lq, 1], of this rank's keys in a row's weights; no gradient
};

/// Attention over the keys of all ranks from that over each rank's own: output [B, H, Lq, e] and its log-sum-exp [B, H, Lq], which
/// is relative to `largest`, and -inf for a row without keys here. Differentiable in both; backward needs no other rank.
Merged merge(const at::Tensor& output, const at::Tensor& log_sum_exp, const at::Tensor& largest, const RanksPtr& ranks);

}  // namespace xattn::detail
