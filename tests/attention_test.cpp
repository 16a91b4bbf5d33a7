// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/plan.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "attention/choose_kernel.h"
#include "attention/heads.h"
#include "attention/mask_parts.h"
#include "compare.h"
#include "plan/runs_on.h"
#include "test_util.h"

namespace xattn::test {
namespace {

constexpr int64_t kB = 2, kH = 4, kLq = 5, kLk = 7, kD = 8;

AttentionResult on_kernels(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  return detail::absolute(detail::attend_on_kernels(q, k, v, options));
}

const std::vector<at::ScalarType> kTypes = {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf};

// Every kind of mask, by name. Two of them leave rows without keys.
std::map<std::string, Mask> masks(torch::Device device, int64_t Lq = kLq, int64_t Lk = kLk) {
  const auto floats = torch::dtype(torch::kDouble);
  const auto holes = torch::zeros({Lq, Lk}, floats).masked_fill(torch::rand({Lq, Lk}) > 0.7, -kInfinity);
  auto dense = torch::rand({kB, kH, Lq, Lk}) > 0.3;
  dense[0][1][Lq / 2].fill_(false);
  std::map<std::string, Mask> all = {
      {"none", Mask()},
      {"key_padding", Mask::key_padding(torch::rand({kB, Lk}) > 0.3)},
      {"lengths", Mask::lengths(torch::tensor({0, 4}), Lk)},
      {"dense", Mask::dense(dense)},
      {"dense_per_query", Mask::dense(torch::rand({Lq, Lk}) > 0.3)},
      {"bias", Mask::bias(torch::randn({kB, 1, Lq, Lk}, floats))},
      {"bias_with_holes", Mask::bias(holes)},
      {"upper_left", Mask::causal(CausalAlignment::upper_left)},
      {"lower_right", Mask::causal(CausalAlignment::lower_right)},
      {"joined", Mask::causal(CausalAlignment::lower_right) & Mask::lengths(torch::tensor({3, 7}), Lk) &
                     Mask::bias(torch::randn({1, kH, 1, Lk}, floats))},
  };
  for (auto& [name, mask] : all) mask = mask.to(device);
  return all;
}

class AttentionTest : public testing::TestWithParam<torch::Device> {
 protected:
  AttentionTest() { torch::manual_seed(0); }

  torch::Tensor random(at::IntArrayRef shape, at::ScalarType type = torch::kDouble) const {
    return torch::randn(shape, torch::kDouble).to(GetParam(), type).requires_grad_();
  }

