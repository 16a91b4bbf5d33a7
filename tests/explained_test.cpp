// SPDX-License-Identifier: Apache-2.0
#include <torch/torch.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "loading/block_layouts.h"
#include "loading/layouts.h"
#include "loading/recipes.h"
#include "test_util.h"

// Everything that changes the result of a layer is computed, or rejected by name.
namespace xattn {
namespace {

using nlohmann::json;
using test::data_path;
using test::error_of;
using test::TempDir;
using torch::Tensor;
using Strings = std::vector<std::string>;

void expect_part(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

// Tensors as a file, alone or beside a config.json.
struct SavedLayer {
  explicit SavedLayer(const NamedTensors& tensors, const json& config = {}) {
    save_safetensors(dir.file("model.safetensors"), tensors);
    if (!config.is_null()) test::write_bytes(dir.file("config.json"), config.dump());
  }
  Checkpoint open() const { return open_checkpoint(dir.file("model.safetensors")); }
  CrossAttention made(const LayerOptions& options = {.num_heads = 2}) const { return cross_attention_from(open(), options); }
  std::string error(const LayerOptions& options = {.num_heads = 2}) const {
    return error_of<FileError>([&] { made(options); });
  }
  TempDir dir;
};

// A layer of 8 features and a context of 12, by the names of BART.
NamedTensors bart_layer(const std::string& prefix) {
  NamedTensors tensors;
  for (const auto& [name, width] : {std::pair("q_proj", 8), {"k_proj", 12}, {"v_proj", 12}, {"out_proj", 8}}) {
    tensors[prefix + name + ".weight"] = torch::randn({8, width});
    tensors[prefix + name + ".bias"] = torch::randn({8});
  }
  return tensors;
}

// The same with other names of the projections.
NamedTensors renamed_bart(const std::string& prefix, const std::array<std::string, 4>& names) {
  NamedTensors tensors;
  for (const auto& [name, tensor] : bart_layer("")) {
    const std::map<std::string, std::string> of = {
        {"q_proj", names[0]}, {"k_proj", names[1]}, {"v_proj", names[2]}, {"out_proj", names[3]}};
    const auto point = name.find('.');
    tensors[prefix + of.at(name.substr(0, point)) + name.substr(point)] = tensor;
  }
  return tensors;
}

// The same as in diffusers, where only the last projection has a bias.
NamedTensors diffusers_layer(const std::string& prefix) {
  NamedTensors tensors = {{prefix + "to_out.0.bias", torch::randn({8})}};
  for (const auto& [name, width] : {std::pair("to_q", 8), {"to_k", 12}, {"to_v", 12}, {"to_out.0", 8}}) {
    tensors[prefix + name + ".weight"] = torch::randn({8, width});
  }
  return tensors;
}

// A layer by the names of Gemma, without biases.
NamedTensors gemma_layer(const std::string& prefix) {
  auto tensors = bart_layer(prefix);
  for (const auto* name : {"q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias"}) tensors.erase(prefix + name);
  tensors[prefix + "o_proj.weight"] = tensors.at(prefix + "out_proj.weight");
  tensors.erase(prefix + "out_proj.weight");
  return tensors;
}

NamedTensors with(NamedTensors tensors, const std::string& name, const Tensor& tensor = torch::ones({1})) {
  tensors[name] = tensor;
  return tensors;
}

// ---- Names that the layout does not explain ---------------------------------------------------------------------------------

struct Example {
  std::string name;
  Checkpoint weights = open_checkpoint(data_path("layouts/" + name + ".safetensors"));
  std::map<std::string, std::string> about = open_checkpoint(data_path("layouts/" + name + ".expect.safetensors")).metadata();

  std::string prefix() const { return about.at("prefix"); }
  LayerOptions options() const {
    return {.prefix = prefix(), .num_heads = std::stoll(about.at("num_heads")), .without_input_norms = true};
  }
  NamedTensors tensors() const {
    NamedTensors all;
    for (const auto& [tensor, info] : weights.tensors()) all.emplace(tensor, weights.tensor(tensor));
    return all;
  }
};

std::vector<std::string> examples() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("layouts"))) {
    const auto file = entry.path().filename().string();
    if (!file.ends_with(".expect.safetensors") || file.ends_with(".block.expect.safetensors")) continue;
    if (file.starts_with("ip_adapter")) continue;                                           // parts of layers
    if (open_checkpoint(entry.path().string()).metadata().contains("positions")) continue;  // see LearnedPositionsTest
    names.push_back(file.substr(0, file.find('.')));
  }
  std::ranges::sort(names);
  return names;
}

class ExplainedTest : public testing::TestWithParam<std::string> {};

TEST_P(ExplainedTest, EveryNameOfAFamilyIsExplained) {
  const Example example{GetParam()};
  EXPECT_EQ(unexplained_names(choose_layer(example.weights, example.prefix()), example.weights.tensors()), Strings());
  for (const auto& block : find_blocks(example.weights.tensors())) {
    EXPECT_EQ(unexplained_names(block, example.weights.tensors()), Strings()) << block.prefix;
  }
}

