// SPDX-License-Identifier: Apache-2.0
#include "loading/block_layouts.h"

#include <torch/torch.h>
#include <xattn/find_blocks.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "compare.h"
#include "loading/recipes.h"
#include "test_util.h"

namespace xattn {
namespace {

using nlohmann::json;
using test::copy_of;
using test::data_path;
using test::error_of;
using test::TempDir;
using torch::Tensor;

const std::map<std::string, NormPlacement> kPlacements = {{"before", NormPlacement::before}, {"after", NormPlacement::after}};
const std::map<std::string, Activation> kActivations = {
    {"relu", Activation::relu}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh}, {"silu", Activation::silu}};

// Made by scripts/layout_fixtures.py: weights with their neighbours, and inputs and outputs of a whole block.
struct BlockFamily {
  explicit BlockFamily(const std::string& name_) : name(name_) {}

  std::string name;
  Checkpoint weights = open_checkpoint(data_path("layouts/" + name + ".safetensors"));
  Checkpoint expected = open_checkpoint(data_path("layouts/" + name + ".block.expect.safetensors"));
  json told = json::parse(expected.metadata().at("block"));

  // The prefix of the block, which its attention and its feed-forward branch share.
  std::string prefix() const {
    const auto& attention = expected.metadata().at("prefix");
    const auto& feed_forward = told.at("feed_forward_norm").get_ref<const std::string&>();
    const auto differ = std::ranges::mismatch(attention, feed_forward);
    auto shared = std::string(attention.begin(), differ.in1);
    if (shared.ends_with(".layer.")) shared.resize(shared.size() - 6);  // T5's branches are layer.1 and layer.2 of its block
    return shared.substr(0, shared.rfind('.') + 1);
  }
  int64_t heads() const { return std::stoll(expected.metadata().at("num_heads")); }

  // Options that neither its file nor a config.json beside it sets.
  BlockOptionsFromFile options() const {
    return {.prefix = prefix(),
            .num_heads = heads(),
            .norm_placement = kPlacements.at(told.at("norm_placement")),
            .activation = kActivations.at(told.at("activation"))};
  }

  Tensor output_of(CrossAttentionBlock& block) const {
    const torch::NoGradGuard no_grad;
    const auto context = expected.tensor("context");
    return std::get<0>(block->forward(expected.tensor("query"), context, context, mask()));
  }

  Mask mask() const {
    if (!expected.contains("mask")) return {};
    const auto mask = expected.tensor("mask");
    return mask.dim() == 2 ? Mask::key_padding(mask) : Mask::dense(mask);
  }
};

std::vector<std::string> block_families() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("layouts"))) {
    const auto file = entry.path().filename().string();
    if (file.ends_with(".block.expect.safetensors")) names.push_back(file.substr(0, file.find('.')));
  }
  std::ranges::sort(names);
  return names;
}

// float32, sums of up to 64 terms; norms after the residual may divide by a standard deviation below one.
void expect_equal(const Tensor& output, const Tensor& expected, const std::string& what) {
  const auto difference = (output - expected).abs().max().item<double>() / expected.abs().max().item<double>();
  EXPECT_LE(difference, 2e-6) << what;
}

// The message of the error for a file that does not fit. Expects that nothing changed.
std::string refusal(torch::nn::Module& module, const Checkpoint& file, const LoadOptions& options) {
  const auto before = copy_of(module);
  const auto message = error_of<LoadError>([&] { load_weights(module, file, options); });
  for (const auto& [name, tensor] : copy_of(module)) EXPECT_TRUE(tensor.equal(before.at(name))) << name << " changed";
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  const auto start = "[load_weights] " + file.path() + ": does not fit the module; ";
  EXPECT_TRUE(message.starts_with(start)) << message;
  return message.substr(std::min(message.size(), start.size()));
}

// ---- Every family -----------------------------------------------------------------------------------------------------------

class BlockLayoutsTest : public testing::TestWithParam<std::string> {};

