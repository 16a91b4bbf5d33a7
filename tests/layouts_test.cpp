// SPDX-License-Identifier: Apache-2.0
#include "loading/layouts.h"

#include <torch/torch.h>
#include <xattn/find_layers.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
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

INSTANTIATE_TEST_SUITE_P(Families, LayoutsTest, testing::ValuesIn(families()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace xattn