TEST_P(ExplainedTest, AnotherNameIsRefusedUnlessAllowed) {
  const Example example{GetParam()};
  const auto strange = example.prefix() + "norm_cross.weight";
  const SavedLayer saved(with(example.tensors(), strange));
  const auto file = saved.open();
  const auto layer = choose_layer(file, example.prefix());
  EXPECT_EQ(unexplained_names(layer, file.tensors()), Strings({"norm_cross.weight"}));
  auto options = example.options();
  const auto from = [&](const auto& options_) {
    return error_of<FileError>([&] {
      layer.added.empty() ? static_cast<void>(cross_attention_from(file, options_))
                          : static_cast<void>(decoupled_cross_attention_from(file, options_));
    });
  };
  expect_part(from(options), "unexpected: norm_cross.weight");

  const auto refused = [&](torch::nn::Module& module, const LoadOptions& load) {
    const auto message = error_of<LoadError>([&] { load_weights(module, file, load); });
    expect_part(message, "unexpected: norm_cross.weight");
    load_weights(module, file,
                 {.prefix = load.prefix, .allow_unexpected = true, .without_input_norms = load.without_input_norms});
  };
  options.allow_unexpected = true;
  const LoadOptions by_prefix{.prefix = example.prefix(), .without_input_norms = true};
  if (layer.added.empty()) {
    auto module = cross_attention_from(file, options);
    const auto plain = cross_attention_from(example.weights, options);
    EXPECT_TRUE(module->query_linear->weight.equal(plain->query_linear->weight));
    refused(*module, by_prefix);
    const auto layers = find_layers(file.tensors());
    if (std::ranges::count(layers, AttentionKind::cross, &FoundLayer::kind) == 1 && layer.kind == AttentionKind::cross) {
      refused(*module, {.without_input_norms = true});
    }
  } else {
    auto module = decoupled_cross_attention_from(file, options);
    refused(*module, by_prefix);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, ExplainedTest, testing::ValuesIn(examples()), [](const auto& info) { return info.param; });

TEST(UnexplainedTest, EveryOtherNameBelowALayerIsRefusedByName) {
  for (const auto* name : {"norm_cross.weight", "mem_k", "mem_v", "sinks", "gate", "q_norm.scale", "q_proj.weight_zero_point",
                           "q_proj.scale_weight", "q_proj.ia3_l.default", "layer_scale.gamma", "rotary_emb.inv_freq",
                           "relative_attention_bias.weight", "distance_embedding.weight"}) {
    const SavedLayer saved(with(bart_layer("a.cross."), std::string("a.cross.") + name));
    expect_part(saved.error(),
                std::string("layer \"a.cross.\" must have only names that layout out_proj explains; unexpected: ") + name);
    EXPECT_EQ(saved.made({.num_heads = 2, .allow_unexpected = true})->options.num_heads(), 2);
    const SavedLayer alone(with(bart_layer(""), name));
    expect_part(alone.error(), std::string("unexpected: ") + name);
  }
}

TEST(LearnedPositionsTest, AreRefusedByNameUntilTheCallerAddsThem) {
  for (const auto* name : {"clip_pool", "timm_pool_positions", "timm_attention_pool"}) {
    const Example example{name};
    auto options = example.options();
    const auto message = error_of<FileError>([&] { return cross_attention_from(example.weights, options); });
    expect_part(message,
                "unexpected: " + example.about.at("positions") + "; learned positions are not part of the layer: add them");
    options.allow_unexpected = true;
    auto module = cross_attention_from(example.weights, options);
    expect_part(error_of<LoadError>([&] { load_weights(*module, example.weights, {.prefix = example.prefix()}); }),
                "unexpected: " + example.about.at("positions"));
  }
}

TEST(OtherAttentionTest, OfTheSameNamesIsRefused) {
  NamedTensors set_transformer, memory;
  for (const auto* part : {"q", "k", "v", "o"}) {
    set_transformer[std::string("enc.0.mab0.fc_") + part + ".weight"] = torch::randn({8, 8});
    set_transformer[std::string("decoder.enc_att.fc_") + part + ".weight"] = torch::randn({8, 8});
    const std::string projection = *part == 'o' ? "out" : part;
    memory["memory_attention.layers.0.cross_attn_image." + projection + "_proj.weight"] = torch::randn({8, 8});
  }
  const SavedLayer saved(set_transformer), sam(memory);
  expect_part(saved.error({.prefix = "enc.0.mab0", .num_heads = 2}),
              "fc_q.weight must be of a layer that computes attention alone, but is of the Set Transformer");
  EXPECT_EQ(saved.made({.prefix = "decoder.enc_att", .num_heads = 2})->options.num_heads(), 2);
  expect_part(sam.error(), "but is of SAM 2's memory, whose queries and keys have rotary embeddings");
  CrossAttention module(CrossAttentionOptions(8, 8, 8, 8).num_heads(2).qkv_bias(false).output_bias(false));
  expect_part(error_of<LoadError>([&] { load_weights(*module, saved.open(), {.prefix = "enc.0.mab0"}); }), "Set Transformer");
  for (const auto* direction : {"audio_to_video_attn.", "video_to_audio_attn."}) {
    expect_part(SavedLayer(diffusers_layer(std::string("transformer_blocks.0.") + direction)).error(),
                "but is of LTX-2 between video and audio, whose queries and keys have rotary embeddings");
  }
}

TEST(OtherAttentionTest, WithRotaryEmbeddingsIsRefusedByItsConfig) {
  NamedTensors vit, glue;
  for (const auto& [name, out] : {std::pair("qkv", 24), {"proj", 8}}) {
    vit[std::string("blocks.0.attn.") + name + ".weight"] = torch::randn({out, 8});
  }
  for (const auto* layer : {"self_attention", "cross_attention"}) {
    for (const auto* part : {"q", "k", "v", "o"}) {
      glue[std::string("transformer_layers.0.") + layer + "." + part + "_proj.weight"] = torch::randn({8, 8});
    }
  }
  for (const auto* name :
       {"eva02_base_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_pe_core_base"}) {
    expect_part(SavedLayer(vit, json{{"architecture", name}}).error(), "which has rotary embeddings of its queries and keys");
  }
  for (const auto& hiera : {json{{"architecture", "hiera_tiny_224"}}, json{{"model_type", "hiera"}}}) {
    expect_part(SavedLayer(vit, hiera).error(), "which has attention that is not to all keys");
  }
  EXPECT_EQ(SavedLayer(vit, json{{"architecture", "vit_base_patch16_224"}, {"model_args", {{"num_heads", 4}}}})
                .made({})
                ->options.num_heads(),
            4);
  EXPECT_EQ(SavedLayer(vit, json{{"architecture", "vit_base_patch16_rpn_224"}}).made()->options.num_heads(), 2);
  const SavedLayer saved(glue, json{{"model_type", "lightglue"}, {"num_attention_heads", 2}});
  expect_part(saved.error({.prefix = "transformer_layers.0.self_attention"}), "rotary embeddings of its queries and keys");
  EXPECT_EQ(saved.made({.prefix = "transformer_layers.0.cross_attention"})->options.num_heads(), 2);
  for (const auto& rope : {json{{"rope_theta", 1e4}}, json{{"rope_parameters", {{"rope_type", "default"}}}}}) {
    auto config = rope;
    config["num_attention_heads"] = 2;
    const SavedLayer rotary(glue, config);
    expect_part(rotary.error({.prefix = "transformer_layers.0.self_attention"}), "rotary embeddings of its queries and keys");
    EXPECT_EQ(rotary.made({.prefix = "transformer_layers.0.cross_attention"})->options.num_heads(), 2);
    NamedTensors nested;  // where the config has no part of its own for the prefix
    for (const auto& [name, tensor] : glue) nested["text_model." + name] = tensor;
    expect_part(SavedLayer(nested, config).error({.prefix = "text_model.transformer_layers.0.self_attention"}),
                "rotary embeddings of its queries and keys");
  }
}

TEST(UnexplainedTest, LowRankWeightsAreRefusedWithTheWayToMergeThem) {
  const auto refused = [](const NamedTensors& layer, const std::string& name) {
    const auto message = SavedLayer(with(layer, "a.cross." + name, torch::ones({2, 8}))).error();
    expect_part(message, "unexpected: " + name);
    expect_part(message, "merge_and_unload of peft or fuse_lora of diffusers");
  };
  for (const auto* name : {"q_proj.lora_A.default.weight", "q_proj.lora_A", "q_proj.lora_magnitude_vector.default.weight",
                           "v_proj.lora_embedding_A.default", "q_proj.hada_w1_a", "q_proj.lokr_w1"}) {
    refused(bart_layer("a.cross."), name);
  }
  for (const auto* name : {"to_q_lora.down.weight", "processor.to_q_lora.up.weight", "to_q.lora.down.weight",
                           "to_q.lora_down.weight", "processor.to_out_lora.down.weight", "to_k.dora_scale"}) {
    refused(diffusers_layer("a.cross."), name);
  }
  NamedTensors wrapped;  // peft's names for the base weights
  for (const auto& [name, tensor] : bart_layer("base_model.model.cross.")) {
    const auto point = name.rfind('.');
    wrapped[name.substr(0, point) + ".base_layer" + name.substr(point)] = tensor;
  }
  expect_part(SavedLayer(with(wrapped, "base_model.model.cross.q_proj.lora_A.default.weight")).error(),
              "merge_and_unload of peft");
  auto module = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2));
  const auto message = error_of<LoadError>([&] {
    load_weights(*module, with(bart_layer("a.cross."), "a.cross.q_proj.lora_A.default.weight"), {.prefix = "a.cross."});
  });
  expect_part(message, "unexpected: q_proj.lora_A.default.weight; low-rank weights must first be merged");
}

