// SPDX-License-Identifier: Apache-2.0
#include <xattn/block.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/frozen_block.h>
#include <xattn/load.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "compare.h"
#include "fixture.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

// ---- Results of PyTorch, from tests/data/block ------------------------------------------------------------------------------

std::vector<std::string> block_fixtures() {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(data_path("block"))) names.push_back(file.path().stem());
  std::sort(names.begin(), names.end());
  return names;
}

CrossAttentionBlockOptions block_options(const Fixture& fixture) {
  static const std::map<std::string, NormKind> norms = {
      {"none", NormKind::none}, {"rms", NormKind::rms}, {"layer", NormKind::layer}};
  static const std::map<std::string, NormPlacement> placements = {{"before", NormPlacement::before},
                                                                  {"after", NormPlacement::after}};
  static const std::map<std::string, BlockGate> gates = {
      {"none", BlockGate::none}, {"scalar", BlockGate::scalar}, {"per_feature", BlockGate::per_feature}};
  static const std::map<std::string, Activation> activations = {
      {"relu", Activation::relu}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh}, {"silu", Activation::silu}};
  const auto json = nlohmann::json::parse(fixture.metadata.at("block"));
  CrossAttentionBlockOptions options(fixture.options());
  options.norm(norms.at(json.value("norm", "layer")))
      .norm_placement(placements.at(json.value("norm_placement", "before")))
      .gate(gates.at(json.value("gate", "none")))
      .activation(activations.at(json.value("activation", "gelu")));
  if (json.contains("feed_forward")) options.feed_forward(json["feed_forward"].get<int64_t>());
  return options;
}

// `tolerance` of compare.h for the lengths of all sums that a gradient passes through. The half types store a result at the end
// of each branch and of each sum: twice as often as attention alone, for which `tolerance` is derived.
double block_tolerance(const Fixture& fixture, at::ScalarType type) {
  const auto options = CrossAttentionBlock(block_options(fixture))->options;
  const auto& inner = options.attention();
  const auto features = 4 * inner.dim_query() + inner.dim_key() + inner.dim_value() + 2 * *options.feed_forward();
  const auto heads = inner.num_heads() * (*inner.head_dim() + *inner.value_head_dim());
  const auto rows = fixture.rows("query") + fixture.rows("key") + fixture.rows("value");
  const bool half = type == at::kHalf || type == at::kBFloat16;
  return (half ? 2 : 1) * tolerance(type, features + heads + rows);
}

// Weight and bias of a layer are compared as one tensor, because a bias is the weight of an input that is always one.
NamedTensors by_layer(const NamedTensors& gradients) {
  std::map<std::string, std::vector<Tensor>> parts;
  for (const auto& [name, gradient] : gradients) {
    parts[name.substr(0, name.rfind('.'))].push_back(gradient.to(at::kCPU, at::kDouble).flatten());
  }
  NamedTensors layers;
  for (const auto& [layer, tensors] : parts) layers[layer] = torch::cat(tensors);
  return layers;
}

void expect_matches(const Fixture& fixture, at::ScalarType type, at::Device device) {
  CrossAttentionBlock block(block_options(fixture));
  load_weights(*block, fixture.tensors, {.prefix = "weights."});
  block->to(device, type);
  NamedTensors inputs;
  for (const auto* name : {"query", "key", "value"}) {
    inputs[name] = fixture.tensors.at(name).to(device, type, false, /*copy=*/true).requires_grad_();
  }
  const auto [output, weights] = block->forward(inputs["query"], inputs["key"], inputs["value"], fixture.mask(device));

  const auto what = fixture.name + " in " + std::string(c10::toString(type)) + " on " + device.str() + ", made by " +
                    fixture.about("truth") + " (stale? python3 " + fixture.about("script") + ")";
  const auto allowed = block_tolerance(fixture, type);
  EXPECT_EQ(output.scalar_type(), type);
  expect_close(output, fixture.tensors.at("output"), allowed, "output of " + what);
  expect_close(weights, fixture.tensors.at("attention_weights"), allowed, "attention_weights of " + what);

  torch::autograd::backward({output, weights}, {fixture.tensors.at("cotangent.output").to(device, type),
                                                fixture.tensors.at("cotangent.attention_weights").to(device, type)});
  NamedTensors actual, expected;
  for (const auto& [name, input] : inputs) actual[name] = input.grad();
  for (const auto& parameter : block->named_parameters()) actual["weights." + parameter.key()] = parameter.value().grad();
  for (const auto& [name, tensor] : fixture.tensors) {
    if (name.starts_with("grad.")) expected[name.substr(5)] = tensor;
  }
  const auto actual_layers = by_layer(actual), expected_layers = by_layer(expected);
  ASSERT_EQ(actual_layers.size(), expected_layers.size());
  for (const auto& [layer, gradient] : expected_layers) {
    expect_close(actual_layers.at(layer), gradient, allowed, "gradient of " + layer + " of " + what);
  }
}

class BlockFixtureTest : public testing::TestWithParam<std::string> {};

