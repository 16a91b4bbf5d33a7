// SPDX-License-Identifier: Apache-2.0
#include <xattn/norm.h>

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <torch/nn/init.h>

#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "base/text.h"
#include "cpu/on_kernels.h"
#include "cpu/packed.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"
#include "modules/norm_weights.h"
#include "modules/option_names.h"

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
  stream << detail::formatted("xattn::Norm(NormOptions(NormKind::{}, {}).eps({}){})", detail::name_of(options.kind()),
                              options.size(), options.eps(), options.bias() ? "" : ".bias(false)");
}

torch::Tensor NormImpl::forward(const torch::Tensor& x) {
  if (options.kind() == NormKind::none) return x;
  detail::check_value(options.eps() >= 0 && weight.defined(), "norm",
                      "options must fit the parameters, but kind or eps do not.");
  detail::check_dense("norm", "x", x);
  detail::check_value(x.defined() && x.dim() >= 1 && x.size(-1) == options.size(), "norm",
                      "x must have shape [..., {}], but has {}.", options.size(), detail::shape_of(x));
  detail::check_computed_type("norm", "x", x);
  return detail::normalised(x, {options.kind(), options.size(), options.eps(), weight, bias});
}

namespace detail {

NormWeights norm_weights(const Norm& norm) {
  if (!norm) return {};
  return {norm->options.kind(), norm->options.size(), norm->options.eps(), norm->weight, norm->bias};
}

void engine::normalise_rows(const NormWeights& norm, const float* x, float* y, int64_t n, int64_t features) {
  if (norm.kind == NormKind::none) return;
  kernels().normalise({.rows = n * (features / norm.size),
                       .n = norm.size,
                       .x = x,
                       .y = y,
                       .subtracts_mean = norm.kind == NormKind::layer,
                       .eps = norm.eps,
                       .weight = data(norm.weight),
                       .bias = norm.bias.defined() ? data(norm.bias) : nullptr});
}

at::Tensor normalised(const at::Tensor& x, const NormWeights& norm) {
  if (norm.kind == NormKind::none) return x;
  const auto& weight = norm.weight;
  const auto& bias = norm.bias;
  const auto size = norm.size;
  const auto fits = [size](const at::Tensor& of_features) {
    return of_features.is_contiguous() && of_features.numel() == size;
  };
  const bool all_fit = fits(weight) && (!bias.defined() || fits(bias)) && x.size(-1) == size;  // LibTorch reports others
  if (all_fit && run_on_kernels({x, weight, bias.defined() ? bias : weight}) && !is_recorded({x, weight, bias})) {
    const auto rows = x.contiguous(), y = at::empty_like(rows);
    engine::each_part(x.numel() / size, kOperationsOfANorm * size, [&](int64_t begin, int64_t end) {
      const auto first = begin * size;
      engine::normalise_rows(norm, engine::data(rows) + first, engine::mutable_data(y) + first, end - begin, size);
    });
    return y;
  }
  const auto wide = x.to(norm.weight.scalar_type());  // under autocast the weight may be wider than the input
  const auto y = norm.kind == NormKind::rms ? at::rms_norm(wide, norm.size, norm.weight, norm.eps)
                                            : at::layer_norm(wide, norm.size, norm.weight, norm.bias, norm.eps);
  return y.to(x.scalar_type());
}

}  // namespace detail

}  // namespace xattn
