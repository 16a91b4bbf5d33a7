// SPDX-License-Identifier: Apache-2.0
#include <xattn/load.h>

#include <sys/stat.h>
#include <torch/torch.h>
#include <xattn/cross_attention.h>
#include <xattn/find_layers.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "compare.h"
#include "test_util.h"

namespace xattn {
namespace {

using test::copy_of;
using test::data_path;
using test::error_of;
using test::TempDir;
using Names = std::vector<std::string>;

// query_linear is 4 -> 8: the smallest layer whose four widths differ.
CrossAttention small() {
  return CrossAttention(4, 5, 6, 8);
}

bool equal(const NamedTensors& a, const NamedTensors& b) {
  return std::ranges::equal(a, b, [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.dtype() == y.second.dtype() && torch::equal(x.second, y.second);
  });
}

// The message of the error for these tensors. Expects that nothing changed.
std::string refusal(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {}) {
  const auto before = copy_of(module);
  const auto message = error_of<LoadError>([&] { load_weights(module, tensors, options); });
  EXPECT_TRUE(equal(copy_of(module), before)) << "the module changed";
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  const std::string start = "[load_weights] set of tensors: does not fit the module; ";
  EXPECT_TRUE(message.starts_with(start)) << message;
  return message.substr(std::min(message.size(), start.size()));
}

// The reference inside a larger model, as in tests/data/reference_in_model.pt.
struct ModelImpl : torch::nn::Module {
  torch::nn::Embedding embedding = register_module("embedding", torch::nn::Embedding(20, 8));
  CrossAttention fusion = register_module("fusion", CrossAttention(8, 12, 12, 16));
  torch::nn::Linear classifier = register_module("classifier", torch::nn::Linear(16, 5));
};
TORCH_MODULE(Model);

// Two names for one tensor.
struct TiedImpl : torch::nn::Module {
  TiedImpl() { register_parameter("decoder", encoder); }
  torch::Tensor encoder = register_parameter("encoder", torch::zeros({2}));
};

// ---- Loading ----------------------------------------------------------------------------------------------------------------

TEST(LoadTest, LoadsTheReferenceFromTorchScript) {
  CrossAttention attention(8, 12, 12, 16);
  const auto report = load_weights(*attention, data_path("reference.pt"));
  EXPECT_EQ(report.loaded.size(), 8U);
  EXPECT_EQ(report.summary(), "loaded 8 tensors");
  EXPECT_TRUE(equal(copy_of(*attention), load_tensors(data_path("reference.pt"))));
}

TEST(LoadTest, LoadsALargerModelWithTheReferenceInside) {
  Model model;
  EXPECT_EQ(load_weights(*model, data_path("reference_in_model.pt")).loaded.size(), 11U);
  EXPECT_TRUE(equal(copy_of(*model), load_tensors(data_path("reference_in_model.pt"))));
}

TEST(LoadTest, LoadsOneLayerOfALargerModelByPrefix) {
  CrossAttention attention(8, 12, 12, 16);
  const auto report = load_weights(*attention, data_path("reference_in_model.pt"), {.prefix = "fusion."});
  EXPECT_EQ(report.loaded, Names({"key_linear.bias", "key_linear.weight", "output_linear.bias", "output_linear.weight",
                                  "query_linear.bias", "query_linear.weight", "value_linear.bias", "value_linear.weight"}));
  EXPECT_TRUE(report.unexpected.empty());
  const auto tensors = load_tensors(data_path("reference_in_model.pt"));
  EXPECT_TRUE(torch::equal(attention->query_linear->weight, tensors.at("fusion.query_linear.weight")));
}

TEST(LoadTest, TakesAPrefixWithOrWithoutThePointAtItsEnd) {
  torch::nn::Linear module(2, 2);
  const NamedTensors tensors = {{"a.weight", torch::ones({2, 2})},
                                {"a.bias", torch::ones({2})},
                                {"my_weight", torch::zeros({2, 2})},
                                {"my_bias", torch::zeros({2})}};
  for (const auto* prefix : {"a.", "a"}) {
    EXPECT_EQ(load_weights(*module, tensors, {.prefix = prefix}).loaded.size(), 2U) << prefix;
    EXPECT_EQ(module->bias.sum().item<float>(), 2) << prefix;
  }
  load_weights(*module, tensors, {.prefix = "my_"});
  EXPECT_EQ(module->bias.sum().item<float>(), 0);
}

TEST(LoadTest, TakesTheLayerAtTheRootIfThePrefixIsEmpty) {
  auto saved = small(), other = small(), loaded = small();
  auto tensors = copy_of(*saved);
  for (const auto& [name, tensor] : copy_of(*other)) tensors["cross." + name] = tensor;
  load_weights(*loaded, tensors, {.prefix = "", .allow_unexpected = true});
  EXPECT_TRUE(loaded->query_linear->weight.equal(saved->query_linear->weight));
  load_weights(*loaded, tensors, {.prefix = "cross"});
  EXPECT_TRUE(loaded->query_linear->weight.equal(other->query_linear->weight));
}

TEST(LoadTest, LoadsWhatSaveSafetensorsWroteOfAModule) {
  const TempDir dir;
  Model saved, loaded;
  save_safetensors(dir.file("x"), *saved, {{"step", "7"}});
  EXPECT_EQ(open_checkpoint(dir.file("x")).metadata().at("step"), "7");
  load_weights(*loaded, dir.file("x"));
  EXPECT_TRUE(equal(copy_of(*loaded), copy_of(*saved)));
}

// A layer of eight heads.
CrossAttention with_eight_heads() {
  return CrossAttention(CrossAttentionOptions(8, 12, 12, 16).num_heads(8));
}

TEST(LoadTest, AFileOfAModuleHasTheNumbersOfHeads) {
  const TempDir dir;
  const auto saved = with_eight_heads();
  save_safetensors(dir.file("x"), *saved, {{"num_heads", "8"}});
  EXPECT_EQ(error_of<c10::ValueError>([&] { save_safetensors(dir.file("x"), *saved, {{"num_heads", "4"}}); }),
            "[save_safetensors] metadata \"num_heads\" must be 8, the number of heads of that layer, but is \"4\".");
  save_safetensors(dir.file("x"), *saved);
  const auto file = open_checkpoint(dir.file("x"));
  EXPECT_EQ(cross_attention_from(file)->options.num_heads(), 8);
  EXPECT_EQ(cross_attention_from(file, {.num_heads = 4})->options.num_heads(), 4);
  save_safetensors(dir.file("without"), copy_of(*saved));
  EXPECT_EQ(cross_attention_from(open_checkpoint(dir.file("without")))->options.num_heads(), 1);
  save_safetensors(dir.file("strange"), copy_of(*saved), {{"num_heads", "many"}});
  EXPECT_EQ(error_of<FileError>([&] { return cross_attention_from(open_checkpoint(dir.file("strange"))); }),
            "[load] " + dir.file("strange") + ": metadata \"num_heads\" must be a number of heads, but is \"many\"");

  Model model;
  save_safetensors(dir.file("model"), *model);
  EXPECT_EQ(open_checkpoint(dir.file("model")).metadata().at("fusion.num_heads"), "1");
}

TEST(LoadTest, ComparesTheModuleWithTheNumbersOfHeadsInItsFile) {
  const TempDir dir;
  save_safetensors(dir.file("x"), *with_eight_heads());
  CrossAttention one(8, 12, 12, 16);
  const auto message = error_of<LoadError>([&] { load_weights(*one, dir.file("x")); });
  EXPECT_TRUE(message.ends_with("misshapen: the module must have num_heads 8, as the file's metadata says, but has 1"))
      << message;
  load_weights(*one, dir.file("x"), {.ignore_config = true});
  load_weights(*with_eight_heads(), dir.file("x"));
  Model model;
  const LoadOptions renamed{.allow_missing = true, .rename = {{"^", "fusion."}}};
  EXPECT_TRUE(error_of<LoadError>([&] {
                load_weights(*model, dir.file("x"), renamed);
              }).ends_with("misshapen: fusion must have num_heads 8, as the file's metadata says, but has 1"));
}

TEST(LoadTest, DetectsFormatsFromTheContentsNotTheName) {
  const TempDir dir;
  std::filesystem::copy_file(data_path("reference.pt"), dir.file("x.safetensors"));
  EXPECT_EQ(open_checkpoint(dir.file("x.safetensors")).format(), FileFormat::torchscript);
  EXPECT_EQ(load_tensors(dir.file("x.safetensors")).size(), 8U);
  save_safetensors(dir.file("y.pt"), *small());
  EXPECT_EQ(open_checkpoint(dir.file("y.pt")).format(), FileFormat::safetensors);
  EXPECT_EQ(load_tensors(dir.file("y.pt")).size(), 8U);
}

TEST(LoadTest, KeepsTheModulesOwnTensors) {
  // An optimizer may hold them.
  auto attention = small();
  const auto weight = attention->query_linear->weight;
  const void* data = weight.data_ptr();
  const auto tensors = copy_of(*small());
  load_weights(*attention, tensors);
  EXPECT_TRUE(attention->query_linear->weight.is_same(weight));
  EXPECT_EQ(weight.data_ptr(), data);
  EXPECT_TRUE(weight.is_leaf() && weight.requires_grad());
  EXPECT_TRUE(torch::equal(weight, tensors.at("query_linear.weight")));
  EXPECT_NE(tensors.at("query_linear.weight").data_ptr(), data);
}

TEST(LoadTest, LoadsIntoAnyStrides) {
  auto attention = small();
  attention->query_linear->weight.set_data(torch::zeros({4, 8}).t());
  const auto tensors = copy_of(*small());
  load_weights(*attention, tensors);
  EXPECT_TRUE(torch::equal(attention->query_linear->weight, tensors.at("query_linear.weight")));
}

TEST(LoadTest, LoadsBuffers) {
  torch::nn::BatchNorm1d saved(3), loaded(3);
  saved->forward(torch::rand({4, 3}));
  EXPECT_EQ(load_weights(*loaded, copy_of(*saved)).loaded.size(), 5U);
  EXPECT_TRUE(torch::equal(loaded->running_mean, saved->running_mean));
  EXPECT_EQ(loaded->num_batches_tracked.item<int64_t>(), 1);
}

TEST(LoadTest, ExpectsNothingForParametersThatAreSwitchedOff) {
  torch::nn::BatchNorm1d norm(torch::nn::BatchNorm1dOptions(3).affine(false).track_running_stats(false));
  EXPECT_EQ(load_weights(*norm, NamedTensors()).summary(), "loaded 0 tensors");
  torch::nn::Linear linear(torch::nn::LinearOptions(3, 2).bias(false));
  EXPECT_EQ(load_weights(*linear, NamedTensors{{"weight", torch::ones({2, 3})}}).summary(), "loaded 1 tensors");
}

TEST(LoadTest, LoadsSharedParametersFromEitherName) {
  for (const auto* name : {"encoder", "decoder"}) {
    TiedImpl tied;
    const auto report = load_weights(tied, NamedTensors{{name, torch::ones({2})}});
    EXPECT_EQ(report.summary(), "loaded 2 tensors");
    EXPECT_TRUE(torch::equal(tied.encoder, torch::ones({2})));
  }
}

TEST(LoadTest, SharedParametersMayHaveEqualValuesUnderBothNames) {
  TiedImpl tied;
  load_weights(tied, NamedTensors{{"encoder", torch::ones({2})}, {"decoder", torch::ones({2}, at::kDouble)}});
  EXPECT_TRUE(torch::equal(tied.encoder, torch::ones({2})));
  EXPECT_EQ(refusal(tied, {{"encoder", torch::ones({2})}, {"decoder", torch::tensor({1.F, 2.F})}}),
            "misshapen: decoder and encoder are one tensor of the module, but differ in the file");
}

TEST(LoadTest, ConvertsFloatingPointTypes) {
  for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
    for (const auto own : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
      torch::nn::Linear linear(2, 1);
      linear->to(own);
      load_weights(*linear,
                   NamedTensors{{"weight", torch::tensor({{0.5, -3.}}).to(type)}, {"bias", torch::tensor({2.}).to(type)}});
      EXPECT_EQ(linear->weight.scalar_type(), own);
      EXPECT_TRUE(torch::equal(linear->weight, torch::tensor({{0.5, -3.}}).to(own)));
    }
  }
}

TEST(LoadTest, ConvertsComplexTypes) {
  TiedImpl module;
  module.encoder.set_data(torch::zeros({2}, at::kComplexDouble));
  const auto value = torch::complex(torch::ones({2}), -torch::ones({2}));
  load_weights(module, NamedTensors{{"encoder", value}});
  EXPECT_TRUE(torch::equal(module.encoder, value.to(at::kComplexDouble)));
}

TEST(LoadTest, LoadsOntoADevice) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  auto attention = small();
  attention->to(torch::kCUDA, torch::kHalf);
  const auto tensors = copy_of(*small());
  load_weights(*attention, tensors);
  EXPECT_TRUE(attention->query_linear->weight.is_cuda());
  EXPECT_TRUE(torch::equal(attention->query_linear->weight.cpu(), tensors.at("query_linear.weight").to(torch::kHalf)));
}

