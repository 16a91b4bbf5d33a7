// SPDX-License-Identifier: Apache-2.0
#include <xattn/norm.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

TEST(NormTest, RmsDividesByTheRootMeanSquare) {
  Norm norm(NormOptions(NormKind::rms, 6).eps(1e-3));
  norm->to(torch::kDouble);
  torch::nn::init::normal_(norm->weight);
  const auto x = torch::randn({2, 3, 6}, torch::kDouble);
  const auto expected = x / (x.square().mean(-1, true) + 1e-3).sqrt() * norm->weight;
  expect_close(norm(x), expected, tolerance(torch::kDouble, 12), "rms norm");
}

TEST(NormTest, LayerSubtractsTheMeanAndDividesByTheDeviation) {
  Norm norm(NormOptions(NormKind::layer, 6).eps(1e-3));
  norm->to(torch::kDouble);
  torch::nn::init::normal_(norm->weight);
  torch::nn::init::normal_(norm->bias);
  const auto x = torch::randn({2, 3, 6}, torch::kDouble);
  const auto centred = x - x.mean(-1, true);
  const auto expected = centred / (centred.square().mean(-1, true) + 1e-3).sqrt() * norm->weight + norm->bias;
  expect_close(norm(x), expected, tolerance(torch::kDouble, 24), "layer norm");
}

TEST(NormTest, LayerMayLeaveItsBiasOut) {
  Norm with(NormKind::layer, 6), without(NormOptions(NormKind::layer, 6).bias(false));
  torch::nn::init::normal_(with->weight);
  without->weight.set_data(with->weight.detach());
  EXPECT_EQ(without->parameters().size(), 1U);
  const auto x = torch::randn({2, 6});
  EXPECT_TRUE(without(x).equal(with(x)));  // its bias is zero
}

TEST(NormTest, NoneIsTheIdentityWithoutParameters) {
  Norm norm(NormKind::none, 6);
  const auto x = torch::randn({2, 6});
  EXPECT_TRUE(norm(x).is_same(x));
  EXPECT_TRUE(norm->parameters().empty());
}

TEST(NormTest, KeepsTheTypeOfItsInput) {
  for (auto kind : {NormKind::rms, NormKind::layer}) {
    for (auto type : {torch::kHalf, torch::kBFloat16, torch::kFloat, torch::kDouble}) {
      Norm norm(kind, 8);
      norm->to(type);
      EXPECT_EQ(norm(torch::randn({3, 8}).to(type)).scalar_type(), type);
    }
  }
}

TEST(NormTest, SumsHalfTypesInFloat32) {
  // The squares of 300 overflow float16.
  Norm norm(NormKind::rms, 4);
  norm->to(torch::kHalf);
  expect_close(norm(torch::full({4}, 300.0, torch::kHalf)), torch::ones({4}), tolerance(torch::kHalf, 4), "rms norm of 300");
}

TEST(NormTest, ClonesAndPrintsWhatBuildsItAgain) {
  Norm norm(NormOptions(NormKind::layer, 6).eps(1e-3));
  torch::nn::init::normal_(norm->weight);
  const auto copy = std::dynamic_pointer_cast<NormImpl>(norm->clone());
  EXPECT_TRUE(copy->weight.equal(norm->weight));
  EXPECT_FALSE(copy->weight.is_same(norm->weight));
  std::ostringstream stream;
  norm->pretty_print(stream);
  EXPECT_EQ(stream.str(), "xattn::Norm(NormOptions(NormKind::layer, 6).eps(0.001))");
  stream.str("");
  Norm(NormOptions(NormKind::layer, 6).bias(false))->pretty_print(stream);
  EXPECT_EQ(stream.str(), "xattn::Norm(NormOptions(NormKind::layer, 6).eps(1e-06).bias(false))");
}

TEST(NormTest, RefusesBadInput) {
  EXPECT_EQ(error_of<c10::ValueError>([] { Norm(NormKind::rms, 0); }), "[norm] size must be at least 1, but is 0.");
  EXPECT_EQ(error_of<c10::ValueError>([] { Norm(NormOptions(NormKind::rms, 2).eps(-1)); }),
            "[norm] eps must not be negative, but is -1.");
  Norm norm(NormKind::rms, 4);
  EXPECT_EQ(error_of<c10::ValueError>([&] { norm(torch::ones({2, 3})); }),
            "[norm] x must have shape [..., 4], but has [2, 3].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { norm(torch::ones({2, 4}, torch::kLong)); }),
            "[norm] x must be float64, float32, bfloat16 or float16, but is int64.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { norm(torch::ones({2, 4}).to_sparse()); }), "[norm] x must be dense, but is sparse.");
}

TEST(NormTest, TakesParametersOfAnyLayoutAndRefusesThoseOfAnotherSize) {
  const torch::NoGradGuard no_grad;  // on the library's kernels
  Norm norm(NormOptions(NormKind::layer, 20));
  norm->weight.set_data(torch::randn({20, 2}).select(1, 0));
  norm->bias.set_data(torch::randn({1}).expand({20}));
  const auto x = torch::randn({3, 20});
  EXPECT_TRUE(norm->forward(x).allclose(torch::layer_norm(x, {20}, norm->weight, norm->bias, norm->options.eps())));
  for (auto* parameter : {&norm->weight, &norm->bias}) {
    const auto fitting = parameter->clone();
    parameter->set_data(torch::ones({7}));
    EXPECT_THROW(norm->forward(x), c10::Error);
    parameter->set_data(fitting);
  }
}

}  // namespace
}  // namespace xattn::test
