// SPDX-License-Identifier: Apache-2.0
#include <xattn/decoupled.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/checkpoint.h>
#include <xattn/find_layers.h>
#include <xattn/frozen_decoupled.h>
#include <xattn/ip_adapter.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "loading/recipes.h"
#include "plan/order_traits.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

// ---- The definition in plain operations -----------------------------------------------------------------------------------

// [B, L, n * size] -> [B, H, L, size]: heads that share a key/value head are repeated.
Tensor heads(const Tensor& x, int64_t n, int64_t H, Norm norm, const CrossAttentionOptions& options) {
  const bool across = options.qk_norm_scope() == NormScope::across_heads;
  const auto split = (norm && across ? norm(x) : x).unflatten(-1, {n, -1});
  return (norm && !across ? norm(split) : split).transpose(1, 2).repeat_interleave(H / n, 1);
}

// Masks are boolean [B, Lk], true = may attend, or undefined; none hides all keys.
struct PlainContext {
  Tensor key, value, keep;
};

Tensor plain(DecoupledCrossAttention module, const Tensor& query, const std::vector<PlainContext>& contexts) {
  auto& attention = module->attention;
  const auto& o = attention->options;
  const auto H = o.num_heads(), G = *o.kv_heads();
  const auto q = heads(attention->query_linear(query), H, H, attention->query_norm, o);
  Tensor sum;
  for (size_t i = 0; i < contexts.size(); ++i) {
    const bool first = i == 0;
    auto key_linear = first ? attention->key_linear : module->added_projections[i - 1]->key_linear;
    auto value_linear = first ? attention->value_linear : module->added_projections[i - 1]->value_linear;
    auto key_norm = first ? attention->key_norm : module->added_projections[i - 1]->key_norm;
    const auto k = heads(key_linear(contexts[i].key), G, H, key_norm, o);
    const auto v = heads(value_linear(contexts[i].value), G, H, nullptr, o);
    auto logits = torch::matmul(q, k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
    if (contexts[i].keep.defined()) {
      logits = logits.masked_fill(contexts[i].keep.logical_not().unsqueeze(1).unsqueeze(1), -INFINITY);
    }
    const auto answer = torch::matmul(torch::softmax(logits, -1), v);
    sum = first ? answer : sum + module->options.added()[i - 1].scale() * answer;
  }
  return attention->output_linear(sum.transpose(1, 2).flatten(2));
}

// ---- Properties -----------------------------------------------------------------------------------------------------------

class DecoupledTest : public testing::TestWithParam<torch::Device> {
 protected:
  static constexpr int64_t kB = 2, kLq = 4, kLk = 6, kLi = 3;  // Li: length of the images, the added contexts

  DecoupledTest() { torch::manual_seed(0); }

  // float64, so that results can be compared closely.
  DecoupledCrossAttention make(const DecoupledCrossAttentionOptions& options) const {
    DecoupledCrossAttention module(options);
    module->to(GetParam(), torch::kDouble);
    return module;
  }
  DecoupledCrossAttention make() const { return make(DecoupledCrossAttentionOptions(options_).added({{9, 7}})); }
  Tensor random(at::IntArrayRef shape) const { return torch::randn(shape, torch::dtype(torch::kDouble).device(GetParam())); }

  torch::Device device_ = GetParam();
  Tensor query_ = random({kB, kLq, 8}), key_ = random({kB, kLk, 12}), value_ = random({kB, kLk, 10});
  Tensor image_key_ = random({kB, kLi, 9}), image_value_ = random({kB, kLi, 7});
  KeyValue image_{image_key_, image_value_};
  // In one order, for equal bits.
  CrossAttentionOptions options_ = CrossAttentionOptions(8, 12, 10, 16).num_heads(4).plan(PlanMode::standard);
};

TEST_P(DecoupledTest, EqualsTheDefinitionWithItsGradients) {
  using O = CrossAttentionOptions;
  const auto text_keep = torch::arange(kLk, device_) < torch::tensor({{4}, {6}}, device_);
  const auto image_keep = torch::arange(kLi, device_) < torch::tensor({{3}, {1}}, device_);
  for (const auto& attention :
       {options_, O(options_).kv_heads(2).head_dim(6).value_head_dim(5), O(options_).qkv_bias(false).qk_norm(NormKind::rms),
        O(options_).kv_heads(1).qk_norm(NormKind::layer).qk_norm_scope(NormScope::across_heads)}) {
    for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
      auto module = make(DecoupledCrossAttentionOptions(O(attention).attention_weights(weights))
                             .added({AddedContextOptions(9, 7).scale(0.6), AddedContextOptions(5, 5).scale(-2)}));
      std::vector<Tensor> inputs = {query_, key_, value_, image_key_, image_value_, random({kB, 1, 5})};
      for (auto& input : inputs) input.requires_grad_();
      const auto& x = inputs;
      const auto output = std::get<0>(module->forward(
          x[0], x[1], x[2], {{x[3], x[4], Mask::key_padding(image_keep)}, {x[5], x[5]}}, Mask::key_padding(text_keep)));
      const auto expected = plain(module, x[0], {{x[1], x[2], text_keep}, {x[3], x[4], image_keep}, {x[5], x[5], {}}});
      expect_close(output, expected, tolerance(torch::kDouble, 64), "output");

      for (const auto& parameter : module->parameters()) inputs.push_back(parameter);
      const auto actual_gradients = torch::autograd::grad({output.sin().sum()}, inputs);
      const auto expected_gradients = torch::autograd::grad({expected.sin().sum()}, inputs);
      for (size_t i = 0; i < inputs.size(); ++i) {
        // A bias of keys has no influence without a norm: its gradient is only rounding.
        if (expected_gradients[i].abs().max().item<double>() < 1e-14) continue;
        expect_close(actual_gradients[i], expected_gradients[i], 1e-12, "gradient " + std::to_string(i));
      }
    }
  }
}

