// SPDX-License-Identifier: Apache-2.0
#include <torch/torch.h>
#include <xattn/cross_attention.h>
#include <xattn/find_layers.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/load_stacks.h>
#include <xattn/safetensors.h>
#include <xattn/stacks.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "file_checks.h"
#include "test_util.h"

// Whole models of tests/data/models and back; scripts/model_fixtures.py writes them.
namespace xattn::whole_models {
namespace {

using test::data_path;
using test::error_of;
using test::expect_close;
using test::TempDir;
using torch::Tensor;
using Names = std::vector<std::string>;

torch::nn::LayerNorm layer_norm(int64_t size, double eps = 1e-5) {
  return torch::nn::LayerNorm(torch::nn::LayerNormOptions({size}).eps(eps));
}

// ---- BLIP: stacks, in a program that nests otherwise than the file ----------------------------------------------------------

struct ImageEmbeddingImpl : torch::nn::Module {
  Tensor forward(const Tensor& image) {
    const auto patches = patch_embedding(image).flatten(2).transpose(1, 2);
    return torch::cat({class_embedding.expand({image.size(0), 1, -1}), patches}, 1) + position_embedding;
  }

  Tensor class_embedding = register_parameter("class_embedding", torch::zeros({1, 1, 12}));
  Tensor position_embedding = register_parameter("position_embedding", torch::zeros({1, 5, 12}));
  torch::nn::Conv2d patch_embedding =
      register_module("patch_embedding", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 12, 2).stride(2)));
};
TORCH_MODULE(ImageEmbedding);

struct WordEmbeddingImpl : torch::nn::Module {
  Tensor forward(const Tensor& words) {
    return norm(word_embeddings(words) + position_embeddings(torch::arange(words.size(1))));
  }

  torch::nn::Embedding word_embeddings = register_module("word_embeddings", torch::nn::Embedding(12, 8));
  torch::nn::Embedding position_embeddings = register_module("position_embeddings", torch::nn::Embedding(8, 8));
  torch::nn::LayerNorm norm = register_module("LayerNorm", layer_norm(8, 1e-12));
};
TORCH_MODULE(WordEmbedding);

struct ToWordsImpl : torch::nn::Module {
  Tensor forward(const Tensor& x, const Tensor& vocabulary) {
    return torch::linear(norm(torch::gelu(dense(x))), vocabulary, bias);
  }

  torch::nn::Linear dense = register_module("dense", torch::nn::Linear(8, 8));
  torch::nn::LayerNorm norm = register_module("LayerNorm", layer_norm(8, 1e-12));
  Tensor bias = register_parameter("bias", torch::zeros({12}));
};
TORCH_MODULE(ToWords);

struct BlipSizes {
  int64_t text_heads = 2;
  double text_eps = 1e-12;
  Activation vision_activation = Activation::gelu;
};

struct BlipImpl : torch::nn::Module {
  explicit BlipImpl(const BlipSizes& sizes = {}) {
    auto of_image = CrossAttentionBlockOptions(CrossAttentionOptions(12, 12, 12, 12).num_heads(3)).feed_forward(16);
    of_image.norm_context(true).activation(sizes.vision_activation);
    vision = register_module("vision", Encoder(EncoderOptions({of_image, of_image}).norm(NormOptions(NormKind::layer, 12))));
    auto self = CrossAttentionBlockOptions(CrossAttentionOptions(8, 8, 8, 8).num_heads(sizes.text_heads)).feed_forward(0);
    auto cross = CrossAttentionBlockOptions(CrossAttentionOptions(8, 12, 12, 8).num_heads(sizes.text_heads)).feed_forward(12);
    self.norm_placement(NormPlacement::after).norm_eps(sizes.text_eps);
    cross.norm_placement(NormPlacement::after).norm_eps(sizes.text_eps);
    decoder = register_module("decoder", Decoder(DecoderOptions({{self, cross}, {self, cross}})));
  }

  Tensor forward(const NamedTensors& inputs) {
    const auto memory = vision(image(inputs.at("pixel_values")));
    return to_words(decoder(words(inputs.at("input_ids")), memory), words->word_embeddings->weight);
  }

