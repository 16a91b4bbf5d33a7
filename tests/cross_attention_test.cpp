// SPDX-License-Identifier: Apache-2.0
#include <xattn/cross_attention.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/block.h>
#include <xattn/frozen.h>
#include <xattn/frozen_block.h>

#include <cmath>
#include <set>
#include <sstream>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using at::Tensor;

class CrossAttentionTest : public testing::TestWithParam<torch::Device> {
 protected:
  static constexpr int64_t kB = 2, kLq = 4, kLk = 6;

  CrossAttentionTest() { torch::manual_seed(0); }

  // float64, so that results can be compared closely.
  CrossAttention make(const CrossAttentionOptions& options) const {
    CrossAttention module(options);
    module->to(GetParam(), torch::kDouble);
    return module;
  }
  torch::Tensor random(at::IntArrayRef shape) const {
    return torch::randn(shape, torch::dtype(torch::kDouble).device(GetParam()));
  }

  torch::Device device_ = GetParam();
  torch::Tensor query_ = random({kB, kLq, 8}), key_ = random({kB, kLk, 12}), value_ = random({kB, kLk, 10});
  CrossAttentionOptions options_{8, 12, 10, 16};
};

TEST_P(CrossAttentionTest, EqualsTheReferenceWrittenInPlainOperations) {
  auto module = make(options_);
  const auto [output, weights] = module->forward(query_, key_, value_);
  const auto Q = module->query_linear(query_), K = module->key_linear(key_), V = module->value_linear(value_);
  const auto P = torch::softmax(torch::matmul(Q, K.transpose(1, 2)) / std::sqrt(16.0), -1);
  expect_close(weights, P, tolerance(torch::kDouble, 8 + 12 + 16), "weights");
  expect_close(output, module->output_linear(torch::matmul(P, V)), tolerance(torch::kDouble, 3 * 16), "output");
}

TEST_P(CrossAttentionTest, EveryOptionGivesItsShapes) {
  using W = AttentionWeights;
  for (const auto weights : {W::none, W::mean, W::per_head}) {
    auto options = options_;
    options.num_heads(4).kv_heads(2).head_dim(6).value_head_dim(5).qk_norm(NormKind::rms).attention_weights(weights);
    auto module = make(options);
    EXPECT_EQ(module->query_linear->weight.sizes(), (std::vector<int64_t>{24, 8}));
    EXPECT_EQ(module->key_linear->weight.sizes(), (std::vector<int64_t>{12, 12}));
    EXPECT_EQ(module->value_linear->weight.sizes(), (std::vector<int64_t>{10, 10}));
    EXPECT_EQ(module->output_linear->weight.sizes(), (std::vector<int64_t>{16, 20}));
    const auto [output, map] = module->forward(query_, key_, value_);
    EXPECT_EQ(output.sizes(), (std::vector<int64_t>{kB, kLq, 16}));
    EXPECT_EQ(map.defined(), weights != W::none);
    if (weights == W::mean) {
      EXPECT_EQ(map.sizes(), (std::vector<int64_t>{kB, kLq, kLk}));
    }
    if (weights == W::per_head) {
      EXPECT_EQ(map.sizes(), (std::vector<int64_t>{kB, 4, kLq, kLk}));
    }
  }
}

TEST_P(CrossAttentionTest, WeightsOfChosenHeadsAreThoseOfAllHeadsInTheirOrder) {
  options_.num_heads(4).attention_weights(AttentionWeights::per_head);
  auto module = make(options_);
  const auto all = std::get<1>(module->forward(query_, key_, value_));
  module->options.weight_heads({2, 0});
  const auto chosen = std::get<1>(module->forward(query_, key_, value_));
  EXPECT_EQ(chosen.sizes(), (std::vector<int64_t>{kB, 2, kLq, kLk}));
  EXPECT_TRUE(chosen.equal(torch::stack({all.select(1, 2), all.select(1, 0)}, 1)));
  EXPECT_EQ(error_of<c10::ValueError>([&] { CrossAttention{options_.weight_heads({4})}; }),
            "[cross_attention] weight_heads must be of the 4 heads, but name 4.");
}

TEST_P(CrossAttentionTest, OutputDoesNotDependOnTheWeightsAskedFor) {
  std::vector<torch::Tensor> outputs;
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    torch::manual_seed(1);
    auto module = make(CrossAttentionOptions(options_).num_heads(4).attention_weights(weights));
    outputs.push_back(std::get<0>(module->forward(query_, key_, value_, Mask::causal(CausalAlignment::lower_right))));
  }
  expect_close(outputs[1], outputs[0], 1e-12, "mean");
  EXPECT_TRUE(outputs[2].equal(outputs[1]));
}

TEST_P(CrossAttentionTest, UnbatchedEqualsABatchOfOne) {
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    auto module = make(CrossAttentionOptions(options_).num_heads(2).attention_weights(weights));
    const auto mask = Mask::lengths(torch::tensor({4}), kLk).to(device_);
    const auto [output, map] = module->forward(query_[0], key_[0], value_[0], mask);
    const auto [outputs, maps] = module->forward(query_.slice(0, 0, 1), key_.slice(0, 0, 1), value_.slice(0, 0, 1), mask);
    EXPECT_TRUE(output.equal(outputs[0]));
    EXPECT_EQ(map.defined(), maps.defined());
    if (map.defined()) {
      EXPECT_TRUE(map.equal(maps[0]));
    }
  }
}