TEST_P(BlockFixtureTest, MatchesPyTorch) {
  const auto fixture = load_fixture("block/" + GetParam());
  ASSERT_FALSE(fixture.types().empty());
  for (const auto device : devices()) {
    for (const auto type : fixture.types()) expect_matches(fixture, type, device);
  }
}

TEST_P(BlockFixtureTest, MatchesPyTorchInEveryLegalOrderFrozenAndNot) {
  const auto fixture = load_fixture("block/" + GetParam());
  const torch::NoGradGuard no_grad;
  const auto input = [&](const char* name) { return fixture.tensors.at(name).to(torch::kFloat); };
  const auto query = input("query"), key = input("key"), value = input("value");
  const auto allowed = block_tolerance(fixture, torch::kFloat);
  for (const auto& orders : legal_orders(block_options(fixture).attention())) {
    auto options = block_options(fixture);
    auto attention = options.attention();
    CrossAttentionBlock block(options.attention(attention.plan(PlanMode::pin(orders))));
    load_weights(*block, fixture.tensors, {.prefix = "weights."});
    const auto frozen = block->freeze();
    const auto mask = fixture.mask(torch::kCPU);
    const auto expect = [&](const std::tuple<Tensor, Tensor>& found, const std::string& how) {
      const auto what =
          fixture.name + ", " + std::string(name_of(orders.logits)) + ", " + std::string(name_of(orders.values)) + how;
      expect_close(std::get<0>(found), fixture.tensors.at("output"), allowed, "output of " + what);
      expect_close(std::get<1>(found), fixture.tensors.at("attention_weights"), allowed, "attention_weights of " + what);
    };
    expect(block->forward(query, key, value, mask), "");
    expect(block->attend(query, block->context(key, value, mask, {.expected_queries = 100})), " with a context");
    expect(frozen.forward(query, key, value, mask), ", frozen");
    expect(frozen.attend(query, frozen.context(key, value, mask)), ", frozen, with a context");
  }
}

INSTANTIATE_TEST_SUITE_P(, BlockFixtureTest, testing::ValuesIn(block_fixtures()), [](const auto& info) { return info.param; });

// ---- Properties -------------------------------------------------------------------------------------------------------------

class CrossAttentionBlockTest : public testing::TestWithParam<torch::Device> {
 protected:
  static constexpr int64_t kB = 2, kLq = 4, kLk = 6;

  CrossAttentionBlockTest() { torch::manual_seed(0); }

  // float64, so that results can be compared closely.
  CrossAttentionBlock make(const CrossAttentionBlockOptions& options) const {
    CrossAttentionBlock block(options);
    block->to(device_, torch::kDouble);
    return block;
  }
  CrossAttentionBlockOptions options() const { return CrossAttentionBlockOptions(attention_); }
  Tensor random(at::IntArrayRef shape) const { return torch::randn(shape, torch::dtype(torch::kDouble).device(device_)); }
  Tensor output_of(CrossAttentionBlock& block, const Mask& mask = {}) const {
    return std::get<0>(block->forward(query_, key_, value_, mask));
  }

  // Every kind of block: with all norms, places and gates, with and without feed-forward branch.
  template <class F>
  void for_each_kind(F check) const {
    for (const auto norm : {NormKind::none, NormKind::rms, NormKind::layer}) {
      for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
        for (const auto gate : {BlockGate::none, BlockGate::scalar, BlockGate::per_feature}) {
          for (const auto& [feed_forward, glu] : {std::pair(0, false), {12, false}, {12, true}}) {
            auto kind = options().norm(norm).norm_placement(placement).gate(gate).feed_forward(feed_forward);
            auto block = make(kind.feed_forward_glu(glu).feed_forward_bias(!glu));
            for (auto& gate : block->parameters(/*recurse=*/false)) gate.detach().normal_();
            std::ostringstream what;
            block->pretty_print(what);
            SCOPED_TRACE(what.str());
            check(block);
          }
        }
      }
    }
  }

  torch::Device device_ = GetParam();
  Tensor query_ = random({kB, kLq, 8}), key_ = random({kB, kLk, 12}), value_ = random({kB, kLk, 10});
  CrossAttentionOptions attention_ = CrossAttentionOptions(8, 12, 10, 8).num_heads(2);
};

TEST_P(CrossAttentionBlockTest, ANewGatedBlockChangesNothingAndItsGatesLearn) {
  for (const auto gate : {BlockGate::scalar, BlockGate::per_feature}) {
    for (const auto norm : {NormKind::none, NormKind::rms, NormKind::layer}) {
      auto block = make(options().gate(gate).norm(norm));
      const auto output = output_of(block);
      EXPECT_TRUE(output.equal(query_));
      output.sin().sum().backward();
      for (const auto& parameter : block->named_parameters()) {
        const auto moves = parameter.value().grad().ne(0);
        const bool is_gate = parameter.key().ends_with("_gate");
        EXPECT_EQ(moves.sum().item<int64_t>(), is_gate ? moves.numel() : 0) << parameter.key();
      }
    }
  }
}