  ImageEmbedding image = register_module("image", ImageEmbedding());
  WordEmbedding words = register_module("words", WordEmbedding());
  ToWords to_words = register_module("to_words", ToWords());
  Encoder vision = nullptr;
  Decoder decoder = nullptr;
};
TORCH_MODULE(Blip);

LoadOptions blip_options() {
  return {.rename = {{"^vision_model\\.embeddings", "image"},
                     {"^vision_model", "vision"},
                     {"^text_decoder\\.bert\\.embeddings", "words"},
                     {"^text_decoder\\.bert\\.encoder", "decoder"},
                     {"^text_decoder\\.cls\\.predictions(\\.transform)?", "to_words"}}};
}

// ---- Whisper: modules nested and named as in the file -----------------------------------------------------------------------

struct WhisperLayerImpl : torch::nn::Module {
  WhisperLayerImpl(int64_t heads, int64_t hidden, bool decodes)
      : self_attn(register_module("self_attn", attention(heads))),
        fc1(register_module("fc1", torch::nn::Linear(8, hidden))),
        fc2(register_module("fc2", torch::nn::Linear(hidden, 8))) {
    if (!decodes) return;
    encoder_attn = register_module("encoder_attn", attention(heads));
    encoder_attn_layer_norm = register_module("encoder_attn_layer_norm", layer_norm(8));
  }

  static CrossAttention attention(int64_t heads) {
    return CrossAttention(CrossAttentionOptions(8, 8, 8, 8).num_heads(heads).key_bias(false));
  }

  Tensor forward(Tensor x, const Tensor& memory, const Mask& mask) {
    const auto y = self_attn_layer_norm(x);
    x = x + std::get<0>(self_attn(y, y, y, mask));
    if (encoder_attn) x = x + std::get<0>(encoder_attn(encoder_attn_layer_norm(x), memory, memory));
    return x + fc2(torch::gelu(fc1(final_layer_norm(x))));
  }

  CrossAttention self_attn, encoder_attn = nullptr;
  torch::nn::LayerNorm self_attn_layer_norm = register_module("self_attn_layer_norm", layer_norm(8));
  torch::nn::LayerNorm encoder_attn_layer_norm = nullptr;
  torch::nn::Linear fc1, fc2;
  torch::nn::LayerNorm final_layer_norm = register_module("final_layer_norm", layer_norm(8));
};
TORCH_MODULE(WhisperLayer);

struct WhisperStackImpl : torch::nn::Module {
  WhisperStackImpl(int64_t heads, int64_t hidden, bool decodes, int64_t positions)
      : embed_positions(register_module("embed_positions", torch::nn::Embedding(positions, 8))) {
    for (int i = 0; i < 2; ++i) layers->push_back(WhisperLayer(heads, hidden, decodes));
    if (decodes) {
      embed_tokens = register_module("embed_tokens", torch::nn::Embedding(12, 8));
    } else {
      conv1 = register_module("conv1", torch::nn::Conv1d(torch::nn::Conv1dOptions(3, 8, 3).padding(1)));
      conv2 = register_module("conv2", torch::nn::Conv1d(torch::nn::Conv1dOptions(8, 8, 3).stride(2).padding(1)));
    }
  }

  Tensor forward(const Tensor& input, const Tensor& memory = {}) {
    auto x = embed_tokens ? embed_tokens(input) : torch::gelu(conv2(torch::gelu(conv1(input)))).transpose(1, 2);
    x = x + embed_positions->weight.narrow(0, 0, x.size(1));
    const auto mask = embed_tokens ? Mask::causal(CausalAlignment::upper_left) : Mask();
    for (const auto& layer : *layers) x = layer->as<WhisperLayer>()->forward(x, memory, mask);
    return norm(x);
  }

  torch::nn::Conv1d conv1 = nullptr, conv2 = nullptr;
  torch::nn::Embedding embed_tokens = nullptr, embed_positions;
  torch::nn::ModuleList layers = register_module("layers", torch::nn::ModuleList());
  torch::nn::LayerNorm norm = register_module("layer_norm", layer_norm(8));
};
TORCH_MODULE(WhisperStack);

struct WhisperImpl : torch::nn::Module {
  explicit WhisperImpl(int64_t decoder_heads = 4)
      : encoder(body->register_module("encoder", WhisperStack(2, 12, false, 5))),
        decoder(body->register_module("decoder", WhisperStack(decoder_heads, 16, true, 8))) {
    register_module("model", body);
    tied = projection->register_parameter("weight", decoder->embed_tokens->weight);
    register_module("proj_out", projection);
  }