TEST_P(CrossAttentionTest, ABatchEqualsItsLoop) {
  auto module = make(CrossAttentionOptions(options_).num_heads(2));
  const auto valid = torch::rand({kB, kLk}, device_) > 0.4;
  const auto [outputs, maps] = module->forward(query_, key_, value_, Mask::key_padding(valid));
  for (int64_t b = 0; b < kB; ++b) {
    const auto [output, map] = module->forward(query_[b], key_[b], value_[b], Mask::key_padding(valid.slice(0, b, b + 1)));
    expect_close(output, outputs[b], 1e-12, "output");
    expect_close(map, maps[b], 1e-12, "weights");
  }
}

TEST_P(CrossAttentionTest, PermutingTheContextChangesNothingButTheOrderOfItsWeights) {
  auto module = make(CrossAttentionOptions(options_).num_heads(2));
  const auto order = torch::randperm(kLk, torch::kLong).to(device_);
  const auto [output, weights] = module->forward(query_, key_, value_);
  const auto [permuted, permuted_weights] = module->forward(query_, key_.index_select(1, order), value_.index_select(1, order));
  expect_close(permuted, output, 1e-12, "output");
  expect_close(permuted_weights, weights.index_select(2, order), 1e-12, "weights");
}

TEST_P(CrossAttentionTest, MaskedContextHasNoInfluenceAndNoGradient) {
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
    auto module = make(CrossAttentionOptions(options_).num_heads(2).attention_weights(weights));
    const auto mask = Mask::lengths(torch::tensor({3, 6}), kLk).to(device_);
    const auto key = key_.clone().requires_grad_(), value = value_.clone().requires_grad_();
    const auto output = std::get<0>(module->forward(query_, key, value, mask));
    for (const auto& gradient : torch::autograd::grad({output.square().sum()}, {key, value})) {
      EXPECT_TRUE(gradient[0].slice(0, 3).eq(0).all().item<bool>());
    }
    key_[0].slice(0, 3).fill_(1e3);
    value_[0].slice(0, 3).fill_(-1e3);
    EXPECT_TRUE(std::get<0>(module->forward(query_, key_, value_, mask)).equal(output));
    key_.normal_();
    value_.normal_();
  }
}

TEST_P(CrossAttentionTest, RowWithoutKeysGivesTheOutputBias) {
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
    auto module = make(CrossAttentionOptions(options_).attention_weights(weights));
    const auto mask = Mask::lengths(torch::tensor({0, 6}), kLk).to(device_);
    const auto query = query_.clone().requires_grad_();
    const auto [output, map] = module->forward(query, key_, value_, mask);
    EXPECT_TRUE(output[0].equal(module->output_linear->bias.expand({kLq, 16})));
    if (map.defined()) {
      EXPECT_TRUE(map[0].eq(0).all().item<bool>());
    }
    output.sum().backward();
    EXPECT_TRUE(query.grad()[0].eq(0).all().item<bool>());
    for (const auto& parameter : module->named_parameters()) {
      EXPECT_TRUE(parameter.value().grad().isfinite().all().item<bool>()) << parameter.key();
    }
  }
}

TEST_P(CrossAttentionTest, EmptyLengthsGiveEmptyOutputsOrTheOutputBias) {
  auto module = make(options_);
  const auto [none, no_weights] = module->forward(query_.slice(1, 0, 0), key_, value_);
  EXPECT_EQ(none.sizes(), (std::vector<int64_t>{kB, 0, 16}));
  EXPECT_EQ(no_weights.sizes(), (std::vector<int64_t>{kB, 0, kLk}));
  const auto [output, weights] = module->forward(query_, key_.slice(1, 0, 0), value_.slice(1, 0, 0));
  EXPECT_TRUE(output.equal(module->output_linear->bias.expand({kB, kLq, 16})));
  EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{kB, kLq, 0}));
  output.sum().backward();
  EXPECT_TRUE(module->query_linear->weight.grad().eq(0).all().item<bool>());
}

TEST_P(CrossAttentionTest, SelfAttentionIsForwardOfOneTensor) {
  auto module = make(CrossAttentionOptions(8, 8, 8, 8).num_heads(2));
  const auto [output, weights] = module->forward(query_, query_, query_, Mask::causal(CausalAlignment::upper_left));
  EXPECT_EQ(output.sizes(), query_.sizes());
  EXPECT_TRUE(weights.triu(1).eq(0).all().item<bool>());
}

TEST_P(CrossAttentionTest, StridesDoNotMatter) {
  auto module = make(CrossAttentionOptions(options_).num_heads(2));
  const auto expected = std::get<0>(module->forward(query_, key_, value_));
  const auto turned = [](const torch::Tensor& x) { return x.permute({2, 0, 1}).contiguous().permute({1, 2, 0}); };
  expect_close(std::get<0>(module->forward(turned(query_), turned(key_), turned(value_))), expected, 1e-12, "turned");
  // One batch entry, with the huge stride that transpose().contiguous() leaves on its unit axis.
  const auto alone = [](const torch::Tensor& x) {
    return x.slice(0, 0, 1).as_strided({1, x.size(1), x.size(2)}, {1 << 20, x.stride(1), x.stride(2)});
  };
  expect_close(std::get<0>(module->forward(alone(query_), alone(key_), alone(value_))), expected.slice(0, 0, 1), 1e-12,
               "alone");
}