TEST_P(BlockLayoutsTest, ComputesTheFamilysOutput) {
  const BlockFamily family{GetParam()};
  auto block = cross_attention_block_from(family.weights, family.options());
  EXPECT_EQ(block->options.norm_eps(), family.told.at("norm_eps").get<double>());
  EXPECT_EQ(block->options.feed_forward(), family.told.at("feed_forward").get<int64_t>());
  EXPECT_EQ(block->options.norm_bias(), family.told.value("norm_bias", true));
  EXPECT_EQ(block->options.feed_forward_glu(), family.told.contains("feed_forward_multiplier"));
  expect_equal(family.output_of(block), family.expected.tensor("output"), choose_block(family.weights, family.prefix()).layout);
}

// A user's model.
struct ModelWithABlock : torch::nn::Module {
  explicit ModelWithABlock(const CrossAttentionBlockOptions& options)
      : fusion(register_module("fusion", CrossAttentionBlock(options))) {}
  CrossAttentionBlock fusion;
};

TEST_P(BlockLayoutsTest, LoadsIntoAModuleThatHoldsABlock) {
  const BlockFamily family{GetParam()};
  const auto prefix = family.prefix();
  const auto alone = cross_attention_block_from(family.weights, family.options());
  NamedTensors renamed;  // as if the file's layer were called "model.fusion"
  for (const auto& [name, info] : family.weights.tensors()) {
    if (!name.starts_with(prefix)) continue;
    renamed["model.fusion." + name.substr(prefix.size())] = family.weights.tensor(name);
  }
  ModelWithABlock model(alone->options);
  const auto report = load_weights(model, renamed, {.prefix = "model."});
  EXPECT_EQ(report.loaded.size(), model.parameters().size());
  EXPECT_TRUE(report.unexpected.empty());
  std::set<std::string> sources;
  for (const auto& [parameter, recipe] : detail::recipes(choose_block(family.weights, prefix), family.weights.tensors())) {
    sources.insert("fusion." + recipe.source.substr(prefix.size()));
  }
  EXPECT_EQ(sources.size() + report.surrounding.size(), renamed.size());
  for (const auto& name : report.surrounding) EXPECT_FALSE(sources.contains(name)) << name;
  expect_equal(family.output_of(model.fusion), family.expected.tensor("output"), "block in a module");
}

TEST_P(BlockLayoutsTest, IsChosenIfItIsTheOnlyOne) {
  const BlockFamily family{GetParam()};
  const auto blocks = find_blocks(family.weights.tensors());
  ASSERT_EQ(blocks.size(), 1U);
  EXPECT_EQ(blocks[0].prefix, family.prefix());
  EXPECT_EQ(blocks[0].attention.prefix, family.expected.metadata().at("prefix"));
  CrossAttentionBlock block(cross_attention_block_from(family.weights, family.options())->options);
  load_weights(*block, family.weights);
  expect_equal(family.output_of(block), family.expected.tensor("output"), "block without a prefix");
}

TEST_P(BlockLayoutsTest, RefusesAnotherArithmetic) {
  const BlockFamily family{GetParam()};
  const LoadOptions options{.prefix = family.prefix(), .allow_missing = true, .allow_unexpected = true};
  const auto right = cross_attention_block_from(family.weights, family.options())->options;
  const auto found = choose_block(family.weights, family.prefix());
  const auto& layout = detail::block_layout_named(found.layout);
  const auto said = [&](CrossAttentionBlockOptions wrong) {
    CrossAttentionBlock block(std::move(wrong));
    return refusal(*block, family.weights, options);
  };
  const auto has = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
  };
  const auto needs = ", as layout " + layout.name + " needs, but has ";
  const bool rms = right.norm() == NormKind::rms;
  auto norm = right, placement = right, gate = right, glu = right, scale = right;
  has(said(norm.norm(rms ? NormKind::layer : NormKind::rms)),
      std::string("the module must have norm ") + (rms ? "rms" + needs + "layer" : "layer" + needs + "rms"));
  has(said(gate.gate(right.gate() == BlockGate::none ? BlockGate::scalar : BlockGate::none)), "the module must have gate ");
  has(said(glu.feed_forward_glu(!right.feed_forward_glu())), "the module must have feed_forward_glu ");
  if (layout.norm_placement) {
    const bool before = right.norm_placement() == NormPlacement::before;
    has(said(placement.norm_placement(before ? NormPlacement::after : NormPlacement::before)),
        std::string("the module must have norm_placement ") +
            (before ? "before" + needs + "after" : "after" + needs + "before"));
  }
  if (right.attention().scale() == 1) {
    auto inner = right.attention();
    has(said(scale.attention(inner.scale(0.5))),
        "attention must have scale 1, as layout " + found.attention.layout + " needs, but has 0.5");
  }
}