  Tensor forward(const NamedTensors& inputs) {
    return torch::linear(decoder(inputs.at("decoder_input_ids"), encoder(inputs.at("input_features"))), tied);
  }

  std::shared_ptr<torch::nn::Module> body = std::make_shared<torch::nn::Module>("model");
  std::shared_ptr<torch::nn::Module> projection = std::make_shared<torch::nn::Module>("proj_out");
  WhisperStack encoder, decoder;
  Tensor tied;
};
TORCH_MODULE(Whisper);

// ---- There and back ---------------------------------------------------------------------------------------------------------

std::string model_path(const std::string& name) {
  return data_path("models/" + name);
}

// With XATTN_KEEP_MODELS set, the models are left there for scripts/check_whole_models.py.
template <class Model>
void expect_there_and_back(const std::string& name, const LoadOptions& options) {
  const TempDir dir;
  const char* kept = std::getenv("XATTN_KEEP_MODELS");
  const auto out = std::filesystem::path(kept ? kept : dir.path()) / name;
  std::filesystem::create_directory(out);

  const auto file = open_checkpoint(model_path(name));
  const auto inputs = load_tensors(model_path(name) + "/expect.safetensors");
  Model model;
  const auto report = load_weights(*model, file, options);
  EXPECT_TRUE(report.missing.empty() && report.unexpected.empty() && report.surrounding.empty()) << report.summary();
  EXPECT_EQ(file.unread(), Names());
  const auto before = model(inputs);
  expect_close(before, inputs.at("logits"), 1e-5, "logits");

  torch::optim::SGD optimizer(model->parameters(), /*lr=*/0.1);
  torch::cross_entropy_loss(before.flatten(0, 1), torch::arange(8)).backward();
  optimizer.step();
  const torch::NoGradGuard no_grad;
  const auto after = model(inputs);
  EXPECT_FALSE(after.allclose(before, 1e-3, 1e-3));

  save_safetensors(out / "model.safetensors", *model, {.like = file, .load = options});
  save_safetensors(out / "logits.safetensors", NamedTensors{{"before", before.detach()}, {"after", after}});
  const auto saved = open_checkpoint(out.string());
  EXPECT_EQ(saved.metadata().at("format"), "pt");
  ASSERT_EQ(saved.tensors().size(), file.tensors().size());
  for (const auto& [tensor, info] : file.tensors()) {
    ASSERT_TRUE(saved.contains(tensor)) << tensor;
    EXPECT_EQ(saved.tensors().at(tensor).shape, info.shape) << tensor;
    EXPECT_EQ(saved.tensors().at(tensor).type, info.type) << tensor;
  }
  Model again;
  load_weights(*again, saved, options);
  EXPECT_TRUE(torch::equal(again(inputs), after));
}

TEST(WholeModelTest, BlipGoesFromItsFolderThroughAStepOfTrainingAndBack) {
  expect_there_and_back<Blip>("blip", blip_options());
}

TEST(WholeModelTest, WhisperGoesFromItsFolderThroughAStepOfTrainingAndBack) {
  expect_there_and_back<Whisper>("whisper", {});
}

// The error of loading without its beginning, "[load_weights] FILE: ".
template <class E = LoadError, class Model>
std::string load_error(const std::string& name, Model&& model, const LoadOptions& options = {}) {
  const auto message = error_of<E>([&] { load_weights(*model, model_path(name), options); });
  const auto start = "[load_weights] " + model_path(name) + "/model.safetensors: ";
  EXPECT_TRUE(message.starts_with(start)) << message;
  return message.substr(std::min(message.size(), start.size()));
}

// ---- config.json ------------------------------------------------------------------------------------------------------------

