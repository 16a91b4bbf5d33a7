// SPDX-License-Identifier: Apache-2.0
#include "attention/softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "attention/mask_parts.h"
#include "cpu/on_kernels.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;

namespace {

// The type of returned weights: that of the logits, except that autocast on CUDA makes every softmax float32.
at::ScalarType weights_type(const Tensor& weights, at::ScalarType logits) {
  const bool widened = weights.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA);
  return widened ? at::kFloat : logits;
}

// Calls f(offset, rows) for parts of the rows of x [..., n], contiguous, on all threads.
template <class F>
void each_rows(const Tensor& x, const F& f) {
  if (x.numel() == 0) return;
  const auto n = x.size(-1), least = std::max<int64_t>(1, kOperationsOfATask / (8 * n));  // an exponential is some 8 operations
  engine::TaskThreads{.all = true}.parts(x.numel() / n, [&](int64_t begin, int64_t end) { f(begin * n, end - begin); }, least);
}

// The softmax of rows [..., n], contiguous, on the kernels.
Tensor softmax_on_kernels(const Tensor& x) {
  const auto y = at::empty_like(x);
  each_rows(x, [&](int64_t offset, int64_t rows) {
    const auto n = x.size(-1);
    auto* to = engine::mutable_data(y) + offset;
    std::copy_n(engine::data(x) + offset, rows * n, to);
    kernels().softmax({.rows = rows, .n = n, .x = to, .x_stride = n});
  });
  return y;
}

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    const auto y = softmax_on_kernels(x);
    context->save_for_backward({y});
    return y;
  }

  // dx = y * (dy - sum of y * dy)
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto y = context->get_saved_variables()[0];
    if (!grads[0].defined()) return {Tensor()};
    if (at::GradMode::is_enabled() || !run_on_kernels({y, grads[0]})) {
      return {at::_softmax_backward_data(grads[0], y, -1, y.scalar_type())};
    }
    const auto dy = grads[0].contiguous(), dx = at::empty_like(y);
    each_rows(y, [&](int64_t offset, int64_t rows) {
      const auto n = y.size(-1);
      const auto *weights = engine::data(y) + offset, *grad = engine::data(dy) + offset;
      auto* to = engine::mutable_data(dx) + offset;
      for (int64_t row = 0; row < rows; ++row, weights += n, grad += n, to += n) {
        float sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += weights[i] * grad[i];
        for (int64_t i = 0; i < n; ++i) to[i] = weights[i] * (grad[i] - sum);
      }
    });
    return {dx};
  }
};

// Both softmaxes copy a tensor that is not contiguous. Logits [B, H, Lq, Lk] stored as [B, Lq, H, Lk] need no copy.
Tensor softmax_as_stored(const Tensor& logits, SoftmaxOfRows softmax) {
  const auto rows_first = logits.transpose(1, 2);  // [B, Lq, H, Lk]
  if (logits.is_contiguous() || !rows_first.is_contiguous()) return softmax(logits);
  return softmax(rows_first).transpose(1, 2);
}

}  // namespace

Tensor softmax_on_operators(const Tensor& logits) {
  return at::softmax(logits, -1);
}

Tensor softmax_of_rows(const Tensor& logits) {
  if (!run_on_kernels({logits})) return softmax_on_operators(logits);
  const auto x = logits.contiguous();
  return at::GradMode::is_enabled() && x.requires_grad() ? SoftmaxFunction::apply(x) : softmax_on_kernels(x);
}

at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
at::ScalarType wide_type(const Tensor& x) {
  return wide_type(x.scalar_type());
}

Tensor with_rows_filled(const Tensor& x, const Tensor& rows, double value) {
  return rows.defined() ? x.masked_fill(rows, value) : x;
}

SoftmaxResult softmax_over_keys(
    const Tensor& products, at::ScalarType type, const Mask& mask, bool log_sum_exp, SoftmaxOfRows softmax) {
  const auto Lq = products.size(2), Lk = products.size(3);
  const auto allowed = allowed_keys(mask, Lq, Lk, products.device());
  const auto bias = total_bias(mask, Lk, type);
  SoftmaxResult result;
  result.empty_rows = rows_without_keys(mask, Lq, Lk, products.device(), type);

  auto logits = products.to(wide_type(products));
  if (bias.defined()) logits = logits + bias;
  if (allowed.defined()) logits = logits.masked_fill(at::logical_not(allowed), kMinusInfinity);

  // The softmax of a row of -inf alone is NaN, and so is its gradient. Such a row is zeroed before and after the softmax.
  logits = with_rows_filled(logits, result.empty_rows, 0);
  result.weights = with_rows_filled(softmax_as_stored(logits, softmax), result.empty_rows, 0);
  if (!log_sum_exp) return result;
  result.largest = Lk > 0 ? at::amax(logits.detach(), -1) : at::zeros(logits.sizes().slice(0, 3), logits.options());
  const auto rows = result.empty_rows.defined() ? result.empty_rows.squeeze(-1) : result.empty_rows;
  const auto sums = at::logsumexp(logits - result.largest.unsqueeze(-1), -1);
  result.log_sum_exp = with_rows_filled(sums, rows, kMinusInfinity);
  return result;
}

AttentionResult absolute(RelativeAttention attended) {
  auto& [result, largest] = attended;
  if (largest.defined()) result.log_sum_exp = result.log_sum_exp + largest;
  return result;
}

Tensor chosen_heads(const Tensor& x, const std::vector<int64_t>& heads) {
  if (heads.empty()) return x;
  std::vector<Tensor> chosen;
  for (const auto head : heads) chosen.push_back(x.select(1, head));
  return at::stack(chosen, 1);
}

Tensor requested_weights(const Tensor& weights, const AttentionOptions& options, at::ScalarType type) {
  if (options.weights == AttentionWeights::none) return {};
  auto wanted = weights;
  if (options.weights == AttentionWeights::mean) {
    wanted = weights.size(1) == 1 ? weights.squeeze(1) : weights.mean(1);
  } else {
    wanted = chosen_heads(weights, options.weight_heads);
  }
  return wanted.to(weights_type(weights, type));
}

}  // namespace xattn::detail
