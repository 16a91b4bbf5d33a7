// SPDX-License-Identifier: Apache-2.0
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <vector>

#include "attention/softmax.h"
#include "compare.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_product.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using detail::matrix_product;
using detail::project;
using torch::Tensor;

class ProductTest : public testing::Test {
 protected:
  ProductTest() { torch::manual_seed(0); }
  ~ProductTest() override { at::set_num_threads(threads_); }

  int threads_ = at::get_num_threads();
};

// Rows around a tile's and around the number from which right sides are packed, columns around a panel's, depths from none to
// several of a block's.
TEST_F(ProductTest, EqualsMatmulForAllSizesAndLayouts) {
  for (const int64_t m : {0, 1, 3, 14, 24, 25, 61}) {
    for (const int64_t k : {0, 1, 7, 300, 2100}) {
      for (const int64_t n : {1, 16, 33, 200}) {
        const auto a = torch::randn({m, k}), b = torch::randn({k, n});
        const auto exact = at::matmul(a.to(torch::kDouble), b.to(torch::kDouble));
        const auto what = "[" + std::to_string(m) + ", " + std::to_string(k) + ", " + std::to_string(n) + "]";
        const auto allowed = tolerance(torch::kFloat, k + 2);
        const auto columns = [](const Tensor& x) { return x.t().contiguous().t(); };
        const auto inside = [](const Tensor& x) {
          return torch::constant_pad_nd(x, {3, 2, 1, 1}).narrow(0, 1, x.size(0)).narrow(1, 3, x.size(1));
        };
        expect_close(matrix_product(a, b), exact, allowed, what);
        expect_close(matrix_product(columns(a), b), exact, allowed, what + " a by columns");
        expect_close(matrix_product(inside(a.t()).t(), b), exact, allowed, what + " a by columns of a larger one");
        expect_close(matrix_product(a, columns(b)), exact, allowed, what + " b by columns");
        expect_close(matrix_product(inside(a), inside(b)), exact, allowed, what + " parts of larger ones");
        expect_close(matrix_product(a, inside(b.t()).t()), exact, allowed, what + " columns of a larger one");
      }
    }
  }
}

TEST_F(ProductTest, MultipliesEachMatrixOfABatchWhereverItLies) {
  const auto a = torch::randn({2, 30, 3, 40}), b = torch::randn({2, 50, 3, 40});  // [B, L, H, d]
  const auto left = a.transpose(1, 2), right = b.transpose(1, 2).transpose(2, 3);
  const auto exact = at::matmul(left.to(torch::kDouble), right.to(torch::kDouble));
  expect_close(matrix_product(left, right), exact, tolerance(torch::kFloat, 40), "[2, 3, 30, 50]");
  expect_close(matrix_product(left[1], right[1]), exact[1], tolerance(torch::kFloat, 40), "[3, 30, 50]");
  const auto shared = torch::randn({40, 50});
  expect_close(matrix_product(left[0], shared.expand({3, -1, -1})),
               at::matmul(left[0].to(torch::kDouble), shared.to(torch::kDouble)), tolerance(torch::kFloat, 40), "expanded");
}

TEST_F(ProductTest, AnyNumberOfThreadsGivesEqualBits) {
  for (const int64_t m : {5, 30, 200}) {
    const auto a = torch::randn({2, m, 500}), b = torch::randn({2, 500, 300});
    at::set_num_threads(1);
    const auto expected = matrix_product(a, b);
    const auto a_by_columns = a.transpose(1, 2).contiguous().transpose(1, 2);
    for (const int threads : {2, 3, 8}) {
      at::set_num_threads(threads);
      EXPECT_TRUE(torch::equal(matrix_product(a, b), expected)) << m << " rows, " << threads << " threads";
      EXPECT_TRUE(torch::equal(matrix_product(a_by_columns, b), expected))
          << m << " rows by columns, " << threads << " threads";
      const auto by_columns = b.transpose(1, 2).contiguous().transpose(1, 2);
      const auto again = matrix_product(a, by_columns);
      at::set_num_threads(1);
      EXPECT_TRUE(torch::equal(matrix_product(a, by_columns), again)) << m << " rows, " << threads << " threads, by columns";
    }
  }
}