  torch::Device device_ = GetParam();
};

// Attention written out number by number, for one batch entry and head: q [Lq, d], k [Lk, d], v [Lk, e], allowed and added [Lq,
// Lk]. Returns weights [Lq, Lk], output [Lq, e] and log-sum-exp [Lq].
std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> loop(const torch::Tensor& q,
                                                             const torch::Tensor& k,
                                                             const torch::Tensor& v,
                                                             double scale,
                                                             const torch::Tensor& allowed,
                                                             const torch::Tensor& added) {
  const auto Lq = q.size(0), Lk = k.size(0), d = q.size(1), e = v.size(1);
  auto weights = torch::zeros({Lq, Lk}, torch::kDouble), output = torch::zeros({Lq, e}, torch::kDouble);
  auto log_sum_exp = torch::full({Lq}, -kInfinity, torch::kDouble);
  const auto Q = q.accessor<double, 2>(), K = k.accessor<double, 2>(), V = v.accessor<double, 2>();
  for (int64_t i = 0; i < Lq; ++i) {
    std::vector<double> exponentials(Lk, 0.0);
    double sum = 0;
    for (int64_t j = 0; j < Lk; ++j) {
      if (!allowed[i][j].item<bool>()) continue;
      double logit = added[i][j].item<double>();
      for (int64_t c = 0; c < d; ++c) logit += scale * Q[i][c] * K[j][c];
      sum += exponentials[j] = std::exp(logit);
    }
    if (sum == 0) continue;
    log_sum_exp[i] = std::log(sum);
    for (int64_t j = 0; j < Lk; ++j) {
      weights[i][j] = exponentials[j] / sum;
      for (int64_t c = 0; c < e; ++c) output[i][c] += exponentials[j] / sum * V[j][c];
    }
  }
  return {weights, output, log_sum_exp};
}

TEST_P(AttentionTest, DefinitionEqualsItsFormulaNumberByNumber) {
  for (const int64_t G : {1, 2, 4}) {
    const auto q = random({kB, kH, kLq, kD}).detach(), k = random({kB, G, kLk, kD}).detach(),
               v = random({kB, G, kLk, 3}).detach();
    for (const auto& [name, mask] : masks(device_)) {
      AttentionOptions options{.mask = mask, .scale = 0.7, .weights = AttentionWeights::per_head, .log_sum_exp = true};
      const auto result = attention(q, k, v, options);
      const auto keep = detail::allowed_keys(mask, kLq, kLk, device_), bias = detail::total_bias(mask, kLk);
      const auto allowed = (keep.defined() ? keep.cpu() : torch::ones({1, 1, 1, 1}, torch::kBool)).expand({kB, kH, kLq, kLk});
      const auto added = (bias.defined() ? bias.cpu() : torch::zeros({1, 1, 1, 1}, torch::kDouble)).expand({kB, kH, kLq, kLk});
      for (int64_t b = 0; b < kB; ++b) {
        for (int64_t h = 0; h < kH; ++h) {
          const auto g = h / (kH / G);
          const auto [weights, output, log_sum_exp] =
              loop(q[b][h].cpu(), k[b][g].cpu(), v[b][g].cpu(), 0.7, allowed[b][h], added[b][h]);
          const auto limit = tolerance(torch::kDouble, kD + kLk + 3);
          expect_close(result.weights[b][h], weights, limit, name + " weights");
          expect_close(result.output[b][h], output, limit, name + " output");
          expect_close(result.log_sum_exp[b][h].exp(), log_sum_exp.exp(), 10 * limit, name + " log-sum-exp");
        }
      }
    }
  }
}

// Whether LibTorch's fused kernel for the CPU, of float64 among others, runs if heads share keys.
bool fused_heads_may_share_keys() {
  return detail::is_fused(detail::choose_kernel({.shares_keys = true}).kernel);
}

TEST_P(AttentionTest, FusedEqualsDefinitionInOutputLogSumExpAndGradients) {
  for (const auto type : kTypes) {
    for (const int64_t G : {1, 2, 4}) {
      if (G < kH && !fused_heads_may_share_keys()) continue;
      const auto q = random({kB, kH, kLq, kD}, type), k = random({kB, G, kLk, kD}, type), v = random({kB, G, kLk, kD}, type);
      const auto cotangent = random({kB, kH, kLq, kD}, type).detach();
      for (const auto& [name, mask] : masks(device_)) {
        const auto what = name + " " + c10::toString(type) + " G" + std::to_string(G);
        AttentionOptions options{.mask = mask, .log_sum_exp = device_.is_cpu()};
        options.path = AttentionPath::definition;
        // The exact result is the definition in float64 on the same numbers.
        const auto wide = [](const torch::Tensor& x) { return x.detach().to(torch::kDouble).requires_grad_(); };
        const std::vector<torch::Tensor> exact_inputs = {wide(q), wide(k), wide(v)};
        const auto exact = attention(exact_inputs[0], exact_inputs[1], exact_inputs[2], options);
        options.path = AttentionPath::fused;
        const auto fused = attention(q, k, v, options);
        const auto limit = tolerance(type, 2 * (kD + kLk));
        expect_close(fused.output, exact.output, limit, what + " output");
        if (options.log_sum_exp) {
          EXPECT_EQ(fused.log_sum_exp.scalar_type(), type == torch::kDouble ? torch::kDouble : torch::kFloat);
          expect_close(fused.log_sum_exp.exp(), exact.log_sum_exp.exp(), 10 * limit, what + " log-sum-exp");
          const auto direction = torch::randn({kB, kH, kLq}, fused.log_sum_exp.options());
          const auto of_both =
              torch::autograd::grad({fused.output, fused.log_sum_exp}, {q, k, v}, {cotangent, direction}, true);
          const auto exact_of_both =
              torch::autograd::grad({exact.output, exact.log_sum_exp}, exact_inputs,
                                    {cotangent.to(torch::kDouble), direction.to(torch::kDouble)}, /*retain_graph=*/true);
          for (size_t i = 0; i < 3; ++i) expect_close(of_both[i], exact_of_both[i], 4 * limit, what + " gradient of both");
        }
        const auto gradients = torch::autograd::grad({fused.output}, {q, k, v}, {cotangent});
        const auto expected = torch::autograd::grad({exact.output}, exact_inputs, {cotangent.to(torch::kDouble)});
        for (size_t i = 0; i < 3; ++i) expect_close(gradients[i], expected[i], 4 * limit, what + " gradient");
      }
    }
  }
}

// The context is read in parts and has enough query rows to be packed. On our own kernels value heads have another size.
TEST_P(AttentionTest, GradientsOverALongContextAreExactAndOfEqualBitsForAnyThreads) {
  const int64_t Lq = 50, Lk = 2300, d = 20, e = device_.is_cpu() && detail::modules_run_on() == RunsOn::module_kernels ? 13 : d;
  const auto q = random({2, 4, Lq, d}, torch::kFloat), k = random({2, 2, Lk, d}, torch::kFloat),
             v = random({2, 2, Lk, e}, torch::kFloat);
  const auto cotangent = random({2, 4, Lq, e}, torch::kFloat).detach();
  const auto gradients = [&](const Mask& mask, at::ScalarType type) {
    std::vector<torch::Tensor> inputs;
    for (const auto& x : {q, k, v}) inputs.push_back(x.detach().to(type).requires_grad_());
    const auto path = type == torch::kDouble ? AttentionPath::definition : AttentionPath::fused;
    const auto output = attention(inputs[0], inputs[1], inputs[2], {.mask = mask, .path = path}).output;
    return torch::autograd::grad({output}, inputs, {cotangent.to(type)});
  };
  const auto threads = at::get_num_threads();
  for (const auto& mask :
       {Mask(), Mask::causal(CausalAlignment::upper_left), Mask::lengths(torch::tensor({1030, 0}, device_), Lk),
        Mask::dense(torch::rand({2, 4, Lq, Lk}, device_) < 0.1)}) {
    const auto expected = gradients(mask, torch::kDouble);
    at::set_num_threads(1);
    const auto found = gradients(mask, torch::kFloat);
    for (size_t i = 0; i < 3; ++i) expect_close(found[i], expected[i], 4 * tolerance(torch::kFloat, 2 * (d + Lk)), "gradient");
    for (const int more : {2, 3, 8}) {
      at::set_num_threads(more);
      const auto again = gradients(mask, torch::kFloat);
      for (size_t i = 0; i < 3 && device_.is_cpu(); ++i) EXPECT_TRUE(torch::equal(again[i], found[i])) << more << " threads";
    }
    at::set_num_threads(threads);
  }
}

TEST_P(AttentionTest, FusedIsTwiceDifferentiableThroughTheDefinition) {
  const auto G = fused_heads_may_share_keys() ? 2 : kH;
  const auto q = random({kB, kH, kLq, kD}), k = random({kB, G, kLk, kD}), v = random({kB, G, kLk, kD});
  for (const auto& [name, mask] : masks(device_)) {
    std::vector<std::vector<torch::Tensor>> second;
    for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
      const auto output = attention(q, k, v, {.mask = mask, .path = path}).output;
      const auto first = torch::autograd::grad({output.sin().sum()}, {q, k, v}, {}, true, /*create_graph=*/true);
      second.push_back(torch::autograd::grad({first[0].sin().sum() + first[1].cos().sum() + first[2].sum()}, {q, k, v}));
    }
    for (size_t i = 0; i < 3; ++i) expect_close(second[1][i], second[0][i], 1e-12, name);
  }
}

TEST_P(AttentionTest, FusedComputesOnlyTheGradientsThatAreRequired) {
  const auto q = random({1, 2, 3, 4}).detach(), k = random({1, 2, 5, 4}), v = random({1, 2, 5, 4}).detach();
  const auto output = attention(q, k, v, {.path = AttentionPath::fused}).output;
  output.sum().backward();
  EXPECT_TRUE(k.grad().defined());
  EXPECT_FALSE(q.grad().defined());
  EXPECT_FALSE(v.grad().defined());
  EXPECT_THROW(output.sum().backward(), c10::Error) << "a graph that was freed must say so";
}

TEST_P(AttentionTest, GradientsEqualDifferencesForEveryMaskInFirstAndSecondOrder) {
  const auto q = random({kB, kH, kLq, 2}), k = random({kB, 2, kLk, 2}), v = random({kB, 2, kLk, 2});
  const auto output_direction = random({kB, kH, kLq, 2}).detach(), weights_direction = random({kB, kH, kLq, kLk}).detach();
  const auto row_direction = random({kB, kH, kLq}).detach();
  for (const auto& [name, mask] : masks(device_)) {
    const auto f = [&, &mask = mask](const std::vector<torch::Tensor>& x) {
      const auto result =
          attention(x[0], x[1], x[2], {.mask = mask, .weights = AttentionWeights::per_head, .log_sum_exp = true});
      return (result.output * output_direction).sum() + (result.weights * weights_direction).sum() +
             (result.log_sum_exp.exp() * row_direction).sum();
    };
    expect_gradient(f, {q, k, v}, name);
    expect_second_gradient(f, {q, k, v}, name);
  }
}

TEST_P(AttentionTest, BiasReceivesItsGradientInFirstAndSecondOrder) {
  const auto q = random({kB, kH, kLq, 2}).detach(), k = random({kB, kH, kLk, 2}).detach(),
             v = random({kB, kH, kLk, 2}).detach();
  for (const auto& shape : std::vector<std::vector<int64_t>>{{kLq, kLk}, {kB, kLq, kLk}, {1, kH, 1, kLk}}) {
    const auto bias = random(shape);
    const auto f = [&](const std::vector<torch::Tensor>& x) {
      const auto mask = Mask::bias(x[0]) & Mask::lengths(torch::tensor({0, 4}, device_), kLk);
      return attention(q, k, v, {.mask = mask}).output.sin().sum();
    };
    expect_gradient(f, {bias}, "bias");
    expect_second_gradient(f, {bias}, "bias");
  }
}

TEST(AttentionOfFloatsTest, ARowWhoseLogitsAllOverflowIsNaNOnEveryPath) {
  const auto q = torch::full({1, 1, 1, 1}, 1e20f), k = torch::full({1, 1, 3, 1}, -1e20f);
  for (const auto path : {AttentionPath::automatic, AttentionPath::definition}) {
    EXPECT_TRUE(attention(q, k, torch::ones_like(k), {.path = path}).output.isnan().all().item<bool>());
  }
}

TEST(AttentionOfFloatsTest, UnderAutocastEveryPathComputesInItsType) {
  const auto x = torch::randn({1, 1, 2, 8});
  const auto mask = Mask::bias(torch::full({2, 2}, std::numeric_limits<float>::lowest()));  // -inf in bfloat16
  at::autocast::set_autocast_enabled(torch::kCPU, true);
  for (const auto path : {AttentionPath::automatic, AttentionPath::definition}) {
    const auto output = attention(x, x, x, {.mask = mask, .path = path}).output;
    EXPECT_EQ(output.scalar_type(), torch::kBFloat16);
    EXPECT_TRUE(output.eq(0).all().item<bool>());
  }
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  at::autocast::clear_cache();
}

TEST_P(AttentionTest, RowWithoutKeysGivesZerosAndNoGradientInEveryType) {
  const auto keep = (torch::arange(kLq) != 2).unsqueeze(1).expand({kLq, kLk}).to(device_);  // query 2 has no key
  for (const auto type : kTypes) {
    const auto hole = torch::zeros({kLq, kLk}).masked_fill(keep.cpu().logical_not(), -kInfinity).to(device_, type);
    for (const auto& mask : {Mask::dense(keep), Mask::bias(hole)}) {
      for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
        const auto q = random({kB, kH, kLq, kD}, type), k = random({kB, kH, kLk, kD}, type),
                   v = random({kB, kH, kLk, kD}, type);
        AttentionOptions options{.mask = mask, .path = path};
        options.log_sum_exp = path == AttentionPath::definition || device_.is_cpu();
        if (path == AttentionPath::definition) options.weights = AttentionWeights::per_head;
        const auto result = attention(q, k, v, options);
        EXPECT_TRUE(result.output.select(2, 2).eq(0).all().item<bool>());
        if (result.weights.defined()) {
          EXPECT_TRUE(result.weights.select(2, 2).eq(0).all().item<bool>());
        }
        if (options.log_sum_exp) {
          EXPECT_TRUE(result.log_sum_exp.select(2, 2).eq(-kInfinity).all().item<bool>());
        }
        // The whole gradient arrives at the empty row: nothing may reach q, k or v, and nothing may be NaN.
        const auto gradients = torch::autograd::grad({result.output.select(2, 2).sum()}, {q, k, v}, {}, true);
        for (const auto& gradient : gradients) EXPECT_TRUE(gradient.eq(0).all().item<bool>());
        const auto all = torch::autograd::grad({result.output.sum()}, {q, k, v});
        for (const auto& gradient : all) EXPECT_TRUE(gradient.isfinite().all().item<bool>());
        EXPECT_TRUE(all[0].select(2, 2).eq(0).all().item<bool>());
      }
    }
  }
}