TEST_P(DecoupledTest, GradientsEqualDifferencesInFirstAndSecondOrder) {
  for (const auto weights : {AttentionWeights::mean, AttentionWeights::none}) {
    auto module = make(DecoupledCrossAttentionOptions(
                           CrossAttentionOptions(2, 3, 2, 4).num_heads(2).qk_norm(NormKind::rms).attention_weights(weights))
                           .added({AddedContextOptions(2, 3).scale(0.7)}));
    std::vector<Tensor> inputs = {random({1, 2, 2}), random({1, 3, 3}), random({1, 3, 2}), random({1, 2, 2}),
                                  random({1, 2, 3})};
    for (auto& input : inputs) input.requires_grad_();
    for (const auto& parameter : module->parameters()) inputs.push_back(parameter);
    const auto f = [&](const std::vector<Tensor>& x) {
      return std::get<0>(module->forward(x[0], x[1], x[2], {{x[3], x[4]}})).sin().sum();
    };
    expect_gradient(f, inputs, "decoupled");
    expect_second_gradient(f, inputs, "decoupled");
  }
}

TEST_P(DecoupledTest, EqualsItsAttentionAtScaleZeroAndWithoutAddedContexts) {
  auto module = make();
  module->options.added()[0].scale(0);
  const auto mask = Mask::lengths(torch::tensor({4, 6}), kLk).to(device_);
  const auto [expected, expected_weights] = module->attention->forward(query_, key_, value_, mask);
  const auto [output, weights] = module->forward(query_, key_, value_, {image_}, mask);
  EXPECT_TRUE(output.equal(expected));
  EXPECT_TRUE(weights.equal(expected_weights));

  auto alone = make(DecoupledCrossAttentionOptions(options_));
  EXPECT_TRUE(std::get<0>(alone->forward(query_, key_, value_, {}, mask))
                  .equal(std::get<0>(alone->attention->forward(query_, key_, value_, mask))));
}

TEST_P(DecoupledTest, ScaleIsReadByEveryCallAndActsLinearly) {
  auto module = make();
  const auto context = module->context(key_, value_);
  const auto image = module->added_context(0, image_key_, image_value_);
  const auto at = [&](double scale) {
    module->options.added()[0].scale(scale);
    return std::get<0>(module->attend(query_, context, {image}));
  };
  const auto nothing = at(0), half = at(0.5), full = at(1);
  expect_close(half, (nothing + full) / 2, 1e-12, "half");
  EXPECT_FALSE(full.allclose(nothing));
}

TEST_P(DecoupledTest, WeightsAreThoseOfTheFirstContext) {
  for (const auto weights : {AttentionWeights::mean, AttentionWeights::per_head}) {
    auto module = make(DecoupledCrossAttentionOptions(options_.attention_weights(weights)).added({{9, 7}}));
    const auto map = std::get<1>(module->forward(query_, key_, value_, {image_}));
    EXPECT_TRUE(map.equal(std::get<1>(module->attention->forward(query_, key_, value_))));
  }
}

TEST_P(DecoupledTest, LearnedKeyBelongsToTheFirstContext) {
  auto module = make(DecoupledCrossAttentionOptions(options_.bias_kv(true)).added({{9, 7}}));
  const auto [output, weights] = module->forward(query_, key_, value_, {image_});
  EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{kB, kLq, kLk + 1}));
  // Without keys of its own the added context contributes zero, and the rest is the attention with its learned key.
  const auto alone =
      std::get<0>(module->forward(query_, key_, value_, {{image_key_.slice(1, 0, 0), image_value_.slice(1, 0, 0)}}));
  EXPECT_TRUE(alone.equal(std::get<0>(module->attention->forward(query_, key_, value_))));
  EXPECT_FALSE(alone.allclose(output));
}

TEST_P(DecoupledTest, EqualsItselfWithoutGradients) {  // on other kernels
  torch::manual_seed(9);
  for (const double scale : {1.0, 0.6}) {
    DecoupledCrossAttention module(DecoupledCrossAttentionOptions(CrossAttentionOptions(16, 12, 12, 16).num_heads(2))
                                       .added({AddedContextOptions(8, 8).scale(scale)}));
    module->to(GetParam());
    const auto query = torch::randn({2, 40, 16}, GetParam()), text = torch::randn({2, 7, 12}, GetParam()),
               image = torch::randn({2, 3, 8}, GetParam());
    const auto expected = std::get<0>(module->forward(query, text, text, {{image, image}})).detach();
    const torch::NoGradGuard no_grad;
    expect_close(std::get<0>(module->forward(query, text, text, {{image, image}})), expected, tolerance(torch::kFloat, 100),
                 "output");
  }
}

TEST_P(DecoupledTest, AMaskHidesKeysOfItsOwnContextOnly) {
  auto module = make();
  const auto no_text = Mask::lengths(torch::tensor({0, 0}), kLk).to(device_);
  const auto no_image = Mask::lengths(torch::tensor({0, 0}), kLi).to(device_);
  const auto text_alone = std::get<0>(module->attention->forward(query_, key_, value_));
  const auto both = std::get<0>(module->forward(query_, key_, value_, {image_}));
  const auto bias = module->attention->output_linear->bias;
  const auto image_left = std::get<0>(module->forward(query_, key_, value_, {image_}, no_text));
  const auto text_left = std::get<0>(module->forward(query_, key_, value_, {{image_key_, image_value_, no_image}}));
  const auto nothing_left = std::get<0>(module->forward(query_, key_, value_, {{image_key_, image_value_, no_image}}, no_text));
  expect_close(image_left - bias, both - text_alone, 1e-11, "image left");
  EXPECT_TRUE(text_left.equal(text_alone));
  EXPECT_TRUE(nothing_left.equal(bias.expand_as(nothing_left)));
}