TEST_F(ProductTest, GradientsToSecondOrderAreThoseOfLinear) {
  for (const bool with_bias : {false, true}) {
    for (const int64_t rows : {3, 40}) {
      std::vector<Tensor> inputs = {torch::randn({2, rows, 30}), torch::randn({50, 30})};
      if (with_bias) inputs.push_back(torch::randn({50}));
      const auto direction = torch::randn({2, rows, 50});
      const auto all = [&](const auto& linear, at::ScalarType type) {
        std::vector<Tensor> x;
        for (const auto& input : inputs) x.push_back(input.to(type, /*non_blocking=*/false, /*copy=*/true).requires_grad_());
        const auto y = linear(x[0], x[1], with_bias ? x[2] : Tensor());
        auto result = torch::autograd::grad({y.pow(3)}, x, {direction.to(type)}, /*retain_graph=*/true, /*create_graph=*/true);
        auto sum = torch::zeros({}, y.options());
        for (const auto& gradient : result) sum = sum + gradient.pow(2).sum();
        for (const auto& second : torch::autograd::grad({sum}, x)) result.push_back(second);
        result.push_back(y);
        return result;
      };
      const auto found = all([](const auto&... x) { return project(x...); }, torch::kFloat);
      const auto exact = all([](const auto&... x) { return at::linear(x...); }, torch::kDouble);
      for (size_t i = 0; i < exact.size(); ++i) expect_close(found[i], exact[i], 1e-5, "tensor " + std::to_string(i));
    }
  }
}

TEST_F(ProductTest, AWeightsGradientLiesAsTheWeightDoes) {
  const auto x = torch::randn({40, 30}), weight = torch::randn({50, 30}).requires_grad_();
  const auto gradient = torch::autograd::grad({project(x, weight, {}).sum()}, {weight})[0];
  EXPECT_TRUE(gradient.is_contiguous());
}

TEST_F(ProductTest, TwoUsesOfATensorAddTheirGradients) {
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    const auto x = torch::randn({3, 5000}).to(type).requires_grad_();
    const auto [a, b] = detail::for_two_uses(x);
    EXPECT_TRUE(torch::equal(a, x) && torch::equal(b, x));
    EXPECT_TRUE(torch::equal(torch::autograd::grad({(2 * a).sum() + (3 * b).sum()}, {x})[0], torch::full_like(x, 5)));
    const auto [only, unused] = detail::for_two_uses(x);
    EXPECT_TRUE(torch::equal(torch::autograd::grad({(2 * only).sum()}, {x})[0], torch::full_like(x, 2)));
    const auto [c, d] = detail::for_two_uses(x);
    const auto first = torch::autograd::grad({(c * c * d).sum()}, {x}, {}, true, /*create_graph=*/true)[0];  // 3 x^2
    expect_close(torch::autograd::grad({first.sum()}, {x})[0], 6 * x, 1e-5, "second order");
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(detail::for_two_uses(x).first.is_same(x));
  }
}

// Rows below and above those of one task; stored by rows and, as a view, by columns.
TEST_F(ProductTest, ASoftmaxOfRowsAndItsGradientsAreThoseOfTheOperator) {
  at::set_num_threads(3);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{0, 4}, {4, 0}, {2, 1}, {3, 2, 17}, {300, 700}}) {
    const auto data = torch::randn(sizes), direction = torch::randn(sizes);
    for (const bool by_columns : {false, true}) {
      const auto all = [&](const auto& softmax, at::ScalarType type) {
        auto x = data.to(type);
        if (by_columns) x = x.transpose(0, -1).contiguous().transpose(0, -1);
        x.requires_grad_();
        const auto y = softmax(x);
        const auto first = torch::autograd::grad({y}, {x}, {direction.to(type)}, /*retain_graph=*/true)[0];
        const auto again = torch::autograd::grad({y}, {x}, {direction.to(type)}, true, /*create_graph=*/true)[0];
        const auto second = torch::autograd::grad({again.pow(2).sum()}, {x})[0];
        const torch::NoGradGuard no_grad;
        return std::vector<Tensor>{y.detach(), first, again.detach(), second, softmax(x)};
      };
      const auto found = all(detail::softmax_of_rows, torch::kFloat), exact = all(detail::softmax_on_operators, torch::kDouble);
      for (size_t i = 0; i < exact.size(); ++i) expect_close(found[i], exact[i], 1e-5, "tensor " + std::to_string(i));
    }
  }
}

TEST_F(ProductTest, WhatTheKernelsDoNotKnowRunsOnOperators) {
  for (const auto type : {torch::kDouble, torch::kBFloat16}) {
    const auto x = torch::randn({4, 8}).to(type), weight = torch::randn({6, 8}).to(type), bias = torch::randn({6}).to(type);
    EXPECT_TRUE(torch::equal(project(x, weight, bias), at::linear(x, weight, bias))) << type;
    EXPECT_TRUE(torch::equal(matrix_product(x, weight.t()), at::matmul(x, weight.t()))) << type;
  }
  const auto x = torch::randn({4, 8}), weight = torch::randn({6, 8});
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  EXPECT_EQ(project(x, weight, {}).scalar_type(), at::kBFloat16);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
}

}  // namespace
}  // namespace xattn::test