TEST_P(AttentionTest, ABiasOfMinusInfinityInTheTypeOfTheLogitsForbidsItsKey) {
  const auto floats = torch::dtype(torch::kDouble).device(device_);
  for (const auto& [type, least] :
       {std::pair(torch::kFloat, std::numeric_limits<double>::lowest()),
        std::pair(torch::kHalf, double{std::numeric_limits<float>::lowest()}),
        std::pair(torch::kBFloat16, double{std::numeric_limits<float>::lowest()}), std::pair(torch::kHalf, -1e9)}) {
    const auto holes = torch::zeros({kLq, kLk}, floats)
                           .index_fill(0, torch::tensor({2}, device_), least)
                           .index_fill(1, torch::tensor({3}, device_), least);
    for (const auto path : {AttentionPath::definition, AttentionPath::automatic, AttentionPath::fused}) {
      for (const bool trains : {true, false}) {
        const auto q = random({kB, kH, kLq, kD}, type).detach().requires_grad_(trains), k = random({kB, kH, kLk, kD}, type),
                   v = random({kB, kH, kLk, kD}, type);
        const at::AutoGradMode record(trains);
        const auto result = attention(q, k, v, {.mask = Mask::bias(holes), .path = path});
        EXPECT_TRUE(result.output.isfinite().all().item<bool>());
        EXPECT_TRUE(result.output.select(2, 2).eq(0).all().item<bool>());
        if (!trains) continue;
        const auto gradients = torch::autograd::grad({result.output.sum()}, {q, k, v});
        for (const auto& gradient : gradients) EXPECT_TRUE(gradient.isfinite().all().item<bool>());
        EXPECT_TRUE(gradients[0].select(2, 2).eq(0).all().item<bool>());
        EXPECT_TRUE(gradients[2].select(2, 3).eq(0).all().item<bool>());
      }
    }
  }
}