TEST(WholeModelTest, ConfigMustAgreeWithTheModule) {
  EXPECT_EQ(load_error("whisper", Whisper(2)),
            "does not fit the module; misshapen: "
            "model.decoder.layers.0.self_attn must have num_heads 4, as config.json says, but has 2, "
            "model.decoder.layers.0.encoder_attn must have num_heads 4, as config.json says, but has 2, "
            "model.decoder.layers.1.self_attn must have num_heads 4, as config.json says, but has 2, "
            "model.decoder.layers.1.encoder_attn must have num_heads 4, as config.json says, but has 2");
  const auto heads = load_error("blip", Blip(BlipSizes{.text_heads = 4}), blip_options());
  EXPECT_NE(heads.find("decoder.layers.1.cross.attention must have num_heads 2, as config.json says, but has 4"),
            std::string::npos)
      << heads;
  EXPECT_EQ(heads.find("vision."), std::string::npos) << heads;
  const auto eps = load_error("blip", Blip(BlipSizes{.text_eps = 1e-5}), blip_options());
  EXPECT_NE(eps.find("decoder.layers.0.self must have norm_eps 1e-12, as config.json says, but has 1e-05"), std::string::npos)
      << eps;
  EXPECT_EQ(load_error("blip", Blip(BlipSizes{.vision_activation = Activation::relu}), blip_options()),
            "does not fit the module; misshapen: vision.layers.0 must have activation gelu, as config.json says, but has relu, "
            "vision.layers.1 must have activation gelu, as config.json says, but has relu");
}

