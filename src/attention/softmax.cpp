// SPDX-License-Identifier: Apache-2.0
#include "attention/softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "attention/mask_parts.h"

namespace xattn::detail {

using at::Tensor;

namespace {

// The type of returned weights: that of the logits, except that autocast on CUDA makes every softmax float32.
at::ScalarType weights_type(const Tensor& weights, at::ScalarType logits) {
  const bool widened = weights.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA);
  return widened ? at::kFloat : logits;
}

// at::softmax copies a tensor that is not contiguous. Logits [B, H, Lq, Lk] stored as [B, Lq, H, Lk] need no copy.
Tensor softmax_as_stored(const Tensor& logits) {
  const auto rows_first = logits.transpose(1, 2);  // [B, Lq, H, Lk]
  if (logits.is_contiguous() || !rows_first.is_contiguous()) return at::softmax(logits, -1);
  return at::softmax(rows_first, -1).transpose(1, 2);
}

}  // namespace

at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
at::ScalarType wide_type(const Tensor& x) {
  return wide_type(x.scalar_type());
}

Tensor with_rows_filled(const Tensor& x, const Tensor& rows, double value) {
  return rows.defined() ? x.masked_fill(rows, value) : x;
}

SoftmaxResult softmax_over_keys(const Tensor& products,
                                at::ScalarType type,
                                const Mask& mask,
                                std::optional<LogSumExpBase> log_sum_exp) {
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
  result.weights = with_rows_filled(softmax_as_stored(logits), result.empty_rows, 0);
  if (!log_sum_exp) return result;
  if (log_sum_exp == LogSumExpBase::largest_logit) {
    const auto sizes = logits.sizes().slice(0, 3);
    result.largest = Lk > 0 ? at::amax(logits.detach(), -1) : at::zeros(sizes, logits.options());
    logits = logits - result.largest.unsqueeze(-1);
  }
  const auto rows = result.empty_rows.defined() ? result.empty_rows.squeeze(-1) : result.empty_rows;
  result.log_sum_exp = with_rows_filled(at::logsumexp(logits, -1), rows, kMinusInfinity);
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
