// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/log.h>
#include <ATen/ops/stack.h>
#include <xattn/attention.h>

#include <vector>

#include "attention/softmax.h"
#include "base/check.h"
#include "base/describe.h"

namespace xattn {

using at::Tensor;
using detail::check_value;
using detail::shape_of;

namespace {

constexpr auto kMerge = "merge";

void check_parts(const std::vector<AttentionResult>& parts) {
  check_value(!parts.empty(), kMerge, "parts must be at least one, but are none.");
  const auto& first = parts.front();
  for (const auto& part : parts) {
    const auto &x = part.output, &sums = part.log_sum_exp, &weights = part.weights;
    check_value(sums.defined(), kMerge, "parts must have a log_sum_exp, but one has none. Set AttentionOptions::log_sum_exp.");
    check_value(x.defined() && x.dim() == 4 && x.sizes() == first.output.sizes(), kMerge,
                "output must have one shape [B, H, Lq, e] in all parts, but has {} and {}.", shape_of(first.output),
                shape_of(x));
    check_value(sums.sizes() == x.sizes().slice(0, 3), kMerge, "log_sum_exp must have shape [{}, {}, {}], but has {}.",
                x.size(0), x.size(1), x.size(2), shape_of(sums));
    check_value(weights.defined() == first.weights.defined() &&
                    (!weights.defined() || (weights.dim() == 4 && weights.sizes().slice(0, 3) == sums.sizes())),
                kMerge, "weights must be those of all heads, [{}, {}, {}, Lk], or of no part, but have {}.", x.size(0),
                x.size(1), x.size(2), shape_of(weights));
  }
}

}  // namespace

AttentionResult merge(const std::vector<AttentionResult>& parts) {
  check_parts(parts);
  std::vector<Tensor> sums;
  for (const auto& part : parts) sums.push_back(part.log_sum_exp.to(detail::wide_type(part.log_sum_exp)));
  const auto all = at::stack(sums);  // [parts, B, H, Lq]
  const auto largest = at::amax(all.detach(), 0);
  const auto anchor = largest.masked_fill(at::isneginf(largest), 0);  // -inf - -inf is NaN
  const auto masses = at::exp(all - anchor);
  const auto mass = masses.sum(0);
  const auto is_empty = mass == 0;
  const auto divisor = mass.masked_fill(is_empty, 1);
  const auto shares = (masses / divisor).unsqueeze(-1);  // [parts, B, H, Lq, 1]

  Tensor output;
  std::vector<Tensor> weights;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto share = shares[static_cast<int64_t>(i)];
    const auto part = parts[i].output.to(share.scalar_type()) * share;
    output = output.defined() ? output + part : part;
    if (const auto& own = parts[i].weights; own.defined()) weights.push_back((own * share).to(own.scalar_type()));
  }
  return {output.to(parts.front().output.scalar_type()), weights.empty() ? Tensor() : at::cat(weights, -1),
          (at::log(divisor) + anchor).masked_fill(is_empty, detail::kMinusInfinity)};
}

}  // namespace xattn