TEST_P(CrossAttentionBlockTest, WithNormsAfterANewGatedBlockOnlyNormalises) {
  auto block = make(options().gate(BlockGate::scalar).norm_placement(NormPlacement::after).norm_eps(0.25));
  const auto once = torch::layer_norm(query_, {8}, {}, {}, 0.25);
  expect_close(output_of(block), torch::layer_norm(once, {8}, {}, {}, 0.25), 1e-12, "output");
}

TEST_P(CrossAttentionBlockTest, EachBranchHasItsOwnGate) {
  auto block = make(options().gate(BlockGate::per_feature));
  const torch::NoGradGuard no_grad;
  block->attention_gate[3] = 0.5;
  const auto attended = output_of(block) - query_;
  const auto mixed = std::get<0>(block->attention->forward(block->attention_norm(query_), key_, value_));
  expect_close(attended.select(2, 3), std::tanh(0.5) * mixed.select(2, 3), 1e-12, "the feature let through");
  EXPECT_EQ(attended.ne(0).sum().item<int64_t>(), kB * kLq);
  block->attention_gate.zero_();
  block->feed_forward_gate[5] = 40;  // tanh is 1
  const auto fed = output_of(block) - query_;
  const auto hidden = torch::gelu(block->feed_forward_in(block->feed_forward_norm(query_)));
  expect_close(fed.select(2, 5), block->feed_forward_out(hidden).select(2, 5), 1e-12, "the feature let through");
  EXPECT_EQ(fed.ne(0).sum().item<int64_t>(), kB * kLq);
}

TEST_P(CrossAttentionBlockTest, AGatedLinearUnitMultipliesTheActivatedFeatures) {
  for (const bool bias : {false, true}) {
    auto block = make(options().feed_forward(12).feed_forward_glu(true).feed_forward_bias(bias).activation(Activation::silu));
    const auto x = query_ + std::get<0>(block->attention->forward(block->attention_norm(query_), key_, value_));
    const auto normed = block->feed_forward_norm(x);
    const auto linear = [](const Tensor& input, const torch::nn::Linear& layer) {
      const auto product = torch::matmul(input, layer->weight.t());
      return layer->bias.defined() ? product + layer->bias : product;
    };
    const auto in = linear(normed, block->feed_forward_in), multiplier = linear(normed, block->feed_forward_multiplier);
    const auto expected = x + linear(in * in.sigmoid() * multiplier, block->feed_forward_out);
    expect_close(output_of(block), expected, 1e-12, bias ? "with biases" : "without biases");
  }
}

TEST_P(CrossAttentionBlockTest, AttendOfAContextEqualsForward) {
  const auto mask = Mask::lengths(torch::tensor({4, 6}), kLk).to(device_);
  for_each_kind([&](CrossAttentionBlock& block) {
    const auto [output, weights] = block->attend(query_, block->context(key_, value_, mask));
    const auto [expected, expected_weights] = block->forward(query_, key_, value_, mask);
    EXPECT_TRUE(output.equal(expected));
    EXPECT_TRUE(weights.equal(expected_weights));
  });
}

TEST_P(CrossAttentionBlockTest, UnbatchedEqualsABatchOfOne) {
  for_each_kind([&](CrossAttentionBlock& block) {
    const auto [output, weights] = block->forward(query_[1], key_[1], value_[1]);
    const auto [outputs, all_weights] = block->forward(query_, key_, value_);
    expect_close(output, outputs[1], 1e-12, "output");
    expect_close(weights, all_weights[1], 1e-12, "weights");
  });
}

TEST_P(CrossAttentionBlockTest, ReturnsTheWeightsThatTheAttentionIsAskedFor) {
  for (const auto wanted : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    auto block = make(CrossAttentionBlockOptions(CrossAttentionOptions(attention_).attention_weights(wanted)));
    const auto weights = std::get<1>(block->forward(query_, key_, value_));
    const auto expected = std::get<1>(block->attention->forward(block->attention_norm(query_), key_, value_));
    EXPECT_EQ(weights.defined(), wanted != AttentionWeights::none);
    expect_close(weights, expected, 0, "weights");
  }
}

TEST_P(CrossAttentionBlockTest, MaskedKeysHaveNoInfluenceAndNoGradient) {
  const auto mask = Mask::lengths(torch::tensor({3, 6}), kLk).to(device_);
  for_each_kind([&](CrossAttentionBlock& block) {
    auto key = key_.clone().requires_grad_(), value = value_.clone().requires_grad_();
    const auto output = std::get<0>(block->forward(query_, key, value, mask));
    for (const auto& gradient : torch::autograd::grad({output.sin().sum()}, {key, value})) {
      EXPECT_TRUE(gradient[0].slice(0, 3).eq(0).all().item<bool>());
      EXPECT_TRUE(gradient[0].slice(0, 0, 3).ne(0).any().item<bool>());
    }
    key.detach()[0].slice(0, 3).fill_(1e3);
    value.detach()[0].slice(0, 3).fill_(-1e3);
    EXPECT_TRUE(std::get<0>(block->forward(query_, key, value, mask)).equal(output));
  });
}