TEST_P(CrossAttentionTest, GradientsEqualDifferencesInFirstAndSecondOrder) {
  for (const auto weights : {AttentionWeights::mean, AttentionWeights::none}) {
    for (const auto norm : {NormKind::none, NormKind::rms}) {
      auto module = make(CrossAttentionOptions(2, 3, 2, 4).num_heads(2).kv_heads(1).qk_norm(norm).attention_weights(weights));
      std::vector<torch::Tensor> inputs = {random({1, 2, 2}), random({1, 3, 3}), random({1, 3, 2})};
      for (auto& input : inputs) input.requires_grad_();
      for (const auto& parameter : module->parameters()) inputs.push_back(parameter);
      const auto f = [&](const std::vector<torch::Tensor>& x) {
        const auto [output, map] = module->forward(x[0], x[1], x[2]);
        const auto sum = output.sin().sum();
        return map.defined() ? sum + map.square().sum() : sum;
      };
      const std::string what = weights == AttentionWeights::mean ? "with weights" : "without weights";
      expect_gradient(f, inputs, what);
      expect_second_gradient(f, inputs, what);
    }
  }
}

TEST_P(CrossAttentionTest, ContextServesSeveralQueriesAndGathersTheirGradients) {
  auto module = make(CrossAttentionOptions(options_).num_heads(2).kv_heads(1));
  const auto mask = Mask::lengths(torch::tensor({4, 6}), kLk).to(device_);
  const auto key = key_.clone().requires_grad_();
  const auto context = module->context(key, value_, mask);
  EXPECT_EQ(context.key().sizes(), (std::vector<int64_t>{kB, 1, kLk, 8}));
  EXPECT_EQ(context.value().sizes(), (std::vector<int64_t>{kB, 1, kLk, 8}));
  EXPECT_EQ(context.batch_size(), kB);
  EXPECT_EQ(context.length(), kLk);
  const auto first = std::get<0>(module->attend(query_.slice(1, 0, 2), context));
  const auto second = std::get<0>(module->attend(query_.slice(1, 2), context));
  const auto whole = std::get<0>(module->forward(query_, key, value_, mask));
  expect_close(torch::cat({first, second}, 1), whole, 1e-12, "output");
  const auto gathered = torch::autograd::grad({first.sin().sum() + second.sin().sum()}, {key})[0];
  expect_close(gathered, torch::autograd::grad({whole.sin().sum()}, {key})[0], 1e-12, "gradient of key");
}

TEST_P(CrossAttentionTest, ContextOfOtherOrChangedWeightsIsRefused) {
  const std::string message =
      "[cross_attention] context must be made with the weights that attend to it, but they are another module's, or have "
      "changed "
      "since. Make the context again.";
  const auto attend = [&](CrossAttention& module, const Context& context) {
    return error_of<c10::ValueError>([&] { module->attend(query_.to(module->query_linear->weight.scalar_type()), context); });
  };
  auto module = make(CrossAttentionOptions(options_).qk_norm(NormKind::rms)), other = make(options_);
  const auto context = module->context(key_, value_);
  module->attend(query_, context);
  EXPECT_EQ(attend(other, context), message);
  auto clone = CrossAttention(std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone()));
  EXPECT_EQ(attend(clone, context), message);
  torch::optim::Adam optimizer(module->parameters(), 0.1);
  std::get<0>(module->attend(query_, context)).sum().backward();
  optimizer.step();
  EXPECT_EQ(attend(module, context), message);
  const auto fresh = module->context(key_, value_);
  module->to(torch::kFloat);
  EXPECT_EQ(attend(module, fresh), message);
}

TEST_P(CrossAttentionTest, AQueryExpandedOverTheBatchGivesWhatItsCopiesGive) {
  for (int i = 0; i < 2 * kOrders * kOrders; ++i) {
    const auto type = i % 2 == 0 ? torch::kDouble : torch::kFloat;
    const auto limit = type == torch::kDouble ? 1e-12 : 1e-5;
    const Orders orders{static_cast<Order>(i / 2 / kOrders), static_cast<Order>(i / 2 % kOrders)};
    auto module = make(CrossAttentionOptions(options_).num_heads(2).plan(PlanMode::pin(orders)));
    module->to(type);
    const auto learned = query_.slice(0, 0, 1).detach().to(type), copies = learned.repeat({kB, 1, 1});
    const auto key = key_.detach().to(type), value = value_.detach().to(type);
    {
      const torch::NoGradGuard no_grad;
      const auto [expected, weights] = module->forward(copies, key, value);
      const auto [output, same_weights] = module->forward(learned.expand({kB, -1, -1}), key, value);
      expect_close(output, expected, limit, "output");
      expect_close(same_weights, weights, limit, "weights");
    }
    // Each entry of an expanded leaf has a gradient of its own.
    const auto leaf = learned.expand({kB, -1, -1}).detach().requires_grad_(), other = copies.detach().requires_grad_();
    const auto gradient = [&](const Tensor& x) {
      return torch::autograd::grad({std::get<0>(module->forward(x, key, value)).sin().sum()}, {x})[0];
    };
    expect_close(gradient(leaf), gradient(other), limit, "gradient");
  }
}

TEST_P(CrossAttentionTest, ContextKnowsWhetherItIsBatched) {
  auto module = make(options_);
  const auto context = module->context(key_[0], value_[0]);
  EXPECT_FALSE(context.is_batched());
  EXPECT_EQ(std::get<0>(module->attend(query_[0], context)).sizes(), (std::vector<int64_t>{kLq, 16}));
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->attend(query_, context); }),
            "[cross_attention] key and value of the context must have the batch of query, [2, 4, 8], but are unbatched.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->attend(query_[0], module->context(key_, value_)); }),
            "[cross_attention] query must have shape [2, Lq, 8] to match its context, but has [4, 8].");
}

