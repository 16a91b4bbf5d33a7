// SPDX-License-Identifier: Apache-2.0
#include "loading/layouts.h"

#include <torch/torch.h>
#include <xattn/find_layers.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "loading/recipes.h"
#include "test_util.h"

namespace xattn {
namespace {

using test::data_path;
using test::error_of;
using test::TempDir;

// Made by scripts/layout_fixtures.py from the classes that write such files: weights with their neighbours, and inputs and
// outputs of the attention layer alone.
struct Family {
  std::string name;
  Checkpoint weights = open_checkpoint(data_path("layouts/" + name + ".safetensors"));
  Checkpoint expected = open_checkpoint(data_path("layouts/" + name + ".expect.safetensors"));

  std::string metadata(const std::string& key) const {
    const auto found = expected.metadata().find(key);
    return found == expected.metadata().end() ? "" : found->second;
  }
  bool has_positions() const { return !metadata("positions").empty(); }  // which are added to the inputs already
  int64_t heads() const { return std::stoll(metadata("num_heads")); }
  torch::Tensor input(const std::string& input_name) const {
    return expected.contains(input_name) ? expected.tensor(input_name) : torch::Tensor();
  }
};

// Layers with a second context are in decoupled_test.cpp.
std::vector<std::string> families() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("layouts"))) {
    const auto file = entry.path().filename().string();
    if (!file.ends_with(".expect.safetensors") || file.ends_with(".block.expect.safetensors")) continue;
    if (open_checkpoint(entry.path().string()).contains("ip_context")) continue;
    names.push_back(file.substr(0, file.find('.')));
  }
  std::ranges::sort(names);
  return names;
}

Mask mask_of(const torch::Tensor& mask) {
  if (!mask.defined()) return {};
  return mask.dim() == 2 ? Mask::key_padding(mask) : Mask::dense(mask);
}

class LayoutsTest : public testing::TestWithParam<std::string> {};

TEST_P(LayoutsTest, FindsTheLayerAndComputesTheFamilysOutput) {
  const Family family{GetParam()};
  const auto several = choose_layer(family.weights, family.metadata("prefix"));
  EXPECT_EQ(several.prefix, family.metadata("prefix"));
  const auto attention = cross_attention_from(family.weights, {.prefix = family.metadata("prefix"),
                                                               .num_heads = family.heads(),
                                                               .attention_weights = AttentionWeights::per_head,
                                                               .allow_unexpected = family.has_positions(),
                                                               .without_input_norms = true});  // they are applied below
  auto [query_norm, context_norm] = input_norms(family.weights, several);
  const auto key = family.input(family.expected.contains("key") ? "key" : "context");
  const auto value = family.input(family.expected.contains("value") ? "value" : "context");
  const torch::NoGradGuard no_grad;
  const auto [output, weights] = attention.ptr()->forward(query_norm(family.input("query")), context_norm(key),
                                                          context_norm(value), mask_of(family.input("mask")));
  const auto expected = family.input("output");
  const auto scale = expected.abs().max().item<double>();
  EXPECT_LE((output - expected).abs().max().item<double>(), 2e-6 * scale) << several.layout;
  if (const auto expected_weights = family.input("weights"); expected_weights.defined()) {
    EXPECT_TRUE(weights.allclose(expected_weights, 1e-5, 1e-6));
  }
}

TEST_P(LayoutsTest, ChoosesTheOnlyCrossAttentionLayer) {
  const Family family{GetParam()};
  const auto prefix = family.metadata("prefix");
  const auto layers = find_layers(family.weights.tensors());
  const auto cross = std::ranges::count(layers, AttentionKind::cross, &FoundLayer::kind);
  if (cross <= 1) {
    EXPECT_EQ(choose_layer(family.weights).prefix, prefix);
    return;
  }
  const auto message = error_of<FileError>([&] { return choose_layer(family.weights); });
  EXPECT_NE(message.find("\"" + prefix + "\""), std::string::npos) << message;
  EXPECT_NE(message.find("prefix must be one of "), std::string::npos) << message;
}

TEST_P(LayoutsTest, SpellsTheLayerAsItWasFound) {
  const Family family{GetParam()};
  const auto prefix = family.metadata("prefix");
  const auto layer = choose_layer(family.weights, prefix);
  NamedTensors parameters;
  for (const auto& [name, recipe] : detail::recipes(layer, family.weights.tensors())) {
    parameters.emplace(name, recipe.make(lazy(family.weights)));
  }
  for (const auto& [name, tensor] : detail::spell(parameters, detail::layout_named(layer.layout), prefix)) {
    EXPECT_TRUE(torch::equal(tensor, family.weights.tensor(name))) << name;
  }
}

