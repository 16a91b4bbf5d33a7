// SPDX-License-Identifier: Apache-2.0
#include "cpu/on_kernels.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "kernels/kernels.h"

namespace xattn::detail {

using at::Tensor;

namespace {

bool may_run(const Tensor& x) {
  return x.defined() && x.is_cpu() && x.scalar_type() == at::kFloat && x.layout() == at::kStrided && !x.is_neg() &&
         !at::isTensorSubclassLike(x) && !x._fw_grad(/*level=*/0).defined();
}

}  // namespace

bool is_recorded(std::initializer_list<Tensor> all) {
  return at::GradMode::is_enabled() &&
         std::ranges::any_of(all, [](const Tensor& x) { return x.defined() && x.requires_grad(); });
}

bool run_on_kernels(std::initializer_list<Tensor> all) {
  return kernels().is_vectorised && std::ranges::all_of(all, may_run) && !at::autocast::is_autocast_enabled(at::kCPU);
}

}  // namespace xattn::detail