TEST_P(CrossAttentionTest, DropoutActsInTrainingOnly) {
  auto module = make(CrossAttentionOptions(options_).dropout(0.5));
  const auto [a, weights] = module->forward(query_, key_, value_);
  const auto [b, same_weights] = module->forward(query_, key_, value_);
  EXPECT_FALSE(a.equal(b));
  EXPECT_TRUE(weights.equal(same_weights));
  module->eval();
  EXPECT_TRUE(std::get<0>(module->forward(query_, key_, value_)).equal(std::get<0>(module->forward(query_, key_, value_))));
}

TEST_P(CrossAttentionTest, SameInputGivesSameBits) {
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
    auto module = make(CrossAttentionOptions(options_).num_heads(4).attention_weights(weights));
    const auto first = std::get<0>(module->forward(query_, key_, value_));
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(std::get<0>(module->forward(query_, key_, value_)).equal(first));
  }
}

TEST_P(CrossAttentionTest, RunsInEveryType) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
      auto module = make(CrossAttentionOptions(options_).num_heads(2).attention_weights(weights));
      module->to(type);
      auto exact = make(module->options);
      {
        const torch::NoGradGuard no_grad;
        for (auto& parameter : exact->named_parameters()) parameter.value().copy_(module->named_parameters()[parameter.key()]);
      }
      const auto query = query_.to(type), key = key_.to(type), value = value_.to(type);
      const auto [output, map] = module->forward(query, key, value);
      const auto [expected, expected_map] =
          exact->forward(query.to(torch::kDouble), key.to(torch::kDouble), value.to(torch::kDouble));
      EXPECT_EQ(output.scalar_type(), type);
      expect_close(output, expected, tolerance(type, 3 * 16), "output");
      expect_close(map, expected_map, tolerance(type, 3 * 16), "weights");
    }
  }
}

TEST_P(CrossAttentionTest, AutocastGivesTheTypesOfTheReference) {
  CrossAttention module(CrossAttentionOptions(options_).qk_norm(NormKind::rms));
  module->to(device_);
  const auto query = query_.to(torch::kFloat), key = key_.to(torch::kFloat), value = value_.to(torch::kFloat);
  const auto type = device_.type();
  at::autocast::set_autocast_enabled(type, true);
  at::autocast::set_autocast_dtype(type, torch::kBFloat16);
  const auto [output, weights] = module->forward(query, key, value);
  module->options.attention_weights(AttentionWeights::none);
  const auto fused = std::get<0>(module->forward(query, key, value));
  const auto refused = error_of<c10::TypeError>([&] { module->forward(query.to(torch::kLong), key, value); });
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(type, false);
  EXPECT_EQ(output.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(fused.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(weights.scalar_type(), device_.is_cpu() ? torch::kBFloat16 : torch::kFloat);
  EXPECT_EQ(refused, "[cross_attention] query must be of a floating point type, but is int64.");
}

TEST(CrossAttentionTypesTest, ParametersOfOtherTypesAreRefused) {
  for (const auto& [type, name] : {std::pair(torch::kComplexFloat, "complex64"), {torch::kFloat8_e4m3fn, "float8_e4m3fn"}}) {
    CrossAttention module(8, 8, 8, 8);
    module->to(type);
    const auto x = torch::randn({2, 3, 8}).to(type);
    const auto refusal = std::string(" parameters must be float64, float32, bfloat16 or float16, but is ") + name + ".";
    EXPECT_EQ(error_of<c10::TypeError>([&] { module->forward(x, x, x); }), "[cross_attention]" + refusal);
    EXPECT_EQ(error_of<c10::TypeError>([&] { (void)module->context(x, x); }), "[cross_attention]" + refusal);
    EXPECT_EQ(error_of<c10::TypeError>([&] { (void)module->freeze(); }), "[frozen]" + refusal);
  }
}

TEST(CrossAttentionTypesTest, TensorsThatAreNotDenseAreRefusedByName) {
  CrossAttention module(8, 8, 8, 8);
  CrossAttentionBlock block(CrossAttentionOptions(8, 8, 8, 8));
  const auto frozen = module->freeze();
  const auto frozen_block = block->freeze();
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 3, 8});
  const std::pair<torch::Tensor, std::string> others[] = {
      {x.to_sparse(), "sparse."},
      {x.to_mkldnn(), "in the layout of oneDNN."},
      {torch::_nested_tensor_from_tensor_list({x[0], x[1]}), "nested."},
      {torch::quantize_per_tensor(x, 0.1, 0, torch::kQInt8), "quantized."},
  };
  for (const auto& [tensor, is] : others) {
    const auto& other = tensor;  // Clang before 16 lets no lambda capture a structured binding
    EXPECT_EQ(error_of<c10::TypeError>([&] { module->forward(other, x, x); }),
              "[cross_attention] query must be dense, but is " + is);
    EXPECT_EQ(error_of<c10::TypeError>([&] { module->forward(x, other, x); }),
              "[cross_attention] key must be dense, but is " + is);
    EXPECT_EQ(error_of<c10::TypeError>([&] { module->forward(x, x, other); }),
              "[cross_attention] value must be dense, but is " + is);
    EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.forward(x, x, other); }), "[frozen] value must be dense, but is " + is);
    EXPECT_EQ(error_of<c10::TypeError>([&] { block->forward(other, y, y); }),
              "[cross_attention_block] query must be dense, but is " + is);
    EXPECT_EQ(error_of<c10::TypeError>([&] { frozen_block.forward(other, y, y); }),
              "[frozen_block] query must be dense, but is " + is);
  }
}