TEST(UnexplainedTest, LowRankWeightsAtTheTopOfAFileAreRefused) {
  const auto module = [] { return CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2).qkv_bias(false)); };
  const auto refused = [&](const std::string& prefix, const std::string& name) {
    const SavedLayer saved(with(diffusers_layer(prefix), name));
    const auto file = saved.open();
    expect_part(saved.error(), "unexpected: " + name + "; low-rank weights must first be merged");
    EXPECT_EQ(unexplained_names(choose_layer(file), file.tensors()), Strings({name}));
    for (const LoadOptions& options : {LoadOptions{}, LoadOptions{.prefix = prefix}}) {
      auto loaded = module();
      expect_part(error_of<LoadError>([&] { load_weights(*loaded, file, options); }), "unexpected: " + name + "; low-rank");
    }
    EXPECT_EQ(saved.made({.num_heads = 2, .allow_unexpected = true})->options.num_heads(), 2);
  };
  refused("down_blocks.0.attn2.", "lora_unet_down_blocks_0_attn2_to_q.lora_down.weight");
  refused("down_blocks.0.attn2.", "lora_unet_down_blocks_0_attn2_to_out_0.alpha");
  refused("down_blocks.0.attn2.", "lycoris_down_blocks_0_attn2_to_v.lokr_w1");
  refused("text_model.layers.1.attn2.", "lora_te_text_model_layers_1_attn2_to_k.lora_up.weight");
  refused("model.diffusion_model.input_blocks.1.1.attn2.", "lora_unet_input_blocks_1_1_attn2_to_q.lora_up.weight");
  refused("attn2.", "lora_unet_attn2_to_q.hada_w1_a");

  const std::string prefix = "down_blocks.0.attn2.";
  for (const auto* others :
       {"lora_unet_down_blocks_1_attn2_to_q.lora_down.weight", "lora_unet_up_blocks_0_attn2_to_q.alpha",
        "lora_unet_down_blocks_0_attn1_to_q.alpha", "lora_te_text_model_to_q.alpha", "lora_", "lora_unet_", "loras"}) {
    const SavedLayer saved(with(diffusers_layer(prefix), others));
    EXPECT_EQ(saved.made()->options.num_heads(), 2) << others;
    auto loaded = module();
    load_weights(*loaded, saved.open(), {.prefix = prefix});
  }

  const Example bart{"bart"};
  const SavedLayer block(with(bart.tensors(), "lora_unet_model_decoder_layers_0_fc1.lora_down.weight"));
  const BlockOptionsFromFile options{.num_heads = 4, .norm_placement = NormPlacement::after, .activation = Activation::gelu};
  expect_part(error_of<FileError>([&] { return cross_attention_block_from(block.open(), options); }),
              "unexpected: lora_unet_model_decoder_layers_0_fc1.lora_down.weight; low-rank weights");
}

TEST(UnexplainedTest, OneNormOfQueriesAndKeysIsNeverLeftOut) {
  const auto refused = [](const NamedTensors& layer, const std::string& name, const std::string& by_from) {
    const SavedLayer saved(with(layer, name, torch::ones({4})));
    expect_part(saved.error(), by_from);
    auto module = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2).qkv_bias(false));
    expect_part(error_of<LoadError>([&] { load_weights(*module, saved.open()); }), name.substr(name.find('.') + 1));
    expect_part(error_of<LoadError>([&] { load_weights(*module, saved.open(), {.prefix = "a."}); }),
                name.substr(name.find('.') + 1));
  };
  refused(diffusers_layer("a."), "a.norm_q.weight", "but holds none");
  refused(diffusers_layer("a."), "a.norm_k.weight", "but holds none");
  refused(gemma_layer("a."), "a.q_norm.weight", "unexpected: q_norm.weight");
  NamedTensors reference;
  for (const auto& [name, tensor] : diffusers_layer("")) {
    const std::map<std::string, std::string> names = {
        {"to_q", "query_linear"}, {"to_k", "key_linear"}, {"to_v", "value_linear"}, {"to_out", "output_linear"}};
    reference["a." + names.at(name.substr(0, name.find('.'))) + name.substr(name.rfind('.'))] = tensor;
  }
  refused(reference, "a.query_norm.weight", "but holds none");
}

TEST(UnexplainedTest, JointAttentionIsNoDecoupledLayer) {
  auto tensors = diffusers_layer("transformer_blocks.0.attn.");
  const auto add = [&](const std::string& name, at::IntArrayRef shape) {
    tensors["transformer_blocks.0.attn." + name] = torch::randn(shape);
  };
  for (const auto* name : {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}) {
    add(std::string(name) + ".weight", {8, 8});
    add(std::string(name) + ".bias", {8});
  }
  const auto refused = [&] {
    const SavedLayer saved(tensors);
    expect_part(saved.error(), "joint attention, as in SD3 and Flux");
    expect_part(error_of<FileError>([&] { return decoupled_cross_attention_from(saved.open(), {.num_heads = 2}); }),
                "joint attention, as in SD3 and Flux");
  };
  refused();
  for (const auto* name : {"norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight"}) add(name, {4});
  refused();
}

TEST(UnexplainedTest, AddedKeysInTheSameSoftmaxAreRefused) {
  auto tensors = diffusers_layer("attn.");
  for (const auto* name : {"attn.add_k_proj", "attn.add_v_proj"}) {
    tensors[std::string(name) + ".weight"] = torch::randn({8, 12});
    tensors[std::string(name) + ".bias"] = torch::randn({8});
  }
  for (const bool norm : {true, false}) {
    if (norm)
      tensors = with(with(tensors, "attn.group_norm.weight", torch::ones({8})), "attn.group_norm.bias", torch::ones({8}));
    const SavedLayer saved(tensors);
    const auto decoupled = error_of<FileError>([&] { return decoupled_cross_attention_from(saved.open(), {.num_heads = 2}); });
    for (const auto& message : {saved.error(), decoupled}) {
      expect_part(message, "unexpected: add_k_proj.bias, add_k_proj.weight, add_v_proj.bias, add_v_proj.weight");
      expect_part(message, "added keys in the same softmax, behind a group norm, as in Kandinsky and DeepFloyd IF");
    }
    tensors = diffusers_layer("attn.");
    for (const auto* name : {"attn.add_k_proj", "attn.add_v_proj"}) {
      tensors[std::string(name) + ".weight"] = torch::randn({8, 12});
      tensors[std::string(name) + ".bias"] = torch::randn({8});
    }
  }
}

TEST(UnexplainedTest, ASecondContextIsNotDropped) {
  const Example wan{"wan_i2v"};
  const auto message = error_of<FileError>([&] { return cross_attention_from(wan.weights, wan.options()); });
  expect_part(message, "must have one context; unexpected: add_k_proj.bias, add_k_proj.weight");
  expect_part(message, "decoupled_cross_attention_from makes a module with further ones");
  auto options = wan.options();
  options.allow_unexpected = true;
  EXPECT_TRUE(cross_attention_from(wan.weights, options));
}

TEST(UnexplainedTest, T5sRelativeBiasIsHarmlessInCrossAttentionAlone) {
  const Example t5{"t5"};
  EXPECT_TRUE(cross_attention_from(t5.weights, t5.options()));
  const auto message = error_of<FileError>(
      [&] { return cross_attention_from(t5.weights, {.prefix = "decoder.block.0.layer.0.SelfAttention", .num_heads = 4}); });
  expect_part(message, "unexpected: relative_attention_bias.weight");
}

TEST(UnexplainedTest, NamesBesideABlockAreThoseThatItsFamilyHas) {
  for (const auto& name : examples()) {
    const Example example{name};
    const auto blocks = find_blocks(example.weights.tensors());
    if (blocks.empty()) continue;
    for (const auto* strange : {"post_norm.weight", "fc1.lora_A", "adapter.weight"}) {
      const SavedLayer saved(with(example.tensors(), blocks[0].prefix + strange));
      const auto placement = detail::block_layout_named(blocks[0].layout).norm_placement;
      BlockOptionsFromFile options{.num_heads = std::stoll(example.about.at("num_heads")),
                                   .norm_placement = placement.value_or(NormPlacement::after),
                                   .activation = Activation::gelu};
      expect_part(error_of<LoadError>([&] { return cross_attention_block_from(saved.open(), options); }),
                  std::string("unexpected: ") + strange);
      options.allow_unexpected = true;
      EXPECT_TRUE(cross_attention_block_from(saved.open(), options));
    }
  }
}