// Next to such a bias, a log-sum-exp loses the number of keys. A part of a context has 2,048 keys, or 1,024 in backward.
TEST_P(AttentionTest, RowsOfVeryNegativeFiniteBiasesAreAveragesWithTheirGradients) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const int64_t Lk : {70, 2500, 8192}) {
      for (const auto least : {-1e9, -1e30}) {
        const auto mask = Mask::bias(torch::full({kLq, Lk}, least, torch::dtype(torch::kFloat).device(device_)));
        const auto zeros = [&](int64_t L) { return torch::zeros({kB, kH, L, kD}, torch::dtype(type).device(device_)); };
        const auto q = zeros(kLq).requires_grad_(), k = zeros(Lk).requires_grad_(), v = random({kB, kH, Lk, kD}, type);
        const auto mean = v.detach().to(torch::kDouble).mean(2, /*keepdim=*/true).expand({kB, kH, kLq, kD});
        for (const auto path : {AttentionPath::definition, AttentionPath::automatic, AttentionPath::fused}) {
          const auto what = std::string(c10::toString(type)) + ", " + std::to_string(Lk) + " keys";
          const auto output = attention(q, k, v, {.mask = mask, .path = path}).output;
          const auto limit = tolerance(type, Lk);
          expect_close(output, mean, limit, what + " output");
          const auto gradients = torch::autograd::grad({output.sum()}, {q, k, v});
          expect_close(gradients[2], torch::full_like(v, static_cast<double>(kLq) / static_cast<double>(Lk)), limit,
                       what + " dv");
        }
      }
    }
  }
}

TEST_P(AttentionTest, Float16LogitsMayExceedItsLargestNumber) {
  const auto options = torch::dtype(torch::kHalf).device(device_);
  const auto q = torch::full({1, 1, 1, 1}, 300.0, options).requires_grad_();
  const auto k = torch::tensor({299.0, 300.0, -300.0}, options).view({1, 1, 3, 1});
  const auto v = torch::tensor({1.0, 2.0, 3.0}, options).view({1, 1, 3, 1});
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    const auto result = attention(q, k, v, {.scale = 1.0, .weights = weights});
    EXPECT_EQ(result.output.item<double>(), 2.0);
    EXPECT_TRUE(torch::autograd::grad({result.output.sum()}, {q})[0].isfinite().all().item<bool>());
  }
}

TEST_P(AttentionTest, ACausalMaskAloneIsExactAtAnyScale) {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const auto q = random({kB, kH, kLq, kD}, type), k = random({kB, kH, kLq, kD}, type), v = random({kB, kH, kLq, kD}, type);
    for (const double scale : {0.0, -0.5, 0.5}) {
      AttentionOptions options{.mask = Mask::causal(CausalAlignment::upper_left), .scale = scale};
      options.path = AttentionPath::definition;
      const auto expected = attention(q, k, v, options).output;
      options.path = AttentionPath::fused;
      const auto found = attention(q, k, v, options).output;
      const auto limit = tolerance(type, 2 * (kD + kLk));
      expect_close(found, expected, limit, "output");
      const auto gradients = torch::autograd::grad({found.sin().sum()}, {q, k, v});
      const auto exact = torch::autograd::grad({expected.sin().sum()}, {q, k, v});
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_TRUE((gradients[i] - exact[i]).abs().max().item<double>() <= 4 * limit * exact[2].abs().max().item<double>());
      }
    }
  }
}

TEST_P(AttentionTest, GradientsOfATensorGivenTwiceAreAddedOnce) {
  const auto q = random({kB, kH, kLq, kD}), k = random({kB, kH, kLk, kD});
  std::vector<std::vector<torch::Tensor>> all;
  for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
    const auto output = attention(q, k, k, {.path = path}).output, self = attention(k, k, k, {.path = path}).output;
    const auto first = torch::autograd::grad({output.sin().sum() + self.cos().sum()}, {q, k}, {}, true, /*create_graph=*/true);
    const auto second = torch::autograd::grad({first[0].sin().sum() + first[1].square().sum()}, {q, k});
    all.push_back({first[0], first[1], second[0], second[1]});
  }
  for (size_t i = 0; i < 4; ++i) expect_close(all[1][i], all[0][i], 1e-12, "gradient " + std::to_string(i));
}

TEST_P(AttentionTest, GradientOfTheLogSumExpIsZeroForTheValues) {
  if (!device_.is_cpu()) GTEST_SKIP() << "only the CPU kernel returns its log-sum-exp";
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const auto q = random({1, 2, 3, 4}, type).detach(), k = random({1, 2, 5, 4}, type).detach(), v = random({1, 2, 5, 4}, type);
    const auto result = attention(q, k, v, {.log_sum_exp = true, .path = AttentionPath::fused});
    EXPECT_TRUE(torch::autograd::grad({result.log_sum_exp.sum()}, {v}, {}, true)[0].eq(0).all().item<bool>());
    const auto both = torch::autograd::grad({result.output.sum(), result.log_sum_exp.sum()}, {v}, {}, true)[0];
    expect_close(both, torch::autograd::grad({result.output.sum()}, {v})[0], tolerance(type, 10), "both");
  }
}

TEST_P(AttentionTest, NegatedViewsAreReadWithTheirSign) {
  for (const auto type : kTypes) {
    const auto q = random({kB, kH, kLq, kD}, type).detach(), k = random({kB, kH, kLk, kD}, type).detach(),
               v = random({kB, kH, kLk, kD}, type).detach(), bias = random({kLq, kLk}, type).detach();
    for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
      const auto expected = attention(-q, -k, -v, {.mask = Mask::bias(-bias), .path = path}).output;
      const auto found = attention(at::_neg_view(q), at::_neg_view(k), at::_neg_view(v),
                                   {.mask = Mask::bias(at::_neg_view(bias)), .path = path});
      EXPECT_TRUE(torch::allclose(found.output, expected, 0, tolerance(type, kD + kLk)));
    }
  }
}

TEST_P(AttentionTest, MaskedKeyHasNoInfluenceAndNoGradient) {
  const auto mask = Mask::lengths(torch::tensor({4, 6}), kLk).to(device_);
  for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
    const auto q = random({kB, kH, kLq, kD}), k = random({kB, kH, kLk, kD}), v = random({kB, kH, kLk, kD});
    const auto output = attention(q, k, v, {.mask = mask, .path = path}).output;
    const auto gradients = torch::autograd::grad({output.square().sum()}, {k, v});
    for (const auto& gradient : gradients) {
      EXPECT_TRUE(gradient[0].slice(1, 4).eq(0).all().item<bool>());
      EXPECT_TRUE(gradient[1].slice(1, 6).eq(0).all().item<bool>());
      EXPECT_TRUE(gradient[1].slice(1, 0, 6).ne(0).any().item<bool>());
    }
    const torch::NoGradGuard no_grad;
    k[0].slice(1, 4).fill_(1e6);
    v[0].slice(1, 4).fill_(-1e6);
    EXPECT_TRUE(attention(q, k, v, {.mask = mask, .path = path}).output.equal(output));
  }
}