TEST_P(CrossAttentionTest, TrainsInsideALargerModel) {
  struct ModelImpl : torch::nn::Module {
    ModelImpl()
        : fusion(register_module("fusion", CrossAttention(8, 12, 10, 16))),
          head(register_module("head", torch::nn::Linear(16, 1))) {}
    torch::Tensor forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v) {
      return head(std::get<0>(fusion(q, k, v)));
    }
    CrossAttention fusion;
    torch::nn::Linear head;
  } model;
  model.to(device_, torch::kDouble);
  torch::optim::Adam optimizer(model.parameters(), 1e-2);
  const auto target = query_.sum(-1, true);
  double first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(model.forward(query_, key_, value_), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.05 * first);
  for (const auto& parameter : model.named_parameters()) EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
}

TEST_P(CrossAttentionTest, ClonesDeeplyAndMovesBetweenDevices) {
  auto module =
      make(CrossAttentionOptions(options_).num_heads(2).qk_norm(NormKind::layer).qk_norm_scope(NormScope::across_heads));
  auto copy = CrossAttention(std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone(device_)));
  EXPECT_TRUE(std::get<0>(copy->forward(query_, key_, value_)).equal(std::get<0>(module->forward(query_, key_, value_))));
  const torch::NoGradGuard no_grad;
  for (auto& parameter : copy->parameters()) parameter.zero_();
  EXPECT_TRUE(module->query_linear->weight.ne(0).any().item<bool>());
}

TEST_P(CrossAttentionTest, SavesAndLoadsWithTorch) {
  const TempDir directory;
  auto module = make(CrossAttentionOptions(options_).qk_norm(NormKind::rms));
  torch::save(module, directory.file("module.pt"));
  auto loaded = make(module->options);
  torch::load(loaded, directory.file("module.pt"), device_);
  EXPECT_TRUE(std::get<0>(loaded->forward(query_, key_, value_)).equal(std::get<0>(module->forward(query_, key_, value_))));
}

TEST_P(CrossAttentionTest, AnyModuleMayLeaveTheMaskOut) {
  auto module = make(options_);
  torch::nn::AnyModule any(module);
  using Result = std::tuple<torch::Tensor, torch::Tensor>;
  const auto [output, weights] = any.forward<Result>(query_, key_, value_);
  const auto [masked, masked_weights] = any.forward<Result>(query_, key_, value_, Mask::causal(CausalAlignment::upper_left));
  EXPECT_TRUE(output.equal(std::get<0>(module->forward(query_, key_, value_))));
  EXPECT_TRUE(masked_weights[0][0][1].eq(0).item<bool>());
}

TEST_P(CrossAttentionTest, ARowThatABiasForbidsIsTheOutputBiasForEveryRequest) {
  for (const auto& [type, least] : {std::pair(torch::kFloat, std::numeric_limits<double>::lowest()),
                                    std::pair(torch::kBFloat16, double{std::numeric_limits<float>::lowest()}),
                                    std::pair(torch::kHalf, double{std::numeric_limits<float>::lowest()})}) {
    const auto bias = torch::zeros({kLq, kLk}, torch::dtype(torch::kDouble).device(device_))
                          .index_fill(0, torch::tensor({1}, device_), least);
    for (const auto wanted : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
      for (const bool trains : {true, false}) {
        auto module = make(options_.attention_weights(wanted));
        module->to(type);
        module->train(trains);
        const at::AutoGradMode record(trains);
        const auto [output, weights] = module->forward(query_.to(type), key_.to(type), value_.to(type), Mask::bias(bias));
        EXPECT_TRUE(output.isfinite().all().item<bool>());
        EXPECT_TRUE(output.select(1, 1).equal(module->output_linear->bias.expand({kB, 16})));
        if (weights.defined()) {
          EXPECT_TRUE(weights.select(-2, 1).eq(0).all().item<bool>());
        }
        if (!trains) continue;
        output.sum().backward();
        for (const auto& parameter : module->parameters()) EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
      }
    }
  }
}

TEST_P(CrossAttentionTest, EmptyContextsGiveTheOutputBiasAndNoGradientInEveryOrder) {
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      SCOPED_TRACE(std::string(name_of(logits)) + ", " + std::string(name_of(values)));
      auto module = make(options_.plan(PlanMode::pin({logits, values})));
      for (const int64_t B : {0, 2}) {
        for (const int64_t Lk : {0, 6}) {
          const auto [output, weights] = module->forward(random({B, kLq, 8}), random({B, Lk, 12}), random({B, Lk, 10}));
          EXPECT_EQ(output.sizes(), (std::vector<int64_t>{B, kLq, 16}));
          if (Lk > 0) continue;
          EXPECT_TRUE(output.equal(module->output_linear->bias.expand({B, kLq, 16})));
          module->zero_grad();
          output.sum().backward();
          EXPECT_TRUE(module->value_linear->bias.grad().eq(0).all().item<bool>());
        }
      }
    }
  }
}

