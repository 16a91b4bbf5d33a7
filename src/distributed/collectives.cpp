// SPDX-License-Identifier: Apache-2.0
#include "distributed/collectives.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <exception>
#include <numeric>

#include "attention/softmax.h"
#include "base/text.h"

namespace xattn::detail {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

RanksPtr ranks_of(AutogradContext* context) {
  return c10::static_intrusive_pointer_cast<Ranks>(context->saved_data["ranks"].toCapsule());
}

void keep(AutogradContext* context, const RanksPtr& ranks) {
  context->saved_data["ranks"] = c10::IValue::make_capsule(ranks);
}

void check_first_derivative() {
  if (!at::GradMode::is_enabled()) return;
  throw c10::NotImplementedError(
      "[context_parallel] create_graph must be false: attention over several ranks has first derivatives only.");
}

// The rows of all ranks, each [B, L, ...] with its own L, exchanged as tensors padded to the longest.
Tensor gather_rows(const Tensor& own, const std::vector<int64_t>& lengths, Ranks& ranks) {
  const auto most = *std::ranges::max_element(lengths);
  std::vector<int64_t> padding(static_cast<size_t>(2 * own.dim()), 0);
  padding[static_cast<size_t>(2 * own.dim() - 3)] = most - own.size(1);  // after the rows
  auto parts = ranks.gather(at::constant_pad_nd(own, padding).contiguous());
  for (size_t i = 0; i < parts.size(); ++i) parts[i] = parts[i].narrow(1, 0, lengths[i]);
  return at::cat(parts, 1);
}

Tensor rows_of(const Tensor& all, const std::vector<int64_t>& lengths, int64_t rank) {
  const auto first = std::accumulate(lengths.begin(), lengths.begin() + rank, int64_t{0});
  return all.narrow(1, first, lengths[static_cast<size_t>(rank)]);
}

}  // namespace

template <class Start>
void Ranks::run(const Tensor& x, const Start& start) {
  bytes_ += static_cast<int64_t>(x.nbytes());
  auto happened = "has no exchange with the others";  // no backend, for example none for this device
  try {
    const auto work = start();
    happened = "lost the others: a rank has failed, or did not answer in time";
    work->wait();
  } catch (const std::exception& error) {
    const std::string what = error.what();
    throw c10::DistBackendError(
        formatted("[context_parallel] rank {} of {} {} ({}).", rank(), size(), happened, what.substr(0, what.find('\n'))));
  }
}

void Ranks::reduce(Tensor& x, c10d::ReduceOp::RedOpType operation) {
  if (size() == 1) return;
  std::vector<Tensor> tensors = {x};
  run(x, [&] { return group_->allreduce(tensors, {.reduceOp = operation}); });
}

std::vector<Tensor> Ranks::gather(const Tensor& x) {
  if (size() == 1) return {x};
  std::vector<std::vector<Tensor>> found(1);
  for (int64_t i = 0; i < size(); ++i) found[0].push_back(at::empty_like(x));
  std::vector<Tensor> own = {x};
  run(x, [&] { return group_->allgather(found, own); });
  return found[0];
}

// ---- Gradients that add up ------------------------------------------------------------------------------------------------

namespace {

struct SummedGradients : torch::autograd::Function<SummedGradients> {
  static variable_list forward(AutogradContext* context, at::TensorList tensors, const RanksPtr& ranks) {
    keep(context, ranks);
    variable_list same;
    for (const auto& tensor : tensors) same.push_back(tensor.detach());
    return same;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative();
    variable_list parts, result(grads.size() + 1);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (context->needs_input_grad(i)) parts.push_back(grads[i].to(wide_type(grads[i])).flatten());
    }
    auto all = at::cat(parts);
    ranks_of(context)->sum(all);
    int64_t first = 0;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!context->needs_input_grad(i)) continue;
      result[i] = all.narrow(0, first, grads[i].numel()).view(grads[i].sizes()).to(grads[i].scalar_type());
      first += grads[i].numel();
    }
    return result;
  }
};