TEST(UnexplainedTest, HarmlessNamesStayHarmlessInEveryLayout) {
  auto tensors = bart_layer("cross.");
  tensors["cross.masked_bias"] = torch::tensor(-1e4);
  tensors["cross.bias"] = torch::ones({1, 1, 5, 5}, torch::kBool);
  tensors["cross.output.LayerNorm.weight"] = torch::ones({8});
  EXPECT_EQ(SavedLayer(tensors).made()->options.num_heads(), 2);
  auto module = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2));
  EXPECT_EQ(load_weights(*module, tensors, {.prefix = "cross."}).surrounding,
            Strings({"bias", "masked_bias", "output.LayerNorm.weight"}));
  tensors["cross.bias"] = torch::ones({8});  // no mask of self-attention
  expect_part(SavedLayer(tensors).error(), "unexpected: bias");
}

// ---- Sizes and norms in front -----------------------------------------------------------------------------------------------

TEST(MisshapenTest, BiasesOfOtherSizesAreNamed) {
  for (const auto& [name, parameter] :
       {std::pair("q_proj.bias", "query_linear.bias"), {"out_proj.bias", "output_linear.bias"}}) {
    const SavedLayer saved(with(bart_layer("cross."), std::string("cross.") + name, torch::ones({7})));
    const auto shape = std::string(" must have shape [8], but has [7]");
    expect_part(saved.error(), "layer \"cross.\" does not fit together; misshapen: " + (name + shape));
    expect_part(saved.error({.num_heads = 2, .allow_unexpected = true}), name + shape);
    EXPECT_EQ(choose_layer(saved.open()).misshapen, Strings({name + shape}));
    auto module = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2));
    expect_part(error_of<LoadError>([&] { load_weights(*module, saved.open()); }), parameter + shape);
    auto without = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2).qkv_bias(false).output_bias(false));
    expect_part(error_of<LoadError>([&] { load_weights(*without, saved.open(), {.allow_unexpected = true}); }), name + shape);
  }
  const Example bart{"bart"};
  const SavedLayer block(with(bart.tensors(), bart.prefix() + "v_proj.bias", torch::ones({7})));
  expect_part(
      error_of<FileError>([&] {
        return cross_attention_block_from(
            block.open(),
            {.num_heads = 4, .norm_placement = NormPlacement::after, .activation = Activation::gelu, .allow_unexpected = true});
      }),
      "v_proj.bias must have shape [16], but has [7]");
}

TEST(MisshapenTest, NormsOfOtherSizesAreNamed) {
  const auto layer = diffusers_layer("attn2.");
  for (const int64_t size : {3, 5, 16}) {
    const auto with_norm = with(layer, "attn2.norm_q.weight", torch::ones({size}));
    expect_part(SavedLayer(with(with_norm, "attn2.norm_k.weight", torch::ones({8}))).error(),
                "misshapen: norm_q.weight and norm_k.weight must be of a head, or of all heads, but have shapes [" +
                    std::to_string(size) + "] and [8]");
  }
}

TEST(MisshapenTest, HalfOfTheBiasesOfNormsIsNamed) {
  auto tensors = diffusers_layer("attn2.");
  for (const auto* name : {"norm_q.weight", "norm_k.weight", "norm_q.bias"}) {
    tensors[std::string("attn2.") + name] = torch::ones({8});
  }
  const SavedLayer saved(tensors);
  const std::string reason = "norm_q.bias and norm_k.bias must both be there";
  expect_part(saved.error({.allow_unexpected = true}), "layer \"attn2.\" does not fit together; misshapen: " + reason);
  EXPECT_EQ(choose_layer(saved.open()).misshapen, Strings({reason}));
}

TEST(InputNormsTest, AreNotDropped) {
  for (const auto* name : {"flamingo", "perceiver", "perceiver_lucidrains"}) {
    const Example example{name};
    auto options = example.options();
    auto module = cross_attention_from(example.weights, options);
    options.without_input_norms = false;
    const auto message = error_of<FileError>([&] { return cross_attention_from(example.weights, options); });
    expect_part(message, "must have no norms of its own in front of its projections; unexpected: ");
    expect_part(message, "; apply those that input_norms returns, and set without_input_norms");
    const auto norm = detail::layout_named(choose_layer(example.weights, example.prefix()).layout).input_norms[0] + ".weight";
    const auto loading = error_of<LoadError>([&] { load_weights(*module, example.weights, {.prefix = example.prefix()}); });
    expect_part(loading, norm);
    const auto report = load_weights(*module, example.weights, {.prefix = example.prefix(), .without_input_norms = true});
    EXPECT_EQ(std::ranges::count(report.surrounding, norm), 1);
  }
}

// ---- float8 -----------------------------------------------------------------------------------------------------------------

// Every element by definition, in float64; blocks are rows and columns that share a scale.
Tensor scaled(const Tensor& weight, const Tensor& scale, int64_t block_rows, int64_t block_columns) {
  const auto wide = weight.to(torch::kDouble), factors = scale.to(torch::kDouble);
  auto result = torch::empty_like(wide);
  for (int64_t i = 0; i < wide.size(0); ++i) {
    for (int64_t j = 0; j < wide.size(1); ++j) result[i][j] = wide[i][j] * factors[i / block_rows][j / block_columns];
  }
  return result;
}

const std::vector<std::string> kSpellings = {"scale_weight", "weight_scale", "weight_scale_inv"};

TEST(Float8Test, ScalesMultiplyWeightsByTensorRowAndBlockInEverySpelling) {
  torch::manual_seed(1);
  struct Case {
    std::vector<int64_t> shape;
    std::vector<int64_t> blocks;  // of the scale, as two axes
    std::vector<int64_t> block;
  };
  // A weight of k_proj, [8, 12].
  const std::vector<Case> cases = {{{}, {1, 1}, {8, 12}},      {{1}, {1, 1}, {8, 12}},    {{1, 1}, {1, 1}, {8, 12}},
                                   {{8}, {8, 1}, {1, 12}},     {{8, 1}, {8, 1}, {1, 12}}, {{2, 3}, {2, 3}, {4, 4}},
                                   {{1, 12}, {1, 12}, {8, 1}}, {{8, 3}, {8, 3}, {1, 4}}};
  for (const auto& spelling : kSpellings) {
    for (const auto type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
      for (const auto& [shape, blocks, block] : cases) {
        auto tensors = bart_layer("cross.");
        const auto weight = tensors.at("cross.k_proj.weight").to(type);
        const auto scale = torch::rand(shape) + 0.5;
        tensors["cross.k_proj.weight"] = weight;
        tensors["cross.k_proj." + spelling] = scale;
        tensors["cross.k_proj.input_scale"] = torch::full({}, 3.);
        const auto module = SavedLayer(tensors).made({.num_heads = 2, .dtype = torch::kDouble});
        const auto expected = scaled(weight, scale.reshape(blocks), block[0], block[1]);
        EXPECT_TRUE(module->key_linear->weight.equal(expected)) << spelling << " " << scale.sizes();
        EXPECT_TRUE(module->query_linear->weight.equal(tensors.at("cross.q_proj.weight").to(torch::kDouble)));
      }
    }
  }
}

TEST(Float8Test, GivesTheOutputOfTheDequantisedLayer) {
  torch::manual_seed(2);
  auto tensors = bart_layer("cross."), plain = tensors;
  for (const std::string projection : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
    const auto name = "cross." + projection + ".weight";
    const auto scale = torch::rand({8}) * 4;
    tensors[name] = tensors.at(name).to(at::kFloat8_e4m3fn);
    tensors[name + "_scale"] = scale;
    plain[name] = scaled(tensors.at(name), scale.view({8, 1}), 1, 12).to(torch::kFloat);
  }
  const auto module = SavedLayer(tensors).made(), expected = SavedLayer(plain).made();
  const auto query = torch::randn({2, 3, 8}), context = torch::randn({2, 5, 12});
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(std::get<0>(module.ptr()->forward(query, context, context))
                  .equal(std::get<0>(expected.ptr()->forward(query, context, context))));
}