TEST_P(AttentionTest, WeightsSumToOneAndAverageOverHeads) {
  const auto q = random({kB, kH, kLq, kD}), k = random({kB, 2, kLk, kD}), v = random({kB, 2, kLk, kD});
  const auto per_head = attention(q, k, v, {.weights = AttentionWeights::per_head}).weights;
  expect_close(per_head.sum(-1), torch::ones({kB, kH, kLq}), 1e-12, "sums");
  expect_close(attention(q, k, v, {.weights = AttentionWeights::mean}).weights, per_head.mean(1), 1e-12, "mean");
  EXPECT_FALSE(attention(q, k, v).weights.defined());
}

TEST_P(AttentionTest, DropoutChangesTheOutputButNotTheReturnedWeights) {
  const auto q = random({1, 1, 1, kD}), k = random({1, 1, 4096, kD}), v = torch::ones({1, 1, 4096, 1}, q.options());
  const auto weights = attention(q, k, v, {.weights = AttentionWeights::per_head}).weights;
  const auto dropped = attention(q, k, v, {.dropout = 0.5, .weights = AttentionWeights::per_head});
  EXPECT_TRUE(dropped.weights.equal(weights));
  // With values of one the output is the sum of the weights that were kept, over 1/2: one on average.
  const double output = dropped.output.item<double>();
  EXPECT_NE(output, 1.0);
  const double deviation = std::sqrt(weights.square().sum().item<double>());
  EXPECT_NEAR(output, 1.0, 5 * deviation);
  EXPECT_TRUE(attention(q, k, v, {.dropout = 1}).output.eq(0).all().item<bool>());
}

TEST_P(AttentionTest, LargeLogitsStayExact) {
  // Logits of +-1e4 overflow an exponential that is not shifted; here one key outweighs all others.
  const auto q = torch::full({1, 1, 1, 1}, 100.0, torch::dtype(torch::kDouble).device(device_));
  const auto k = torch::tensor({-100.0, 100.0, 0.0}, q.options()).view({1, 1, 3, 1});
  const auto v = torch::tensor({1.0, 2.0, 3.0}, q.options()).view({1, 1, 3, 1});
  for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
    for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
      const auto result = attention(q.to(type), k.to(type), v.to(type), {.scale = 1.0, .path = path});
      EXPECT_EQ(result.output.item<double>(), 2.0);
    }
  }
}

TEST_P(AttentionTest, EmptyAxesGiveEmptyOrZeroResults) {
  for (const auto& [B, Lq, Lk] : {std::tuple(0, 3, 4), std::tuple(2, 0, 4), std::tuple(2, 3, 0), std::tuple(2, 0, 0)}) {
    for (const auto& mask : {Mask(), Mask::causal(CausalAlignment::lower_right),
                             Mask::dense(torch::ones({Lq, Lk}, torch::dtype(torch::kBool).device(device_)))}) {
      const auto q = random({B, 2, Lq, 4}), k = random({B, 2, Lk, 4}), v = random({B, 2, Lk, 4});
      const auto result = attention(q, k, v, {.mask = mask, .weights = AttentionWeights::mean, .log_sum_exp = true});
      EXPECT_EQ(result.output.sizes(), (std::vector<int64_t>{B, 2, Lq, 4}));
      EXPECT_EQ(result.weights.sizes(), (std::vector<int64_t>{B, Lq, Lk}));
      EXPECT_TRUE(result.output.eq(0).all().item<bool>());
      EXPECT_TRUE(result.log_sum_exp.eq(Lk == 0 ? -kInfinity : 0.0).all().item<bool>() || result.log_sum_exp.numel() == 0);
      EXPECT_TRUE(attention(q, k, v, {.mask = mask}).output.equal(result.output));
      for (const auto& gradient : torch::autograd::grad({result.output.sum()}, {q, k, v})) {
        EXPECT_TRUE(gradient.eq(0).all().item<bool>());
      }
    }
  }
}

TEST_P(AttentionTest, StridesDoNotMatter) {
  const auto q = random({kB, kH, kLq, kD}).detach(), k = random({kB, kH, kLk, kD}).detach(),
             v = random({kB, kH, kLk, kD}).detach();
  const auto strided = [](const torch::Tensor& x) { return x.permute({3, 1, 0, 2}).contiguous().permute({2, 1, 3, 0}); };
  for (const auto path : {AttentionPath::definition, AttentionPath::fused}) {
    const auto expected = attention(q, k, v, {.path = path}).output;
    expect_close(attention(strided(q), strided(k), strided(v), {.path = path}).output, expected, 1e-12, "strided");
  }
}

TEST_P(AttentionTest, FusedThrowsWithTheReasonWhereThereIsNoKernel) {
  const auto x = random({1, 2, 3, 4});
  const auto refusal = [&](AttentionOptions options, const torch::Tensor& k, const torch::Tensor& v) {
    options.path = AttentionPath::fused;
    return error_of<c10::ValueError>([&] { attention(x, k, v, options); });
  };
  EXPECT_EQ(refusal({.weights = AttentionWeights::mean}, x, x),
            "[attention] path must not be fused here, because attention weights are requested.");
  EXPECT_EQ(refusal({.dropout = 0.1}, x, x), "[attention] path must not be fused here, because dropout is above 0.");
  const auto empty = x.slice(2, 0, 0);
  EXPECT_EQ(refusal({}, empty, empty), "[attention] path must not be fused here, because an axis is empty.");
  EXPECT_EQ(refusal({.mask = Mask::bias(random({3, 3}))}, x, x),
            "[attention] path must not be fused here, because the mask's bias requires a gradient.");
  if (device_.is_cpu()) {
    EXPECT_EQ(
        refusal({}, x, x.slice(3, 0, 2)),
        "[attention] path must not be fused here, because LibTorch's CPU kernel needs value heads of the size of key heads.");
  } else {
    EXPECT_EQ(refusal({.log_sum_exp = true}, x, x),
              "[attention] path must not be fused here, because only the CPU kernel returns its log-sum-exp.");
  }
}