TEST_P(DecoupledTest, MaskedImagesHaveNoInfluenceAndNoGradient) {
  auto module = make();
  const auto mask = Mask::lengths(torch::tensor({2, 3}), kLi).to(device_);
  const auto key = image_key_.clone().requires_grad_(), value = image_value_.clone().requires_grad_();
  const auto output = std::get<0>(module->forward(query_, key_, value_, {{key, value, mask}}));
  for (const auto& gradient : torch::autograd::grad({output.square().sum()}, {key, value})) {
    EXPECT_TRUE(gradient[0][2].eq(0).all().item<bool>());
    EXPECT_TRUE(gradient[1][2].ne(0).any().item<bool>());
  }
  image_key_[0][2].fill_(1e3);
  image_value_[0][2].fill_(-1e3);
  EXPECT_TRUE(std::get<0>(module->forward(query_, key_, value_, {{image_key_, image_value_, mask}})).equal(output));
}

TEST_P(DecoupledTest, UnbatchedEqualsABatchOfOne) {
  auto module = make();
  const auto first = [](const Tensor& x) { return x.slice(0, 0, 1); };
  const auto [output, weights] = module->forward(query_[0], key_[0], value_[0], {{image_key_[0], image_value_[0]}});
  const auto [outputs, maps] =
      module->forward(first(query_), first(key_), first(value_), {{first(image_key_), first(image_value_)}});
  EXPECT_TRUE(output.equal(outputs[0]));
  EXPECT_TRUE(weights.equal(maps[0]));
}

TEST_P(DecoupledTest, ContextsServeSeveralQueriesAndGatherTheirGradients) {
  auto module = make();
  const auto key = image_key_.clone().requires_grad_();
  const auto context = module->context(key_, value_);
  const auto image = module->added_context(0, key, image_value_);
  EXPECT_EQ(image.key().sizes(), (std::vector<int64_t>{kB, 4, kLi, 4}));
  const auto first = std::get<0>(module->attend(query_.slice(1, 0, 2), context, {image}));
  const auto second = std::get<0>(module->attend(query_.slice(1, 2), context, {image}));
  const auto whole = std::get<0>(module->forward(query_, key_, value_, {{key, image_value_}}));
  expect_close(torch::cat({first, second}, 1), whole, 1e-12, "output");
  const auto gathered = torch::autograd::grad({first.sin().sum() + second.sin().sum()}, {key})[0];
  expect_close(gathered, torch::autograd::grad({whole.sin().sum()}, {key})[0], 1e-12, "gradient of key");
}

TEST_P(DecoupledTest, ContextsOfOtherOrChangedWeightsAreRefused) {
  auto module = make(DecoupledCrossAttentionOptions(options_).added({{9, 7}, {9, 7}}));
  const std::string reason =
      "context must be made with the weights that attend to it, but they are another module's, or have changed since. Make the "
      "context again.";
  const auto refusal = [&](const Context& context, const std::vector<Context>& added) {
    return error_of<c10::ValueError>([&] { module->attend(query_, context, added); });
  };
  const auto context = module->context(key_, value_);
  const auto zero = module->added_context(0, image_key_, image_value_);
  const auto one = module->added_context(1, image_key_, image_value_);
  module->attend(query_, context, {zero, one});
  EXPECT_EQ(refusal(zero, {zero, one}), "[decoupled_cross_attention] " + reason);
  EXPECT_EQ(refusal(context, {one, zero}), "[decoupled_cross_attention.added0] " + reason);
  {
    const torch::NoGradGuard no_grad;
    module->added_projections[1]->key_linear->weight.mul_(2);
  }
  EXPECT_EQ(refusal(context, {zero, one}), "[decoupled_cross_attention.added1] " + reason);
}

TEST_P(DecoupledTest, DropoutActsInTrainingOnly) {
  auto module = make(DecoupledCrossAttentionOptions(options_.dropout(0.5)).added({{9, 7}}));
  const auto no_text = Mask::lengths(torch::tensor({0, 0}), kLk).to(device_);
  const auto output = [&] { return std::get<0>(module->forward(query_, key_, value_, {image_}, no_text)); };
  EXPECT_FALSE(output().equal(output()));
  module->eval();
  EXPECT_TRUE(output().equal(output()));
}

TEST_P(DecoupledTest, RunsInEveryTypeAndUnderAutocast) {
  auto module = make();
  for (const auto type : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    module->to(type);
    const auto to = [&](const Tensor& x) { return x.to(type); };
    const auto output = std::get<0>(module->forward(to(query_), to(key_), to(value_), {{to(image_key_), to(image_value_)}}));
    EXPECT_EQ(output.scalar_type(), type);
    module->to(torch::kDouble);  // holds the rounded weights
    const auto back = [&](const Tensor& x) { return x.to(type).to(torch::kDouble); };
    const auto expected =
        std::get<0>(module->forward(back(query_), back(key_), back(value_), {{back(image_key_), back(image_value_)}}));
    expect_close(output, expected, tolerance(type, 64), "output");
  }
  module->to(torch::kFloat);
  const auto to = [&](const Tensor& x) { return x.to(torch::kFloat); };
  at::autocast::set_autocast_enabled(device_.type(), true);
  at::autocast::set_autocast_dtype(device_.type(), torch::kBFloat16);
  const auto output = std::get<0>(module->forward(to(query_), to(key_), to(value_), {{to(image_key_), to(image_value_)}}));
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device_.type(), false);
  EXPECT_EQ(output.scalar_type(), torch::kBFloat16);
}

TEST_P(DecoupledTest, AdaptsAFrozenAttention) {
  auto module = make();
  for (auto& parameter : module->attention->parameters()) parameter.requires_grad_(false);
  std::vector<Tensor> trained;
  for (const auto& parameter : module->parameters()) {
    if (parameter.requires_grad()) trained.push_back(parameter);
  }
  EXPECT_EQ(trained.size(), 4);
  torch::optim::Adam optimizer(trained, 1e-2);
  const auto before = module->attention->key_linear->weight.clone();
  const auto target = std::get<0>(module->attention->forward(query_, key_, value_)) + image_value_.mean() + 1;
  double first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(std::get<0>(module->forward(query_, key_, value_, {image_})), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.05 * first);
  EXPECT_TRUE(module->attention->key_linear->weight.equal(before));
}