INSTANTIATE_TEST_SUITE_P(Families, BlockLayoutsTest, testing::ValuesIn(block_families()), [](const auto& info) {
  return info.param;
});

// ---- Settings that a file lacks ---------------------------------------------------------------------------------------------

// A copy of a family's weights in a folder of its own, beside a config.json.
struct Folder {
  Folder(const std::string& name, const json& config) {
    std::filesystem::copy_file(data_path("layouts/" + name + ".safetensors"), dir.file("model.safetensors"));
    test::write_bytes(dir.file("config.json"), config.dump());
  }
  CrossAttentionBlockOptions made(const BlockOptionsFromFile& options = {}) const {
    return cross_attention_block_from(open(), options)->options;
  }
  std::string error(const BlockOptionsFromFile& options = {}) const {
    const auto message = error_of<FileError>([&] { return cross_attention_block_from(open(), options); });
    const auto start = "[load] " + open().path() + ": ";
    EXPECT_TRUE(message.starts_with(start)) << message;
    return message.substr(std::min(message.size(), start.size()));
  }
  Checkpoint open() const { return open_checkpoint(dir.file("model.safetensors")); }

  TempDir dir;
};

TEST(BlockConfigTest, SaysWhatIsMissing) {
  const Folder folder("bart", {{"decoder_attention_heads", 4}});
  EXPECT_EQ(
      folder.error(),
      "the norm_placement of \"model.decoder.layers.0.\" is not among its weights, nor in a config.json beside it; give one "
      "of before, after");
  EXPECT_EQ(
      folder.error({.norm_placement = NormPlacement::after}),
      "the activation of \"model.decoder.layers.0.\" is not among its weights, nor in a config.json beside it; give one of "
      "relu, gelu, gelu_tanh, silu");
  EXPECT_EQ(
      Folder("bert", json::object()).error(),
      "the number of heads of \"bert.encoder.layer.0.crossattention.\" is not among its weights, nor in a config.json beside "
      "it; give one of 1, 2, 4, 8, 16");
}

TEST(BlockConfigTest, PlacesNormsByTheTypeOfTheModel) {
  const auto placement = [](const std::string& family, const std::string& model_type) {
    const json config = {{"model_type", model_type}, {"num_attention_heads", 4}, {"activation_function", "relu"}};
    return Folder(family, config).made().norm_placement();
  };
  for (const auto* type : {"bart", "marian"}) EXPECT_EQ(placement("bart", type), NormPlacement::after) << type;
  for (const auto* type : {"whisper", "mbart", "pegasus", "m2m_100", "musicgen"}) {
    EXPECT_EQ(placement("bart", type), NormPlacement::before) << type;
  }
  const json nested = {{"model_type", "vision-encoder-decoder"},
                       {"decoder", {{"model_type", "mbart"}, {"decoder_attention_heads", 4}, {"activation_function", "gelu"}}}};
  EXPECT_EQ(Folder("mbart", nested).made().norm_placement(), NormPlacement::before);
}