TEST_P(AttentionTest, RefusesBadInputByName) {
  const auto q = random({2, 4, 3, 8}), k = random({2, 2, 5, 8}), v = random({2, 2, 5, 6});
  const auto value_error = [](const auto&... arguments) { return error_of<c10::ValueError>([&] { attention(arguments...); }); };
  const auto type_error = [](const auto&... arguments) { return error_of<c10::TypeError>([&] { attention(arguments...); }); };
  EXPECT_EQ(value_error(q[0], k, v), "[attention] q must have shape [B, H, Lq, d], but has [4, 3, 8].");
  EXPECT_EQ(value_error(q, k[0], v), "[attention] k must have shape [2, G, Lk, 8], but has [2, 5, 8].");
  EXPECT_EQ(value_error(q, k.slice(3, 0, 4), v), "[attention] k must have shape [2, G, Lk, 8], but has [2, 2, 5, 4].");
  EXPECT_EQ(value_error(q, random({2, 3, 5, 8}), v),
            "[attention] k must have a number of heads that divides the 4 of q, but has 3.");
  EXPECT_EQ(value_error(q, k, v.slice(2, 0, 4)), "[attention] v must have shape [2, 2, 5, e], but has [2, 2, 4, 6].");
  EXPECT_EQ(type_error(q.to(torch::kLong), k, v), "[attention] q must be of a floating point type, but is int64.");
  EXPECT_EQ(type_error(q, k.to(torch::kFloat), v), "[attention] k must be float64, the type of q, but is float32.");
  EXPECT_EQ(type_error(q, k, v.to(torch::kHalf)), "[attention] v must be float64, the type of q, but is float16.");
  EXPECT_EQ(value_error(q, k, v, AttentionOptions{.scale = kInfinity}), "[attention] scale must be finite, but is inf.");
  EXPECT_EQ(value_error(q, k, v, AttentionOptions{.scale = std::nan("")}), "[attention] scale must be finite, but is nan.");
  const auto narrow = q.to(torch::kFloat8_e4m3fn);
  EXPECT_EQ(type_error(narrow, narrow, narrow),
            "[attention] q must be float64, float32, bfloat16 or float16, but is float8_e4m3fn.");
  EXPECT_EQ(type_error(q, k.to_sparse(), v), "[attention] k must be dense, but is sparse.");
  const auto on_meta = [](const torch::Tensor& x) { return x.to(torch::kMeta); };
  EXPECT_EQ(type_error(on_meta(q), on_meta(k), on_meta(v)), "[attention] q must hold numbers, but is on meta.");
  EXPECT_EQ(type_error(q, on_meta(k), v), "[attention] k must be on " + device_.str() + ", as q, but is on meta.");
  EXPECT_EQ(value_error(q, k, v, AttentionOptions{.dropout = 1.5}), "[attention] dropout must lie in [0, 1], but is 1.5.");
  EXPECT_EQ(value_error(q, k, v,
                        AttentionOptions{.mask = Mask::dense(torch::ones({3, 4}, torch::dtype(torch::kBool).device(device_)))}),
            "[attention] mask (dense) must fit [B, H, Lq, Lk] = [2, 4, 3, 5], but has [1, 1, 3, 4].");
  if (!device_.is_cpu()) {
    EXPECT_EQ(type_error(q, k.cpu(), v), "[attention] k must be on " + device_.str() + ", as q, but is on cpu.");
  }
}

TEST(AttentionErrorTest, ErrorsAreOneLineWithoutABacktrace) {
  const auto x = torch::ones({1, 2, 3, 4});
  const auto what = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(what([&] { attention(x, x[0], x); }), "[attention] k must have shape [1, G, Lk, 4], but has [2, 3, 4].");
  EXPECT_EQ(what([&] { attention(x, x.to(torch::kDouble), x); }),
            "[attention] k must be float32, the type of q, but is float64.");
  EXPECT_THROW(attention(x, x[0], x), c10::ValueError);
  EXPECT_THROW(attention(x, x.to(torch::kDouble), x), c10::TypeError);
}

// ---- The library's own kernels ----------------------------------------------------------------------------------------------

class AttentionOnKernelsTest : public testing::Test {
 protected:
  AttentionOnKernelsTest() { torch::manual_seed(0); }
  ~AttentionOnKernelsTest() override { at::set_num_threads(threads_); }

  // Compares every result with the definition in float64.
  static void expect_the_definition(const torch::Tensor& q,
                                    const torch::Tensor& k,
                                    const torch::Tensor& v,
                                    AttentionOptions options,
                                    const std::string& what) {
    options.log_sum_exp = true;
    const auto result = on_kernels(q, k, v, options);
    options.path = AttentionPath::definition;
    const auto exact = attention(q.to(torch::kDouble), k.to(torch::kDouble), v.to(torch::kDouble), options);
    const auto limit = tolerance(torch::kFloat, q.size(3) + k.size(2));
    expect_close(result.output, exact.output, limit, what + " output");
    expect_close(result.log_sum_exp.exp(), exact.log_sum_exp.exp(), 10 * limit, what + " log-sum-exp");
    ASSERT_EQ(result.weights.defined(), exact.weights.defined()) << what;
    if (exact.weights.defined()) expect_close(result.weights, exact.weights, limit, what + " weights");
  }

  int threads_ = at::get_num_threads();
};

TEST_F(AttentionOnKernelsTest, EqualTheDefinitionForEveryMaskAndRequest) {
  const std::vector<AttentionOptions> requests = {{},
                                                  {.scale = 0.3, .weights = AttentionWeights::mean},
                                                  {.weights = AttentionWeights::per_head},
                                                  {.weights = AttentionWeights::per_head, .weight_heads = {2, 0}}};
  for (const int64_t Lq : {1, 5, 33}) {  // 1 to 132 rows of a head: with unpacked keys, and with packed ones
    for (const int64_t G : {1, 2, 4}) {
      const auto q = torch::randn({kB, kH, Lq, kD}), k = torch::randn({kB, G, 19, kD}), v = torch::randn({kB, G, 19, 3});
      for (const auto& [name, mask] : masks(torch::kCPU, Lq, 19)) {
        for (auto request : requests) {
          request.mask = mask;
          expect_the_definition(q, k, v, request, name);
        }
      }
    }
  }
}

// A part has 2,048 keys. Here the first part may have no allowed key, and with `upper_left` no other part has one.
TEST_F(AttentionOnKernelsTest, ReadALongContextInParts) {
  const int64_t Lk = 3 * 2048 + 37;
  const auto only_last = torch::arange(Lk).ge(Lk - 3).view({1, Lk}).expand({kB, Lk}).contiguous();
  for (const int64_t Lq : {3, 29}) {
    const auto q = torch::randn({kB, kH, Lq, kD}), k = torch::randn({kB, 2, Lk, kD}), v = torch::randn({kB, 2, Lk, 24});
    auto all = masks(torch::kCPU, Lq, Lk);
    all["only_last"] = Mask::key_padding(only_last);
    all["all_but_last"] = Mask::key_padding(only_last.logical_not());
    for (const auto& [name, mask] : all) {
      expect_the_definition(q, k, v, {.mask = mask}, name);
      const auto alone = on_kernels(q, k, v, {.mask = mask}).output;
      const auto with_weights = on_kernels(q, k, v, {.mask = mask, .weights = AttentionWeights::mean}).output;
      expect_close(alone, with_weights, tolerance(torch::kFloat, Lk), name + " with weights");
    }
  }
}