TEST_P(DecoupledTest, ClonesDeeply) {
  auto module = make(DecoupledCrossAttentionOptions(options_.qk_norm(NormKind::rms)).added({{9, 7}}));
  auto copy = DecoupledCrossAttention(std::dynamic_pointer_cast<DecoupledCrossAttentionImpl>(module->clone(device_)));
  const auto output = [&](DecoupledCrossAttention& m) {
    return std::get<0>(m->forward(query_, key_, value_, {image_})).detach();
  };
  const auto expected = output(module);
  EXPECT_TRUE(output(copy).equal(expected));
  const torch::NoGradGuard no_grad;
  for (auto& parameter : copy->parameters()) parameter.zero_();
  EXPECT_TRUE(output(copy).eq(0).all().item<bool>());
  EXPECT_TRUE(output(module).equal(expected));
}

TEST_P(DecoupledTest, SavesAndLoadsWithTorch) {
  const TempDir directory;
  auto module = make();
  torch::save(module, directory.file("module.pt"));
  auto loaded = make(module->options);
  torch::load(loaded, directory.file("module.pt"), device_);
  EXPECT_TRUE(std::get<0>(loaded->forward(query_, key_, value_, {image_}))
                  .equal(std::get<0>(module->forward(query_, key_, value_, {image_}))));
}

TEST_P(DecoupledTest, AnyModuleMayLeaveTheMaskOut) {
  auto module = make();
  torch::nn::AnyModule any(module);
  const auto output = std::get<0>(any.forward<std::tuple<Tensor, Tensor>>(query_, key_, value_, std::vector<KeyValue>{image_}));
  EXPECT_TRUE(output.equal(std::get<0>(module->forward(query_, key_, value_, {image_}))));
}

TEST_P(DecoupledTest, ChangedOptionsActOrAreRefused) {
  const auto refusal = [&](const auto& change) {
    auto module = make();
    change(*module);
    return error_of<c10::ValueError>([&] { module->forward(query_, key_, value_, {image_}); });
  };
  using Impl = DecoupledCrossAttentionImpl;
  EXPECT_EQ(refusal([](Impl& m) { m.options.added()[0].scale(kInfinity); }),
            "[decoupled_cross_attention] added[0].scale must be finite, but is inf.");
  EXPECT_EQ(refusal([](Impl& m) { m.options.added().clear(); }),
            "[decoupled_cross_attention] options must fit the parameters, but name 0 added contexts for 1.");
  EXPECT_EQ(refusal([](Impl& m) { m.attention->options.weight_heads({4}); }),
            "[decoupled_cross_attention] weight_heads must be of the 4 heads, but name 4.");
}

TEST(FrozenDecoupledTest, ProjectionsOfAnotherTypeThanTheAttentionAreRefused) {
  for (const bool is_attention : {true, false}) {
    DecoupledCrossAttention module(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 8, 8, 8)).added({{8, 8}}));
    is_attention ? module->attention->to(torch::kBFloat16) : module->added_projections[0]->to(torch::kBFloat16);
    const std::string of_attention = is_attention ? "bfloat16" : "float32", of_added = is_attention ? "float32" : "bfloat16";
    EXPECT_EQ(error_of<c10::TypeError>([&] { return module->freeze(); }), "[frozen] added projections must be " + of_attention +
                                                                              " on cpu, as the attention, but one is " +
                                                                              of_added + " on cpu.");
  }
}

TEST_P(DecoupledTest, RefusesBadInputByName) {
  auto module = make();
  const auto value_error = [&](const Tensor& query, const KeyValue& image) {
    return error_of<c10::ValueError>([&] { module->forward(query, key_, value_, {image}); });
  };
  const auto type_error = [&](const Tensor& query, const KeyValue& image) {
    return error_of<c10::TypeError>([&] { module->forward(query, key_, value_, {image}); });
  };
  EXPECT_EQ(value_error(key_, image_), "[decoupled_cross_attention] query must have shape [B, Lq, 8], but has [2, 6, 12].");
  EXPECT_EQ(value_error(query_.slice(0, 0, 1), image_),
            "[decoupled_cross_attention] query must have shape [2, Lq, 8] to match its context, but has [1, 4, 8].");
  EXPECT_EQ(value_error(query_, {image_value_, image_value_}),
            "[decoupled_cross_attention.added0] key must have shape [B, Lk, 9], but has [2, 3, 7].");
  EXPECT_EQ(value_error(query_, {image_key_, Tensor()}),
            "[decoupled_cross_attention.added0] value must have shape [B, Lk, 7], but has undefined.");
  EXPECT_EQ(value_error(query_, {image_key_, image_value_.slice(1, 0, 2)}),
            "[decoupled_cross_attention.added0] value must have the batch and length of key, [2, 3, 9], but has [2, 2, 7].");
  EXPECT_EQ(value_error(query_, {image_key_[0], image_value_[0]}),
            "[decoupled_cross_attention] added[0] must be a batch of 2, as the first context, but is unbatched.");
  EXPECT_EQ(value_error(query_, {image_key_.slice(0, 0, 1), image_value_.slice(0, 0, 1)}),
            "[decoupled_cross_attention] added[0] must be a batch of 2, as the first context, but is a batch of 1.");
  EXPECT_EQ(type_error(query_, {image_key_.to(torch::kFloat), image_value_}),
            "[decoupled_cross_attention.added0] key must be float64, the type of the parameters, but is float32.");
  EXPECT_EQ(value_error(query_, {image_key_, image_value_, Mask::lengths(torch::tensor({3, 4}), 5).to(device_)}),
            "[decoupled_cross_attention.added0] mask (lengths) must fit [B, H, Lq, Lk] = [2, 4, 4, 3], but has [2, 1, 1, 5].");
  EXPECT_EQ(value_error(query_, {image_key_, image_value_, Mask::bias(random({2, 3}))}),
            "[decoupled_cross_attention.added0] mask (bias) must fit [B, H, Lq, Lk] = [2, 4, 4, 3], but has [1, 1, 2, 3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->forward(query_, key_, value_, {}); }),
            "[decoupled_cross_attention] added must have as many contexts as the options, 1, but has 0.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->forward(query_, key_, value_, {image_, image_}); }),
            "[decoupled_cross_attention] added must have as many contexts as the options, 1, but has 2.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { return module->added_context(1, image_key_, image_value_); }),
            "[decoupled_cross_attention] index must be below the number of added contexts, 1, but is 1.");
}