TEST(BlockConfigTest, SetsActivationEpsAndHeads) {
  const auto bert = Folder("bert", {{"hidden_act", "relu"}, {"layer_norm_eps", 1e-3}, {"num_attention_heads", 2}}).made();
  EXPECT_EQ(bert.activation(), Activation::relu);
  EXPECT_EQ(bert.norm_eps(), 1e-3);
  EXPECT_EQ(bert.attention().num_heads(), 2);
  const auto t5 = Folder("t5_gated", {{"dense_act_fn", "silu"}, {"layer_norm_epsilon", 1e-4}, {"num_heads", 4}}).made();
  EXPECT_EQ(t5.activation(), Activation::silu);
  EXPECT_EQ(t5.norm_eps(), 1e-4);
  const auto gpt2 = Folder("gpt2", {{"activation_function", "gelu_new"}, {"layer_norm_epsilon", 1e-4}, {"n_head", 4}}).made();
  EXPECT_EQ(gpt2.activation(), Activation::gelu_tanh);
  EXPECT_EQ(gpt2.norm_eps(), 1e-4);
  const auto mllama = Folder("mllama", {{"text_config", {{"hidden_act", "gelu"}, {"rms_norm_eps", 1e-4}}}}).made();
  EXPECT_EQ(mllama.activation(), Activation::gelu);
  EXPECT_EQ(mllama.norm_eps(), 1e-4);
}

TEST(BlockConfigTest, ReadsT5sFeedForwardProj) {
  const auto activation = [](const std::string& name, json config) {
    config["num_heads"] = 4;
    return Folder(name, config).made().activation();
  };
  EXPECT_EQ(activation("t5", {{"feed_forward_proj", "relu"}}), Activation::relu);
  EXPECT_EQ(activation("t5", {{"feed_forward_proj", "gelu"}}), Activation::gelu);
  EXPECT_EQ(activation("t5_gated", {{"feed_forward_proj", "gated-gelu"}}), Activation::gelu_tanh);
  EXPECT_EQ(activation("t5_gated", {{"feed_forward_proj", "gated-silu"}}), Activation::silu);
  EXPECT_EQ(activation("t5_gated", {{"dense_act_fn", "relu"}, {"feed_forward_proj", "gated-gelu"}}), Activation::relu);
  EXPECT_EQ(Folder("t5_gated", {{"feed_forward_proj", "gated-tanh"}, {"num_heads", 4}}).error(),
            "the activation in its config.json, \"gated-tanh\", is not known; give one of relu, gelu, gelu_tanh, silu");
}

TEST(BlockConfigTest, OptionsComeFirstAndTheFamilyLast) {
  const Folder folder("bert", {{"hidden_act", "relu"}, {"layer_norm_eps", 1e-3}, {"num_attention_heads", 2}});
  const auto told = folder.made({.num_heads = 4, .activation = Activation::silu, .norm_eps = 0.5});
  EXPECT_EQ(told.activation(), Activation::silu);
  EXPECT_EQ(told.norm_eps(), 0.5);
  EXPECT_EQ(told.attention().num_heads(), 4);
  const auto untold = Folder("bert", {{"num_attention_heads", 4}}).made();
  EXPECT_EQ(untold.activation(), Activation::gelu);
  EXPECT_EQ(untold.norm_eps(), 1e-12);
  EXPECT_EQ(untold.norm_placement(), NormPlacement::after);
}

TEST(BlockConfigTest, ReadsTheQFormersOwnPart) {
  const json language_model = {{"num_attention_heads", 8}, {"hidden_act", "relu"}, {"layer_norm_eps", 1.}};
  const json qformer = {{"num_attention_heads", 4}, {"hidden_act", "gelu_new"}, {"layer_norm_eps", 1e-3}};
  const auto made = Folder("qformer", {{"text_config", language_model}, {"qformer_config", qformer}}).made();
  EXPECT_EQ(made.attention().num_heads(), 4);
  EXPECT_EQ(made.activation(), Activation::gelu_tanh);
  EXPECT_EQ(made.norm_eps(), 1e-3);
  const Folder untold("qformer", {{"text_config", language_model}});
  EXPECT_TRUE(untold.error().starts_with("the number of heads of ")) << untold.error();
  EXPECT_EQ(untold.made({.num_heads = 4}).activation(), Activation::gelu);
}