TEST_F(AttentionOnKernelsTest, HaveEqualBitsForOneThreadAndTwoAndWithOrWithoutWeights) {
  for (const int64_t Lq : {1, 6, 70}) {
    for (const int64_t Lk : {50, 5000}) {
      const auto q = torch::randn({3, 4, Lq, 16}), k = torch::randn({3, 2, Lk, 16}), v = torch::randn({3, 2, Lk, 16});
      const auto run = [&](int threads, AttentionWeights weights) {
        at::set_num_threads(threads);
        return on_kernels(q, k, v, {.weights = weights});
      };
      for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
        const auto one = run(1, weights), two = run(2, weights);
        EXPECT_TRUE(torch::equal(one.output, two.output)) << Lq << ", " << Lk;
        EXPECT_TRUE(!one.weights.defined() || torch::equal(one.weights, two.weights)) << Lq << ", " << Lk;
        EXPECT_TRUE(Lk > 4096 || torch::equal(one.output, run(1, AttentionWeights::none).output)) << Lq;
      }
    }
  }
}

// Causal masks of both alignments, alone and with every other kind of restriction.
std::vector<std::pair<std::string, Mask>> causal_masks(int64_t Lq, int64_t Lk) {
  std::vector<std::pair<std::string, Mask>> all;
  for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
    for (const auto& [name, mask] : masks(torch::kCPU, Lq, Lk)) {
      const auto aligned = alignment == CausalAlignment::upper_left ? "upper left and " : "lower right and ";
      all.emplace_back(aligned + name, Mask::causal(alignment) & mask);
    }
  }
  return all;
}

// Sizes of several groups of rows and several panels of keys, with more queries than keys and with fewer.
TEST_F(AttentionOnKernelsTest, EqualTheDefinitionUnderCausalMasksOfAllSizes) {
  const std::vector<AttentionOptions> requests = {{},
                                                  {.weights = AttentionWeights::mean},
                                                  {.weights = AttentionWeights::per_head},
                                                  {.weights = AttentionWeights::per_head, .weight_heads = {3, 1}}};
  for (int draw = 0; draw < 10; ++draw) {
    const auto Lq = torch::randint(1, 300, {}).item<int64_t>(), Lk = torch::randint(7, 400, {}).item<int64_t>();
    const auto q = torch::randn({kB, kH, Lq, kD}), k = torch::randn({kB, 2, Lk, kD}), v = torch::randn({kB, 2, Lk, 3});
    for (const auto& [name, mask] : causal_masks(Lq, Lk)) {
      auto request = requests[static_cast<size_t>(draw) % requests.size()];
      request.mask = mask;
      at::set_num_threads(1 + draw % 3);
      expect_the_definition(q, k, v, request, name + ", " + std::to_string(Lq) + " x " + std::to_string(Lk));
    }
  }
}

TEST_F(AttentionOnKernelsTest, EqualTheDefinitionUnderCausalMasksOnALongContext) {
  const int64_t Lk = 2 * 2048 + 300;
  for (const int64_t Lq : {3, 200, 4600}) {
    const auto q = torch::randn({1, 2, Lq, kD}), k = torch::randn({1, 1, Lk, kD}), v = torch::randn({1, 1, Lk, 5});
    for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
      const auto causal = Mask::causal(alignment);
      for (const auto& mask : {causal, causal & Mask::key_padding(torch::rand({1, Lk}) > 0.9)}) {
        expect_the_definition(q, k, v, {.mask = mask}, std::to_string(Lq) + " queries");
      }
    }
  }
}

TEST_F(AttentionOnKernelsTest, GiveZeroWeightsBehindTheDiagonalAndNothingToRowsBeforeIt) {
  const int64_t Lq = 250, Lk = 130;
  const auto q = torch::randn({kB, kH, Lq, kD}), k = torch::randn({kB, kH, Lk, kD});
  const auto result = on_kernels(
      q, k, k,
      {.mask = Mask::causal(CausalAlignment::lower_right), .weights = AttentionWeights::per_head, .log_sum_exp = true});
  EXPECT_TRUE(result.weights.triu(Lk - Lq + 1).eq(0).all().item<bool>());
  EXPECT_TRUE(result.output.narrow(2, 0, Lq - Lk).eq(0).all().item<bool>());
  EXPECT_TRUE(result.log_sum_exp.narrow(2, 0, Lq - Lk).eq(-kInfinity).all().item<bool>());
  expect_close(result.weights.sum(-1).narrow(2, Lq - Lk, Lk), torch::ones({kB, kH, Lk}), 1e-6, "sums of rows");
}

// A NaN in the last key would spread to every row that is multiplied by it.
TEST_F(AttentionOnKernelsTest, ReadNoKeyBehindTheLastThatAGroupOfRowsSees) {
  for (const int64_t L : {400, 5000}) {  // at once, and in parts
    for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
      const auto q = torch::randn({1, 2, L, 8});
      auto k = torch::randn({1, 2, L, 8});
      k.select(2, L - 1).fill_(std::numeric_limits<float>::quiet_NaN());
      const auto output = on_kernels(q, k, k, {.mask = Mask::causal(alignment)}).output;
      EXPECT_TRUE(output.narrow(2, 0, L - 150).isfinite().all().item<bool>()) << L;
      EXPECT_TRUE(output.select(2, L - 1).isnan().all().item<bool>()) << L;
    }
  }
}

TEST_F(AttentionOnKernelsTest, HaveEqualBitsUnderCausalMasksForAnyThreadsAndOtherRows) {
  for (const int64_t Lq : {5, 70, 300}) {
    for (const int64_t Lk : {200, 5000}) {
      const auto q = torch::randn({3, 4, Lq, 16}), k = torch::randn({3, 2, Lk, 16}), v = torch::randn({3, 2, Lk, 16});
      for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
        for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
          const auto run = [&](int threads, const torch::Tensor& queries) {
            at::set_num_threads(threads);
            return on_kernels(queries, k, v, {.mask = Mask::causal(alignment), .weights = weights});
          };
          const auto one = run(1, q);
          for (const int threads : {2, 3, 8}) {
            const auto more = run(threads, q);
            EXPECT_TRUE(torch::equal(one.output, more.output)) << Lq << ", " << Lk;
            EXPECT_TRUE(!one.weights.defined() || torch::equal(one.weights, more.weights)) << Lq << ", " << Lk;
          }
          auto other = q.clone();
          other.narrow(2, Lq / 2, Lq - Lq / 2).normal_();
          other[2].normal_();
          const auto rows = [Lq](const torch::Tensor& x) { return x.narrow(0, 0, 2).narrow(2, 0, Lq / 2); };
          EXPECT_TRUE(torch::equal(rows(run(2, other).output), rows(one.output))) << Lq << ", " << Lk;
        }
      }
    }
  }
}