INSTANTIATE_TEST_SUITE_P(Devices, DecoupledTest, testing::ValuesIn(devices()), device_name);

// ---- Options --------------------------------------------------------------------------------------------------------------

TEST(DecoupledOptionsTest, ParametersHaveTheNamesOfTheirParts) {
  const DecoupledCrossAttention module(
      DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 10, 16).key_bias(false).qk_norm(NormKind::rms))
          .added({{9, 7}, AddedContextOptions(5, 5).key_bias(true).value_bias(false)}));
  std::set<std::string> added;
  for (const auto& parameter : module->named_parameters()) {
    if (!parameter.key().starts_with("attention.")) added.insert(parameter.key());
  }
  EXPECT_EQ(added, (std::set<std::string>{"added0.key_linear.weight", "added0.key_norm.weight", "added0.value_linear.bias",
                                          "added0.value_linear.weight", "added1.key_linear.bias", "added1.key_linear.weight",
                                          "added1.key_norm.weight", "added1.value_linear.weight"}));
  EXPECT_TRUE(module->named_parameters().contains("attention.query_linear.weight"));
}

TEST(DecoupledOptionsTest, RefusesWhatCannotBe) {
  const auto refusal = [](const AddedContextOptions& added, const CrossAttentionOptions& attention = {8, 12, 10, 16}) {
    return error_of<c10::ValueError>(
        [&] { DecoupledCrossAttention module(DecoupledCrossAttentionOptions(attention).added({{9, 7}, added})); });
  };
  EXPECT_EQ(refusal({0, 7}), "[decoupled_cross_attention] added[1].dim_key must be at least 1, but is 0.");
  EXPECT_EQ(refusal({9, -1}), "[decoupled_cross_attention] added[1].dim_value must be at least 1, but is -1.");
  EXPECT_EQ(refusal(AddedContextOptions(9, 7).scale(INFINITY)),
            "[decoupled_cross_attention] added[1].scale must be finite, but is inf.");
  EXPECT_EQ(refusal({9, 7}, {8, 12, 10, 0}), "[cross_attention] dim_output must be at least 1, but is 0.");
}

TEST(DecoupledOptionsTest, PrintsWhatBuildsItAgain) {
  const auto printed = [](const torch::nn::Module& module) {
    std::ostringstream stream;
    module.pretty_print(stream);
    return stream.str();
  };
  const auto options = CrossAttentionOptions(8, 12, 10, 16).num_heads(4);
  EXPECT_EQ(
      printed(*DecoupledCrossAttention(DecoupledCrossAttentionOptions(options))),
      "xattn::DecoupledCrossAttention(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 10, 16).num_heads(4)))");
  const DecoupledCrossAttention module(DecoupledCrossAttentionOptions(options).added(
      {{9, 7}, AddedContextOptions(5, 5).key_bias(false).value_bias(true).scale(0.5)}));
  EXPECT_EQ(printed(*module),
            "xattn::DecoupledCrossAttention(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 10, 16).num_heads(4))"
            ".added({AddedContextOptions(9, 7), AddedContextOptions(5, 5).key_bias(false).scale(0.5)}))");
  EXPECT_EQ(printed(*module->added_projections[0]), "xattn::AddedProjection(CrossAttentionOptions(8, 9, 7, 16).num_heads(4))");
}

TEST(DecoupledOptionsTest, ResetParametersStartsAfresh) {
  DecoupledCrossAttention module(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 10, 16)).added({{9, 7}}));
  const auto before = module->added_projections[0]->key_linear->weight.clone();
  module->reset_parameters();
  EXPECT_FALSE(module->added_projections[0]->key_linear->weight.equal(before));
}

// ---- Results of diffusers, from tests/data/layouts ------------------------------------------------------------------------

struct DecoupledFamily {
  explicit DecoupledFamily(const std::string& name_) : name(name_) {}

  std::string name;
  Checkpoint expected = open(name + ".expect");
  // An adapter's own file has only the added projections; the rest is in its base.
  bool has_base = expected.metadata().contains("base");
  Checkpoint weights = has_base ? with_ip_adapter(open(about("base")), open(name)) : open(name);
  std::string prefix = about(has_base ? "base_prefix" : "prefix");

  static Checkpoint open(const std::string& file) { return open_checkpoint(data_path("layouts/" + file + ".safetensors")); }
  const std::string& about(const std::string& key) const { return expected.metadata().at(key); }

  DecoupledCrossAttention made() const {
    LayerOptions options{.prefix = prefix, .num_heads = std::stoll(about("num_heads"))};
    if (expected.metadata().contains("qk_norm_eps")) options.qk_norm_eps = std::stod(about("qk_norm_eps"));
    return decoupled_cross_attention_from(weights, options, std::stod(about("ip_scale")));
  }

  void expect_output_of(DecoupledCrossAttention module, const torch::Device& device = torch::kCPU) const {
    const torch::NoGradGuard no_grad;
    const auto query = expected.tensor("query").to(device), text = expected.tensor("context").to(device);
    const auto image = expected.tensor("ip_context").to(device);
    const auto mask = expected.contains("mask") ? Mask::key_padding(expected.tensor("mask").to(device)) : Mask();
    const auto output = std::get<0>(module->forward(query, text, text, {{image, image}}, mask));
    expect_close(output, expected.tensor("output"), 1e-5,
                 name + " on " + device.str() + " (stale? python3 " + about("script") + ")");
  }
};