TEST_P(LayoutsTest, LoadsIntoALayerOfTheSameOptions) {
  const Family family{GetParam()};
  const auto prefix = family.metadata("prefix");
  const LayerOptions made{
      .prefix = prefix, .num_heads = family.heads(), .allow_unexpected = family.has_positions(), .without_input_norms = true};
  const auto expected = cross_attention_from(family.weights, made);
  CrossAttention attention(expected->options);
  const auto report = load_weights(*attention, family.weights,
                                   {.prefix = prefix, .allow_unexpected = family.has_positions(), .without_input_norms = true});
  EXPECT_EQ(report.loaded.size(), attention->parameters().size());
  for (const auto& item : expected->named_parameters()) {
    EXPECT_TRUE(attention->named_parameters()[item.key()].equal(item.value())) << item.key();
  }
}

INSTANTIATE_TEST_SUITE_P(Families, LayoutsTest, testing::ValuesIn(families()), [](const auto& info) { return info.param; });

TEST(LayoutsOfOneWeightTest, AreRefusedForALayerWhoseQueryAndKeyDiffer) {
  const Family family{"lightglue"};
  const auto layer = choose_layer(family.weights, family.metadata("prefix"));
  NamedTensors parameters;
  for (const auto& [name, recipe] : detail::recipes(layer, family.weights.tensors())) {
    parameters.emplace(name, recipe.make(lazy(family.weights)));
  }
  const auto& layout = detail::layout_named("lightglue");
  EXPECT_EQ(detail::spell(parameters, layout).size(), 6U);
  parameters.at("key_linear.weight") = parameters.at("key_linear.weight") + 1;
  EXPECT_EQ(error_of<c10::ValueError>([&] { detail::spell(parameters, layout); }),
            "[layouts] layout lightglue has one to_qk.weight for query and key, but theirs differ.");
}

TEST(LayoutsOfTwoDirectionsTest, TheOtherOneIsAskedForByName) {
  const Family family{"bidirectional"};
  const auto tensor = [&](const std::string& name) { return family.weights.tensor("joint." + name); };
  const auto attention = cross_attention_from(family.weights, {.layout = "bidirectional_context", .num_heads = 2});
  const torch::NoGradGuard no_grad;
  const auto x = family.input("query"), context = family.input("context");
  const auto heads = [](const torch::Tensor& y, const torch::Tensor& weight) {
    return y.matmul(weight.t()).unflatten(-1, {2, 6}).transpose(1, 2);
  };
  const auto logits = heads(x, tensor("to_qk.weight")).matmul(heads(context, tensor("context_to_qk.weight")).transpose(2, 3));
  const auto weights = (logits / std::sqrt(6.0)).softmax(2).transpose(2, 3);  // over x, for each row of the context
  const auto merged = weights.matmul(heads(x, tensor("to_v.weight"))).transpose(1, 2).flatten(2);
  const auto expected = merged.matmul(tensor("context_to_out.weight").t()) + tensor("context_to_out.bias");
  EXPECT_TRUE(std::get<0>(attention.ptr()->forward(context, x, x)).allclose(expected, 1e-5, 1e-5));
}