TEST(Float8Test, BlocksOf128MayEndWithASmallerOne) {
  const auto weight = torch::randn({130, 192}).to(at::kFloat8_e4m3fn);
  const auto scale = torch::rand({2, 2}) + 0.5;
  const LazyTensors tensors = lazy(NamedTensors{{"a.weight", weight}, {"a.weight_scale_inv", scale}});
  const detail::TensorRecipe recipe{.source = "a.weight", .scale = "a.weight_scale_inv"};
  EXPECT_EQ(recipe.misfit(tensors.infos), "");
  EXPECT_EQ(recipe.type(tensors.infos), at::kFloat);
  const auto made = recipe.make(tensors);
  EXPECT_TRUE(made.equal(scaled(weight, scale, 128, 128).to(torch::kFloat)));
}

TEST(Float8Test, PackedAndTransposedWeightsHaveTheirScalesToo) {
  torch::manual_seed(3);
  NamedTensors packed = {{"in_proj_weight", torch::randn({24, 8}).to(at::kFloat8_e4m3fn)},
                         {"in_proj_weight_scale", torch::rand({24}) + 0.5},
                         {"in_proj_bias", torch::randn({24})},
                         {"out_proj.weight", torch::randn({8, 8})},
                         {"out_proj.bias", torch::randn({8})}};
  const auto whole =
      scaled(packed.at("in_proj_weight"), packed.at("in_proj_weight_scale").view({24, 1}), 1, 8).to(torch::kFloat);
  const auto module = SavedLayer(packed).made();
  EXPECT_TRUE(module->key_linear->weight.equal(whole.slice(0, 8, 16)));
  EXPECT_TRUE(module->value_linear->weight.equal(whole.slice(0, 16, 24)));

  NamedTensors gpt2 = {{"q_attn.weight", torch::randn({8, 8})},  {"q_attn.bias", torch::randn({8})},
                       {"c_attn.weight", torch::randn({8, 16})}, {"c_attn.bias", torch::randn({16})},
                       {"c_proj.weight", torch::randn({8, 8})},  {"c_proj.bias", torch::randn({8})}};
  gpt2["c_attn.weight"] = gpt2.at("c_attn.weight").to(at::kFloat8_e4m3fn);
  gpt2["c_attn.scale_weight"] = torch::rand({2, 4}) + 0.5;
  const auto upright = scaled(gpt2.at("c_attn.weight"), gpt2.at("c_attn.scale_weight"), 4, 4).to(torch::kFloat).t();
  EXPECT_TRUE(SavedLayer(gpt2).made()->value_linear->weight.equal(upright.slice(0, 8, 16)));
  gpt2["c_attn.scale_weight"] = torch::ones({8});  // for rows, which are inputs here, or for outputs: the shape is ambiguous
  expect_part(SavedLayer(gpt2).error(), "c_attn.scale_weight must be one number, one for each row or one for each block");
}

TEST(Float8Test, ABlockAndAnAddedContextHaveTheirScalesToo) {
  const Example bart{"bart"};
  auto tensors = bart.tensors();
  const std::string fc1 = "model.decoder.layers.0.fc1.";
  tensors[fc1 + "weight"] = tensors.at(fc1 + "weight").to(at::kFloat8_e4m3fn);
  tensors[fc1 + "scale_weight"] = torch::tensor(0.25);
  tensors[fc1 + "scale_input"] = torch::tensor(2.);
  const BlockOptionsFromFile options{.num_heads = 4, .norm_placement = NormPlacement::after, .activation = Activation::gelu};
  const auto block = cross_attention_block_from(SavedLayer(tensors).open(), options);
  EXPECT_TRUE(block->feed_forward_in->weight.equal(tensors.at(fc1 + "weight").to(torch::kFloat) * 0.25));

  const Example wan{"wan_i2v_original"};
  auto added = wan.tensors();
  const auto name = wan.prefix() + "k_img.";
  added[name + "weight"] = added.at(name + "weight").to(at::kFloat8_e4m3fn);
  added[name + "weight_scale"] = torch::tensor(4.);
  const auto module = decoupled_cross_attention_from(SavedLayer(added).open(), wan.options());
  EXPECT_TRUE(module->added_projections[0]->key_linear->weight.equal(added.at(name + "weight").to(torch::kFloat) * 4));
}

TEST(Float8Test, EveryModuleHasTheScalesOfItsWeightsUnlessItKeepsThem) {
  const auto weight = torch::randn({2, 4}).to(at::kFloat8_e4m3fn), scale = torch::rand({2, 1}) + 0.5;
  const NamedTensors tensors = {{"a.weight", weight}, {"a.bias", torch::zeros({2})}, {"a.weight_scale", scale}};
  torch::nn::Linear linear(4, 2);
  EXPECT_EQ(load_weights(*linear, tensors, {.prefix = "a."}).summary(), "loaded 2 tensors");
  EXPECT_TRUE(linear->weight.equal(scaled(weight, scale, 1, 4).to(torch::kFloat)));
  torch::nn::Linear keeps(4, 2);
  keeps->register_buffer("weight_scale", torch::zeros({2, 1}));
  EXPECT_EQ(load_weights(*keeps, tensors, {.prefix = "a."}).summary(), "loaded 3 tensors");
  EXPECT_TRUE(keeps->weight.equal(weight.to(torch::kFloat)));
  torch::nn::Embedding embedding(2, 4);
  load_weights(*embedding, NamedTensors{{"weight", weight}, {"scale_weight", torch::tensor(0.5)}});
  EXPECT_TRUE(embedding->weight.equal(weight.to(torch::kFloat) * 0.5));
}

TEST(Float8Test, UnknownScalesAreRefused) {
  auto tensors = bart_layer("cross.");
  tensors["cross.k_proj.weight"] = tensors.at("cross.k_proj.weight").to(at::kFloat8_e4m3fn);
  const auto error = [&](const std::string& name, const Tensor& scale) {
    return SavedLayer(with(tensors, "cross.k_proj." + name, scale)).error();
  };
  for (const auto* name : {"weight_scale_2", "weight_amax", "scales", "weight_scales_inv", "scale", "weight_zero_point"}) {
    expect_part(error(name, torch::ones({})), std::string("unexpected: k_proj.") + name);
  }
  for (const auto& shape : std::vector<std::vector<int64_t>>{{7}, {12}, {4}, {3, 3}, {2, 5}, {2, 2, 2}, {0}}) {
    expect_part(error("weight_scale", torch::ones(shape)),
                "cross.k_proj.weight_scale must be one number, one for each row or one for each block of cross.k_proj.weight "
                "[8, 12], but has shape [");
  }
  expect_part(error("weight_scale", torch::ones({8, 1}, at::kByte)),
              "cross.k_proj.weight_scale must have type float64, float32, bfloat16 or float16, but has uint8");
  tensors["cross.k_proj.weight_scale"] = torch::ones({});
  expect_part(error("weight_scale_inv", torch::ones({})), "unexpected: k_proj.weight_scale_inv");  // one of both
}

// ---- config.json ------------------------------------------------------------------------------------------------------------

TEST(LayerConfigTest, SanasCrossAttentionHasHeadsOfItsOwn) {
  const json config = {{"num_attention_heads", 4}, {"attention_head_dim", 2}, {"num_cross_attention_heads", 2}};
  EXPECT_EQ(SavedLayer(diffusers_layer("attn2."), config).made({})->options.num_heads(), 2);
  EXPECT_EQ(SavedLayer(diffusers_layer("attn2."), {{"num_attention_heads", 4}, {"attention_head_dim", 2}})
                .made({})
                ->options.num_heads(),
            4);
}