TEST(LoadTest, LeavesMissingTensorsUnchangedIfAllowed) {
  auto attention = small();
  const auto before = copy_of(*attention);
  auto tensors = copy_of(*small());
  tensors.erase("key_linear.bias");
  const auto report = load_weights(*attention, tensors, {.allow_missing = true});
  EXPECT_EQ(report.missing, Names({"key_linear.bias"}));
  EXPECT_EQ(report.summary(), "loaded 7 tensors; missing: key_linear.bias");
  tensors["key_linear.bias"] = before.at("key_linear.bias");
  EXPECT_TRUE(equal(copy_of(*attention), tensors));
}

TEST(LoadTest, IgnoresUnexpectedTensorsIfAllowed) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors["gate"] = torch::ones({1});
  const auto report = load_weights(*attention, tensors, {.allow_unexpected = true});
  EXPECT_EQ(report.unexpected, Names({"gate"}));
  EXPECT_EQ(report.summary(), "loaded 8 tensors; unexpected: gate");
  tensors.erase("gate");
  EXPECT_TRUE(equal(copy_of(*attention), tensors));
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(LoadTest, RefusesMissingNames) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors.erase("key_linear.bias");
  tensors.erase("query_linear.weight");
  EXPECT_EQ(refusal(*attention, tensors), "missing: key_linear.bias, query_linear.weight");
  EXPECT_EQ(refusal(*attention, tensors, {.allow_unexpected = true}), "missing: key_linear.bias, query_linear.weight");
}