TEST_P(CrossAttentionBlockTest, EmptyLengthsGiveFiniteResults) {
  auto block = make(options());
  EXPECT_EQ(std::get<0>(block->forward(query_.slice(1, 0, 0), key_, value_)).sizes(), (std::vector<int64_t>{kB, 0, 8}));
  const auto output = std::get<0>(block->forward(query_, key_.slice(1, 0, 0), value_.slice(1, 0, 0)));
  EXPECT_EQ(output.sizes(), query_.sizes());
  EXPECT_TRUE(output.isfinite().all().item<bool>());
}

TEST_P(CrossAttentionBlockTest, DropoutDropsBothBranchesInTrainingOnly) {
  auto block = make(options().dropout(1));
  EXPECT_TRUE(output_of(block).equal(query_));
  block->eval();
  auto without = make(options());
  load_weights(*without, [&] {
    NamedTensors tensors;
    for (const auto& parameter : block->named_parameters()) tensors[parameter.key()] = parameter.value();
    return tensors;
  }());
  EXPECT_TRUE(output_of(block).equal(output_of(without)));
  EXPECT_FALSE(output_of(block).equal(query_));

  auto some = make(options().dropout(0.5));
  EXPECT_FALSE(output_of(some).equal(output_of(some)));
}

TEST_P(CrossAttentionBlockTest, GradientsEqualDifferencesInFirstAndSecondOrder) {
  auto inner = CrossAttentionOptions(2, 3, 2, 2).num_heads(2).kv_heads(1).qkv_bias(false).output_bias(false);
  inner.attention_weights(AttentionWeights::none);
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    auto block = make(CrossAttentionBlockOptions(inner)
                          .norm(NormKind::rms)
                          .norm_placement(placement)
                          .gate(BlockGate::scalar)
                          .feed_forward(3)
                          .feed_forward_glu(placement == NormPlacement::before));
    block->attention_gate.detach().fill_(0.7);
    block->feed_forward_gate.detach().fill_(-0.4);
    std::vector<Tensor> inputs = {random({1, 2, 2}), random({1, 3, 3}), random({1, 3, 2})};
    for (auto& input : inputs) input.requires_grad_();
    for (const auto& parameter : block->parameters()) inputs.push_back(parameter);
    const auto f = [&](const std::vector<Tensor>& x) { return std::get<0>(block->forward(x[0], x[1], x[2])).sin().sum(); };
    expect_gradient(f, inputs, "block");
    expect_second_gradient(f, inputs, "block");
  }
}

TEST_P(CrossAttentionBlockTest, RunsInEveryTypeAndUnderAutocast) {
  auto exact = make(options().gate(BlockGate::scalar));
  const torch::NoGradGuard no_grad;
  exact->attention_gate.fill_(0.5);
  exact->feed_forward_gate.fill_(1);
  const auto expected = output_of(exact);
  const auto run = [&](at::ScalarType type) {
    auto block = CrossAttentionBlock(std::dynamic_pointer_cast<CrossAttentionBlockImpl>(exact->clone()));
    block->to(type);
    return std::get<0>(block->forward(query_.to(type), key_.to(type), value_.to(type)));
  };
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    const auto output = run(type);
    EXPECT_EQ(output.scalar_type(), type);
    // Here the weights are rounded too, which counts as one more store.
    expect_close(output, expected, 2 * tolerance(type, 6 * 8 + 12 + 10 + 2 * 32), c10::toString(type));
  }
  at::autocast::set_autocast_enabled(device_.type(), true);
  at::autocast::set_autocast_dtype(device_.type(), torch::kBFloat16);
  const auto output = run(torch::kFloat);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device_.type(), false);
  EXPECT_EQ(output.scalar_type(), torch::kFloat);  // the query's: only the branches have the narrow type
  expect_close(output, expected, 2 * tolerance(torch::kBFloat16, 0), "autocast");
}

TEST_P(CrossAttentionBlockTest, TrainsBetweenFrozenLayers) {
  torch::nn::Linear before(8, 8), after(8, 1);
  for (auto* layer : {&before, &after}) {
    (*layer)->to(device_, torch::kDouble);
    for (auto& parameter : (*layer)->parameters()) parameter.requires_grad_(false);
  }
  auto block = make(options().gate(BlockGate::scalar));
  torch::optim::Adam optimizer(block->parameters(), 1e-2);
  const auto target = value_.sum({1, 2}).view({kB, 1, 1}).expand({kB, kLq, 1});  // a function of the context alone
  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(after(std::get<0>(block->forward(before(query_), key_, value_))), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.05 * first);
}

TEST_P(CrossAttentionBlockTest, ClonesDeeply) {
  for_each_kind([&](CrossAttentionBlock& block) {
    auto copy = CrossAttentionBlock(std::dynamic_pointer_cast<CrossAttentionBlockImpl>(block->clone(device_)));
    const auto expected = output_of(block);
    EXPECT_TRUE(output_of(copy).equal(expected));
    const torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) parameter.zero_();
    EXPECT_TRUE(output_of(block).equal(expected));
  });
}