TEST(LayerConfigTest, OnlyUNetsCallTheirHeadsAttentionHeadDim) {
  const auto heads = [](const char* of_class) {
    return SavedLayer(diffusers_layer("attn2."), {{"_class_name", of_class}, {"attention_head_dim", 4}});
  };
  EXPECT_EQ(heads("UNet2DConditionModel").made({})->options.num_heads(), 4);
  const std::string unknown = "the number of heads of \"attn2.\" is not among its weights";
  for (const auto* of_class : {"Kandinsky3UNet", "UNet3DConditionModel", "I2VGenXLUNet"}) {
    expect_part(heads(of_class).error({}), unknown);
  }
  const json ignored = {{"_class_name", "I2VGenXLUNet"}, {"num_attention_heads", 4}, {"attention_head_dim", 4}};
  expect_part(SavedLayer(diffusers_layer("attn2."), ignored).error({}), unknown);
}

TEST(LayerConfigTest, OnlyTheTopCompletesAPartThatThePrefixNames) {
  const auto layer = gemma_layer("vision_model.transformer.layers.0.self_attn.");
  const json text = {{"num_attention_heads", 4}};
  const auto heads = [&](const json& config) { return SavedLayer(layer, config).made({})->options.num_heads(); };
  EXPECT_EQ(heads({{"text_config", text}, {"vision_config", {{"attention_heads", 2}}}}), 2);  // Mllama
  EXPECT_EQ(heads({{"text_config", text}, {"vision_config", json::object()}, {"num_attention_heads", 2}}), 2);
  EXPECT_EQ(heads({{"text_config", text}}), 4);
  expect_part(SavedLayer(layer, {{"text_config", text}, {"vision_config", json::object()}}).error({}),
              "the number of heads of \"vision_model.transformer.layers.0.self_attn.\" is not among its weights");
}

TEST(LayerConfigTest, PerceiversDecodersHaveHeadsOfTheirOwn) {
  auto tensors = renamed_bart("decoding_cross_attention.attention.", {"self.query", "self.key", "self.value", "output.dense"});
  for (const auto& [norm, size] : {std::pair("1", 8), {"2", 12}}) {
    for (const auto* ending : {".weight", ".bias"}) {
      tensors["decoding_cross_attention.attention.self.layernorm" + std::string(norm) + ending] = torch::ones({size});
    }
  }
  const SavedLayer saved(tensors, {{"num_cross_attention_heads", 8}});
  expect_part(saved.error({.without_input_norms = true}), "the number of heads of \"decoding_cross_attention.attention.\"");
}

TEST(LayerConfigTest, T5GemmaWithoutItsConfigIsRefusedBecauseOfItsSoftCap) {
  auto tensors = gemma_layer("decoder.layers.0.cross_attn.");
  tensors["decoder.layers.0.pre_cross_attn_layernorm.weight"] = torch::ones({8});
  const std::string message =
      "layer \"decoder.layers.0.cross_attn.\" is T5Gemma's, whose config.json says whether logits are capped softly by "
      "\"attn_logit_softcapping\", but there is none";
  expect_part(SavedLayer(tensors).error(), message);
  expect_part(SavedLayer(tensors, json{{"num_attention_heads", 2}}).error(), message);
  const json none = {{"decoder", {{"attn_logit_softcapping", nullptr}, {"query_pre_attn_scalar", 16}}}};
  EXPECT_EQ(SavedLayer(tensors, none).made()->options.scale(), 0.25);
}

TEST(LayerConfigTest, SoftCapsOfLogitsAreRefused) {
  for (const auto* part : {"", "decoder", "text_config"}) {
    json config = {{"attn_logit_softcapping", 50.}, {"final_logit_softcapping", 30.}};
    if (*part != '\0') config = {{part, config}};
    const auto message = SavedLayer(gemma_layer("decoder.layers.0.cross_attn."), config).error();
    expect_part(message, "its config.json caps logits softly, by \"attn_logit_softcapping\" of 50: not computed");
  }
  const json none = {{"attn_logit_softcapping", nullptr}, {"final_logit_softcapping", 30.}};
  EXPECT_EQ(SavedLayer(gemma_layer("cross_attn."), none).made()->options.scale(), 0.5);
}

TEST(LayerConfigTest, SoftCapsAreThoseOfThePartThatThePrefixNames) {
  const json cap = {{"attn_logit_softcapping", 50.}}, capped_text = {{"text_config", cap}, {"vision_config", json::object()}};
  const std::string reason = "its config.json caps logits softly";
  const auto tower = gemma_layer("vision_tower.encoder.layers.0.self_attn.");
  expect_part(SavedLayer(tower, {{"vision_config", cap}}).error(), reason);
  EXPECT_EQ(SavedLayer(tower, capped_text).made()->options.num_heads(), 2);
  const auto without_heads = renamed_bart("layers.0.", {"linear_q", "linear_k", "linear_v", "linear_out"});  // in config.json
  expect_part(SavedLayer(without_heads, cap).error(), reason);

  const auto vit = [](const std::string& prefix) {
    return renamed_bart(prefix, {"attention.query", "attention.key", "attention.value", "output.dense"});
  };
  expect_part(SavedLayer(vit("encoder.layer.0.attention."), cap).error(), reason);
  const auto is_read = [&](const std::string& prefix, const json& config) {
    EXPECT_EQ(SavedLayer(vit(prefix), config).made()->options.num_heads(), 2);
  };
  is_read("qformer.encoder.layer.0.crossattention.", capped_text);  // the language model's
  is_read("Qformer.encoder.layer.0.crossattention.", capped_text);
  is_read("encoder.layer.0.crossattention.", {{"text_config", cap}, {"qformer_config", json::object()}});
}

TEST(LayerConfigTest, GemmasScaleIsRead) {
  const json config = {{"decoder", {{"query_pre_attn_scalar", 64}, {"num_attention_heads", 2}}}};
  EXPECT_EQ(SavedLayer(gemma_layer("decoder.layers.0.cross_attn."), config).made({})->options.scale(), 0.125);
  expect_part(SavedLayer(gemma_layer("cross_attn."), {{"query_pre_attn_scalar", 0}}).error(),
              "query_pre_attn_scalar in its config.json must be positive, but is 0");
}

TEST(LayerConfigTest, KindsOfAttentionThatOnlyAConfigRevealsAreRefused) {
  const auto normed = with(with(gemma_layer("cross_attn."), "cross_attn.q_norm.weight", torch::ones({4})),
                           "cross_attn.k_norm.weight", torch::ones({4}));
  EXPECT_EQ(SavedLayer(normed, {{"model_type", "mllama"}}).made()->options.num_heads(), 2);
  expect_part(SavedLayer(normed, {{"model_type", "gemma3_text"}}).error(), "norms whose weights count from one: not computed");
  expect_part(SavedLayer(gemma_layer("cross_attn."), {{"decoder", {{"model_type", "t5gemma2_decoder"}}}}).error(),
              "in one softmax: not computed");
  expect_part(SavedLayer(diffusers_layer("blocks.0.attn2."), {{"_class_name", "HunyuanDiT2DModel"}}).error(),
              "rotary embeddings of its queries: not computed");
  expect_part(SavedLayer(diffusers_layer("attn2."), {{"qk_norm", "l2"}}).error(), "that have no weights: not computed");
  for (const auto* model : {"dia", "gpt_neo"}) {
    expect_part(SavedLayer(gemma_layer("layers.0.cross_attention."), {{"model_type", model}}).error(),
                "logits without a scale");
  }
  EXPECT_EQ(SavedLayer(gemma_layer("layers.0.cross_attention."), {{"model_type", "gpt_neox"}}).made()->options.num_heads(), 2);
  expect_part(SavedLayer(bart_layer("decoder.layers.0.encoder_attn."), {{"model_type", "autoformer"}}).error(),
              "autocorrelation in place of attention: not computed");
  expect_part(SavedLayer(diffusers_layer("layers.0.attn2."), {{"_class_name", "LuminaNextDiT2DModel"}}).error(),
              "rotary embeddings of its queries: not computed");
  for (const auto* of_class : {"AuraFlowTransformer2DModel", "CogView4Transformer2DModel"}) {
    expect_part(SavedLayer(diffusers_layer("attn2."), {{"_class_name", of_class}}).error(),
                "that have no weights: not computed");
  }
  auto hunyuan = diffusers_layer("blocks.0.attn2.");
  for (const auto* name : {"norm_q.weight", "norm_q.bias", "norm_k.weight", "norm_k.bias"}) {
    hunyuan["blocks.0.attn2." + std::string(name)] = torch::ones({4});
  }
  expect_part(SavedLayer(hunyuan).error(),
              "norms of kind rms, but are layer norms, as those of HunyuanDiT, whose queries have rotary");
}