class DecoupledFixtureTest : public testing::TestWithParam<const char*> {};

TEST_P(DecoupledFixtureTest, MatchesDiffusers) {
  const DecoupledFamily family(GetParam());
  auto module = family.made();
  for (const auto device : devices()) {
    module->to(device);
    family.expect_output_of(module, device);
  }
}

TEST_P(DecoupledFixtureTest, MatchesDiffusersInEveryLegalOrderFrozenAndNot) {
  const DecoupledFamily family(GetParam());
  auto module = family.made();
  const torch::NoGradGuard no_grad;
  const auto& expected = family.expected;
  const auto query = expected.tensor("query"), text = expected.tensor("context"), image = expected.tensor("ip_context");
  const auto mask = expected.contains("mask") ? Mask::key_padding(expected.tensor("mask")) : Mask();
  for (const auto& orders : legal_orders(module->attention->options)) {
    if (!detail::ends_in_heads(orders.values)) continue;
    module->attention->options.plan(PlanMode::pin(orders));
    const auto frozen = module->freeze();
    const auto what = family.name + ", " + std::string(name_of(orders.logits)) + ", " + std::string(name_of(orders.values));
    const auto expect = [&](const std::tuple<Tensor, Tensor>& found, const std::string& how) {
      expect_close(std::get<0>(found), expected.tensor("output"), 1e-5, what + how);
    };
    expect(module->forward(query, text, text, {{image, image}}, mask), "");
    expect(frozen.forward(query, text, text, {{image, image}}, mask), ", frozen");
    expect(frozen.attend(query, frozen.context(text, text, mask), {frozen.added_context(0, image, image)}),
           ", frozen, with contexts");
  }
}

// A user's model.
struct ModelWithAddedContexts : torch::nn::Module {
  explicit ModelWithAddedContexts(const DecoupledCrossAttentionOptions& options)
      : fusion(register_module("fusion", DecoupledCrossAttention(options))) {}
  DecoupledCrossAttention fusion;
};

TEST_P(DecoupledFixtureTest, LoadsIntoAModuleThatHoldsOneOrNotAtAll) {
  const DecoupledFamily family(GetParam());
  NamedTensors renamed;  // as if the file's layer were called "model.fusion"
  for (const auto& [name, info] : family.weights.tensors()) {
    if (!name.starts_with(family.prefix)) continue;
    renamed["model.fusion." + name.substr(family.prefix.size())] = family.weights.tensor(name);
  }
  ModelWithAddedContexts model(family.made()->options);
  const auto report = load_weights(model, renamed, {.prefix = "model."});
  EXPECT_EQ(report.loaded.size(), model.parameters().size());
  EXPECT_EQ(report.summary(), "loaded " + std::to_string(renamed.size()) + " tensors");
  family.expect_output_of(model.fusion);

  ModelWithAddedContexts empty(family.made()->options);
  const auto layer = find_layers(lazy(renamed).infos).at(0);
  renamed.erase(detail::added_recipes(layer, lazy(renamed).infos).at("added0.value_linear.weight").source);
  const auto before = empty.fusion->attention->query_linear->weight.clone();
  const auto message = error_of<LoadError>([&] { load_weights(empty, renamed, {.prefix = "model."}); });
  EXPECT_NE(message.find("; missing: fusion.added0.key_linear."), std::string::npos) << message;  // half a context is none
  EXPECT_NE(message.find("fusion.added0.value_linear.weight"), std::string::npos) << message;
  EXPECT_TRUE(empty.fusion->attention->query_linear->weight.equal(before));
}