TEST_P(CrossAttentionBlockTest, SavesAndLoadsByName) {
  const TempDir directory;
  for_each_kind([&](CrossAttentionBlock& block) {
    save_safetensors(directory.file("block.safetensors"), *block);
    auto loaded = make(block->options);
    EXPECT_FALSE(output_of(loaded).equal(output_of(block)));
    const auto report = load_weights(*loaded, directory.file("block.safetensors"));
    EXPECT_EQ(report.loaded.size(), block->parameters().size());
    EXPECT_TRUE(output_of(loaded).equal(output_of(block)));
  });
}

TEST_P(CrossAttentionBlockTest, LoadsTheAttentionFromAFileOfItsOwn) {
  CrossAttention attention(attention_);
  NamedTensors file;
  for (const auto& parameter : attention->named_parameters()) file["model.fusion." + parameter.key()] = parameter.value();
  auto block = make(options());
  load_weights(*block->attention, file, {.prefix = "model.fusion."});
  EXPECT_TRUE(block->attention->query_linear->weight.cpu().equal(attention->query_linear->weight.to(torch::kDouble)));
}

TEST_P(CrossAttentionBlockTest, AnyModuleMayLeaveTheMaskOut) {
  auto block = make(options());
  torch::nn::AnyModule any(block);
  using Result = std::tuple<Tensor, Tensor>;
  EXPECT_TRUE(std::get<0>(any.forward<Result>(query_, key_, value_)).equal(output_of(block)));
  const auto mask = Mask::causal(CausalAlignment::upper_left);
  EXPECT_TRUE(std::get<0>(any.forward<Result>(query_, key_, value_, mask)).equal(output_of(block, mask)));
}

TEST_P(CrossAttentionBlockTest, ChangedOptionsAreRefusedWhereTheyDoNotFit) {
  const auto refusal = [&](const auto& change) {
    auto block = make(options());
    change(*block);
    return error_of<c10::ValueError>([&] { block->forward(query_, key_, value_); });
  };
  using Impl = CrossAttentionBlockImpl;
  EXPECT_EQ(refusal([](Impl& m) { m.options.dropout(2); }), "[cross_attention_block] dropout must lie in [0, 1], but is 2.");
  EXPECT_EQ(refusal([](Impl& m) { m.options.gate(BlockGate::scalar); }),
            "[cross_attention_block] options must fit the parameters, but specify another gate for attention_gate.");
  EXPECT_EQ(refusal([](Impl& m) { m.options.norm_eps(1); }),
            "[cross_attention_block] options must fit the parameters, but say another kind, size or eps for attention_norm.");
  EXPECT_EQ(refusal([](Impl& m) { m.options.feed_forward(0); }),
            "[cross_attention_block] options must fit the parameters, but say no feed_forward.");
  EXPECT_EQ(refusal([](Impl& m) { m.options.feed_forward_glu(!m.options.feed_forward_glu()); }).substr(0, 80),
            "[cross_attention_block] options must fit the parameters, but say a feed_forward_");
  EXPECT_EQ(refusal([](Impl& m) { m.attention->options.dropout(-1); }),
            "[cross_attention] dropout must lie in [0, 1], but is -1.");
}

TEST_P(CrossAttentionBlockTest, RefusesBadInputByName) {
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    auto block = make(options().norm_placement(placement));
    const auto value_error = [&](const auto&... arguments) {
      return error_of<c10::ValueError>([&] { block->forward(arguments...); });
    };
    const auto type_error = [&](const auto&... arguments) {
      return error_of<c10::TypeError>([&] { block->forward(arguments...); });
    };
    EXPECT_EQ(value_error(key_, key_, value_), "[cross_attention_block] query must have shape [B, Lq, 8], but has [2, 6, 12].");
    EXPECT_EQ(value_error(query_[0][0], key_, value_),
              "[cross_attention_block] query must have shape [B, Lq, 8], but has [8].");
    EXPECT_EQ(value_error(Tensor(), key_, value_),
              "[cross_attention_block] query must have shape [B, Lq, 8], but has undefined.");
    EXPECT_EQ(value_error(query_[0], key_, value_),
              "[cross_attention] query must have shape [2, Lq, 8] to match its context, but has [4, 8].");
    EXPECT_EQ(type_error(query_.to(torch::kFloat), key_, value_),
              "[cross_attention] query must be float64, the type of the parameters, but is float32.");
    EXPECT_EQ(type_error(query_.to(torch::kLong), key_, value_),
              "[cross_attention] query must be float64, the type of the parameters, but is int64.");
    EXPECT_EQ(value_error(query_, value_, value_), "[cross_attention] key must have shape [B, Lk, 12], but has [2, 6, 10].");
    if (!device_.is_cpu()) {
      EXPECT_EQ(type_error(query_.cpu(), key_, value_),
                "[cross_attention_block] query must be on " + device_.str() + ", as the parameters, but is on cpu.");
    }
  }
}

TEST_P(CrossAttentionBlockTest, RefusesAContextOfAnotherBlock) {
  auto block = make(options()), other = make(options());
  EXPECT_EQ(error_of<c10::ValueError>([&] { block->attend(query_, other->context(key_, value_)); }),
            "[cross_attention] context must be made with the weights that attend to it, but they are another module's, or have "
            "changed since. Make the context again.");
}

INSTANTIATE_TEST_SUITE_P(Devices, CrossAttentionBlockTest, testing::ValuesIn(devices()), device_name);