TEST(LayoutsOfKeysAndValuesInOneTest, MayHaveBiasesOfAnyOfTheirParts) {
  const std::vector<std::array<std::string, 3>> spellings = {
      {"to_q", "to_kv", "to_out"}, {"to_q", "to_kv", "to_out.0"},     {"fn.to_q", "fn.to_kv", "fn.to_out"},
      {"q", "kv", "proj"},         {"q_linear", "kv_linear", "proj"}, {"Wq", "Wkv", "out_proj"}};
  for (const auto& names : spellings) {
    for (int biases = 0; biases < 8; ++biases) {
      NamedTensors tensors;
      const std::array<std::array<int64_t, 2>, 3> sizes = {{{16, 8}, {32, 12}, {8, 16}}};
      for (size_t i = 0; i < 3; ++i) {
        tensors["cross." + names[i] + ".weight"] = torch::randn(sizes[i]);
        if ((biases >> i) % 2 == 1) tensors["cross." + names[i] + ".bias"] = torch::randn({sizes[i][0]});
      }
      if (names[0].starts_with("fn.")) {
        tensors["cross.norm.weight"] = torch::ones({8});
        tensors["cross.norm_context.weight"] = torch::ones({12});
      }
      const TempDir dir;
      save_safetensors(dir.file("x.safetensors"), tensors);
      const LayerOptions options{.num_heads = 2, .without_input_norms = true};
      const auto attention = cross_attention_from(open_checkpoint(dir.file("x.safetensors")), options);
      const auto has = [&](const torch::nn::Linear& linear) { return linear->bias.defined(); };
      EXPECT_EQ(has(attention->query_linear), biases % 2 == 1) << names[0] << biases;
      EXPECT_EQ(has(attention->key_linear), biases / 2 % 2 == 1) << names[0] << biases;
      EXPECT_EQ(has(attention->value_linear), biases / 2 % 2 == 1) << names[0] << biases;
      EXPECT_EQ(has(attention->output_linear), biases / 4 == 1) << names[0] << biases;
      if (biases / 2 % 2 == 0) continue;
      EXPECT_TRUE(attention->value_linear->bias.equal(tensors.at("cross." + names[1] + ".bias").slice(0, 16)));
    }
  }
}

// ---- Layouts of a user -----------------------------------------------------------------------------------------------------

// Names that no table has: keys in front of values in one transposed weight, norms of queries and keys, a scale.
Layout own_layout() {
  return {.name = "mine",
          .projections = {LinearNames{"ask.w", "ask.b"},
                          {"tell.w", "tell.b", 0, 2, 2},
                          {"tell.w", "tell.b", 1, 2, 2},
                          {"say.w", ""}},
          .transposed = true,
          .scale = 0.4,
          .qk_norm = {"ask_norm", "tell_norm", 1e-3},
          .beside = {"counter", "around."}};
}

// A layer of 8 features and a context of 12, with 2 heads of 3, by these names.
NamedTensors own_file() {
  const auto draw = [](const std::vector<int64_t>& shape) { return torch::randn(shape); };
  return {{"a.ask.w", draw({8, 6})},           {"a.ask.b", draw({6})},
          {"a.tell.w", draw({12, 12})},        {"a.tell.b", draw({12})},
          {"a.say.w", draw({6, 8})},           {"a.ask_norm.weight", draw({3})},
          {"a.tell_norm.weight", draw({3})},   {"a.counter", draw({})},
          {"a.around.norm.weight", draw({8})}, {"b.q_proj.weight", draw({4, 4})},
          {"b.k_proj.weight", draw({4, 4})},   {"b.v_proj.weight", draw({4, 4})},
          {"b.out_proj.weight", draw({4, 4})}};
}

struct OwnLayer {
  OwnLayer() { save_safetensors(dir.file("x.safetensors"), tensors); }
  Checkpoint file() const { return open_checkpoint(dir.file("x.safetensors")); }
  TempDir dir;
  NamedTensors tensors = own_file();
};

TEST(OwnLayoutTest, FindsTheLayersThatHaveItsNames) {
  const OwnLayer own;
  EXPECT_TRUE(std::ranges::all_of(find_layers(own.file().tensors()), [](const auto& layer) { return layer.prefix == "b."; }));
  const auto layers = find_layers(own.file().tensors(), own_layout());
  ASSERT_EQ(layers.size(), 1U);
  EXPECT_EQ(layers[0].prefix, "a.");
  EXPECT_EQ(layers[0].layout, "mine");
  EXPECT_EQ(layers[0].kind, AttentionKind::cross);
  EXPECT_EQ(layers[0].possible_heads(), std::vector<int64_t>({2}));
  EXPECT_EQ(unexplained_names(layers[0], own.file().tensors()), std::vector<std::string>());
  EXPECT_EQ(choose_layer(own.file(), "a", own_layout()).prefix, "a.");
}