TEST(LoadTest, RefusesUnexpectedNames) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors["gate"] = torch::ones({1});
  tensors["two\nlines"] = torch::ones({1});
  EXPECT_EQ(refusal(*attention, tensors), "unexpected: gate, two\\x0alines");
  EXPECT_EQ(refusal(*attention, tensors, {.allow_missing = true}), "unexpected: gate, two\\x0alines");
}

TEST(LoadTest, RefusesOtherShapes) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors["query_linear.weight"] = torch::ones({4, 8});
  EXPECT_EQ(refusal(*attention, tensors), "misshapen: query_linear.weight must have shape [8, 4], but has [4, 8]");
}

TEST(LoadTest, RefusesUndefinedTensors) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors["key_linear.bias"] = torch::Tensor();
  EXPECT_EQ(error_of<c10::ValueError>([&] { load_weights(*attention, tensors); }),
            "[lazy] tensor \"key_linear.bias\" must be defined, but is not.");
}

TEST(LoadTest, RefusesTypesThatDoNotConvert) {
  torch::nn::BatchNorm1d norm(2);
  auto tensors = copy_of(*norm);
  tensors["weight"] = torch::ones({2}, at::kComplexFloat);
  tensors["bias"] = torch::ones({2}, at::kChar);  // quantized: meaningless without its scale
  tensors["running_var"] = torch::ones({2}, at::kBool);
  tensors["num_batches_tracked"] = torch::tensor(1.5);
  EXPECT_EQ(refusal(*norm, tensors),
            "misshapen: bias must convert to float32, but is int8, num_batches_tracked must convert to int64, but is float32, "
            "running_var must convert to float32, but is bool, weight must convert to float32, but is complex64");
}