TEST(WholeModelTest, EachPartOfAModelHasItsPartOfTheConfig) {
  const TempDir dir;
  NamedTensors tensors;
  const auto add_layer = [&](const std::string& prefix) {
    for (const auto* name : {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"}) {
      tensors[prefix + name] = torch::ones({8, 8});
    }
  };
  add_layer("vision_model.encoder.layers.0.self_attn.");
  add_layer("text_model.encoder.layers.0.self_attn.");
  save_safetensors(dir.file("model.safetensors"), tensors);
  test::write_bytes(dir.file("config.json"),
                    R"({"text_config": {"num_attention_heads": 2}, "vision_config": {"num_attention_heads": 4}})");
  const auto heads_at = [&](const std::string& prefix) {
    return cross_attention_from(open_checkpoint(dir.path()), {.prefix = prefix})->options.num_heads();
  };
  EXPECT_EQ(heads_at("vision_model.encoder.layers.0.self_attn"), 4);
  EXPECT_EQ(heads_at("text_model.encoder.layers.0.self_attn"), 2);
  CrossAttention four(CrossAttentionOptions(8, 8, 8, 8).num_heads(4).qkv_bias(false).output_bias(false));
  load_weights(*four, dir.path(), {.prefix = "vision_model.encoder.layers.0.self_attn"});
  const LoadOptions renamed{.prefix = "image", .allow_unexpected = true, .rename = {{"^vision_model.*self_attn", "image"}}};
  load_weights(*four, dir.path(), renamed);
  EXPECT_TRUE(error_of<LoadError>([&] {
                load_weights(*four, dir.path(), {.prefix = "text_model.encoder.layers.0.self_attn"});
              }).ends_with("the module must have num_heads 2, as config.json says, but has 4"));
}

TEST(WholeModelTest, ADifferenceFromConfigIsAllowedByAnOption) {
  Whisper model(2);
  EXPECT_EQ(load_weights(*model, model_path("whisper"), {.ignore_config = true}).loaded.size(), 90U);
}

TEST(WholeModelTest, TheHeadsOfTorchsOwnAttentionMustAgreeWithConfig) {
  const TempDir dir;
  torch::nn::MultiheadAttention saved(8, 2), other(8, 4);
  save_safetensors(dir.file("model.safetensors"), *saved);
  test::write_bytes(dir.file("config.json"), R"({"num_attention_heads": 2})");
  EXPECT_EQ(load_weights(*saved, dir.path()).loaded.size(), 4U);
  const auto message = error_of<LoadError>([&] { load_weights(*other, dir.path()); });
  EXPECT_TRUE(message.ends_with("; misshapen: the module must have num_heads 2, as config.json says, but has 4")) << message;
}

// A block in the names of BART, which has its norms after.
TEST(WholeModelTest, PlacementAndActivationOfABlockMustAgreeWithConfig) {
  const TempDir dir;
  const auto attention = CrossAttentionOptions(8, 8, 8, 8).num_heads(2);
  NamedTensors tensors;
  for (const auto* linear : {"encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj"}) {
    tensors[std::string(linear) + ".weight"] = torch::ones({8, 8});
    tensors[std::string(linear) + ".bias"] = torch::ones({8});
  }
  for (const auto* norm : {"encoder_attn_layer_norm", "final_layer_norm"}) {
    for (const auto* part : {".weight", ".bias"}) tensors[std::string(norm) + part] = torch::ones({8});
  }
  tensors.merge(NamedTensors{{"fc1.weight", torch::ones({16, 8})},
                             {"fc1.bias", torch::ones({16})},
                             {"fc2.weight", torch::ones({8, 16})},
                             {"fc2.bias", torch::ones({8})}});
  save_safetensors(dir.file("model.safetensors"), tensors);
  test::write_bytes(dir.file("config.json"),
                    R"({"model_type": "bart", "activation_function": "quick_gelu", "decoder_attention_heads": 2})");
  CrossAttentionBlock block(CrossAttentionBlockOptions(attention).feed_forward(16));
  const auto message = error_of<LoadError>([&] { load_weights(*block, dir.path()); });
  EXPECT_TRUE(
      message.ends_with("; misshapen: the module must have norm_placement after, as config.json says, but has before, "
                        "the module must have activation quick_gelu, as config.json says, but has gelu"))
      << message;
}

// ---- Renaming ---------------------------------------------------------------------------------------------------------------

TEST(WholeModelTest, RulesOfRenamingAreAppliedInTheirOrderToWholeNames) {
  torch::nn::Linear module(2, 1);
  const NamedTensors tensors = {{"a.0.kernel", torch::ones({1, 2})}, {"a.0.b", torch::ones({1})}, {"x", torch::ones({1})}};
  const auto report = load_weights(*module, tensors,
                                   {.prefix = "layer0",
                                    .allow_unexpected = true,
                                    .rename = {{"kernel$", "weight"}, {"^a\\.(\\d)\\.", "layer$1."}, {"0\\.b$", "0.bias"}}});
  EXPECT_EQ(report.summary(), "loaded 2 tensors");
  EXPECT_EQ(module->bias.sum().item<float>(), 1);
}

TEST(WholeModelTest, RulesOfRenamingThatCannotBeMeantAreRefused) {
  torch::nn::Linear module(2, 1);
  NamedTensors tensors = {{"weight", torch::ones({1, 2})}, {"bias", torch::ones({1})}};
  const auto refusal = [&](const RenameRules& rules) {
    return error_of<FileError>([&] { load_weights(*module, tensors, {.rename = rules}); });
  };
  EXPECT_EQ(refusal({{"wieght", "weight"}}),
            "[load_weights] set of tensors: rename must have rules that match a name, but \"wieght\" matches none");
  EXPECT_EQ(
      refusal({{"weight|bias", "x"}}),
      "[load_weights] set of tensors: rename must give each tensor a name of its own, but makes \"x\" of both \"bias\" and "
      "\"weight\"");
  EXPECT_EQ(
      refusal({{"weight", "bias"}}),
      "[load_weights] set of tensors: rename must give each tensor a name of its own, but makes \"bias\" of both \"bias\" "
      "and \"weight\"");
  const auto invalid = error_of<c10::ValueError>([&] { load_weights(*module, tensors, {.rename = {{"(", ""}}}); });
  EXPECT_TRUE(invalid.starts_with("[load_weights] rename must have regular expressions, but has \"(\": ")) << invalid;
  tensors[std::string(100'000, 'a')] = torch::ones({1});  // no stack for as many levels of recursion
  EXPECT_NE(refusal({{"(a|b)*c", "x"}}).find("rename must have names of at most 1000 bytes"), std::string::npos);
}

// ---- Prefixes ---------------------------------------------------------------------------------------------------------------

TEST(WholeModelTest, AWrongPrefixListsThoseThatAreThere) {
  const std::string layers = R"("text_decoder.bert.encoder.layer.0.crossattention.", )";
  EXPECT_NE(load_error("blip", CrossAttention(8, 12, 12, 8), {.prefix = "decoder.0"}).find(layers), std::string::npos);
  EXPECT_EQ(load_error("blip", BlipImpl().decoder, {.prefix = "decoder"}),
            R"(prefix must be one of "text_decoder.bert.encoder.", but is "decoder")");
  EXPECT_EQ(load_error("blip", torch::nn::Conv2d(1, 2, 3), {.prefix = "vision.", .allow_missing = true}).substr(0, 25),
            "prefix must be one of \"te");
  EXPECT_EQ(load_error("whisper", BlipImpl().image, {.prefix = "encoder"}),
            R"(prefix must be one of "model.", but is "encoder")");  // no place has all names: where names begin
  const auto message = load_error("whisper", torch::nn::Linear(16, 8));
  EXPECT_TRUE(message.ends_with("; the prefix may be: model.decoder.layers.0.fc2., model.decoder.layers.1.fc2.")) << message;
  const auto of_layer = load_error("blip", CrossAttention(8, 12, 12, 8), {.prefix = "text_decoder.bert.encoder.layer.0"});
  EXPECT_NE(of_layer.find("; the prefix may be: text_decoder.bert.encoder.layer.0.attention., "), std::string::npos)
      << of_layer;
}

TEST(WholeModelTest, APrefixMeansTheSameWithAndWithoutItsPoint) {
  const auto blip = open_checkpoint(model_path("blip"));
  for (const std::string end : {"", "."}) {
    const auto stack = "text_decoder.bert.encoder" + end, layer = "text_decoder.bert.encoder.layer.1" + end;
    auto decoder = decoder_from(blip, {.prefix = stack});
    EXPECT_EQ(load_weights(*decoder, blip, {.prefix = stack}).missing.size(), 0U);
    auto block = cross_attention_block_from(blip, {.prefix = layer});
    EXPECT_EQ(load_weights(*block, blip, {.prefix = layer}).missing.size(), 0U);
    auto attention =
        cross_attention_from(blip, {.prefix = layer.substr(0, layer.size() - end.size()) + ".crossattention" + end});
    EXPECT_EQ(choose_layer(blip, "text_decoder.bert.encoder.layer.1.crossattention" + end).options.dim_key(), 12);
  }
}

// ---- Stacks in load_weights, and back ---------------------------------------------------------------------------------------

// Expects that a module, filled otherwise and then loaded, equals itself; and that writing it gives the bits of the file.
template <class Module>
void expect_loads_and_writes(Module module, const Checkpoint& file, const LoadOptions& options) {
  const TempDir dir;
  const auto expected = test::copy_of(*module);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module->parameters()) parameter.zero_();
  save_safetensors(dir.file("zeros"), *module, {.like = file, .load = options});
  load_weights(*module, file, options);
  test::expect_equal(test::copy_of(*module), expected);
  save_safetensors(dir.file("same"), *module, {.like = file, .load = options});
  test::expect_equal(load_tensors(dir.file("same")), load_tensors(file.path()));
  load_weights(*module, dir.file("zeros"), options);
  for (const auto& parameter : module->parameters()) EXPECT_EQ(parameter.abs().sum().template item<double>(), 0);
}

TEST(WholeModelTest, EveryStackIsLoadedAndWrittenInItsOwnSpelling) {
  int stacks = 0;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("stacks"))) {
    const auto told = open_checkpoint(entry.path().string()).metadata();
    if (!told.contains("kind")) continue;
    SCOPED_TRACE(entry.path().filename().string());
    const TempDir dir;
    std::filesystem::copy_file(data_path("stacks/" + told.at("family") + ".safetensors"), dir.file("model.safetensors"));
    if (told.contains("config")) test::write_bytes(dir.file("config.json"), told.at("config"));
    const auto file = open_checkpoint(dir.path());
    StackOptionsFromFile options{.prefix = told.at("prefix")};
    if (!told.contains("config")) {
      options.num_heads = std::stoll(told.at("num_heads"));
      if (told.contains("norm_placement")) {  // otherwise the layout says it
        options.norm_placement = told.at("norm_placement") == "before" ? NormPlacement::before : NormPlacement::after;
      }
      if (told.contains("activation"))
        options.activation = told.at("activation") == "relu" ? Activation::relu : Activation::gelu;
    }
    const LoadOptions load{.prefix = told.at("prefix")};
    if (told.at("kind") == "encoder") {
      expect_loads_and_writes(encoder_from(file, options), file, load);
    } else {
      expect_loads_and_writes(decoder_from(file, options), file, load);
    }
    ++stacks;
  }
  EXPECT_EQ(stacks, 22);
}