TEST_P(CrossAttentionTest, ChangedOptionsActOrAreRefused) {
  const auto refusal = [&](const auto& change) {
    auto module = make(options_);
    change(module->options);
    const auto context = make(options_)->context(key_, value_);
    const auto text = error_of<c10::ValueError>([&] { module->forward(query_, key_, value_); });
    EXPECT_EQ(error_of<c10::ValueError>([&] { return module->context(key_, value_); }), text);
    EXPECT_EQ(error_of<c10::ValueError>([&] { module->attend(query_, context); }), text);
    EXPECT_EQ(error_of<c10::ValueError>([&] { module->explain(1, 1, 1); }), text);
    return text;
  };
  using Options = CrossAttentionOptions;
  EXPECT_EQ(refusal([](Options& o) { o.weight_heads({0, 1}); }),
            "[cross_attention] weight_heads must be of the 1 heads, but name 1.");
  EXPECT_EQ(refusal([](Options& o) { o.dropout(-1); }), "[cross_attention] dropout must lie in [0, 1], but is -1.");
  EXPECT_EQ(refusal([](Options& o) { o.scale(kInfinity); }), "[cross_attention] scale must be finite, but is inf.");
  EXPECT_EQ(refusal([](Options& o) { o.scale(std::nullopt); }),
            "[cross_attention] kv_heads, head_dim, value_head_dim and scale must keep a value, but one of them has none.");
  EXPECT_EQ(refusal([](Options& o) { o.num_heads(3).kv_heads(3); }),
            "[cross_attention] options must fit the parameters, but say [48, 8] for query_linear.weight, which has [16, 8].");
  EXPECT_EQ(refusal([](Options& o) { o.query_bias(false); }),
            "[cross_attention] options must fit the parameters, but say no bias for query_linear, which has one.");
  EXPECT_EQ(refusal([](Options& o) { o.bias_kv(true); }),
            "[cross_attention] options must fit the parameters, but say a bias_kv.");
  EXPECT_EQ(refusal([](Options& o) { o.qk_norm(NormKind::rms); }),
            "[cross_attention] options must fit the parameters, but say another kind, size or eps for query_norm.");
  auto normed = make(Options(options_).qk_norm(NormKind::rms));
  normed->options.plan(PlanMode::pin({Order::prefold, Order::standard}));
  EXPECT_EQ(error_of<c10::ValueError>([&] { normed->forward(query_, key_, value_); }),
            "[cross_attention] plan must be of legal orders, but prefold, standard is not: a norm of the query follows Wq.");

  auto module = make(options_), other = make(Options(options_).scale(0.25));
  module->options.scale(0.25).attention_weights(AttentionWeights::per_head).weight_heads({0});
  for (const auto& parameter : other->named_parameters()) {
    parameter.value().detach().copy_(module->named_parameters()[parameter.key()]);
  }
  const auto [output, weights] = module->forward(query_, key_, value_);
  EXPECT_TRUE(output.equal(std::get<0>(other->forward(query_, key_, value_))));
  EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{kB, 1, kLq, kLk}));
}