TEST(OwnLayoutTest, ALayerIsMadeAndComputesWhatTheLayoutSays) {
  const OwnLayer own;
  const auto attention =
      cross_attention_from(own.file(), {.layout = own_layout(), .attention_weights = AttentionWeights::per_head});
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 3, 8}), context = torch::randn({2, 5, 12});
  const auto heads = [](const torch::Tensor& y) { return y.unflatten(-1, {2, 3}).transpose(1, 2); };
  const auto norm = [](const torch::Tensor& y, const torch::Tensor& weight) {
    return y / (y.square().mean(-1, true) + 1e-3).sqrt() * weight;
  };
  const auto& t = own.tensors;
  const auto both = (context.matmul(t.at("a.tell.w")) + t.at("a.tell.b")).chunk(2, -1);
  const auto q = norm(heads(x.matmul(t.at("a.ask.w")) + t.at("a.ask.b")), t.at("a.ask_norm.weight"));
  const auto k = norm(heads(both[0]), t.at("a.tell_norm.weight"));
  const auto expected_weights = (0.4 * q.matmul(k.transpose(-1, -2))).softmax(-1);
  const auto expected = expected_weights.matmul(heads(both[1])).transpose(1, 2).flatten(2).matmul(t.at("a.say.w"));
  const auto [output, weights] = attention.ptr()->forward(x, context, context);
  EXPECT_TRUE(weights.allclose(expected_weights, 1e-5, 1e-6));
  EXPECT_TRUE(output.allclose(expected, 1e-5, 1e-5));
}

TEST(OwnLayoutTest, LoadsIntoModulesAndChecksTheScale) {
  const OwnLayer own;
  const auto expected = cross_attention_from(own.file(), {.layout = own_layout()});
  CrossAttention attention(expected->options);
  EXPECT_EQ(load_weights(*attention, own.file(), {.layout = own_layout()}).loaded.size(), 9U);
  EXPECT_TRUE(attention->value_linear->weight.equal(expected->value_linear->weight));
  EXPECT_EQ(load_weights(*attention, own.tensors, {.prefix = "a", .layout = own_layout()}).surrounding.size(), 2U);
  auto options = expected->options;
  CrossAttention other(options.scale(1));
  const auto message = error_of<LoadError>([&] { load_weights(*other, own.file(), {.layout = own_layout()}); });
  EXPECT_NE(message.find("the module must have scale 0.4, as layout mine needs, but has 1"), std::string::npos) << message;
}

TEST(OwnLayoutTest, NamesThatItDoesNotExplainAreRefused) {
  OwnLayer own;
  auto layout = own_layout();
  layout.beside = {"counter"};
  EXPECT_EQ(unexplained_names(choose_layer(own.file(), {}, layout), own.file().tensors()),
            std::vector<std::string>({"around.norm.weight"}));
  const auto message = error_of<FileError>([&] { return cross_attention_from(own.file(), {.layout = layout}); });
  EXPECT_NE(message.find("must have only names that layout mine explains; unexpected: around.norm.weight"), std::string::npos)
      << message;
}

TEST(OwnLayoutTest, MayHaveTheNameOfOneOfTheTable) {
  const OwnLayer own;
  auto layout = own_layout();
  layout.name = "bert";
  EXPECT_EQ(cross_attention_from(own.file(), {.layout = layout})->options.scale(), 0.4);
  EXPECT_TRUE(find_layers(own.file().tensors(), "bert").empty());
}

TEST(OwnLayoutTest, MustBeWhole) {
  const auto error = [](const auto& change) {
    auto layout = own_layout();
    change(layout);
    return error_of<c10::ValueError>([&] { return find_layers({}, layout); });
  };
  EXPECT_EQ(error([](auto& layout) { layout.name = ""; }), "[layouts] layout \"\" must have a name, but has not.");
  EXPECT_EQ(error([](auto& layout) { layout.projections[3].weight = ""; }),
            "[layouts] layout \"mine\" must have the names of four weights, but has not.");
  EXPECT_EQ(error([](auto& layout) { layout.projections[2].part = 2; }),
            "[layouts] layout \"mine\" must have a part of tell.w from 0 to 1, but has not.");
  EXPECT_EQ(error([](auto& layout) { layout.projections[0].parts = 0; }),
            "[layouts] layout \"mine\" must have a part of ask.w from 0 to -1, but has not.");
}

TEST(OwnLayoutTest, ARowOfTheTableMayBeChanged) {
  auto rows = layouts();
  auto layout = *std::ranges::find(rows, "out_proj", &Layout::name);
  layout.name = "scaled";
  layout.scale = 0.25;
  const OwnLayer own;
  EXPECT_EQ(cross_attention_from(own.file(), {.prefix = "b", .layout = layout, .num_heads = 2})->options.scale(), 0.25);
}

}  // namespace
}  // namespace xattn
