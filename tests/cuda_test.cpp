// SPDX-License-Identifier: Apache-2.0
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/xattn.h>

#include "compare.h"

// Tests beyond the suites over devices(): calls never wait for the device, they use the right stream, and frozen layers on
// CUDA. Built with a CUDA build of LibTorch if the headers of a CUDA toolkit are present.
namespace xattn::test {
namespace {

using torch::Tensor;

constexpr int64_t kB = 2, kLq = 5, kLk = 13;
constexpr double kTerms = 100;

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
    torch::manual_seed(0);
  }
};

Tensor random(at::IntArrayRef shape, at::ScalarType type) {
  return torch::randn(shape, torch::dtype(type).device(torch::kCUDA));
}

struct Inputs {
  explicit Inputs(at::ScalarType type)
      : query(random({kB, kLq, 8}, type)), key(random({kB, kLk, 12}, type)), value(random({kB, kLk, 10}, type)) {}
  Tensor query, key, value;
};

CrossAttention make(at::ScalarType type, AttentionWeights weights = AttentionWeights::per_head) {
  auto options = CrossAttentionOptions(8, 12, 10, 16).num_heads(4).kv_heads(2).attention_weights(weights);
  if (weights == AttentionWeights::per_head) options.weight_heads({3, 1});
  CrossAttention module(options);
  module->to(torch::kCUDA, type);
  module->eval();
  return module;
}

std::vector<PlanMode> plans() {
  constexpr Order kAllOrders[] = {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context};
  std::vector<PlanMode> all = {PlanMode::automatic};
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) all.push_back(PlanMode::pin({logits, values}));
  }
  return all;
}

std::vector<Mask> masks() {
  const auto lengths = Mask::lengths(torch::tensor({13, 0}), kLk);
  return {{},
          lengths.to(torch::kCUDA),
          Mask::dense(torch::rand({kB, kLq, kLk}) < 0.6).to(torch::kCUDA),
          Mask::bias(torch::randn({1, 4, kLq, kLk})).to(torch::kCUDA) & Mask::causal(CausalAlignment::lower_right)};
}

// Turns a call that waits for the device into an error.
class NoWaiting {
 public:
  NoWaiting() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NoWaiting() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); }
  NoWaiting(const NoWaiting&) = delete;
  NoWaiting& operator=(const NoWaiting&) = delete;
};

TEST_F(CudaTest, NoCallWaitsForTheDevice) {
  {
    const auto number = torch::ones({}, torch::kCUDA);
    const NoWaiting no_waiting;
    EXPECT_THROW(number.item<float>(), c10::Error) << "what waits is not found";
  }
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    const Inputs x(type);
    for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
      auto module = make(type, weights);
      for (const auto& plan : plans()) {
        module->options.plan(plan);
        const auto frozen = module->freeze();
        for (const auto& mask : masks()) {
          const auto call = [&] {
            module->forward(x.query, x.key, x.value, mask);
            module->attend(x.query, module->context(x.key, x.value, mask));
            frozen.forward(x.query, x.key, x.value, mask);
            frozen.attend(x.query, frozen.context(x.key, x.value, mask, {.expected_queries = kLq}));
          };
          call();  // the first one sets up libraries
          const NoWaiting no_waiting;
          ASSERT_NO_THROW(call()) << name_of(plan.orders.logits) << ", " << name_of(plan.orders.values);
        }
      }
    }
  }
}

TEST_F(CudaTest, AFrozenLayerEqualsTheDefinitionInAllOrdersTypesAndMasks) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    const Inputs x(type);
    auto module = make(type);
    const auto exact = std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone());
    exact->options.plan(PlanMode::standard);
    exact->to(torch::kCPU, torch::kDouble);
    const auto wide = [](const Tensor& t) { return t.to(torch::kCPU, torch::kDouble); };
    for (const auto& mask : masks()) {
      const torch::NoGradGuard no_grad;
      const auto [output, weights] = exact->forward(wide(x.query), wide(x.key), wide(x.value), mask.to(torch::kCPU));
      for (const auto& plan : plans()) {
        const auto frozen = module->freeze({.plan = plan});
        const auto [y, p] = frozen.attend(x.query, frozen.context(x.key, x.value, mask));
        const auto what = std::string(name_of(plan.orders.logits)) + ", " + std::string(name_of(plan.orders.values));
        expect_close(y, output, tolerance(type, kTerms), what);
        expect_close(p, weights, tolerance(type, kTerms), what + ", weights");
      }
    }
  }
}

TEST_F(CudaTest, StreamsShareOneFrozenLayerAndItsContext) {
  const Inputs x(torch::kFloat);
  const auto frozen = make(torch::kFloat)->freeze();
  const auto context = frozen.context(x.key, x.value);
  const auto expected = std::get<0>(frozen.attend(x.query, context));
  torch::cuda::synchronize();
  std::vector<Tensor> results(4);
  for (auto& result : results) {
    const c10::StreamGuard on_stream(c10::cuda::getStreamFromPool());
    for (int repeat = 0; repeat < 20; ++repeat) result = std::get<0>(frozen.attend(x.query, context));
  }
  torch::cuda::synchronize();
  for (const auto& result : results) EXPECT_TRUE(torch::equal(result, expected));
}

TEST_F(CudaTest, AFrozenCallIsCapturedInAGraph) {
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    const Inputs x(type);
    const auto frozen = make(type)->freeze();
    const auto context = frozen.context(x.key, x.value, masks()[1]);
    const auto query = x.query.clone();
    at::cuda::CUDAGraph graph;
    Tensor output, weights;
    {
      const c10::StreamGuard on_stream(c10::cuda::getStreamFromPool());  // the default stream cannot be captured
      frozen.attend(query, context);
      torch::cuda::synchronize();
      graph.capture_begin();
      std::tie(output, weights) = frozen.attend(query, context);
      graph.capture_end();
    }
    for (int repeat = 0; repeat < 3; ++repeat) {
      query.copy_(random({kB, kLq, 8}, type));
      graph.replay();
      const auto [y, p] = frozen.attend(query, context);
      expect_close(output, y, tolerance(type, kTerms), "output");
      expect_close(weights, p, tolerance(type, kTerms), "weights");
    }
  }
}

TEST_F(CudaTest, AModuleAndItsContextsMove) {
  const Inputs x(torch::kFloat);
  auto module = make(torch::kFloat);
  const torch::NoGradGuard no_grad;
  const auto expected = std::get<0>(module->forward(x.query, x.key, x.value));
  const auto clone = std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone());
  module->to(torch::kCPU);
  const auto on_cpu = [](const Tensor& t) { return t.to(torch::kCPU); };
  expect_close(std::get<0>(module->forward(on_cpu(x.query), on_cpu(x.key), on_cpu(x.value))), expected,
               tolerance(torch::kFloat, kTerms), "moved");
  expect_close(std::get<0>(clone->forward(x.query, x.key, x.value)), expected, 0, "clone");
  const auto frozen = clone->freeze();
  const auto context = frozen.context(x.key, x.value);
  const auto [y, p] = frozen.attend(x.query, context.to(torch::kCPU).to(torch::kCUDA));
  expect_close(y, std::get<0>(frozen.attend(x.query, context)), 0, "context");
}

}  // namespace
}  // namespace xattn::test