TEST_F(AttentionOnKernelsTest, ConfineANaNToItsRow) {
  for (const int64_t Lk : {50, 5000}) {
    const auto q = torch::randn({1, 2, 30, 8}), k = torch::randn({1, 2, Lk, 8});
    const auto clean = on_kernels(q, k, k, {.log_sum_exp = true});
    auto spoilt = q.clone();
    spoilt[0][1][7][0] = std::numeric_limits<float>::quiet_NaN();
    const auto result = on_kernels(spoilt, k, k, {.log_sum_exp = true});
    auto expected = clean.output.clone();
    expected[0][1][7].fill_(std::numeric_limits<float>::quiet_NaN());
    EXPECT_TRUE(torch::allclose(result.output, expected, 0, 0, /*equal_nan=*/true)) << Lk;
    EXPECT_TRUE(std::isnan(result.log_sum_exp[0][1][7].item<float>())) << Lk;
    EXPECT_EQ(result.log_sum_exp.isnan().sum().item<int64_t>(), 1) << Lk;
  }
}

// ---- Merging ---------------------------------------------------------------------------------------------------------------

// Attention to parts of the keys, [first, first + n) each, merged.
AttentionResult merged_attention(const torch::Tensor& q,
                                 const torch::Tensor& k,
                                 const torch::Tensor& v,
                                 const Mask& mask,
                                 const std::vector<int64_t>& parts,
                                 AttentionWeights weights) {
  std::vector<AttentionResult> results;
  int64_t first = 0;
  for (const auto n : parts) {
    const auto of_part = detail::shard_of_keys(mask, first, n, q.size(2), k.size(2), q.device());
    results.push_back(
        attention(q, k.narrow(2, first, n), v.narrow(2, first, n), {.mask = of_part, .weights = weights, .log_sum_exp = true}));
    first += n;
  }
  return merge(results);
}

TEST_P(AttentionTest, MergedPartsEqualAttentionToAllKeysWithRowsWithoutKeys) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const auto& [name, mask] : masks(device_)) {
      const torch::NoGradGuard no_grad;
      const auto q = random({kB, kH, kLq, kD}, type), k = random({kB, kH, kLk, kD}, type), v = random({kB, kH, kLk, 3}, type);
      const auto all = attention(q, k, v, {.mask = mask, .weights = AttentionWeights::per_head, .log_sum_exp = true});
      for (const auto& parts : std::vector<std::vector<int64_t>>{{7}, {3, 4}, {0, 1, 6}, {1, 1, 1, 1, 3}}) {
        const auto merged = merged_attention(q, k, v, mask, parts, AttentionWeights::per_head);
        EXPECT_EQ(merged.output.scalar_type(), type);
        expect_close(merged.output, all.output, tolerance(type, kD + 2 * kLk), "output, " + name);
        expect_close(merged.weights, all.weights, tolerance(type, kD + 2 * kLk), "weights, " + name);
        const auto finite = all.log_sum_exp.isfinite();
        EXPECT_TRUE(merged.log_sum_exp.isfinite().equal(finite)) << name;
        expect_close(merged.log_sum_exp.masked_fill(finite.logical_not(), 0),
                     all.log_sum_exp.masked_fill(finite.logical_not(), 0), tolerance(type, kD + 2 * kLk), "sums, " + name);
      }
      EXPECT_FALSE(merged_attention(q, k, v, mask, {3, 4}, AttentionWeights::none).weights.defined());
    }
  }
}

TEST_P(AttentionTest, GradientsOfMergedPartsAreThoseOfAllKeysToTheSecondOrder) {
  for (const auto& [name, mask] : masks(device_)) {
    const std::vector<torch::Tensor> inputs = {random({kB, kH, kLq, kD}), random({kB, kH, kLk, kD}), random({kB, kH, kLk, 3})};
    const auto scalar_of = [](const AttentionResult& r) {
      return r.output.sin().sum() + r.weights.square().sum() +
             r.log_sum_exp.masked_fill(r.log_sum_exp.isneginf(), 0).cos().sum();
    };
    const auto merged = [&, &mask = mask](const std::vector<torch::Tensor>& x) {
      return scalar_of(merged_attention(x[0], x[1], x[2], mask, {2, 0, 5}, AttentionWeights::per_head));
    };
    const auto all = scalar_of(
        attention(inputs[0], inputs[1], inputs[2], {.mask = mask, .weights = AttentionWeights::per_head, .log_sum_exp = true}));
    const auto expected = torch::autograd::grad({all}, inputs), found = torch::autograd::grad({merged(inputs)}, inputs);
    for (size_t i = 0; i < inputs.size(); ++i) expect_close(found[i], expected[i], 1e-12, "gradient, " + name);
    if (name == "lengths") expect_second_gradient(merged, inputs, name);  // with a row that has no keys
  }
}

TEST(MergeTest, BadPartsAreRefused) {
  const auto x = torch::randn({1, 2, 3, 4});
  const auto part = [&x](AttentionWeights weights) { return attention(x, x, x, {.weights = weights, .log_sum_exp = true}); };
  const auto error = [](const std::vector<AttentionResult>& parts) { return error_of<c10::ValueError>([&] { merge(parts); }); };
  const auto good = part(AttentionWeights::none);
  EXPECT_EQ(error({}), "[merge] parts must be at least one, but are none.");
  EXPECT_EQ(error({good, attention(x, x, x)}),
            "[merge] parts must have a log_sum_exp, but one has none. Set AttentionOptions::log_sum_exp.");
  const auto shorter = attention(x.narrow(2, 0, 2), x, x, {.log_sum_exp = true});
  EXPECT_EQ(error({good, shorter}),
            "[merge] output must have one shape [B, H, Lq, e] in all parts, but has [1, 2, 3, 4] and [1, 2, 2, 4].");
  EXPECT_EQ(error({good, {good.output, {}, shorter.log_sum_exp}}),
            "[merge] log_sum_exp must have shape [1, 2, 3], but has [1, 2, 2].");
  EXPECT_EQ(error({part(AttentionWeights::mean)}),
            "[merge] weights must be those of all heads, [1, 2, 3, Lk], or of no part, but have [1, 3, 3].");
  EXPECT_EQ(error({part(AttentionWeights::per_head), good}),
            "[merge] weights must be those of all heads, [1, 2, 3, Lk], or of no part, but have undefined.");
}

INSTANTIATE_TEST_SUITE_P(Devices, AttentionTest, testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace xattn::test