TEST(LoadTest, ListsEverythingThatIsWrongAtOnce) {
  auto attention = small();
  auto tensors = copy_of(*small());
  tensors.erase("key_linear.bias");
  tensors["gate"] = torch::ones({1});
  tensors["query_linear.bias"] = torch::ones({9});
  EXPECT_EQ(refusal(*attention, tensors),
            "missing: key_linear.bias; unexpected: gate; misshapen: query_linear.bias must have shape [8], but has [9]");
  try {
    load_weights(*attention, tensors);
    FAIL();
  } catch (const LoadError& error) {
    EXPECT_EQ(error.report().missing, Names({"key_linear.bias"}));
    EXPECT_EQ(error.report().unexpected, Names({"gate"}));
    EXPECT_EQ(error.report().misshapen, Names({"query_linear.bias must have shape [8], but has [9]"}));
    EXPECT_EQ(error.report().loaded.size(), 6U);
  }
}

TEST(LoadTest, ListsAHundredNamesAndReportsAll) {
  auto module = small();
  NamedTensors tensors;
  for (int i = 0; i < 300; ++i) tensors["x" + std::to_string(i) + std::string(1000, 'y')] = torch::ones({1});
  try {
    load_weights(*module, tensors, {.allow_missing = true});
    ADD_FAILURE() << "loaded";
  } catch (const LoadError& error) {
    EXPECT_EQ(error.report().unexpected.size(), 300U);
    EXPECT_LT(std::string(error.what()).size(), 21'000U);
    EXPECT_TRUE(std::string(error.what()).ends_with(" and 200 more")) << error.what();
  }
}

TEST(LoadTest, RefusesAMissingPrefix) {
  torch::nn::Linear linear(2, 1);
  const NamedTensors tensors = {{"b.weight", torch::ones({1, 2})},
                                {"b.bias", torch::ones({1})},
                                {"c.weight", torch::ones({1})},
                                {"weight", torch::ones({1, 2})},
                                {"bias", torch::ones({1})}};
  for (const bool allow_missing : {false, true}) {
    EXPECT_EQ(error_of<LoadError>([&] { load_weights(*linear, tensors, {.prefix = "a.", .allow_missing = allow_missing}); }),
              R"([load_weights] set of tensors: prefix must be one of "b.", "", but is "a.")");
  }
}

TEST(LoadTest, NamesTheFile) {
  torch::nn::Linear linear(2, 1);
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"weight", torch::ones({1, 2})}});
  EXPECT_EQ(error_of<LoadError>([&] { load_weights(*linear, dir.file("x")); }),
            "[load_weights] " + dir.file("x") + ": does not fit the module; missing: bias");
}

