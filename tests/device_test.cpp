// SPDX-License-Identifier: Apache-2.0

// On a device whose memory the host must not touch, and where nothing may wait: see standin_device.h.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/xattn.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "standin_device.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kB = 2, kLq = 3, kLk = 5, kEq = 8, kEk = 12, kEv = 10, kTerms = 200;

// Prepares modules and inputs on a device, and returns the work to be done there.
using Prepare = std::function<std::function<Tensors()>(torch::Device)>;

// The work gives on the stand-in, without waiting, what it gives on the CPU.
void expect_same(const Prepare& prepare, const std::string& what, at::ScalarType type = torch::kFloat) {
  const auto run = [&](torch::Device device) {
    torch::manual_seed(0);
    const auto work = prepare(device);
    if (device.is_cpu()) return work();
    const NoWaiting no_waiting;
    return work();
  };
  SCOPED_TRACE(what);
  standin();  // the first backward pass makes a thread for each device that is there
  const auto expected = run(torch::kCPU);
  Tensors found;
  try {
    found = run(standin());
  } catch (const c10::Error& error) {
    FAIL() << error.what_without_backtrace();
  }
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(!found[i].defined() || found[i].device() == standin()) << "result " << i << " is on the CPU";
    expect_close(found[i], expected[i], tolerance(type, kTerms), "result " + std::to_string(i));
  }
}

Tensor random(at::IntArrayRef shape, torch::Device device, at::ScalarType type = torch::kFloat) {
  return torch::randn(shape).to(device, type);
}

struct Inputs {
  explicit Inputs(torch::Device device, at::ScalarType type = torch::kFloat)
      : query(random({kB, kLq, kEq}, device, type)),
        key(random({kB, kLk, kEk}, device, type)),
        value(random({kB, kLk, kEv}, device, type)) {}
  Tensor query, key, value;
};

CrossAttentionOptions sizes() {
  return CrossAttentionOptions(kEq, kEk, kEv, 16);
}

std::vector<std::pair<std::string, CrossAttentionOptions>> layers() {
  const auto heads = sizes().num_heads(4).attention_weights(AttentionWeights::per_head);
  return {{"one head", sizes()},
          {"heads", heads},
          {"no weights", CrossAttentionOptions(heads).attention_weights(AttentionWeights::none)},
          {"shared heads", CrossAttentionOptions(heads).kv_heads(2).weight_heads({3, 1})},
          {"norms", CrossAttentionOptions(heads).qk_norm(NormKind::rms).attention_weights(AttentionWeights::mean)},
          {"bias_kv", CrossAttentionOptions(heads).bias_kv(true)}};
}

std::vector<PlanMode> plans() {
  return {PlanMode::automatic, PlanMode::standard, PlanMode::pin({Order::fold_into_query, Order::fold_into_query}),
          PlanMode::pin({Order::prefold, Order::prefold}), PlanMode::pin({Order::fold_into_context, Order::fold_into_context})};
}

std::vector<std::pair<std::string, Mask>> masks(torch::Device device) {
  const auto lengths = Mask::lengths(torch::tensor({5, 0}), kLk);
  return {{"none", {}},
          {"lengths", lengths.to(device)},
          {"padding", Mask::key_padding((torch::rand({kB, kLk}) < 0.6).to(device))},
          {"dense", Mask::dense((torch::rand({kB, 1, kLq, kLk}) < 0.6).to(device))},
          {"bias", Mask::bias(torch::randn({1, 1, kLq, kLk}).to(device)) & lengths.to(device)},
          {"causal", Mask::causal(CausalAlignment::lower_right)}};
}

template <class Module>
Module on(torch::Device device, Module module, at::ScalarType type = torch::kFloat) {
  module->to(type);
  if (!device.is_cpu()) move_to_standin(*module);
  return module;
}

// Results, and the gradients of their sum.
template <class Module>
Tensors with_gradients(Module& module, const Tensors& inputs, const std::function<std::tuple<Tensor, Tensor>()>& call) {
  const auto [output, weights] = call();
  Tensors results = {output.detach(), weights.defined() ? weights.detach() : weights}, wanted = inputs;
  for (const auto& parameter : module->parameters()) wanted.push_back(parameter);
  const auto sum = weights.defined() ? output.square().sum() + weights.square().sum() : output.square().sum();
  // As one vector, because some are zero but for rounding.
  Tensors gradients;
  for (const auto& gradient : torch::autograd::grad({sum}, wanted, {}, {}, false, /*allow_unused=*/true)) {
    if (gradient.defined()) gradients.push_back(gradient.flatten());
  }
  results.push_back(torch::cat(gradients));
  return results;
}