TEST(CrossAttentionBlockOptionsTest, ExampleOfTheHeader) {
  auto query = torch::randn({2, 4, 128}), key = torch::randn({2, 6, 256}), value = key;
  xattn::CrossAttentionBlock block(xattn::CrossAttentionOptions(128, 256, 256, 128).num_heads(4));
  auto [output, weights] = block->forward(query, key, value);
  EXPECT_EQ(output.sizes(), (std::vector<int64_t>{2, 4, 128}));
  EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{2, 4, 6}));
}

TEST(CrossAttentionBlockOptionsTest, DefaultsResolve) {
  CrossAttentionBlock block(CrossAttentionOptions(8, 12, 10, 8));
  EXPECT_EQ(block->options.feed_forward(), 32);
  EXPECT_EQ(block->feed_forward_in->weight.sizes(), (std::vector<int64_t>{32, 8}));
  EXPECT_EQ(block->attention_norm->options.kind(), NormKind::layer);
  EXPECT_EQ(block->attention_norm->options.eps(), 1e-5);
  EXPECT_EQ(block->feed_forward_norm->options.eps(), 1e-5);
}

TEST(CrossAttentionBlockOptionsTest, ParametersHaveTheirNamesAndShapes) {
  const CrossAttentionBlockOptions options(CrossAttentionOptions(8, 12, 10, 8).qkv_bias(false).output_bias(false));
  const auto shapes = [](const CrossAttentionBlockOptions& options) {
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& parameter : CrossAttentionBlock(options)->named_parameters()) {
      if (!parameter.key().starts_with("attention.")) shapes[parameter.key()] = parameter.value().sizes().vec();
    }
    return shapes;
  };
  using Shapes = std::map<std::string, std::vector<int64_t>>;
  auto gated = CrossAttentionBlockOptions(options).norm(NormKind::rms).gate(BlockGate::per_feature).feed_forward(20);
  EXPECT_EQ(shapes(gated), (Shapes{{"attention_norm.weight", {8}},
                                   {"attention_gate", {8}},
                                   {"feed_forward_norm.weight", {8}},
                                   {"feed_forward_in.weight", {20, 8}},
                                   {"feed_forward_in.bias", {20}},
                                   {"feed_forward_out.weight", {8, 20}},
                                   {"feed_forward_out.bias", {8}},
                                   {"feed_forward_gate", {8}}}));
  auto glu = CrossAttentionBlockOptions(options).norm(NormKind::none).feed_forward_glu(true).feed_forward_bias(false);
  EXPECT_EQ(shapes(glu), (Shapes{{"feed_forward_in.weight", {32, 8}},
                                 {"feed_forward_multiplier.weight", {32, 8}},
                                 {"feed_forward_out.weight", {8, 32}}}));
  auto small = CrossAttentionBlockOptions(options).gate(BlockGate::scalar).feed_forward(0);
  EXPECT_EQ(shapes(small), (Shapes{{"attention_norm.weight", {8}}, {"attention_norm.bias", {8}}, {"attention_gate", {1}}}));
  EXPECT_EQ(shapes(small.norm_bias(false)), (Shapes{{"attention_norm.weight", {8}}, {"attention_gate", {1}}}));
  EXPECT_EQ(shapes(CrossAttentionBlockOptions(options).norm(NormKind::none).feed_forward(0)), Shapes());
  EXPECT_TRUE(CrossAttentionBlock(options)->named_parameters().contains("attention.query_linear.weight"));
}

TEST(CrossAttentionBlockOptionsTest, RefusesWhatCannotBe) {
  const CrossAttentionBlockOptions good(CrossAttentionOptions(8, 12, 10, 8));
  const auto refusal = [](const CrossAttentionBlockOptions& options) {
    return error_of<c10::ValueError>([&] { CrossAttentionBlock block(options); });
  };
  auto options = [&] { return CrossAttentionBlockOptions(good); };
  EXPECT_EQ(refusal(options().attention(CrossAttentionOptions(8, 12, 10, 16))),
            "[cross_attention_block] attention must have a dim_output of 8, its dim_query, for the output to be added to the "
            "query, but has 16.");
  EXPECT_EQ(refusal(options().norm_eps(-1)), "[cross_attention_block] norm_eps must not be negative, but is -1.");
  EXPECT_EQ(refusal(options().feed_forward(-4)), "[cross_attention_block] feed_forward must not be negative, but is -4.");
  EXPECT_EQ(refusal(options().dropout(1.5)), "[cross_attention_block] dropout must lie in [0, 1], but is 1.5.");
  EXPECT_EQ(refusal(options().attention(CrossAttentionOptions(8, 12, 10, 8).num_heads(3))),
            "[cross_attention] dim_output must be a multiple of num_heads, but they are 8 and 3. Otherwise give head_dim.");
  EXPECT_EQ(refusal(options().attention(CrossAttentionOptions(0, 12, 10, 0))),
            "[cross_attention] dim_query must be at least 1, but is 0.");
}

