// SPDX-License-Identifier: Apache-2.0
#include <xattn/norm.h>

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <torch/nn/init.h>

#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"

namespace xattn {

NormImpl::NormImpl(const NormOptions& options_) : options(options_) {
  detail::check_value(options.size() >= 1, "norm", "size must be at least 1, but is {}.", options.size());
  detail::check_value(options.eps() >= 0, "norm", "eps must not be negative, but is {}.", options.eps());
  reset();
}

void NormImpl::reset() {
  const auto shape = {options.size()};
  if (options.kind() != NormKind::none) weight = register_parameter("weight", torch::empty(shape));
  if (options.kind() == NormKind::layer && options.bias()) bias = register_parameter("bias", torch::empty(shape));
  reset_parameters();
}

void NormImpl::reset_parameters() {
  if (weight.defined()) torch::nn::init::ones_(weight);
  if (bias.defined()) torch::nn::init::zeros_(bias);
}

void NormImpl::pretty_print(std::ostream& stream) const {
  constexpr const char* kNames[] = {"none", "rms", "layer"};
  stream << detail::formatted("xattn::Norm(NormOptions(NormKind::{}, {}).eps({}){})", kNames[static_cast<int>(options.kind())],
                              options.size(), options.eps(), options.bias() ? "" : ".bias(false)");
}

torch::Tensor NormImpl::forward(const torch::Tensor& x) {
  if (options.kind() == NormKind::none) return x;
  detail::check_value(options.eps() >= 0 && weight.defined(), "norm",
                      "options must fit the parameters, but kind or eps do not.");
  detail::check_value(x.dim() >= 1 && x.size(-1) == options.size(), "norm", "x must have shape [..., {}], but has {}.",
                      options.size(), detail::shape_of(x));
  const auto shape = at::IntArrayRef(options.size());
  const auto wide = x.to(weight.scalar_type());  // under autocast the weight may be wider than the input
  const auto y = options.kind() == NormKind::rms ? at::rms_norm(wide, shape, weight, options.eps())
                                                 : at::layer_norm(wide, shape, weight, bias, options.eps());
  return y.to(x.scalar_type());
}

}  // namespace xattn