TEST_P(DecoupledFixtureTest, IsFoundByItselfIfItIsTheOnlyOne) {
  const DecoupledFamily family(GetParam());
  DecoupledCrossAttention module(family.made()->options);
  if (!family.has_base) {
    load_weights(*module, family.weights);
    family.expect_output_of(module);
    return;
  }
  const auto message = error_of<FileError>([&] { load_weights(*module, family.weights); });
  EXPECT_NE(message.find("prefix must be one of \"down_blocks.0.attentions.0."), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    ,
    DecoupledFixtureTest,
    testing::Values("ip_adapter", "ip_adapter_down", "ip_adapter_up", "ip_adapter_mid", "wan_i2v", "wan_i2v_original"),
    [](const auto& info) { return info.param; });

// ---- Loading --------------------------------------------------------------------------------------------------------------

// The tensors of a layer of 4 -> 4 by the names of diffusers, with this many IP-Adapters.
NamedTensors layer_with_adapters(const std::string& prefix, int adapters) {
  NamedTensors tensors = {{prefix + "to_q.weight", torch::randn({4, 4})},
                          {prefix + "to_k.weight", torch::randn({4, 6})},
                          {prefix + "to_v.weight", torch::randn({4, 6})},
                          {prefix + "to_out.0.weight", torch::randn({4, 4})},
                          {prefix + "to_out.0.bias", torch::randn({4})}};
  for (int i = 0; i < adapters; ++i) {
    for (const std::string side : {"k", "v"}) {
      tensors[prefix + "processor.to_" + side + "_ip." + std::to_string(i) + ".weight"] = torch::randn({4, 5});
    }
  }
  return tensors;
}

const auto kSizes = CrossAttentionOptions(4, 6, 6, 4).qkv_bias(false);

TEST(LoadDecoupledTest, TakesSeveralContextsInOrder) {
  const auto tensors = layer_with_adapters("a.", 3);
  DecoupledCrossAttention module(DecoupledCrossAttentionOptions(kSizes).added({{5, 5}, {5, 5}, {5, 5}}));
  EXPECT_EQ(load_weights(*module, tensors).summary(), "loaded 11 tensors");
  for (size_t i = 0; i < 3; ++i) {
    const auto name = "a.processor.to_v_ip." + std::to_string(i) + ".weight";
    EXPECT_TRUE(module->added_projections[i]->value_linear->weight.equal(tensors.at(name)));
  }
}

TEST(LoadDecoupledTest, AddedContextsAreNeverLeftOutSilently) {
  const auto refusal = [](torch::nn::Module& module, int adapters) {
    const auto message =
        error_of<LoadError>([&] { load_weights(module, layer_with_adapters("a.", adapters), {.prefix = "a."}); });
    return message.substr(message.find(';') + 2);
  };
  CrossAttention attention(kSizes);
  DecoupledCrossAttention one(DecoupledCrossAttentionOptions(kSizes).added({{5, 5}}));
  EXPECT_EQ(refusal(*attention, 1), "unexpected: processor.to_k_ip.0.weight, processor.to_v_ip.0.weight");
  EXPECT_EQ(refusal(*one, 2), "unexpected: processor.to_k_ip.1.weight, processor.to_v_ip.1.weight");
  EXPECT_EQ(refusal(*one, 0), "missing: added0.key_linear.weight, added0.value_linear.weight");
}

TEST(LoadDecoupledTest, AdaptsALayerThatHasNoneYet) {
  const auto tensors = layer_with_adapters("a.", 0);
  DecoupledCrossAttention module(DecoupledCrossAttentionOptions(kSizes).added({{5, 5}}));
  const auto report = load_weights(*module, tensors, {.prefix = "a.", .allow_missing = true});
  EXPECT_EQ(report.summary(), "loaded 5 tensors; missing: added0.key_linear.weight, added0.value_linear.weight");
  EXPECT_TRUE(module->attention->value_linear->weight.equal(tensors.at("a.to_v.weight")));
}

TEST(LoadDecoupledTest, LoadsWhatItSavedItself) {
  const TempDir directory;
  const DecoupledCrossAttention saved(DecoupledCrossAttentionOptions(kSizes).added({{5, 5}}));
  DecoupledCrossAttention loaded(saved->options);
  save_safetensors(directory.file("x"), *saved);
  EXPECT_EQ(load_weights(*loaded, directory.file("x")).summary(), "loaded 7 tensors");
  EXPECT_TRUE(loaded->added_projections[0]->key_linear->weight.equal(saved->added_projections[0]->key_linear->weight));
}

// ---- An IP-Adapter's own file ---------------------------------------------------------------------------------------------

class IpAdapterTest : public testing::Test {
 protected:
  Checkpoint saved(const std::string& name, const NamedTensors& tensors) const {
    save_safetensors(directory_.file(name), tensors);
    return open_checkpoint(directory_.file(name));
  }
  // A base with these layers, each with self-attention beside it.
  Checkpoint base(const std::vector<std::string>& transformers) const {
    NamedTensors tensors;
    for (const auto& transformer : transformers) {
      tensors.merge(layer_with_adapters(transformer + "attn1.", 0));
      tensors.merge(layer_with_adapters(transformer + "attn2.", 0));
    }
    return saved("base", tensors);
  }
  // Projections for this many layers, filled with their numbers.
  NamedTensors adapter(int layers) const {
    NamedTensors tensors = {{"image_proj.proj.weight", torch::ones({2, 2})}};
    for (int i = 1; i < 2 * layers; i += 2) {
      for (const std::string side : {"k", "v"}) {
        tensors["ip_adapter." + std::to_string(i) + ".to_" + side + "_ip.weight"] = torch::full({4, 5}, i);
      }
    }
    return tensors;
  }
  // The adapter's number that the layer of this transformer got.
  static int number_of(const Checkpoint& both, const std::string& transformer) {
    return both.tensor(transformer + "attn2.processor.to_k_ip.0.weight")[0][0].item<int>();
  }
  const TempDir directory_;
};

TEST_F(IpAdapterTest, CountsLayersDownUpAndMidWithNumbersInTheirOrder) {
  const std::vector<std::string> in_diffusers = {
      "down_blocks.1.attentions.0.transformer_blocks.2.", "down_blocks.1.attentions.0.transformer_blocks.10.",
      "down_blocks.2.attentions.0.transformer_blocks.0.", "up_blocks.0.attentions.2.transformer_blocks.0.",
      "up_blocks.1.attentions.0.transformer_blocks.0.",   "mid_block.attentions.0.transformer_blocks.0."};
  const std::vector<std::string> in_one_file = {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.",
                                                "model.diffusion_model.input_blocks.11.1.transformer_blocks.0.",
                                                "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.",
                                                "model.diffusion_model.middle_block.1.transformer_blocks.0."};
  for (const auto& names : {in_diffusers, in_one_file}) {
    const auto both = with_ip_adapter(base(names), saved("adapter", adapter(static_cast<int>(names.size()))));
    for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(number_of(both, names[i]), static_cast<int>(2 * i + 1)) << names[i];
    EXPECT_FALSE(both.contains("image_proj.proj.weight"));
  }
}

TEST_F(IpAdapterTest, PassesOverAttentionBetweenFrames) {
  const std::string frames = "down_blocks.0.motion_modules.0.transformer_blocks.0.";
  const std::string image = "up_blocks.0.attentions.0.transformer_blocks.0.";
  const auto both = with_ip_adapter(base({frames, image}), saved("adapter", adapter(1)));
  EXPECT_EQ(number_of(both, image), 1);
  EXPECT_FALSE(both.contains(frames + "attn2.processor.to_k_ip.0.weight"));
}

TEST_F(IpAdapterTest, TakesAPlaceByItsName) {
  const std::string alone = "up_blocks.1.attentions.0.transformer_blocks.0.";
  for (const std::string end : {"", "."}) {
    const auto both =
        with_ip_adapter(base({alone}), saved("adapter", adapter(4)), {{alone + "attn2" + end, "ip_adapter.5" + end}});
    EXPECT_EQ(number_of(both, alone), 5);
  }
}

TEST_F(IpAdapterTest, RefusesTheAdapterOfAnotherModel) {
  const auto two = base({"down_blocks.0.attentions.0.transformer_blocks.0.", "mid_block.attentions.0.transformer_blocks.0."});
  const auto refusal = [&](const NamedTensors& tensors) {
    const auto message = error_of<FileError>([&] { return with_ip_adapter(two, saved("adapter", tensors)); });
    const auto start = "[ip_adapter] " + directory_.file("adapter") +
                       ": must have to_k_ip and to_v_ip for the 2 cross-attention layers of " + two.path() + "; ";
    EXPECT_TRUE(message.starts_with(start)) << message;
    return message.substr(std::min(message.size(), start.size()));
  };
  EXPECT_EQ(refusal(adapter(1)), "missing: ip_adapter.3.to_k_ip.weight, ip_adapter.3.to_v_ip.weight");
  EXPECT_EQ(refusal(adapter(3)), "unexpected: ip_adapter.5.to_k_ip.weight, ip_adapter.5.to_v_ip.weight");
  auto with_lora = adapter(2);
  with_lora["ip_adapter.1.to_q_lora.up.weight"] = torch::ones({4, 1});
  with_lora.erase("ip_adapter.3.to_v_ip.weight");
  EXPECT_EQ(refusal(with_lora), "missing: ip_adapter.3.to_v_ip.weight; unexpected: ip_adapter.1.to_q_lora.up.weight");
  const auto lora = saved("adapter", with_lora);
  const auto by_name = error_of<FileError>(
      [&] { return with_ip_adapter(two, lora, {{"mid_block.attentions.0.transformer_blocks.0.attn2", "ip_adapter.1"}}); });
  EXPECT_TRUE(by_name.ends_with("; unexpected: ip_adapter.1.to_q_lora.up.weight")) << by_name;
}

TEST_F(IpAdapterTest, RefusesABaseThatHasNoPlaceForIt) {
  const auto one = saved("adapter", adapter(1));
  EXPECT_EQ(error_of<FileError>([&] { return with_ip_adapter(one, one); }),
            "[ip_adapter] " + one.path() + ": must hold cross-attention layers named as in diffusers, but holds none");
  const auto has_one = saved("base", layer_with_adapters("a.attn2.", 1));
  EXPECT_EQ(error_of<FileError>([&] { return with_ip_adapter(has_one, one); }),
            "[checkpoint] " + has_one.path() + R"(: already has a tensor "a.attn2.processor.to_k_ip.0.weight")");
}

TEST(DecoupledContextTest, RefusesAContextWhoseValuesHaveBeenProjectedOut) {
  DecoupledCrossAttention module(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 12, 8)).added({{6, 6}}));
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12}), z = torch::randn({2, 4, 6});
  const auto added = module->added_context(0, z, z);
  module->attention->options.plan(PlanMode::pin({Order::standard, Order::fold_into_context}));
  const auto other = module->attention->context(y, y, {}, {.expected_queries = 3});
  module->attention->options.plan(PlanMode::automatic);
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->attend(x, other, {added}); }),
            "[decoupled_cross_attention] context must be made by this layer, for values that end in heads, but is in the order "
            "fold_into_context.");
}