TEST(CrossAttentionBlockOptionsTest, PrintsWhatBuildsItAgain) {
  const auto printed = [](const CrossAttentionBlock& block) {
    std::ostringstream stream;
    block->pretty_print(stream);
    return stream.str();
  };
  const CrossAttentionOptions attention(8, 12, 10, 8);
  EXPECT_EQ(printed(CrossAttentionBlock(attention)), "xattn::CrossAttentionBlock(CrossAttentionOptions(8, 12, 10, 8))");
  EXPECT_EQ(printed(CrossAttentionBlock(CrossAttentionOptions(attention).num_heads(2))),
            "xattn::CrossAttentionBlock(CrossAttentionOptions(8, 12, 10, 8).num_heads(2))");
  EXPECT_EQ(printed(CrossAttentionBlock(CrossAttentionBlockOptions(attention).feed_forward(0))),
            "xattn::CrossAttentionBlock(CrossAttentionBlockOptions(CrossAttentionOptions(8, 12, 10, 8)).feed_forward(0))");
  const CrossAttentionBlock full(CrossAttentionBlockOptions(CrossAttentionOptions(attention).num_heads(2))
                                     .norm(NormKind::rms)
                                     .norm_placement(NormPlacement::after)
                                     .norm_eps(0.5)
                                     .norm_bias(false)
                                     .gate(BlockGate::per_feature)
                                     .feed_forward(20)
                                     .activation(Activation::gelu_tanh)
                                     .feed_forward_glu(true)
                                     .feed_forward_bias(false)
                                     .dropout(0.25));
  EXPECT_EQ(
      printed(full),
      "xattn::CrossAttentionBlock(CrossAttentionBlockOptions(CrossAttentionOptions(8, 12, 10, 8).num_heads(2))"
      ".norm(NormKind::rms).norm_placement(NormPlacement::after).norm_eps(0.5).norm_bias(false).gate(BlockGate::per_feature)"
      ".feed_forward(20).activation(Activation::gelu_tanh).feed_forward_glu(true).feed_forward_bias(false).dropout(0.25))");
}

TEST(CrossAttentionBlockOptionsTest, ResetParametersStartsAfresh) {
  CrossAttentionBlockOptions options(CrossAttentionOptions(8, 12, 10, 8));
  CrossAttentionBlock block(options.gate(BlockGate::scalar).feed_forward_glu(true));
  NamedTensors before;
  for (auto& parameter : block->named_parameters()) {
    const torch::NoGradGuard no_grad;
    before[parameter.key()] = parameter.value().fill_(3).clone();
  }
  block->reset_parameters();
  for (const auto& parameter : block->named_parameters()) {
    EXPECT_TRUE(parameter.value().ne(before[parameter.key()]).all().item<bool>()) << parameter.key();
  }
  EXPECT_TRUE(block->attention_gate.eq(0).all().item<bool>());
  EXPECT_TRUE(block->attention_norm->weight.eq(1).all().item<bool>());
}

// Norms, branches and feed-forward in plain operations, around self-attention that a function computes.
TEST(SelfAttentionBlockTest, NormalisesKeysAndValuesAsItDoesTheQuery) {
  torch::manual_seed(0);
  const auto options = CrossAttentionOptions(16, 16, 16, 16).num_heads(4).attention_weights(AttentionWeights::per_head);
  CrossAttentionBlock block(CrossAttentionBlockOptions(options).norm_context(true));
  block->to(torch::kDouble);
  const auto x = torch::randn({2, 5, 16}, torch::kDouble);
  const auto mask = Mask::causal(CausalAlignment::upper_left);
  const auto normalised = block->attention_norm(x);
  const auto [attended, expected_weights] = block->attention->forward(normalised, normalised, normalised, mask);
  auto expected = x + attended;
  const auto hidden = torch::gelu(block->feed_forward_in(block->feed_forward_norm(expected)));
  expected = expected + block->feed_forward_out(hidden);
  const auto [output, weights] = block->forward(x, x, x, mask);
  expect_close(output, expected, 1e-12, "output");
  expect_close(weights, expected_weights, 1e-12, "weights");
  expect_close(std::get<0>(block->attend(x, block->context(x, x, mask))), expected, 1e-12, "with a kept context");
  const auto y = torch::randn({2, 5, 16}, torch::kDouble);
  expect_close(std::get<0>(block->forward(x, x.clone(), y)), std::get<0>(block->attend(x, block->context(x, y))), 1e-12,
               "others");
}

TEST(SelfAttentionBlockTest, RefusesItsOwnQueryAsAKeyThatItWouldNotNormalise) {
  const CrossAttentionOptions options(8, 8, 8, 8);
  const auto x = torch::randn({2, 3, 8});
  CrossAttentionBlock before{options};
  EXPECT_EQ(error_of<c10::ValueError>([&] { before->forward(x, x, x); }),
            "[cross_attention_block] key must be another tensor than the query, unless norm_context is set, but is the same: a "
            "block of self-attention with norms before normalises keys and values, too.");
  CrossAttentionBlock after(CrossAttentionBlockOptions(options).norm_placement(NormPlacement::after));
  CrossAttentionBlock without(CrossAttentionBlockOptions(options).norm(NormKind::none));
  after->forward(x, x, x);
  without->forward(x, x, x);
  EXPECT_EQ(
      error_of<c10::ValueError>(
          [] { CrossAttentionBlock(CrossAttentionBlockOptions(CrossAttentionOptions(8, 6, 6, 8)).norm_context(true)); }),
      "[cross_attention_block] attention must have a dim_key and dim_value of 8, its dim_query, for norm_context, but has 6 "
      "and 6.");
}