TEST(StandInTest, FindsAccessByTheHostWaitingAndMixedDevices) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto x = torch::ones({3, 4}).to(standin());
  EXPECT_EQ(x.sum().item<float>(), 12);
  EXPECT_TRUE(torch::equal(x.transpose(0, 1).contiguous().cpu(), torch::ones({4, 3})));
  EXPECT_DEATH(std::cerr << *x.const_data_ptr<float>(), "");
  EXPECT_THROW(x + torch::ones({4}), c10::Error);
  EXPECT_NO_THROW(x + torch::ones({}));
  const NoWaiting no_waiting;
  EXPECT_THROW(x.sum().item<float>(), c10::Error);
  EXPECT_THROW(x.cpu(), c10::Error);
  EXPECT_THROW(torch::ones({4}).to(standin()), c10::Error);
  EXPECT_THROW(x.index({x > 0}), c10::Error);
  EXPECT_NO_THROW(x.add_(1).t().matmul(x));
}

TEST(StandInDeviceTest, AModuleAndItsGradientsNeverWait) {
  for (const auto& [name, options] : layers()) {
    for (const auto& plan : plans()) {
      if ((options.bias_kv() || options.qk_norm() != NormKind::none) && plan.pinned) continue;
      const auto count = masks(torch::kCPU).size();
      for (size_t i = 0; i < count; ++i) {
        expect_same(
            [&, &options = options](torch::Device device) {
              auto module = on(device, CrossAttention(CrossAttentionOptions(options).plan(plan)));
              const Inputs x(device);
              const auto mask = masks(device)[i].second;
              return [module, x, mask]() mutable {
                for (auto* input : {&x.query, &x.key, &x.value}) const_cast<Tensor*>(input)->requires_grad_();
                return with_gradients(module, {x.query, x.key, x.value},
                                      [&] { return module->forward(x.query, x.key, x.value, mask); });
              };
            },
            name + ", mask " + masks(torch::kCPU)[i].first);
      }
    }
  }
}

// Both kinds of context have the same functions.
template <class Layer>
Tensors use_contexts(Layer& layer, const Inputs& x, const Mask& mask, const Tensor& indices) {
  auto& l = *layer;
  Tensors results;
  const auto attend = [&](const auto& context) {
    const auto [output, weights] = l.attend(x.query, context);
    results.insert(results.end(), {output, weights});
  };
  const auto context = l.context(x.key, x.value, mask);
  attend(context);
  attend(context.append(x.key, x.value));
  attend(context.append(x.key, x.value, mask).append(x.key, x.value));
  attend(context.truncate(2));
  attend(context.select(indices));
  attend(std::decay_t<decltype(context)>::join({context, context}));
  return results;
}

TEST(StandInDeviceTest, ContextsAndFrozenLayersNeverWait) {
  for (const auto& [name, options] : layers()) {
    for (const auto& mask : {0, 1, 2}) {
      for (const bool frozen : {false, true}) {
        expect_same(
            [&, &options = options](torch::Device device) {
              auto module = on(device, CrossAttention(options));
              const Inputs x(device);
              const auto restriction = masks(device)[static_cast<size_t>(mask)].second;
              const auto indices = torch::tensor({1, 1}).to(device);
              return [=]() mutable {
                const torch::NoGradGuard no_grad;
                if (!frozen) return use_contexts(module, x, restriction, indices);
                const auto layer = std::make_shared<Frozen>(module->freeze());
                auto results = use_contexts(layer, x, restriction, indices);
                results.push_back(std::get<0>(layer->forward(x.query, x.key, x.value, restriction)));
                const auto context = layer->context(x.key, x.value, restriction, {.expected_queries = 1});
                results.push_back(
                    std::get<0>(layer->attend(x.query, FrozenContext::cat({context.slice(0, 1), context.slice(1, 2)}))));
                return results;
              };
            },
            name + (frozen ? ", frozen" : "") + ", mask " + masks(torch::kCPU)[static_cast<size_t>(mask)].first);
      }
    }
  }
}

TEST(StandInDeviceTest, HalfTypesNeverWait) {
  for (const auto type : {torch::kHalf, torch::kBFloat16}) {
    expect_same(
        [&](torch::Device device) {
          auto module = on(device, CrossAttention(layers()[1].second), type);
          const Inputs x(device, type);
          return [=]() mutable {
            const torch::NoGradGuard no_grad;
            return Tensors{std::get<0>(module->forward(x.query, x.key, x.value)),
                           std::get<0>(module->freeze().forward(x.query, x.key, x.value))};
          };
        },
        c10::toString(type), type);
  }
}