TEST_P(CrossAttentionTest, RefusesBadInputByName) {
  auto module = make(options_);
  const auto value_error = [&](const auto&... arguments) {
    return error_of<c10::ValueError>([&] { module->forward(arguments...); });
  };
  const auto type_error = [&](const auto&... arguments) {
    return error_of<c10::TypeError>([&] { module->forward(arguments...); });
  };
  EXPECT_EQ(value_error(query_, query_, value_), "[cross_attention] key must have shape [B, Lk, 12], but has [2, 4, 8].");
  EXPECT_EQ(value_error(query_, key_, key_), "[cross_attention] value must have shape [B, Lk, 10], but has [2, 6, 12].");
  EXPECT_EQ(value_error(key_, key_, value_), "[cross_attention] query must have shape [B, Lq, 8], but has [2, 6, 12].");
  EXPECT_EQ(value_error(query_[0][0], key_, value_), "[cross_attention] query must have shape [B, Lq, 8], but has [8].");
  EXPECT_EQ(value_error(query_, torch::Tensor(), value_),
            "[cross_attention] key must have shape [B, Lk, 12], but has undefined.");
  EXPECT_EQ(value_error(query_, key_, value_.slice(1, 0, 5)),
            "[cross_attention] value must have the batch and length of key, [2, 6, 12], but has [2, 5, 10].");
  EXPECT_EQ(value_error(query_, key_, value_[0]),
            "[cross_attention] value must have the batch and length of key, [2, 6, 12], but has [6, 10].");
  EXPECT_EQ(value_error(query_, key_[0], value_[0]),
            "[cross_attention] key and value of the context must have the batch of query, [2, 4, 8], but are unbatched.");
  EXPECT_EQ(value_error(query_, key_.slice(0, 0, 1), value_.slice(0, 0, 1)),
            "[cross_attention] key and value of the context must have the batch of query, [2, 4, 8], but are a batch of 1.");
  EXPECT_EQ(value_error(query_.slice(0, 0, 1), key_, value_),
            "[cross_attention] query must have shape [2, Lq, 8] to match its context, but has [1, 4, 8].");
  EXPECT_EQ(type_error(query_.to(torch::kFloat), key_, value_),
            "[cross_attention] query must be float64, the type of the parameters, but is float32.");
  EXPECT_EQ(type_error(query_, key_.to(torch::kHalf), value_),
            "[cross_attention] key must be float64, the type of the parameters, but is float16.");
  EXPECT_EQ(value_error(query_, key_, value_, Mask::lengths(torch::tensor({3, 4}), 5).to(device_)),
            "[cross_attention] mask (lengths) must fit [B, H, Lq, Lk] = [2, 1, 4, 6], but has [2, 1, 1, 5].");
  EXPECT_EQ(type_error(query_.to(torch::kMeta), key_, value_),
            "[cross_attention] query must be on " + device_.str() + ", as the parameters, but is on meta.");
  EXPECT_EQ(type_error(query_, key_.to(torch::kMeta), value_),
            "[cross_attention] key must be on " + device_.str() + ", as the parameters, but is on meta.");
  EXPECT_EQ(type_error(query_, key_, value_, Mask::bias(torch::zeros({kLq, kLk}, torch::kMeta))),
            "[cross_attention] mask (bias) must be on " + device_.str() + ", as the inputs, but is on meta.");
  EXPECT_EQ(value_error(query_, key_, value_, Mask::bias(random({3, 6})) & Mask::bias(random({2, 6}))),
            "[cross_attention] mask (bias) must fit [B, H, Lq, Lk] = [2, 1, 4, 6], but has [1, 1, 3, 6].");
  EXPECT_EQ(value_error(query_, key_, value_, Mask::bias(random({3, 6}))),
            "[cross_attention] mask (bias) must fit [B, H, Lq, Lk] = [2, 1, 4, 6], but has [1, 1, 3, 6].");
  if (!device_.is_cpu()) {
    EXPECT_EQ(type_error(query_.cpu(), key_, value_),
              "[cross_attention] query must be on " + device_.str() + ", as the parameters, but is on cpu.");
    EXPECT_EQ(type_error(query_, key_, value_, Mask::lengths(torch::tensor({3, 4}), 6)),
              "[cross_attention] mask (lengths) must be on " + device_.str() + ", as the inputs, but is on cpu.");
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, CrossAttentionTest, testing::ValuesIn(devices()), device_name);

TEST(CrossAttentionOptionsTest, DefaultsAreTheReference) {
  CrossAttention module(128, 256, 256, 512);
  const auto& options = module->options;
  EXPECT_EQ(options.num_heads(), 1);
  EXPECT_EQ(options.kv_heads(), 1);
  EXPECT_EQ(options.head_dim(), 512);
  EXPECT_EQ(options.value_head_dim(), 512);
  EXPECT_EQ(options.scale(), 1 / std::sqrt(512.0));
  std::set<std::string> names;
  for (const auto& parameter : module->named_parameters()) names.insert(parameter.key());
  EXPECT_EQ(names,
            (std::set<std::string>{"query_linear.weight", "query_linear.bias", "key_linear.weight", "key_linear.bias",
                                   "value_linear.weight", "value_linear.bias", "output_linear.weight", "output_linear.bias"}));
}

TEST(CrossAttentionOptionsTest, BiasesCanBeLeftOut) {
  CrossAttention module(CrossAttentionOptions(8, 8, 8, 8).qkv_bias(false).output_bias(false));
  EXPECT_EQ(module->parameters().size(), 4);
  EXPECT_FALSE(module->query_linear->bias.defined());
}

TEST(CrossAttentionOptionsTest, RefusesWhatCannotBe) {
  const CrossAttentionOptions good(8, 12, 10, 16);
  const auto refusal = [](const CrossAttentionOptions& options) {
    return error_of<c10::ValueError>([&] { CrossAttention module(options); });
  };
  auto options = [&] { return CrossAttentionOptions(good); };
  EXPECT_EQ(refusal(options().dim_query(0)), "[cross_attention] dim_query must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().dim_key(-1)), "[cross_attention] dim_key must be at least 1, but is -1.");
  EXPECT_EQ(refusal(options().dim_value(0)), "[cross_attention] dim_value must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().dim_output(0)), "[cross_attention] dim_output must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().num_heads(0)), "[cross_attention] num_heads must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().kv_heads(0)), "[cross_attention] kv_heads must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().head_dim(0)), "[cross_attention] head_dim must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().value_head_dim(0)), "[cross_attention] value_head_dim must be at least 1, but is 0.");
  EXPECT_EQ(refusal(options().num_heads(3)),
            "[cross_attention] dim_output must be a multiple of num_heads, but they are 16 and 3. Otherwise give head_dim.");
  EXPECT_EQ(refusal(options().num_heads(4).kv_heads(3)),
            "[cross_attention] num_heads must be a multiple of kv_heads, but they are 4 and 3.");
  EXPECT_EQ(refusal(options().dropout(1.5)), "[cross_attention] dropout must lie in [0, 1], but is 1.5.");
  EXPECT_EQ(refusal(options().scale(std::nan(""))), "[cross_attention] scale must be finite, but is nan.");
  EXPECT_EQ(refusal(options().qk_norm(NormKind::rms).qk_norm_eps(-1)),
            "[cross_attention] qk_norm_eps must not be negative, but is -1.");
  EXPECT_EQ(refusal(options().qk_norm_scope(NormScope::across_heads)),
            "[cross_attention] qk_norm must be rms or layer for a qk_norm_scope of across_heads, but is none.");
}

TEST(CrossAttentionOptionsTest, PrintsWhatBuildsItAgain) {
  const auto printed = [](const CrossAttention& module) {
    std::ostringstream stream;
    module->pretty_print(stream);
    return stream.str();
  };
  EXPECT_EQ(printed(CrossAttention(8, 12, 10, 16)), "xattn::CrossAttention(8, 12, 10, 16)");
  const CrossAttention full(CrossAttentionOptions(8, 12, 10, 16)
                                .num_heads(4)
                                .kv_heads(2)
                                .head_dim(6)
                                .value_head_dim(5)
                                .qkv_bias(false)
                                .output_bias(false)
                                .scale(1)
                                .dropout(0.25)
                                .qk_norm(NormKind::rms)
                                .qk_norm_scope(NormScope::across_heads)
                                .qk_norm_eps(0.5)
                                .attention_weights(AttentionWeights::none));
  EXPECT_EQ(printed(full),
            "xattn::CrossAttention(CrossAttentionOptions(8, 12, 10, 16).num_heads(4).kv_heads(2).head_dim(6).value_head_dim(5)"
            ".query_bias(false).key_bias(false).value_bias(false).output_bias(false).scale(1).dropout(0.25)"
            ".qk_norm(NormKind::rms).qk_norm_scope(NormScope::across_heads).qk_norm_eps(0.5)"
            ".attention_weights(AttentionWeights::none))");
  EXPECT_EQ(printed(CrossAttention(CrossAttentionOptions(8, 12, 10, 16).plan(PlanMode::by(Rates::cuda())))),
            "xattn::CrossAttention(CrossAttentionOptions(8, 12, 10, 16).plan(PlanMode::by(rates)))");
}

TEST(CrossAttentionOptionsTest, ResetParametersStartsAfresh) {
  CrossAttention module(8, 12, 10, 16);
  const auto before = module->query_linear->weight.clone();
  module->reset_parameters();
  EXPECT_FALSE(module->query_linear->weight.equal(before));
  EXPECT_LE(module->query_linear->weight.abs().max().item<double>(), 1 / std::sqrt(8.0));
}

// On a machine with a GPU every suite above runs on it too; without one this test is skipped with that reason.
TEST(DeviceTest, SuitesRunOnCuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device: the suites ran on the CPU alone";
  EXPECT_EQ(devices().size(), 2);
}

// ---- Contexts in other orders ------------------------------------------------------------------------------------------------

class PlannedContextTest : public testing::Test {
 protected:
  PlannedContextTest() { torch::manual_seed(0); }

  Context context_in(const Orders& orders) {
    module_->options.plan(PlanMode::pin(orders));
    const auto context = module_->context(key_, value_, {}, {.expected_queries = 3});
    module_->options.plan(PlanMode::automatic);
    EXPECT_EQ(context.orders(), orders);
    return context;
  }

  CrossAttention module_{CrossAttentionOptions(8, 12, 10, 8).num_heads(2)};
  Tensor query_ = torch::randn({2, 3, 8}), key_ = torch::randn({2, 5, 12}), value_ = torch::randn({2, 5, 10});
};

TEST_F(PlannedContextTest, EveryOrderGivesTheSameOutputAndGradients) {
  const auto gradients_with = [&](const Context& context) {
    module_->zero_grad();
    const auto output = std::get<0>(module_->attend(query_, context));
    output.square().sum().backward();
    std::vector<Tensor> all = {output.detach()};
    for (const auto& parameter : module_->parameters()) all.push_back(parameter.grad().clone());
    return all;
  };
  const auto expected = gradients_with(module_->context(key_, value_));
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      const auto context = context_in({logits, values});
      EXPECT_EQ(context.length(), 5);
      const auto found = gradients_with(context);
      for (size_t i = 0; i < expected.size(); ++i) {
        const auto what = std::string(name_of(logits)) + ", " + std::string(name_of(values)) + ", " + std::to_string(i);
        EXPECT_TRUE(torch::allclose(found[i], expected[i], /*rtol=*/1e-4, /*atol=*/1e-5)) << what;
      }
    }
  }
}