// A file in memory with two tensors of float32 and one that is not read.
Checkpoint with_float4(const std::string& name) {
  const std::string header = R"({"weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
                             R"("bias":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},")" +
                             name + R"(":{"dtype":"F4","shape":[2],"data_offsets":[12,13]}})";
  const uint64_t length = header.size();
  const auto bytes = std::make_shared<std::string>(std::string(reinterpret_cast<const char*>(&length), 8) + header);
  bytes->append(13, '\0');
  return open_checkpoint(std::as_bytes(std::span(*bytes)), bytes, "x");
}

TEST(LoadTest, NamesUnreadableTensorsThatTheModuleNeedsAndListsOthersAsUnexpected) {
  torch::nn::Linear linear(2, 1);
  EXPECT_EQ(error_of<LoadError>([&] { load_weights(*linear, with_float4("scale")); }),
            "[load_weights] x: does not fit the module; unexpected: scale");
  EXPECT_EQ(load_weights(*linear, with_float4("scale"), {.allow_unexpected = true}).loaded.size(), 2U);
  torch::nn::BatchNorm1d norm(1);
  const auto message = error_of<LoadError>([&] { load_weights(*norm, with_float4("running_mean"), {.allow_missing = true}); });
  EXPECT_NE(message.find("running_mean is not read: it is of dtype \"F4\", which torch does not have"), std::string::npos)
      << message;
}

TEST(LoadTest, ALayerIsNotMadeOfUnreadableTensors) {
  EXPECT_EQ(
      error_of<FileError>([&] { return cross_attention_from(with_float4("query_linear.weight"), {}); }),
      "[load] x: must hold an attention layer, but tensor \"query_linear.weight\" is not read: it is of dtype \"F4\", which "
      "torch does not have");
}

// ---- Finding layers ---------------------------------------------------------------------------------------------------------

std::vector<FoundLayer> layers_of(const NamedTensors& tensors) {
  return find_layers(lazy(tensors).infos);
}