TEST(PlannedBlockTest, ForwardTakesTheCheapestOrderAndGivesTheSameResult) {
  torch::manual_seed(0);
  CrossAttentionBlock block(CrossAttentionOptions(64, 64, 64, 64).num_heads(4));
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({1, 1, 64}), y = torch::randn({1, 500, 64});
  EXPECT_EQ(block->explain(1, 1, 500), block->attention->explain(1, 1, 500));
  EXPECT_NE(block->explain(1, 1, 500).find("fold_into_query"), std::string::npos);
  expect_close(std::get<0>(block->forward(x, y, y)), std::get<0>(block->attend(x, block->context(y, y))), 1e-4, "output");
  const auto few = block->context(y, y, {}, {.expected_queries = 1});
  EXPECT_EQ(few.orders().logits, Order::fold_into_query);
  expect_close(std::get<0>(block->attend(x, few)), std::get<0>(block->forward(x, y, y)), 1e-4, "with a raw context");
}

TEST(BlockWithoutGradientsTest, EqualsTheBlockWithThem) {  // on other kernels
  torch::manual_seed(6);
  const auto query = 3 * torch::randn({9, 3, 16}).transpose(0, 1), key = torch::randn({3, 20, 16});  // not contiguous
  for (const auto activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
    for (const auto norm : {NormKind::layer, NormKind::rms, NormKind::none}) {
      for (const auto gate : {BlockGate::none, BlockGate::scalar, BlockGate::per_feature}) {
        for (const bool glu : {false, true}) {
          CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(16, 16, 16, 16).num_heads(2))
                                        .norm(norm)
                                        .norm_placement(glu ? NormPlacement::before : NormPlacement::after)
                                        .activation(activation)
                                        .gate(gate)
                                        .feed_forward_glu(glu));
          {
            const torch::NoGradGuard no_grad;
            for (auto& parameter : block->parameters()) parameter.add_(torch::randn_like(parameter), 0.3);
          }
          const auto expected = std::get<0>(block->forward(query, key, key)).detach();
          const torch::NoGradGuard no_grad;
          const auto output = std::get<0>(block->forward(query, key, key));
          expect_close(output, expected, tolerance(torch::kFloat, 200), "output");
        }
      }
    }
  }
}

TEST(SelfAttentionBlockTest, AContextBelongsToTheNormThatItPassed) {
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(8, 8, 8, 8)).norm_context(true));
  const auto x = torch::randn({2, 3, 8});
  const auto context = block->context(x, x);
  block->attend(x, context);
  const std::string error =
      "[cross_attention_block] context must be made with the weights that attend to it, but they are another module's, or have "
      "changed since. Make the context again.";
  EXPECT_EQ(error_of<c10::ValueError>([&] { block->attend(x, block->attention->context(x, x)); }), error);
  const torch::NoGradGuard no_grad;
  block->attention_norm->weight.mul_(2);
  EXPECT_EQ(error_of<c10::ValueError>([&] { block->attend(x, context); }), error);
}

TEST(BlockOptionsTest, RefusesAnotherNormBiasThanItsNormsHave) {
  CrossAttentionBlock block(CrossAttentionOptions(8, 12, 12, 8));
  block->options.norm_bias(false);
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12});
  EXPECT_EQ(error_of<c10::ValueError>([&] { block->forward(x, y, y); }),
            "[cross_attention_block] options must fit the parameters, but say another norm_bias for attention_norm.");
}

TEST(GatedBlockTest, TheOutputHasTheTypeOfAHalfQueryUnderAutocast) {
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(8, 12, 12, 8)).gate(BlockGate::scalar));
  const auto x = torch::randn({2, 3, 8}).to(torch::kBFloat16), y = torch::randn({2, 5, 12});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto output = std::get<0>(block->forward(x, y, y));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(output.scalar_type(), torch::kBFloat16);
}

TEST(BlockOptionsTest, OptionsOfTheAttentionAreThoseOfItsModule) {
  CrossAttentionBlock block(CrossAttentionOptions(8, 12, 12, 8));
  const auto x = torch::randn({2, 3, 8}), y = torch::randn({2, 5, 12});
  EXPECT_TRUE(block->options.attention() == block->attention->options) << "with every default resolved";
  block->attention->options.attention_weights(AttentionWeights::per_head);
  EXPECT_EQ(std::get<1>(block->forward(x, y, y)).sizes(), (std::vector<int64_t>{2, 1, 3, 5}));
  block->options.attention().scale(0.5);
  EXPECT_EQ(
      error_of<c10::ValueError>([&] { block->forward(x, y, y); }),
      "[cross_attention_block] options.attention must be as the module was made, but has changed. Change attention->options.");
}

}  // namespace
}  // namespace xattn::test
