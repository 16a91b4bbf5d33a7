// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/checkpoint.h>
#include <xattn/cross_attention_options.h>
#include <xattn/plan.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

// How tests compare tensors, and which devices they run on.
namespace xattn::test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline constexpr Order kAllOrders[] = {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context};

/// The orders that are legal for such a layer.
inline std::vector<Orders> legal_orders(const CrossAttentionOptions& options) {
  PlanRequest request;
  request.query_norm = request.key_norm = options.qk_norm() != NormKind::none;
  request.bias_kv = options.bias_kv();
  std::vector<Orders> legal;
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      if (illegal_for_logits(logits, request).empty() && illegal_for_values(values, request).empty()) {
        legal.push_back({logits, values});
      }
    }
  }
  return legal;
}

/// Every device of this machine. Suites that compute values run once on each.
inline std::vector<torch::Device> devices() {
  std::vector<torch::Device> all = {torch::kCPU};
  if (torch::cuda::is_available()) all.emplace_back(torch::kCUDA, 0);
  return all;
}

/// "cpu", "cuda": the suffix of a parameterised test.
inline std::string device_name(const testing::TestParamInfo<torch::Device>& info) {
  return info.param.is_cuda() ? "cuda" : "cpu";
}

/// Parameters and buffers as they are now.
inline NamedTensors copy_of(const torch::nn::Module& module) {
  NamedTensors tensors;
  for (const auto& item : module.named_parameters()) tensors[item.key()] = item.value().detach().clone();
  for (const auto& item : module.named_buffers()) tensors[item.key()] = item.value().detach().clone();
  return tensors;
}

/// The difference from the exact result that rounding allows, relative to the largest element.
///
/// A sum of n products in a type with unit roundoff eps is off by at most n eps sum |a_i b_i|, so a chain of sums by at most
/// the sum of their lengths (`terms`: features + head size + keys ...) times eps. float16 and bfloat16 add up in float32 and
/// round when they store: there the stores count, about two for each element. No bound exceeds the limits below.
inline double tolerance(at::ScalarType type, int64_t terms) {
  switch (type) {
    case at::kDouble: return std::min(1e-12, static_cast<double>(terms) * std::numeric_limits<double>::epsilon());
    case at::kFloat: return std::min(1e-5, static_cast<double>(terms) * std::numeric_limits<float>::epsilon());
    case at::kHalf: return 2e-3;        // 2 units of 2^-10
    case at::kBFloat16: return 1.5e-2;  // 2 units of 2^-7
    default: throw std::invalid_argument("no tolerance for this type");
  }
}

/// Expects |actual - expected| <= tolerance * max |expected| everywhere; otherwise reports what differs, where and by how much.
inline void expect_close(const torch::Tensor& actual,
                         const torch::Tensor& expected,
                         double tolerance,
                         const std::string& what) {
  ASSERT_EQ(actual.defined(), expected.defined()) << what;
  if (!actual.defined()) return;
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  if (expected.numel() == 0) return;
  const auto a = actual.detach().to(torch::kCPU, torch::kDouble);
  const auto b = expected.detach().to(torch::kCPU, torch::kDouble);
  const auto difference = (a - b).abs().flatten();
  const double largest = b.abs().max().item<double>();
  const auto at = difference.argmax().item<int64_t>();  // the place of a NaN, if there is one
  const double worst = difference[at].item<double>();
  EXPECT_TRUE(worst <= tolerance * largest)
      << what << " " << actual.sizes() << ": largest difference " << worst << " (relative " << worst / largest << ", allowed "
      << tolerance << ") at flat index " << at << ": " << a.flatten()[at].item<double>() << " instead of "
      << b.flatten()[at].item<double>();
}

using ScalarFunction = std::function<torch::Tensor(const std::vector<torch::Tensor>&)>;

/// Expects the gradient of `f`, one number, to equal central differences along random directions, for every input (float64,
/// requiring grad): a wrong gradient has no chance to agree along a random direction.
inline void expect_gradient(const ScalarFunction& f, const std::vector<torch::Tensor>& inputs, const std::string& what) {
  constexpr double kStep = 3e-4;  // four-point differences: truncated by step^4 of the fifth derivative, rounded by eps / step
  constexpr int kDirections = 3;
  const auto gradients = torch::autograd::grad({f(inputs)}, inputs, {}, /*retain_graph=*/{}, /*create_graph=*/false,
                                               /*allow_unused=*/true);
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (int repeat = 0; repeat < kDirections; ++repeat) {
      const auto direction = torch::randn_like(inputs[i].detach());
      const auto original = inputs[i].detach().clone();
      const auto at = [&](double step) {  // moves the input itself, which may be a parameter of a module
        inputs[i].detach().copy_(original + step * direction);
        const double result = f(inputs).item<double>();
        inputs[i].detach().copy_(original);
        return result;
      };
      const double numeric = (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
      const double analytic = gradients[i].defined() ? (gradients[i] * direction).sum().item<double>() : 0;
      EXPECT_NEAR(analytic, numeric, 1e-7 * std::max(1.0, std::abs(numeric))) << what << ", input " << i;
    }
  }
}

/// The same for the second derivative: differentiates a fixed projection of the gradient.
inline void expect_second_gradient(const ScalarFunction& f, const std::vector<torch::Tensor>& inputs, const std::string& what) {
  std::vector<torch::Tensor> directions;
  for (const auto& input : inputs) directions.push_back(torch::randn_like(input.detach()));
  const auto projected = [&](const std::vector<torch::Tensor>& x) {
    const auto gradients = torch::autograd::grad({f(x)}, x, {}, /*retain_graph=*/true, /*create_graph=*/true);
    auto sum = torch::zeros({}, x.front().options());
    for (size_t i = 0; i < x.size(); ++i) sum = sum + (gradients[i] * directions[i]).sum();
    return sum;
  };
  expect_gradient(projected, inputs, what + ", second order");
}

}  // namespace xattn::test