struct AllRows : torch::autograd::Function<AllRows> {
  static Tensor forward(AutogradContext* context,
                        const Tensor& own,
                        const std::vector<int64_t>& lengths,
                        const RanksPtr& ranks) {
    keep(context, ranks);
    context->saved_data["lengths"] = lengths;
    return gather_rows(own, lengths, *ranks);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative();
    return {rows_of(grads[0], context->saved_data["lengths"].toIntVector(), ranks_of(context)->rank()), {}, {}};
  }
};

struct OwnRows : torch::autograd::Function<OwnRows> {
  static Tensor forward(AutogradContext* context,
                        const Tensor& all,
                        const std::vector<int64_t>& lengths,
                        const RanksPtr& ranks) {
    keep(context, ranks);
    context->saved_data["lengths"] = lengths;
    return rows_of(all, lengths, ranks->rank()).clone();
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative();
    return {gather_rows(grads[0], context->saved_data["lengths"].toIntVector(), *ranks_of(context)), {}, {}};
  }
};

}  // namespace

void sum_gradients(const std::vector<Tensor*>& tensors, const RanksPtr& ranks) {
  std::vector<Tensor> trained;
  for (const auto* x : tensors) {
    if (x->defined() && x->requires_grad()) trained.push_back(*x);
  }
  if (ranks->size() == 1 || !at::GradMode::is_enabled() || trained.empty()) return;
  const auto same = SummedGradients::apply(at::TensorList(trained), ranks);
  size_t next = 0;
  for (auto* x : tensors) {
    if (x->defined() && x->requires_grad()) *x = same[next++];
  }
}

Tensor all_rows(const Tensor& own, const std::vector<int64_t>& lengths, const RanksPtr& ranks) {
  return ranks->size() == 1 ? own : AllRows::apply(own, lengths, ranks);
}

Tensor own_rows(const Tensor& x, const std::vector<int64_t>& lengths, const RanksPtr& ranks) {
  return ranks->size() == 1 ? x : OwnRows::apply(x, lengths, ranks);
}

// ---- Merging --------------------------------------------------------------------------------------------------------------

namespace {

struct Merge : torch::autograd::Function<Merge> {
  static variable_list forward(
      AutogradContext* context, const Tensor& output, const Tensor& log_sum_exp, const Tensor& largest, const RanksPtr& ranks) {
    auto most = at::where(at::isneginf(log_sum_exp), log_sum_exp, log_sum_exp + largest).contiguous();
    ranks->max(most);
    const auto anchor = most.masked_fill(at::isneginf(most), 0);  // -inf - -inf is NaN
    const auto mass = at::exp(log_sum_exp + (largest - anchor)).unsqueeze(-1);
    auto sums = at::cat({output * mass, mass}, -1);
    ranks->sum(sums);
    const auto e = output.size(-1);
    const auto total = sums.narrow(-1, e, 1);
    const auto merged = sums.narrow(-1, 0, e) / total.masked_fill(total == 0, 1);
    const auto share = mass / total.masked_fill(total == 0, 1);
    context->save_for_backward({output, merged, share});
    context->mark_non_differentiable({share});
    return {merged, share};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    check_first_derivative();
    const auto saved = context->get_saved_variables();
    const auto &output = saved[0], &merged = saved[1], &share = saved[2];
    const auto grad = share * grads[0];
    return {grad, (grad * (output - merged)).sum(-1), {}, {}};
  }
};

}  // namespace

Merged merge(const Tensor& output, const Tensor& log_sum_exp, const Tensor& largest, const RanksPtr& ranks) {
  const auto both = Merge::apply(output.to(log_sum_exp.scalar_type()), log_sum_exp, largest, ranks);
  return {both[0], both[1]};
}

}  // namespace xattn::detail