TEST(BlockConfigTest, RefusesAnUnknownActivation) {
  const Folder folder("bert", {{"hidden_act", "quick_gelu"}, {"num_attention_heads", 4}});
  EXPECT_EQ(folder.error(),
            "the activation in its config.json, \"quick_gelu\", is not known; give one of relu, gelu, gelu_tanh, silu");
  EXPECT_EQ(folder.made({.activation = Activation::gelu}).activation(), Activation::gelu);
}

TEST(BlockConfigTest, IgnoresValuesOfOtherTypes) {
  const Folder folder("bert", {{"hidden_act", 3}, {"layer_norm_eps", "tiny"}, {"num_attention_heads", 4}});
  EXPECT_EQ(folder.made().activation(), Activation::gelu);
  EXPECT_EQ(folder.made().norm_eps(), 1e-12);
}

TEST(BlockConfigTest, RefusesAPlacementThatTheLayoutExcludes) {
  const BlockFamily family("t5");
  auto options = family.options();
  options.norm_placement = NormPlacement::after;
  EXPECT_EQ(error_of<LoadError>([&] { return cross_attention_block_from(family.weights, options); }),
            "[load_weights] " + family.weights.path() +
                ": does not fit the module; misshapen: the module must have norm_placement before, as layout t5 needs, but has "
                "after");
}

// ---- Choosing a block -------------------------------------------------------------------------------------------------------

// The tensors that nn.TransformerDecoderLayer saves, with 8 features, and 12 in its feed-forward branch.
NamedTensors decoder_layer(const std::string& prefix) {
  NamedTensors tensors;
  const auto add = [&](const std::string& name, at::IntArrayRef shape) { tensors[prefix + name] = torch::randn(shape); };
  for (const std::string attention : {"self_attn.", "multihead_attn."}) {
    add(attention + "in_proj_weight", {24, 8});
    add(attention + "in_proj_bias", {24});
    add(attention + "out_proj.weight", {8, 8});
    add(attention + "out_proj.bias", {8});
  }
  for (const std::string norm : {"norm1.", "norm2.", "norm3."}) {
    add(norm + "weight", {8});
    add(norm + "bias", {8});
  }
  add("linear1.weight", {12, 8});
  add("linear1.bias", {12});
  add("linear2.weight", {8, 12});
  add("linear2.bias", {8});
  return tensors;
}

CrossAttentionBlockOptions decoder_layer_options() {
  return CrossAttentionBlockOptions(CrossAttentionOptions(8, 8, 8, 8).num_heads(2)).feed_forward(12);
}

TEST(ChooseBlockTest, ListsTheBlocksOfTheFile) {
  const TempDir dir;
  auto tensors = decoder_layer("layers.0.");
  tensors.merge(decoder_layer("layers.1."));
  save_safetensors(dir.file("two"), tensors);
  const auto two = open_checkpoint(dir.file("two"));
  const auto error = [&](const auto& call) { return error_of<FileError>(call).substr(std::string("[load] ").size()); };
  EXPECT_EQ(error([&] { return choose_block(two); }),
            two.path() + R"(: prefix must be one of "layers.0.", "layers.1.", but was not given)");
  EXPECT_EQ(error([&] { return choose_block(two, "layers.2"); }),
            two.path() + R"(: prefix must be one of "layers.0.", "layers.1.", but is "layers.2")");
  EXPECT_EQ(choose_block(two, "layers.1").prefix, "layers.1.");
  CrossAttentionBlock block(decoder_layer_options());
  EXPECT_EQ(error([&] { load_weights(*block, two); }),
            two.path() + R"(: prefix must be one of "layers.0.", "layers.1.", but was not given)");
  EXPECT_EQ(load_weights(*block, two, {.prefix = "layers.1."}).surrounding.size(), 6U);
  EXPECT_TRUE(block->feed_forward_in->bias.equal(tensors.at("layers.1.linear1.bias")));

  save_safetensors(dir.file("none"), NamedTensors{{"x", torch::ones({1})}});
  EXPECT_EQ(error([&] { return choose_block(open_checkpoint(dir.file("none"))); }),
            dir.file("none") + ": must hold a block around cross-attention in a layout that is known, but holds none");
}