// Self-attention is refused for this reason, and cross-attention beside it is not.
void expect_self_refused(const NamedTensors& self, const NamedTensors& cross, const json& config, const std::string& reason) {
  expect_part(SavedLayer(self, config).error(), reason + ": not computed");
  EXPECT_EQ(SavedLayer(cross, config).made()->options.num_heads(), 2) << config;
}

TEST(LayerConfigTest, KindsOfSelfAttentionAreRefusedByTheClassOfDiffusers) {
  const std::string rotary = "rotary embeddings of its queries and keys", joint = "joint attention to text and video";
  for (const auto& [of_class, reason] : {std::pair("WanTransformer3DModel", rotary),
                                         {"LTXVideoTransformer3DModel", rotary},
                                         {"LTX2VideoTransformer3DModel", rotary},
                                         {"Lumina2Transformer2DModel", rotary},
                                         {"AllegroTransformer3DModel", rotary},
                                         {"StableAudioDiTModel", rotary},
                                         {"CosmosTransformer3DModel", rotary},
                                         {"SkyReelsV2Transformer3DModel", rotary},
                                         {"ChronoEditTransformer3DModel", rotary},
                                         {"OmniGenTransformer2DModel", rotary},
                                         {"ZImageTransformer2DModel", rotary},
                                         {"CogVideoXTransformer3DModel", joint},
                                         {"ConsisIDTransformer3DModel", joint},
                                         {"SanaTransformer2DModel", std::string("linear attention")}}) {
    expect_self_refused(diffusers_layer("transformer_blocks.0.attn1."), diffusers_layer("transformer_blocks.0.attn2."),
                        {{"_class_name", of_class}}, reason);
  }
}

TEST(LayerConfigTest, KindsOfSelfAttentionAreRefusedByTheConfig) {
  const std::string positions = "logits that depend on positions", in_part = "attention that is not to all keys";
  const std::string rotary = "rotary embeddings of its queries and keys";
  const auto self = bart_layer("decoder.layers.0.self_attn."), cross = bart_layer("decoder.layers.0.encoder_attn.");
  for (const auto* type : {"alibi", "relative_key", "relative_key_query"}) {
    expect_self_refused(self, cross, {{"position_embedding_type", type}}, positions);
  }
  expect_self_refused(self, cross, {{"model_type", "nezha"}}, positions);
  expect_self_refused(self, cross, {{"attention_type", "prob"}}, in_part);
  expect_self_refused(self, cross, {{"position_embeddings_type", "rotary"}, {"rotary_embedding_base", 10000}}, rotary);
  const auto encoder = bart_layer("encoder.layers.0.self_attn.");
  for (const auto& [config, reason] : {std::pair(json{{"model_type", "pegasus_x"}}, in_part),
                                       {json{{"attention_type", "block_sparse"}}, in_part},
                                       {json{{"model_type", "speecht5"}}, positions}}) {
    expect_self_refused(encoder, self, config, reason);  // the decoder's is attention to all keys
    expect_self_refused(encoder, cross, config, reason);
  }
}

TEST(LayerConfigTest, RotaryEmbeddingsAreRefusedByTheTypeOfTheModelsPart) {
  const std::string rotary = "rotary embeddings of its queries and keys";
  for (const auto* type : {"llama", "mistral", "mixtral", "gemma", "gemma2", "qwen2", "qwen3", "phi", "phi3", "idefics"}) {
    expect_self_refused(gemma_layer("model.layers.0.self_attn."), gemma_layer("model.layers.0.cross_attn."),
                        {{"model_type", type}}, rotary);
  }
  const json paligemma = {{"model_type", "paligemma"},
                          {"text_config", {{"model_type", "gemma"}}},
                          {"vision_config", {{"model_type", "siglip_vision_model"}}}};
  const json qwen = {{"model_type", "qwen2_audio"},
                     {"text_config", {{"model_type", "qwen2"}}},
                     {"audio_config", {{"model_type", "qwen2_audio_encoder"}}}};
  const auto language = gemma_layer("language_model.model.layers.0.self_attn.");
  expect_self_refused(language, bart_layer("vision_tower.vision_model.encoder.layers.0.self_attn."), paligemma, rotary);
  expect_self_refused(language, bart_layer("audio_tower.layers.0.self_attn."), qwen, rotary);
}

TEST(LayerConfigTest, Gpt2sSwitchesOfTheScaleAreComputed) {
  NamedTensors gpt2;
  const std::string prefix = "transformer.h.2.crossattention.";
  for (const auto& [name, out] : {std::pair("q_attn", 8), {"c_attn", 16}, {"c_proj", 8}}) {
    gpt2[prefix + name + ".weight"] = torch::randn({8, out});
    gpt2[prefix + name + ".bias"] = torch::randn({out});
  }
  const auto scale = [&](const json& config) { return *SavedLayer(gpt2, config).made()->options.scale(); };
  EXPECT_EQ(scale({{"scale_attn_weights", true}, {"scale_attn_by_inverse_layer_idx", false}}), 0.5);
  EXPECT_EQ(scale({{"scale_attn_weights", false}}), 1);
  EXPECT_EQ(scale({{"scale_attn_by_inverse_layer_idx", true}}), 0.5 / 3);
  EXPECT_EQ(scale({{"scale_attn_weights", false}, {"scale_attn_by_inverse_layer_idx", true}}), 1. / 3);
  EXPECT_EQ(scale({{"decoder", {{"scale_attn_weights", false}}}}), 1);
  NamedTensors alone;
  for (const auto& [name, tensor] : gpt2) alone[name.substr(prefix.size())] = tensor;
  expect_part(SavedLayer(alone, {{"scale_attn_by_inverse_layer_idx", true}}).error(),
              "scale_attn_by_inverse_layer_idx, but prefix \"\" does not contain the number of the layer");
}

TEST(LayerConfigTest, EpsIsTheFamilysHoweverItsNamesAreWrapped) {
  const Example wan{"wan"};
  for (const std::string wrapper :
       {"", "module.", "_orig_mod.", "transformer.", "model.diffusion_model.", "module._orig_mod."}) {
    NamedTensors tensors;
    for (const auto& [name, tensor] : wan.tensors()) tensors[wrapper + name] = tensor;
    const auto module = SavedLayer(tensors).made({.prefix = wrapper + wan.prefix(), .num_heads = 2});
    EXPECT_EQ(module->options.qk_norm_eps(), 1e-6) << wrapper;
    EXPECT_EQ(
        SavedLayer(tensors, {{"eps", 1e-4}}).made({.prefix = wrapper + wan.prefix(), .num_heads = 2})->options.qk_norm_eps(),
        1e-4);
  }
  for (const std::string wrapper : {"", "module.", "_orig_mod."}) {
    const Example ltx{"ltx"};
    NamedTensors tensors;
    for (const auto& [name, tensor] : ltx.tensors()) tensors[wrapper + name] = tensor;
    EXPECT_EQ(SavedLayer(tensors).made({.prefix = wrapper + ltx.prefix(), .num_heads = 2})->options.qk_norm_eps(), 1e-5);
  }
}