TEST(FindLayersTest, FindsWidthsAndBiases) {
  const auto options = CrossAttentionOptions(4, 5, 6, 7).num_heads(1).head_dim(8).value_head_dim(9);
  auto with_some_biases = options;
  with_some_biases.key_bias(false).output_bias(false);
  const auto layers = layers_of(copy_of(*CrossAttention(with_some_biases)));
  ASSERT_EQ(layers.size(), 1U);
  const auto& found = layers[0].options;
  EXPECT_EQ(layers[0].prefix, "");
  EXPECT_EQ(found.dim_query(), 4);
  EXPECT_EQ(found.dim_key(), 5);
  EXPECT_EQ(found.dim_value(), 6);
  EXPECT_EQ(found.dim_output(), 7);
  EXPECT_EQ(found.num_heads(), 1);
  EXPECT_EQ(found.head_dim(), 8);
  EXPECT_EQ(found.value_head_dim(), 9);
  EXPECT_TRUE(found.query_bias() && found.value_bias());
  EXPECT_FALSE(found.key_bias() || found.output_bias());
}

TEST(FindLayersTest, BuildsAModuleThatLoads) {
  const CrossAttention saved(CrossAttentionOptions(4, 5, 6, 24).num_heads(6).kv_heads(2).qkv_bias(false));
  const auto tensors = copy_of(*saved);
  CrossAttention loaded(layers_of(tensors).at(0).with_heads(6));
  load_weights(*loaded, tensors);
  EXPECT_EQ(loaded->options.kv_heads(), 2);
  EXPECT_EQ(loaded->options.head_dim(), 4);
  const auto query = torch::rand({1, 2, 4}), key = torch::rand({1, 3, 5}), value = torch::rand({1, 3, 6});
  EXPECT_TRUE(
      torch::equal(std::get<0>(loaded->forward(query, key, value)), std::get<0>(saved.ptr()->forward(query, key, value))));
}

TEST(FindLayersTest, ListsThePossibleNumbersOfHeads) {
  const auto layer = layers_of(copy_of(*CrossAttention(CrossAttentionOptions(4, 5, 6, 24).num_heads(6).kv_heads(2)))).at(0);
  EXPECT_EQ(layer.options.num_heads(), 3);
  EXPECT_EQ(layer.options.kv_heads(), 1);
  for (const int64_t heads : {-3, 0, 1, 5, 48}) {
    EXPECT_EQ(error_of<c10::ValueError>([&] { layer.with_heads(heads); }),
              "[with_heads] num_heads must be one of 3, 6, 12, 24, but is " + std::to_string(heads) + ".");
  }
}

TEST(FindLayersTest, ListsTheHeadsOfWidthsOfAnySize) {
  constexpr int64_t kWidth = int64_t{1} << 40;
  std::map<std::string, TensorInfo> infos;
  for (const std::string name : {"query", "key", "value"}) infos[name + "_linear.weight"] = {torch::kFloat, {kWidth, 1}};
  infos["output_linear.weight"] = {torch::kFloat, {1, kWidth}};
  const auto heads = find_layers(infos).at(0).possible_heads();
  ASSERT_EQ(heads.size(), 41U) << "the powers of two";
  for (size_t i = 0; i < heads.size(); ++i) EXPECT_EQ(heads[i], int64_t{1} << i);
}

TEST(FindLayersTest, SkipsWidthsWhoseProductsOverflow) {
  constexpr int64_t kWidth = int64_t{1} << 62;
  std::map<std::string, TensorInfo> infos;
  infos["query_linear.weight"] = {torch::kFloat, {kWidth, 1}};
  infos["key_linear.weight"] = {torch::kFloat, {1, 1}};
  infos["value_linear.weight"] = {torch::kFloat, {5, 1}};
  infos["output_linear.weight"] = {torch::kFloat, {1, kWidth}};  // 5 times as much in 64 bits
  EXPECT_TRUE(find_layers(infos).empty());
  for (const int64_t size : {-1, 0}) {
    infos["key_linear.weight"].shape[0] = size;
    EXPECT_TRUE(find_layers(infos).empty());
  }
}

TEST(FindLayersTest, ListsTheHeadsInOrder) {
  const auto layer = layers_of(copy_of(*CrossAttention(CrossAttentionOptions(4, 5, 6, 36).num_heads(6)))).at(0);
  EXPECT_EQ(layer.possible_heads(), (std::vector<int64_t>{1, 2, 3, 4, 6, 9, 12, 18, 36}));
}

// ---- config.json ------------------------------------------------------------------------------------------------------------