TEST(DecoupledContextTest, AScaleOfZeroLeavesAContextOut) {
  DecoupledCrossAttention module(
      DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 12, 8)).added({AddedContextOptions(6, 6).scale(0)}));
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12});
  const auto z = torch::full({2, 4, 6}, NAN);
  const auto expected = std::get<0>(module->attention->forward(x, y, y));
  expect_close(std::get<0>(module->forward(x, y, y, {{z, z}})), expected, 1e-6, "forward");
  expect_close(std::get<0>(module->attend(x, module->context(y, y), {module->added_context(0, z, z)})), expected, 1e-6,
               "attend");
}

TEST(DecoupledContextTest, TheMaskOfAContextThatIsLeftOutIsCheckedAllTheSame) {
  DecoupledCrossAttention module(
      DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 12, 8)).added({AddedContextOptions(6, 6).scale(0)}));
  const auto frozen = module->freeze();
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12}), z = torch::randn({2, 4, 6});
  const auto mask = Mask::dense(torch::ones({1, 1, 7, 4}, torch::kBool));  // of 7 queries
  const auto expect_refused = [](const std::string& caller, const auto& call) {
    EXPECT_EQ(error_of<c10::ValueError>(call),
              "[" + caller + ".added0] mask (dense) must fit [B, H, Lq, Lk] = [2, 1, 3, 4], but has [1, 1, 7, 4].");
  };
  const std::string of_module = "decoupled_cross_attention", of_frozen = "frozen_decoupled";
  expect_refused(of_module, [&] { module->forward(x, y, y, {{z, z, mask}}); });
  expect_refused(of_module, [&] { module->attend(x, module->context(y, y), {module->added_context(0, z, z, mask)}); });
  expect_refused(of_frozen, [&] { frozen.forward(x, y, y, {{z, z, mask}}); });
  expect_refused(of_frozen, [&] { frozen.attend(x, frozen.context(y, y), {frozen.added_context(0, z, z, mask)}); });
}

TEST(DecoupledOptionsTest, OptionsOfTheAttentionAreThoseOfItsModule) {
  DecoupledCrossAttention module(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 12, 8)).added({{6, 6}}));
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12}), z = torch::randn({2, 4, 6});
  module->forward(x, y, y, {{z, z}});
  module->options.attention().dropout(0.5);
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->forward(x, y, y, {{z, z}}); }),
            "[decoupled_cross_attention] options.attention must be as the module was made, but has changed. Change "
            "attention->options.");
  DecoupledCrossAttention other(DecoupledCrossAttentionOptions(CrossAttentionOptions(8, 12, 12, 8)).added({{6, 6}}));
  other->options.added()[0].value_bias(false);
  EXPECT_EQ(
      error_of<c10::ValueError>([&] { other->forward(x, y, y, {{z, z}}); }),
      "[decoupled_cross_attention.added0] options must fit the parameters, but say no bias for value_linear, which has one.");
}

}  // namespace
}  // namespace xattn::test