TEST(WholeModelTest, EveryLayerIsWrittenInItsOwnSpelling) {
  int layers = 0;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("layouts"))) {
    const auto path = entry.path().string();
    if (path.find(".expect.") != std::string::npos) continue;
    const auto file = open_checkpoint(path);
    for (const auto& layer : find_layers(file.tensors())) {
      const auto is_float8 =
          std::ranges::any_of(file.tensors(), [](const auto& x) { return byte_count({x.second.type, {}}) == 1; });
      if (is_float8) continue;
      SCOPED_TRACE(path + " " + layer.prefix);
      CrossAttention module(layer.with_heads(layer.possible_heads().front()));
      const LoadOptions options{
          .prefix = layer.prefix, .allow_unexpected = true, .without_input_norms = true, .ignore_config = true};
      module->to(file.tensors().begin()->second.type);
      load_weights(*module, file, options);
      expect_loads_and_writes(module, file, options);
      ++layers;
    }
  }
  EXPECT_GT(layers, 50);
}

// ---- Writing ----------------------------------------------------------------------------------------------------------------

TEST(WholeModelTest, WritesWithTheTypesOfTheFileAndCopiesWhatTheModuleDoesNotHave) {
  const TempDir dir;
  const NamedTensors tensors = {{"a.weight", torch::zeros({1, 2}, torch::kHalf)},
                                {"a.bias", torch::zeros({1}, torch::kBFloat16)},
                                {"steps", torch::tensor(int64_t{7})}};
  save_safetensors(dir.file("x"), tensors, {{"total_size", "12"}, {"author", "somebody"}});
  torch::nn::Linear module(2, 1);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module->parameters()) parameter.fill_(1.0001);
  const auto like = open_checkpoint(dir.file("x"));
  save_safetensors(dir.file("x"), *module, {.like = like, .load = {.prefix = "a"}});  // in place of its own file
  const auto saved = open_checkpoint(dir.file("x"));
  EXPECT_EQ(saved.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"author", "somebody"}}));
  test::expect_equal(load_tensors(dir.file("x")), {{"a.weight", torch::ones({1, 2}, torch::kHalf)},
                                                   {"a.bias", torch::ones({1}, torch::kBFloat16)},
                                                   {"steps", torch::tensor(int64_t{7})}});
}

