// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention_map.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/tensor.h>

#include "attention/draw.h"
#include "base/check.h"
#include "base/describe.h"

namespace xattn {

using at::Tensor;
using detail::check_floating;
using detail::check_value;
using detail::shape_of;

Tensor attention_maps(const Tensor& weights, const MapOptions& options) {
  constexpr auto kCaller = "attention_maps";
  check_floating(kCaller, "weights", weights);
  check_value(weights.dim() == 3 || weights.dim() == 4, kCaller,
              "weights must have shape [B, H, Lq, Lk] or [B, Lq, Lk], but has {}.", shape_of(weights));
  check_value(options.rows >= 1, kCaller, "rows must be at least 1, but is {}.", options.rows);
  check_value(options.columns >= 1, kCaller, "columns must be at least 1, but is {}.", options.columns);
  check_value(options.first_key >= 0, kCaller, "first_key must not be negative, but is {}.", options.first_key);
  const auto cells = options.rows * options.columns;
  check_value(options.first_key + cells == weights.size(-1), kCaller,
              "weights must be over {} + {} x {} = {} keys (first_key + rows x columns), but are over {}.", options.first_key,
              options.rows, options.columns, options.first_key + cells, weights.size(-1));
  check_value(options.heads.empty() || weights.dim() == 4, kCaller,
              "heads must be empty where weights have no axis of heads, but has {} of them.", options.heads.size());
  for (const auto head : options.heads) {
    check_value(head >= 0 && head < weights.size(1), kCaller, "heads must lie in [0, {}), but hold {}.", weights.size(1), head);
  }

  auto maps = weights.detach();
  if (!options.heads.empty()) maps = maps.index_select(1, at::tensor(options.heads, maps.options().dtype(at::kLong)));
  if (maps.dim() == 4) maps = maps.mean(1, /*keepdim=*/false, at::kFloat);  // [B, Lq, Lk]
  const auto picture = maps.narrow(2, options.first_key, cells).to(at::kCPU, at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  return picture.unflatten(2, {options.rows, options.columns});  // [B, Lq, rows, columns]
}

Tensor attention_entropy(const Tensor& weights) {
  constexpr auto kCaller = "attention_entropy";
  check_floating(kCaller, "weights", weights);
  check_value(weights.dim() >= 1, kCaller, "weights must have shape [..., Lk], but has {}.", shape_of(weights));
  const auto wide = weights.scalar_type() == at::kDouble ? weights : weights.to(at::kFloat);
  const auto w = wide.masked_fill(wide.eq(0), 1);  // 1 log 1 = 0 stands for 0 log 0, and has a finite gradient
  return -(w * w.log()).sum(-1);
}

}  // namespace xattn