TEST(StandInDeviceTest, BlocksNeverWait) {
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    for (const auto gate : {BlockGate::none, BlockGate::scalar}) {
      expect_same(
          [&](torch::Device device) {
            auto options = CrossAttentionBlockOptions(CrossAttentionOptions(kEq, kEk, kEv, kEq).num_heads(2));
            auto block = on(device, CrossAttentionBlock(options.norm_placement(placement).gate(gate).feed_forward(16)));
            block->eval();
            const Inputs x(device);
            const auto mask = masks(device)[1].second;
            return [=]() mutable {
              auto results = with_gradients(block, {}, [&] { return block->forward(x.query, x.key, x.value, mask); });
              const torch::NoGradGuard no_grad;
              const auto frozen = block->freeze();
              const auto context = frozen.context(x.key, x.value, mask);
              results.push_back(std::get<0>(frozen.attend(x.query, context)));
              results.push_back(std::get<0>(block->attend(x.query, block->context(x.key, x.value))));
              return results;
            };
          },
          "block");
    }
  }
}

TEST(StandInDeviceTest, DecoupledLayersNeverWait) {
  expect_same(
      [&](torch::Device device) {
        auto module = on(device, DecoupledCrossAttention(DecoupledCrossAttentionOptions(sizes().num_heads(4)).added({{6, 6}})));
        const Inputs x(device);
        const auto image = random({kB, 4, 6}, device);
        return [=]() mutable {
          auto results = with_gradients(module, {}, [&] { return module->forward(x.query, x.key, x.value, {{image, image}}); });
          const torch::NoGradGuard no_grad;
          results.push_back(std::get<0>(module->freeze().forward(x.query, x.key, x.value, {{image, image}})));
          return results;
        };
      },
      "decoupled");
}

TEST(StandInDeviceTest, SmallerPartsNeverWait) {
  expect_same(
      [](torch::Device device) {
        auto norm = on(device, Norm(NormOptions(NormKind::rms, kEq)));
        const auto linear = on(device, torch::nn::Linear(kEq, 20));
        const Inputs x(device);
        const auto q = random({kB, 4, kLq, 6}, device), k = random({kB, 2, kLk, 6}, device),
                   v = random({kB, 2, kLk, 4}, device);
        const auto ignored = (torch::rand({kB, kLk}) < 0.4).to(device);
        const auto maps = torch::rand({1, kLq, 6}).to(device);
        return [=]() mutable {
          const torch::NoGradGuard no_grad;
          const auto mask = Mask::from_multihead_attention(ignored, {}, 4) & Mask::causal(CausalAlignment::upper_left);
          const auto result = attention(q, k, v, {.mask = mask, .weights = AttentionWeights::mean});
          return Tensors{norm(x.query), FrozenLinear(*linear).forward(x.query), result.output, result.weights,
                         attention_entropy(maps)};
        };
      },
      "parts");
}

TEST(StandInDeviceTest, LoadsAndSavesWeights) {
  const TempDir dir;
  for (const bool as_state_dict : {false, true}) {
    const auto path = dir.file(as_state_dict ? "weights.pt" : "weights.safetensors");
    torch::manual_seed(1);
    auto written = on(standin(), CrossAttention(sizes()));
    NamedTensors tensors;
    for (const auto& item : written->named_parameters()) tensors[item.key()] = item.value().detach();
    as_state_dict ? save_state_dict(path, tensors) : save_safetensors(path, tensors);
    auto read = on(standin(), CrossAttention(sizes()));
    load_weights(*read, path);
    for (const auto& item : read->named_parameters()) {
      EXPECT_EQ(item.value().device(), standin());
      expect_close(item.value(), tensors.at(item.key()), 0, item.key());
    }
    CrossAttention on_cpu(sizes());
    load_weights(*on_cpu, path);
    const Inputs x(torch::kCPU), moved(standin());
    const auto expected = std::get<0>(on_cpu->forward(x.query, x.key, x.value));
    const auto found = std::get<0>(read->forward(x.query.to(standin()), x.key.to(standin()), x.value.to(standin())));
    expect_close(found, expected, tolerance(torch::kFloat, kTerms), path);
  }
}

}  // namespace
}  // namespace xattn::test