TEST(WholeModelTest, AddsParametersThatTheFileDoesNotHaveOnlyIfTheyMayBeMissing) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a.weight", torch::zeros({1, 2})}});
  torch::nn::Linear module(2, 1);
  const auto like = open_checkpoint(dir.file("x"));
  EXPECT_EQ(error_of<LoadError>([&] { save_safetensors(dir.file("y"), *module, {.like = like, .load = {.prefix = "a."}}); }),
            "[save_safetensors] " + dir.file("x") + ": does not fit the module; missing: bias");
  EXPECT_FALSE(std::filesystem::exists(dir.file("y")));
  save_safetensors(dir.file("y"), *module, {.like = like, .load = {.prefix = "a.", .allow_missing = true}});
  test::expect_equal(load_tensors(dir.file("y")), {{"a.weight", module->weight.detach()}, {"a.bias", module->bias.detach()}});
}

TEST(WholeModelTest, RefusesToWriteWhatCannotBeWrittenBack) {
  const TempDir dir;
  torch::nn::Linear module(torch::nn::LinearOptions(2, 1).bias(false));
  const NamedTensors scaled = {{"weight", torch::ones({1, 2}).to(at::kFloat8_e4m3fn)}, {"weight_scale", torch::ones({1})}};
  save_safetensors(dir.file("x"), scaled);
  EXPECT_EQ(error_of<FileError>([&] { save_safetensors(dir.file("y"), *module, {.like = open_checkpoint(dir.file("x"))}); }),
            "[save_safetensors] " + dir.file("x") +
                ": tensor \"weight\" must have a type other than float8 with a scale to be written back");
  const auto objects = open_checkpoint(data_path("files/objects.pt"));
  const auto message = error_of<FileError>(
      [&] { save_safetensors(dir.file("y"), *module, {.like = objects, .load = {.allow_missing = true}}); });
  EXPECT_NE(message.find("must have only tensors that are read, to be copied; not read: "), std::string::npos) << message;
  EXPECT_FALSE(std::filesystem::exists(dir.file("y")));
}

}  // namespace
}  // namespace xattn::whole_models