TEST_F(PlannedContextTest, BelongsToAllWeightsThatItHolds) {
  const torch::NoGradGuard no_grad;
  const auto is_refused_after = [&](const Orders& orders, const std::function<void()>& change) {
    const auto context = context_in(orders);
    module_->attend(query_, context);
    change();
    try {
      module_->attend(query_, context);
    } catch (const c10::ValueError&) {
      return true;
    }
    return false;
  };
  const Orders folded{Order::fold_into_context, Order::fold_into_context};
  EXPECT_TRUE(is_refused_after(folded, [&] { module_->query_linear->weight.mul_(2); }));
  EXPECT_TRUE(is_refused_after(folded, [&] { module_->query_linear->bias.add_(1); }));
  EXPECT_TRUE(is_refused_after(folded, [&] { module_->output_linear->weight.mul_(2); }));
  EXPECT_TRUE(is_refused_after(folded, [&] { module_->options.scale(0.3); }));
  EXPECT_FALSE(is_refused_after({}, [&] { module_->query_linear->weight.mul_(2); }));
  EXPECT_FALSE(is_refused_after({}, [&] { module_->options.scale(0.2); }));
}

TEST_F(PlannedContextTest, DoesNotChangeWithTheTensorsItWasMadeOf) {
  const torch::NoGradGuard no_grad;
  const auto raw = context_in({Order::fold_into_query, Order::fold_into_query});
  const auto expected = std::get<0>(module_->attend(query_, raw));
  key_.zero_(), value_.zero_();
  expect_close(std::get<0>(module_->attend(query_, raw)), expected, 0, "output");
}

TEST_F(PlannedContextTest, RefusesACallUnderAnotherAutocast) {
  const auto context = module_->context(key_, value_);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto error = error_of<c10::TypeError>([&] { module_->attend(query_, context); });
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(
      error,
      "[cross_attention] context must be bfloat16, the type of this call's products, but is float32. Make it and attend to it "
      "under the same autocast.");
}

}  // namespace
}  // namespace xattn::test