TEST(LayerConfigTest, EpsIsNotGuessedIfThePrefixDoesNotIdentifyTheFamily) {
  const Example wan{"wan"};
  NamedTensors tensors;
  for (const auto& [name, tensor] : wan.tensors()) {
    if (name.starts_with(wan.prefix())) tensors["attn2." + name.substr(wan.prefix().size())] = tensor;
  }
  const auto eps = [](const CrossAttention& module) { return module->options.qk_norm_eps(); };
  expect_part(
      SavedLayer(tensors).error(),
      "the eps of the norms of queries and keys of \"attn2.\" is not among its weights, nor in a config.json beside it, and "
      "neither its prefix nor a _class_name identifies the family; give qk_norm_eps: 1e-05 for LTX and Sana, 1e-06 for Wan, "
      "LTX-2 and SD3");
  EXPECT_EQ(eps(SavedLayer(tensors).made({.num_heads = 2, .qk_norm_eps = 1e-6})), 1e-6);
  EXPECT_EQ(eps(SavedLayer(tensors).made({.layout = "diffusers", .num_heads = 2})), 1e-5);
  EXPECT_EQ(eps(SavedLayer(tensors, {{"eps", 1e-4}}).made()), 1e-4);
}

TEST(LayerConfigTest, EpsIsThatOfTheClassOfDiffusers) {
  auto tensors = diffusers_layer("transformer_blocks.0.attn2.");
  for (const auto* name : {"norm_q.weight", "norm_k.weight"}) {
    tensors["transformer_blocks.0.attn2." + std::string(name)] = torch::ones({4});
  }
  const auto of_class = [&](const char* name) {
    return SavedLayer(tensors, {{"_class_name", name}, {"norm_eps", 0.25}});  // of other norms
  };
  for (const auto& [name, eps] : {std::pair("LTXVideoTransformer3DModel", 1e-5),
                                  {"SanaTransformer2DModel", 1e-5},
                                  {"PixArtTransformer2DModel", 1e-5},
                                  {"CosmosTransformer3DModel", 1e-5},
                                  {"LTX2VideoTransformer3DModel", 1e-6},
                                  {"SD3Transformer2DModel", 1e-6},
                                  {"CogVideoXTransformer3DModel", 1e-6},
                                  {"ConsisIDTransformer3DModel", 1e-6}}) {
    const auto saved = of_class(name);
    auto module = saved.made();
    EXPECT_EQ(module->options.qk_norm_eps(), eps) << name;
    module->options.qk_norm_eps(0.5);
    expect_part(error_of<LoadError>([&] { load_weights(*module, saved.open()); }),
                "must have qk_norm_eps " + std::string(eps == 1e-5 ? "1e-05" : "1e-06") + ", as config.json says, but has 0.5");
  }
  expect_part(of_class("NewTransformer3DModel").error(), "neither its prefix nor a _class_name identifies the family");
  EXPECT_EQ(of_class("NewTransformer3DModel").made({.num_heads = 2, .qk_norm_eps = 1e-6})->options.qk_norm_eps(), 1e-6);
}

TEST(LayerConfigTest, EpsOfQueryAndKeyNormsIsRead) {
  const Example mllama{"mllama"};
  const auto eps = [&](const json& config) {
    return SavedLayer(mllama.tensors(), config).made(mllama.options())->options.qk_norm_eps();
  };
  EXPECT_EQ(eps(json::object()), 1e-5);
  EXPECT_EQ(eps({{"text_config", {{"rms_norm_eps", 1e-3}}}}), 1e-3);
  auto options = mllama.options();
  options.qk_norm_eps = 0.5;
  EXPECT_EQ(SavedLayer(mllama.tensors(), {{"rms_norm_eps", 1e-3}}).made(options)->options.qk_norm_eps(), 0.5);
}

// ---- Types ------------------------------------------------------------------------------------------------------------------

TEST(LayerTypeTest, IsTheWidestOfItsTensorsButAtLeastHalf) {
  const auto type_of_layer = [](at::ScalarType weights, at::ScalarType biases, std::optional<at::ScalarType> wanted = {}) {
    auto tensors = bart_layer("cross.");
    for (auto& [name, tensor] : tensors) tensor = tensor.to(name.ends_with("bias") ? biases : weights);
    const auto module = SavedLayer(tensors).made({.num_heads = 2, .dtype = wanted});
    for (const auto& parameter : module->parameters())
      EXPECT_EQ(parameter.scalar_type(), module->query_linear->weight.scalar_type());
    const auto bias = tensors.at("cross.q_proj.bias").to(at::kDouble);
    if (!wanted) {
      EXPECT_TRUE(module->query_linear->bias.to(at::kDouble).equal(bias));
    }
    return module->query_linear->weight.scalar_type();
  };
  EXPECT_EQ(type_of_layer(at::kFloat, at::kFloat), at::kFloat);
  EXPECT_EQ(type_of_layer(at::kHalf, at::kFloat), at::kFloat);
  EXPECT_EQ(type_of_layer(at::kBFloat16, at::kFloat), at::kFloat);
  EXPECT_EQ(type_of_layer(at::kFloat8_e4m3fn, at::kFloat), at::kFloat);
  EXPECT_EQ(type_of_layer(at::kFloat8_e4m3fn, at::kBFloat16), at::kBFloat16);
  EXPECT_EQ(type_of_layer(at::kFloat, at::kDouble), at::kDouble);
  EXPECT_EQ(type_of_layer(at::kBFloat16, at::kHalf), at::kFloat);
  EXPECT_EQ(type_of_layer(at::kFloat8_e5m2, at::kFloat8_e4m3fn), at::kHalf);
  EXPECT_EQ(type_of_layer(at::kFloat8_e5m2, at::kFloat, at::kBFloat16), at::kBFloat16);
  EXPECT_EQ(type_of_layer(at::kHalf, at::kHalf, at::kDouble), at::kDouble);
}

TEST(LayerTypeTest, OfABlockIsTheWidestOfAllItsTensors) {
  const Example bart{"bart"};
  auto tensors = bart.tensors();
  for (auto& [name, tensor] : tensors) {
    if (name.find("layer_norm") == std::string::npos) tensor = tensor.to(at::kBFloat16);
  }
  BlockOptionsFromFile options{.num_heads = 4, .norm_placement = NormPlacement::after, .activation = Activation::gelu};
  const SavedLayer saved(tensors);
  EXPECT_EQ(cross_attention_block_from(saved.open(), options)->feed_forward_in->weight.scalar_type(), at::kFloat);
  options.dtype = at::kBFloat16;
  EXPECT_EQ(cross_attention_block_from(saved.open(), options)->feed_forward_in->weight.scalar_type(), at::kBFloat16);
}

TEST(LayerTypeTest, WeightsWithoutArithmeticAreNamed) {
  for (const auto type : {at::kChar, at::kByte, at::kInt, at::kBool}) {
    const SavedLayer saved(with(bart_layer("cross."), "cross.k_proj.weight", torch::ones({8, 12}, type)));
    const auto type_name = std::string(c10::getDtypeNames(type).first);
    expect_part(saved.error(), "tensor \"cross.k_proj.weight\" must have a floating point type, but has " + type_name);
  }
  auto packed = bart_layer("cross.");  // four bits each, as in bitsandbytes
  packed["cross.q_proj.weight"] = torch::ones({32, 1}, at::kByte);
  packed["cross.k_proj.weight"] = torch::ones({48, 1}, at::kByte);
  expect_part(SavedLayer(packed).error(), "must have a floating point type, but has uint8");
  expect_part(
      SavedLayer({{"cross.q_proj.qweight", torch::ones({1, 8}, at::kInt)}, {"cross.q_proj.scales", torch::ones({1, 8})}})
          .error(),
      "tensor \"cross.q_proj.qweight\" must have a floating point type, but has int32; quantized weights must first be");
  expect_part(error_of<c10::ValueError>([] { SavedLayer(bart_layer("")).made({.num_heads = 2, .dtype = at::kFloat8_e5m2}); }),
              "dtype must be float64, float32, bfloat16 or float16, but is float8_e5m2.");
}

}  // namespace
}  // namespace xattn