// The message of the error for a config.json that `make` writes beside weights without a number of heads.
std::string config_refusal(const std::function<void(const std::string& path)>& make) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a.q_proj.weight", torch::ones({8, 4})},
                                               {"a.k_proj.weight", torch::ones({8, 6})},
                                               {"a.v_proj.weight", torch::ones({8, 6})},
                                               {"a.out_proj.weight", torch::ones({4, 8})}});
  const auto path = dir.file("config.json");
  make(path);
  const auto message = error_of<FileError>([&] { return cross_attention_from(open_checkpoint(dir.file("x"))); });
  const auto place = message.find(path);
  return place == std::string::npos ? message : message.substr(place + path.size());
}

TEST(ModelConfigTest, IsReadAsTheWeightsAre) {
  const auto holds = [](const std::string& text) { return [text](const std::string& path) { test::write_bytes(path, text); }; };
  EXPECT_EQ(config_refusal([](const auto& path) { ASSERT_EQ(mkfifo(path.c_str(), 0600), 0); }),
            ": must be a regular file, but is not");
  EXPECT_EQ(config_refusal([](const auto& path) { std::filesystem::create_directory(path); }),
            ": must be a regular file, but is not");
  EXPECT_EQ(config_refusal(holds(std::string(50'000'000, '['))), ": has 50000000 bytes, more than the limit of 8000000");
  EXPECT_EQ(config_refusal(holds(std::string(8'000'000, '['))), ": is nested deeper than 32 levels");
  EXPECT_EQ(config_refusal(holds("{\"num_heads\": 2,}")), ": is not JSON in UTF-8, at its byte 17");
  EXPECT_NE(config_refusal(holds("{}")).find("the number of heads of \"a.\" is not among its weights"), std::string::npos);
  EXPECT_NE(config_refusal([](const auto&) {}).find("the number of heads of \"a.\" is not among its weights"),
            std::string::npos);
}

TEST(FindLayersTest, FindsEveryLayerInOrderOfPrefix) {
  NamedTensors tensors = {{"embedding.weight", torch::ones({2, 2})}};
  for (const auto* prefix : {"a.b.", "a.", "z."}) {
    for (const auto& [name, tensor] : copy_of(*small())) tensors[prefix + name] = tensor;
  }
  Names prefixes;
  for (const auto& layer : layers_of(tensors)) prefixes.push_back(layer.prefix);
  EXPECT_EQ(prefixes, Names({"a.", "a.b.", "z."}));
}

TEST(FindLayersTest, SkipsIncompleteLayers) {
  const auto whole = copy_of(*small());
  const auto found_with = [&](const std::string& name, const torch::Tensor& tensor) {
    auto tensors = whole;
    tensors[name] = tensor;
    return layers_of(tensors).size();
  };
  EXPECT_EQ(found_with("other", torch::ones({1})), 1U);
  EXPECT_EQ(found_with("key_linear.weight", torch::ones({8})), 0U);
  EXPECT_EQ(found_with("key_linear.weight", torch::ones({0, 5})), 0U);
  EXPECT_EQ(found_with("key_linear.weight", torch::ones({3, 5})),
            0U);  // 8 features of the query cannot be shared by 3 of the key
  EXPECT_EQ(found_with("key_linear.weight", torch::ones({4, 5})), 0U);  // groups for keys, but not for values
  EXPECT_EQ(found_with("query_norm.weight", torch::ones({8})), 0U);
  EXPECT_EQ(layers_of({}).size(), 0U);
  NamedTensors renamed;
  for (const auto& [name, tensor] : whole) renamed["my_" + name] = tensor;
  EXPECT_EQ(layers_of(renamed).size(), 0U);
  for (const auto* name : {"query_linear.weight", "key_linear.weight", "value_linear.weight", "output_linear.weight"}) {
    auto tensors = whole;
    tensors.erase(name);
    EXPECT_EQ(layers_of(tensors).size(), 0U) << name;
  }
}

TEST(FindLayersTest, ReadsShapesOnly) {
  NamedTensors tensors;
  for (const auto& [name, tensor] : copy_of(*small())) tensors[name] = torch::empty(tensor.sizes(), torch::kMeta);
  EXPECT_EQ(layers_of(tensors).size(), 1U);
}

}  // namespace
}  // namespace xattn
