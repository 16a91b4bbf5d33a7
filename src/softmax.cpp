// SPDX-License-Identifier: Apache-2.0
#include "softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>

#include <vector>

namespace xattn::detail {

using at::Tensor;

namespace {

// The type of returned weights: that of the logits, unless autocast makes every softmax float32, as it does on CUDA.
at::ScalarType weights_type(const Tensor& logits) {
  const bool widened = logits.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA);
  return widened ? at::kFloat : logits.scalar_type();
}

// at::softmax copies what is not contiguous; logits of which a query's heads are neighbours stay where they are.
Tensor softmax_in_place_of(const Tensor& logits) {
  const auto rows_first = logits.transpose(1, 2);  // [B, Lq, H, Lk]
  if (logits.is_contiguous() || !rows_first.is_contiguous()) return at::softmax(logits, -1);
  return at::softmax(rows_first, -1).transpose(1, 2);
}

}  // namespace

at::ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor with_rows_filled(const Tensor& x, const Tensor& rows, double value) {
  return rows.defined() ? x.masked_fill(rows, value) : x;
}

SoftmaxResult softmax_over_keys(const Tensor& products, const Mask& mask, bool log_sum_exp) {
  const auto Lq = products.size(2), Lk = products.size(3);
  const auto keep = mask.keep(Lq, Lk, products.device());
  const auto bias = mask.additive();
  const auto empty_rows = Lk > 0 ? mask.empty_rows(Lq, Lk, products.device()) : Tensor();  // [B|1, H|1, Lq|1, 1]

  auto logits = products.to(wide_type(products));
  if (bias.defined()) logits = logits + bias.to(logits.scalar_type());
  if (keep.defined()) logits = logits.masked_fill(at::logical_not(keep), kMinusInfinity);

  // A row of -inf alone would become NaN, in backward too: it is opened before softmax and closed after.
  const auto opened = with_rows_filled(logits, empty_rows, 0);
  SoftmaxResult result{with_rows_filled(softmax_in_place_of(opened), empty_rows, 0), {}, empty_rows};
  if (log_sum_exp) {
    const auto rows = empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows;
    result.log_sum_exp = with_rows_filled(at::logsumexp(opened, -1), rows, kMinusInfinity);
  }
  return result;
}

Tensor chosen_heads(const Tensor& x, const std::vector<int64_t>& heads) {
  if (heads.empty()) return x;
  std::vector<Tensor> chosen;
  for (const auto head : heads) chosen.push_back(x.select(1, head));
  return at::stack(chosen, 1);
}

Tensor wanted_weights(const Tensor& weights, const AttentionOptions& options, const Tensor& products) {
  if (options.weights == AttentionWeights::none) return {};
  auto wanted = weights;
  if (options.weights == AttentionWeights::mean) {
    wanted = weights.size(1) == 1 ? weights.squeeze(1) : weights.mean(1);
  } else {
    wanted = chosen_heads(weights, options.weight_heads);
  }
  return wanted.to(weights_type(products));
}

}  // namespace xattn::detail
