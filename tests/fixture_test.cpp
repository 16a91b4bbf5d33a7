// SPDX-License-Identifier: Apache-2.0
#include "fixture.h"

#include <ATen/autocast_mode.h>
#include <gtest/gtest-spi.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace xattn::test {
namespace {

using torch::Tensor;

// Every file with inputs and outputs, by name.
std::vector<std::string> fixture_names() {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(XATTN_TEST_DATA)) {
    if (file.path().extension() != ".safetensors") continue;
    try {
      const auto fixture = open_checkpoint(file.path());
      if (fixture.contains("query") && fixture.contains("cotangent.output")) names.push_back(file.path().stem());
    } catch (const FileError&) {
      names.push_back(file.path().stem());  // its own test reports the error
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

// For messages: the origin of the expected results, and how to make them again.
std::string origin(const Fixture& fixture) {
  return fixture.name + ".safetensors, made by " + fixture.about("truth") + " (stale? python3 " + fixture.about("script") + ")";
}

// The error that a run in `type` may have, relative to the largest element: `tolerance` of compare.h for the lengths of all
// sums that a gradient passes through. Large logits have a bound of their own. An error of a logit is a relative error of its
// weight, and each term of the chain of sums behind it rounds by eps times the logit; independent errors add up like a
// random walk.
double tolerance_of(const Fixture& fixture, at::ScalarType type) {
  const auto options = fixture.module(fixture.options())->options;
  const auto inner = options.num_heads() * (*options.head_dim() + *options.value_head_dim());
  const auto features = options.dim_query() + options.dim_key() + options.dim_value() + options.dim_output();
  if (const auto logit = fixture.about("largest_logit"); !logit.empty()) {
    const auto terms = options.dim_query() + *options.head_dim() + options.dim_key();
    const auto eps = type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    return std::sqrt(static_cast<double>(terms)) * eps * std::stod(logit);
  }
  const auto rows = fixture.rows("query") + fixture.rows("key") + fixture.rows("value");
  return tolerance(type, features + inner + rows);
}

// One run of a case: its inputs and results.
struct Run {
  CrossAttention module = nullptr;
  std::map<std::string, Tensor> leaves;  // inputs and bias, by their names in the file
  Tensor output, weights;
};

struct Autocast {
  Autocast(const Fixture& fixture, at::Device device) : type(device.type()), before(at::autocast::is_autocast_enabled(type)) {
    if (fixture.about("autocast").empty()) return;
    at::autocast::set_autocast_enabled(type, true);
    at::autocast::set_autocast_dtype(type, type_of_name(fixture.about("autocast")));
  }
  ~Autocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(type, before);
  }
  at::DeviceType type;
  bool before;
};

Run run(const Fixture& fixture, const CrossAttentionOptions& options, at::ScalarType type, at::Device device) {
  Run run;
  run.module = fixture.module(options);
  run.module->to(device, type);
  for (const auto* name : {"query", "key", "value", "mask.bias"}) {
    if (fixture.has(name)) run.leaves[name] = fixture.tensors.at(name).to(device, type, false, /*copy=*/true).requires_grad_();
  }
  const auto at = [&](const char* name) { return run.leaves.contains(name) ? run.leaves.at(name) : run.leaves.at("query"); };
  const auto bias = fixture.has("mask.bias") ? run.leaves.at("mask.bias") : Tensor();
  const Autocast autocast(fixture, device);
  std::tie(run.output, run.weights) = run.module->forward(at("query"), at("key"), at("value"), fixture.mask(device, bias));
  return run;
}

void backward(const Run& run, const Fixture& fixture) {
  std::vector<Tensor> results, cotangents;
  const auto add = [&](const Tensor& result, const char* name) {
    if (!result.defined() || !fixture.has(name)) return;
    results.push_back(result);
    cotangents.push_back(fixture.tensors.at(name).to(result.device(), result.scalar_type()));
  };
  add(run.output, "cotangent.output");
  add(run.weights, "cotangent.attention_weights");
  torch::autograd::backward(results, cotangents);
}

// A bias is the weight of an input that is always one, so the two are compared as one tensor [weight | bias].
NamedTensors with_joined_biases(NamedTensors gradients) {
  for (auto item = gradients.begin(); item != gradients.end();) {
    const auto [name, bias] = *item;
    const auto layer = name.substr(0, name.rfind('.'));
    const auto weight = gradients.find(layer + ".weight");
    if (!name.ends_with(".bias") || weight == gradients.end()) {
      ++item;
      continue;
    }
    weight->second = torch::cat({weight->second.reshape({bias.size(0), -1}), bias.unsqueeze(1)}, 1);
    item = gradients.erase(item);
  }
  return gradients;
}

// The file's gradients: "grad.NAME" or, for large weights, the sums over each axis, "grad_sum_0.NAME" and "grad_sum_1.NAME".
NamedTensors expected_gradients(const Fixture& fixture) {
  NamedTensors gradients;
  for (const auto& [name, tensor] : fixture.tensors) {
    if (name.starts_with("grad.")) gradients[name.substr(5)] = tensor;
    if (name.starts_with("grad_sum_")) gradients[name.substr(5)] = tensor;
  }
  return with_joined_biases(gradients);
}

// The gradients of a run, in the same form.
NamedTensors actual_gradients(const Run& run, const Fixture& fixture) {
  NamedTensors gradients;
  const auto add = [&](const std::string& name, const Tensor& gradient) {
    ASSERT_TRUE(gradient.defined()) << name;
    const auto exact = gradient.to(at::kCPU, at::kDouble);
    if (!fixture.has("grad_sum_0." + name)) {
      gradients[name] = exact;
      return;
    }
    gradients["sum_0." + name] = exact.sum(0);
    gradients["sum_1." + name] = exact.sum(1);
  };
  for (const auto& [name, leaf] : run.leaves) add(name, leaf.grad());
  for (const auto& parameter : run.module->named_parameters()) add("weights." + parameter.key(), parameter.value().grad());
  return with_joined_biases(gradients);
}

void expect_gradients(const NamedTensors& actual, const NamedTensors& expected, double allowed, const std::string& what) {
  double largest = 0;
  for (const auto& [name, gradient] : expected) largest = std::max(largest, gradient.abs().max().item<double>());
  for (const auto& [name, gradient] : expected) {
    ASSERT_TRUE(actual.contains(name)) << name << " of " << what;
    if (gradient.abs().max().item<double>() > 1e-12 * largest) {
      expect_close(actual.at(name), gradient, allowed, "gradient of " + name + " of " + what);
    } else {
      // Zero in mathematics, as with a single key: only the rounding of cancelling terms remains.
      EXPECT_LE(actual.at(name).abs().max().item<double>(), allowed * largest) << "gradient of " << name << " of " << what;
    }
  }
  EXPECT_EQ(actual.size(), expected.size()) << what;
}

void expect_matches(const Fixture& fixture, const CrossAttentionOptions& options, at::ScalarType type, at::Device device) {
  const auto what = std::string(c10::toString(type)) + " on " + device.str() + ", from " + origin(fixture);
  const auto computed = run(fixture, options, type, device);
  const auto allowed = tolerance_of(fixture, computed.output.scalar_type());
  expect_close(computed.output, fixture.tensors.at("output"), allowed, "output of " + what);
  ASSERT_EQ(computed.weights.defined(), fixture.has("attention_weights")) << what;
  if (computed.weights.defined()) {
    expect_close(computed.weights, fixture.tensors.at("attention_weights"), allowed, "attention_weights of " + what);
  }
  backward(computed, fixture);
  expect_gradients(actual_gradients(computed, fixture), expected_gradients(fixture), allowed, what);
}

void expect_types(const Fixture& fixture, at::ScalarType type, at::Device device) {
  const auto computed = run(fixture, fixture.options(), type, device);
  const bool autocast = !fixture.about("autocast").empty();
  EXPECT_EQ(computed.output.scalar_type(), autocast ? type_of_name(fixture.about("output_dtype")) : type);
  if (!computed.weights.defined()) return;
  // The file records the CPU; on CUDA, autocast computes every softmax in float32.
  const auto under_autocast = device.is_cpu() ? fixture.about("attention_weights_dtype") : "float32";
  EXPECT_EQ(computed.weights.scalar_type(), autocast ? type_of_name(under_autocast) : type);
}

class FixtureTest : public testing::TestWithParam<std::string> {};

TEST_P(FixtureTest, MatchesPyTorch) {
  const auto fixture = load_fixture(GetParam());
  ASSERT_FALSE(fixture.types().empty());
  for (const auto device : devices()) {
    for (const auto type : fixture.types()) {
      expect_matches(fixture, fixture.options(), type, device);
      expect_types(fixture, type, device);
    }
  }
}

TEST_P(FixtureTest, MatchesPyTorchInEveryOrder) {
  const auto fixture = load_fixture(GetParam());
  const auto sizes = fixture.module(fixture.options())->options;
  PlanRequest request;
  request.query_norm = request.key_norm = sizes.qk_norm() != NormKind::none;
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      const auto options = fixture.options().plan(PlanMode::pin({logits, values}));
      if (!illegal_for_logits(logits, request).empty()) {
        EXPECT_THROW(CrossAttention{options}, c10::ValueError);
        continue;
      }
      SCOPED_TRACE(std::string(name_of(logits)) + ", " + std::string(name_of(values)));
      for (const auto device : devices()) {
        for (const auto type : fixture.types()) expect_matches(fixture, options, type, device);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, FixtureTest, testing::ValuesIn(fixture_names()), [](const auto& info) { return info.param; });

// Each of the tests below checks one more property of every fixture.
template <class F>
void for_each_fixture(F check) {
  for (const auto device : devices()) {
    for (const auto& name : fixture_names()) {
      SCOPED_TRACE(name + " on " + device.str());
      check(load_fixture(name), device);
    }
  }
}

TEST(FixturesTest, UnbatchedEqualsTheEntryOfABatch) {
  for_each_fixture([](const Fixture& fixture, at::Device device) {
    auto module = fixture.module(fixture.options());
    module->to(device);
    const auto input = [&](const char* name, int64_t entry) {
      return fixture.tensors.at(fixture.has(name) ? name : "query")[entry].to(device, at::kDouble);
    };
    const auto allowed = tolerance_of(fixture, at::kDouble);
    for (int64_t b = 0; b < fixture.tensors.at("query").size(0); ++b) {
      const auto [output, weights] =
          module->forward(input("query", b), input("key", b), input("value", b), fixture.mask(device, {}, b));
      expect_close(output, fixture.tensors.at("output")[b], allowed, "output");
      ASSERT_EQ(weights.defined(), fixture.has("attention_weights"));
      if (weights.defined()) expect_close(weights, fixture.tensors.at("attention_weights")[b], allowed, "attention_weights");
    }
  });
}

// Without weights the fused path runs where it can, so this also compares it with PyTorch, and its gradients with the
// definition's.
TEST(FixturesTest, WantedWeightsChangeNeitherOutputNorGradients) {
  for_each_fixture([](const Fixture& fixture, at::Device device) {
    if (!fixture.about("autocast").empty()) return;
    const auto allowed = tolerance_of(fixture, at::kDouble);
    const auto run_for = [&](AttentionWeights wanted) {
      return run(fixture, fixture.options().attention_weights(wanted), at::kDouble, device);
    };
    const auto per_head = run_for(AttentionWeights::per_head), mean = run_for(AttentionWeights::mean);
    const auto none = run_for(AttentionWeights::none);
    EXPECT_FALSE(none.weights.defined());
    expect_close(mean.weights, per_head.weights.mean(1), allowed, "mean of the weights");
    for (const auto* other : {&per_head, &mean, &none}) {
      expect_close(other->output, fixture.tensors.at("output"), allowed, "output");
      other->output.backward(fixture.tensors.at("cotangent.output").to(device, at::kDouble));
    }
    const auto expected = actual_gradients(per_head, fixture);
    expect_gradients(actual_gradients(mean, fixture), expected, allowed, "mean");
    expect_gradients(actual_gradients(none, fixture), expected, allowed, "none");
  });
}

TEST(FixturesTest, TheSameSeedGivesTheBitsOfPyTorch) {
  const auto fixture = load_fixture("seeded_initialisation");
  torch::manual_seed(std::stoll(fixture.about("seed")));
  CrossAttention module(fixture.options());
  for (const auto& parameter : module->named_parameters()) {
    EXPECT_TRUE(parameter.value().equal(fixture.tensors.at("weights." + parameter.key()))) << parameter.key();
  }
}

TEST(FixturesTest, TheSameSeedGivesTheBitsOfPyTorchInTheExample) {
  const auto fixture = load_fixture("reference_example");
  const auto parameters = fixture.module(fixture.options())->named_parameters();
  for (const auto* name : {"query_linear", "key_linear", "value_linear", "output_linear"}) {
    const auto weight = std::string(name) + ".weight";
    EXPECT_TRUE(parameters[weight][-1].equal(fixture.tensors.at("last_row." + weight).to(at::kDouble))) << name;
  }
}

// The larger model of the TorchScript file, in C++.
struct AnswerModelImpl : torch::nn::Module {
  Tensor forward(const Tensor& tokens, const Tensor& features) {
    const auto [fused, weights] = fusion->forward(embedding(tokens), features, features);
    return classifier(fused.mean(1));
  }
  torch::nn::Embedding embedding = register_module("embedding", torch::nn::Embedding(20, 8));
  CrossAttention fusion = register_module("fusion", CrossAttention(8, 12, 12, 16));
  torch::nn::Linear classifier = register_module("classifier", torch::nn::Linear(16, 5));
};
TORCH_MODULE(AnswerModel);

TEST(FixturesTest, ATorchScriptFileLoadsByNameIntoALargerModel) {
  const auto fixture = load_fixture("reference_in_model");
  AnswerModel model;
  const auto report = load_weights(*model, data_path(fixture.about("weights")));
  EXPECT_EQ(report.loaded.size(), model->parameters().size());
  const auto logits = model->forward(fixture.tensors.at("tokens"), fixture.tensors.at("key"));
  expect_close(logits, fixture.tensors.at("logits"), tolerance_of(fixture, at::kFloat), "logits of " + origin(fixture));
}

// The comparison is sharp: it notices a slightly wrong weight, in every type.
TEST(FixturesTest, TheToleranceNoticesAWrongWeight) {
  const auto fixture = load_fixture("reference");
  for (const auto type : fixture.types()) {
    auto wrong = fixture;
    auto& weight = wrong.tensors["weights.value_linear.weight"];
    weight = weight.to(at::kDouble) * (1 + 10 * tolerance_of(fixture, type));
    testing::TestPartResultArray failures;
    {
      const testing::ScopedFakeTestPartResultReporter reporter(
          testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &failures);
      expect_matches(wrong, wrong.options(), type, at::kCPU);
    }
    EXPECT_GT(failures.size(), 0) << c10::toString(type);
  }
}

}  // namespace
}  // namespace xattn::test