TEST(ChooseBlockTest, TakesABlockThatIsAWholeFile) {
  const auto tensors = decoder_layer("");
  CrossAttentionBlock block(decoder_layer_options());
  const auto report = load_weights(*block, tensors);
  EXPECT_EQ(report.loaded.size(), block->parameters().size());
  EXPECT_EQ(report.surrounding,
            (std::vector<std::string>{"norm1.bias", "norm1.weight", "self_attn.in_proj_bias", "self_attn.in_proj_weight",
                                      "self_attn.out_proj.bias", "self_attn.out_proj.weight"}));
  EXPECT_TRUE(block->attention_norm->weight.equal(tensors.at("norm2.weight")));
}

// The blocks of a file with one decoder layer in which a tensor is replaced, or left out.
std::vector<FoundBlock> blocks_with(const std::string& name, const Tensor& tensor) {
  auto tensors = decoder_layer("a.");
  tensor.defined() ? tensors["a." + name] = tensor : (tensors.erase("a." + name), Tensor());
  std::map<std::string, TensorInfo> infos;
  for (const auto& [full, x] : tensors) infos[full] = {x.scalar_type(), x.sizes().vec()};
  return find_blocks(infos);
}

TEST(ChooseBlockTest, SkipsIncompleteBlocks) {
  EXPECT_EQ(blocks_with("other", torch::ones({1})).size(), 1U);
  for (const auto* name :
       {"norm2.weight", "norm2.bias", "norm3.weight", "linear1.weight", "linear2.weight", "multihead_attn.in_proj_weight"}) {
    EXPECT_TRUE(blocks_with(name, {}).empty()) << name;
  }
  EXPECT_TRUE(blocks_with("norm2.weight", torch::ones({9})).empty());
  EXPECT_TRUE(blocks_with("linear1.weight", torch::ones({12, 9})).empty());
  EXPECT_TRUE(blocks_with("linear1.weight", torch::ones({12})).empty());
  EXPECT_TRUE(blocks_with("linear2.weight", torch::ones({8, 13})).empty());
}

TEST(ChooseBlockTest, NamesBiasesThatDoNotFit) {
  const auto misshapen = [](const std::string& name, const Tensor& tensor) {
    const auto blocks = blocks_with(name, tensor);
    return blocks.size() == 1 ? blocks[0].misshapen : std::vector<std::string>();
  };
  const auto reasons = [](const char* reason) { return std::vector<std::string>{reason}; };
  EXPECT_EQ(misshapen("linear1.bias", {}), reasons("linear2.bias must be absent, as linear1.bias is, but has shape [8]"));
  EXPECT_EQ(misshapen("linear2.bias", {}), reasons("linear2.bias must have shape [8], but is absent"));
  EXPECT_EQ(misshapen("linear1.bias", torch::ones({8})), reasons("linear1.bias must have shape [12], but has shape [8]"));

  auto tensors = decoder_layer("a.");
  tensors.erase("a.linear1.bias");
  CrossAttentionBlock block(decoder_layer_options().feed_forward_bias(false));
  const auto message = error_of<LoadError>([&] { load_weights(*block, tensors, {.prefix = "a.", .allow_unexpected = true}); });
  EXPECT_TRUE(message.ends_with("misshapen: linear2.bias must be absent, as linear1.bias is, but has shape [8]")) << message;
  const TempDir dir;
  save_safetensors(dir.file("x"), tensors);
  EXPECT_EQ(error_of<FileError>([&] { return cross_attention_block_from(open_checkpoint(dir.file("x")), {.num_heads = 2}); }),
            "[load] " + dir.file("x") +
                ": block \"a.\" does not fit together; misshapen: linear2.bias must be absent, as "
                "linear1.bias is, but has shape [8]");
}

