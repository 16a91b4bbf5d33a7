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

namespace xattn::detail {

using at::Tensor;

namespace {

// The type of returned weights: that of the logits, unless autocast makes every softmax float32, as it does on CUDA.
at::ScalarType weights_type(const Tensor& weights, at::ScalarType logits) {
  const bool widened = weights.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA);
  return widened ? at::kFloat : logits;
}

// at::softmax copies what is not contiguous; logits of which a query's heads are neighbours stay where they are.
Tensor softmax_in_place_of(const Tensor& logits) {
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

SoftmaxResult softmax_over_keys(
    const Tensor& products, at::ScalarType type, const Mask& mask, bool log_sum_exp, Tensor* largest) {
  const auto Lq = products.size(2), Lk = products.size(3);
  const auto keep = mask.keep(Lq, Lk, products.device());
  const auto bias = mask.additive(type);
  const auto empty_rows = mask.empty_rows(Lq, Lk, products.device(), type);  // [B|1, H|1, Lq|1, 1]

  auto logits = products.to(wide_type(products));
  if (bias.defined()) logits = logits + bias;
  if (keep.defined()) logits = logits.masked_fill(at::logical_not(keep), kMinusInfinity);

  // A row of -inf alone would become NaN, in backward too: it is opened before softmax and closed after.
  const auto opened = with_rows_filled(logits, empty_rows, 0);
  SoftmaxResult result{with_rows_filled(softmax_in_place_of(opened), empty_rows, 0), {}, empty_rows};
  if (log_sum_exp) {
    const auto rows = empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows;
    if (largest) *largest = Lk > 0 ? at::amax(opened.detach(), -1) : at::zeros(opened.sizes().slice(0, 3), opened.options());
    const auto relative = largest ? opened - largest->unsqueeze(-1) : opened;
    result.log_sum_exp = with_rows_filled(at::logsumexp(relative, -1), rows, kMinusInfinity);
  }
  return result;
}

Tensor chosen_heads(const Tensor& x, const std::vector<int64_t>& heads) {
  if (heads.empty()) return x;
  std::vector<Tensor> chosen;
  for (const auto head : heads) chosen.push_back(x.select(1, head));
  return at::stack(chosen, 1);
}

Tensor wanted_weights(const Tensor& weights, const AttentionOptions& options, at::ScalarType type) {
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