TEST(LoadBlockTest, NamesOfTheBlockAreNeverLeftOutSilently) {
  const auto tensors = decoder_layer("a.");
  const auto error = [&](const CrossAttentionBlockOptions& options) {
    CrossAttentionBlock block(options);
    return error_of<LoadError>([&] { load_weights(*block, tensors, {.prefix = "a."}); });
  };
  const std::string start = "[load_weights] set of tensors: does not fit the module; ";
  EXPECT_EQ(error(decoder_layer_options().feed_forward_bias(false)), start + "unexpected: linear1.bias, linear2.bias");
  EXPECT_EQ(error(decoder_layer_options().feed_forward(0)),
            start + "unexpected: linear1.bias, linear1.weight, linear2.bias, linear2.weight, norm3.bias, norm3.weight");
  EXPECT_EQ(error(decoder_layer_options().feed_forward(16)),
            start +
                "misshapen: feed_forward_in.bias must have shape [16], but has [12], feed_forward_in.weight must have shape "
                "[16, 8], but has [12, 8], feed_forward_out.weight must have shape [8, 16], but has [8, 12]");
}

TEST(LoadBlockTest, BiasesOfNormsAreNeverLeftOutSilently) {
  const auto error = [](const std::string& name) {
    const BlockFamily family{name};
    auto options = cross_attention_block_from(family.weights, family.options())->options;
    CrossAttentionBlock block(options.norm_bias(!options.norm_bias()));
    const auto message = refusal(*block, family.weights, {.prefix = family.prefix()});
    return message.substr(0, message.find(';'));
  };
  EXPECT_EQ(error("moonshine"), "missing: attention_norm.bias, feed_forward_norm.bias");
  EXPECT_EQ(error("torch_decoder_layer"), "unexpected: norm2.bias, norm3.bias");
  EXPECT_EQ(error("bert_old"), "unexpected: crossattention.output.LayerNorm.beta, output.LayerNorm.beta");
}

TEST(LoadBlockTest, GatesOfAnyShapeFitIfTheyHaveAsManyNumbers) {
  const BlockFamily family("idefics");
  NamedTensors tensors;
  for (const auto& [name, info] : family.weights.tensors()) tensors[name] = family.weights.tensor(name);
  const auto options = cross_attention_block_from(family.weights, family.options())->options;
  const auto load = [&](BlockGate gate, const Tensor& value) {
    for (const auto* name : {"alpha_cross_attn", "alpha_dense"}) tensors[family.prefix() + name] = value;
    auto with_gate = options;
    CrossAttentionBlock block(with_gate.gate(gate));
    load_weights(*block, tensors, {.prefix = family.prefix()});
    return block->feed_forward_gate.detach();
  };
  for (const auto& shape : std::vector<std::vector<int64_t>>{{}, {1}, {1, 1, 1}}) {
    EXPECT_TRUE(load(BlockGate::scalar, torch::full(shape, 0.5)).equal(torch::full({1}, 0.5)));
  }
  const auto values = torch::rand({16});
  for (const auto& shape : std::vector<std::vector<int64_t>>{{16}, {1, 1, 16}}) {
    EXPECT_TRUE(load(BlockGate::per_feature, values.view(shape)).equal(values));
  }
  const auto message = error_of<LoadError>([&] { load(BlockGate::per_feature, torch::ones({1})); });
  EXPECT_NE(message.find("the module must have gate scalar, as layout idefics needs, but has per_feature"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace xattn
