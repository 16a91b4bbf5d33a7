// SPDX-License-Identifier: Apache-2.0
#include <xattn/stacks.h>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/find_layers.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/load_stacks.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using nlohmann::json;
using torch::Tensor;

// ---- Stacks of PyTorch's and transformers' classes -------------------------------------------------------------------------

// Made by scripts/stack_fixtures.py: the file of a whole model, and inputs and outputs of one of its stacks.
struct StackFixture {
  explicit StackFixture(const std::string& name)
      : expected(open_checkpoint(data_path("stacks/" + name + ".safetensors"))),
        path(data_path("stacks/" + told("family") + ".safetensors")) {
    if (told("config").empty()) return;
    std::filesystem::copy_file(path, dir.file("model.safetensors"));
    write_bytes(dir.file("config.json"), told("config"));
    path = dir.file("model.safetensors");
  }

  std::string told(const std::string& name) const {
    const auto found = expected.metadata().find(name);
    return found == expected.metadata().end() ? "" : found->second;
  }
  bool is_encoder() const { return told("kind") == "encoder"; }

  // Nothing but the prefix and the type, if there is a config.json.
  StackOptionsFromFile options() const {
    StackOptionsFromFile options{.prefix = told("prefix"), .causal = told("causal") != "false", .dtype = torch::kDouble};
    if (!told("config").empty()) return options;
    options.num_heads = std::stoll(told("num_heads"));
    if (told("norm_placement").empty()) return options;
    options.norm_placement = told("norm_placement") == "before" ? NormPlacement::before : NormPlacement::after;
    options.activation = told("activation") == "relu" ? Activation::relu : Activation::gelu;
    return options;
  }

  Tensor input(const std::string& name) const { return expected.tensor(name).to(torch::kDouble); }
  Mask mask(const std::string& name) const {
    return expected.contains(name) ? Mask::key_padding(expected.tensor(name)) : Mask();
  }

  TempDir dir;
  Checkpoint expected;
  std::string path;  // of the weights
};

// A stack of either kind.
struct AnyStack {
  explicit AnyStack(const StackFixture& fixture) {
    const auto file = open_checkpoint(fixture.path);
    if (fixture.is_encoder()) {
      encoder = encoder_from(file, fixture.options());
    } else {
      decoder = decoder_from(file, fixture.options());
    }
  }
  AnyStack(Encoder encoder_, Decoder decoder_) : encoder(std::move(encoder_)), decoder(std::move(decoder_)) {}

  torch::nn::Module& module() const {
    if (encoder) return *encoder.ptr();
    return *decoder.ptr();
  }
  AnyStack cloned() const {
    return encoder ? AnyStack(Encoder(std::dynamic_pointer_cast<EncoderImpl>(encoder->clone())), nullptr)
                   : AnyStack(nullptr, Decoder(std::dynamic_pointer_cast<DecoderImpl>(decoder->clone())));
  }
  // A new one with the same options.
  AnyStack made_again() const {
    return encoder ? AnyStack(Encoder(encoder->options), nullptr) : AnyStack(nullptr, Decoder(decoder->options));
  }
  Tensor output(const StackFixture& fixture, const Tensor& x, const Tensor& memory) {
    return encoder ? encoder(x, fixture.mask("mask")) : decoder(x, memory, fixture.mask("mask"), fixture.mask("memory_mask"));
  }
  Tensor output(const StackFixture& fixture) {
    return output(fixture, fixture.input("x"), encoder ? Tensor() : fixture.input("memory"));
  }

  Encoder encoder{nullptr};
  Decoder decoder{nullptr};
};

std::vector<std::string> fixtures() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(data_path("stacks"))) {
    const auto name = entry.path().stem().string();
    if (name.find('.') != std::string::npos) names.push_back(name);
  }
  std::ranges::sort(names);
  return names;
}

class StacksTest : public testing::TestWithParam<std::string> {};

TEST_P(StacksTest, ComputesTheOutputOfTheFamilysClass) {
  const StackFixture fixture(GetParam());
  AnyStack stack(fixture);
  const torch::NoGradGuard no_grad;
  // PyTorch computed it in float32: two layers, each of a few sums of up to 24 terms and of norms.
  expect_close(stack.output(fixture), fixture.input("output"), 5e-6, GetParam());
}

TEST_P(StacksTest, SavesAndLoadsItsOwnState) {
  const StackFixture fixture(GetParam());
  AnyStack stack(fixture);
  const auto file = fixture.dir.file("saved.safetensors");
  save_safetensors(file, stack.module());
  auto again = stack.made_again();
  again.module().to(torch::kDouble);
  EXPECT_FALSE(again.output(fixture).equal(stack.output(fixture)));
  EXPECT_EQ(load_weights(again.module(), file).loaded.size(), stack.module().parameters().size());
  EXPECT_TRUE(again.output(fixture).equal(stack.output(fixture)));
}

TEST_P(StacksTest, ACloneComputesTheSameAndSharesNothing) {
  const StackFixture fixture(GetParam());
  AnyStack stack(fixture);
  auto clone = stack.cloned();
  const auto before = stack.output(fixture);
  EXPECT_TRUE(clone.output(fixture).equal(before));
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : clone.module().parameters()) parameter.zero_();
  }
  EXPECT_TRUE(stack.output(fixture).equal(before));
  EXPECT_FALSE(clone.output(fixture).equal(before));
}

TEST_P(StacksTest, GradientsEqualDifferencesAndReachEveryParameter) {
  torch::manual_seed(0);
  const StackFixture fixture(GetParam());
  AnyStack stack(fixture);
  stack.module().apply([](torch::nn::Module& part) {  // differences across the kink of relu are no derivative
    if (auto* block = part.as<CrossAttentionBlock>()) block->options.activation(Activation::silu);
  });
  const auto cotangent = torch::randn_like(fixture.input("output"));
  const auto loss = [&](const std::vector<Tensor>& inputs) {
    return (stack.output(fixture, inputs.front(), inputs.back()) * cotangent).sum();
  };
  std::vector<Tensor> inputs = {fixture.input("x").requires_grad_()};
  if (stack.decoder) inputs.push_back(fixture.input("memory").requires_grad_());
  expect_gradient(loss, inputs, GetParam());
  loss(inputs).backward();
  for (const auto& parameter : stack.module().named_parameters()) {
    if (parameter.key().ends_with("key_linear.bias")) continue;  // adds the same to a whole row of logits
    const auto gradient = parameter.value().grad();
    ASSERT_TRUE(gradient.defined()) << parameter.key();
    EXPECT_GT(gradient.abs().max().item<double>(), 1e-9) << parameter.key();
  }
}

TEST_P(StacksTest, TheTypeIsThatOfTheFileUnlessToldAndTheResultIsTheSame) {
  const StackFixture fixture(GetParam());
  auto options = fixture.options();
  options.dtype = {};
  const auto file = open_checkpoint(fixture.path);
  const torch::NoGradGuard no_grad;
  const auto input = [&](const char* name) { return fixture.expected.tensor(name); };
  const auto output = fixture.is_encoder()
                          ? encoder_from(file, options)->forward(input("x"), fixture.mask("mask"))
                          : decoder_from(file, options)
                                ->forward(input("x"), input("memory"), fixture.mask("mask"), fixture.mask("memory_mask"));
  EXPECT_EQ(output.scalar_type(), torch::kFloat);
  expect_close(output, input("output"), 1e-5, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Fixtures, StacksTest, testing::ValuesIn(fixtures()), [](const auto& info) {
  auto name = info.param;
  std::ranges::replace(name, '.', '_');
  return name;
});

// ---- The modules -----------------------------------------------------------------------------------------------------------

CrossAttentionBlockOptions self_block(int64_t E = 8) {
  return CrossAttentionBlockOptions(CrossAttentionOptions(E, E, E, E).num_heads(2)).norm_context(true).feed_forward(12);
}

CrossAttentionBlockOptions cross_block() {
  return CrossAttentionBlockOptions(CrossAttentionOptions(8, 6, 6, 8).num_heads(2)).feed_forward(12);
}

EncoderOptions encoder_options() {
  return EncoderOptions({self_block(), self_block().feed_forward(20)}).norm(NormOptions(NormKind::layer, 8));
}

DecoderOptions decoder_options() {
  return DecoderOptions({{self_block().feed_forward(0), cross_block()}, {self_block().feed_forward(0), cross_block()}});
}

TEST(EncoderTest, AppliesItsLayersOneAfterTheOtherAndThenItsNorm) {
  Encoder encoder(encoder_options());
  const auto x = torch::randn({2, 5, 8});
  const auto mask = Mask::lengths(torch::tensor({5, 3}), 5);
  auto y = x;
  for (size_t i = 0; i < 2; ++i) y = std::get<0>(encoder->layers->at<CrossAttentionBlockImpl>(i).forward(y, y, y, mask));
  expect_close(encoder(x, mask), encoder->norm(y), 1e-6, "encoder");
}

TEST(EncoderTest, AddsItsRelativePositionBiasInAllLayers) {
  Encoder encoder(encoder_options().relative_position_bias(RelativePositionBiasOptions(2).num_buckets(8).max_distance(6)));
  torch::nn::init::normal_(encoder->relative_position_bias->weight);
  const auto x = torch::randn({2, 5, 8});
  const auto mask = Mask::bias(encoder->relative_position_bias->forward(5, 5));
  auto y = x;
  for (size_t i = 0; i < 2; ++i) y = std::get<0>(encoder->layers->at<CrossAttentionBlockImpl>(i).forward(y, y, y, mask));
  expect_close(encoder(x), encoder->norm(y), 1e-6, "encoder");
}

TEST(EncoderTest, TakesInputsWithoutABatch) {
  Encoder encoder(encoder_options());
  const auto x = torch::randn({1, 5, 8});
  expect_close(encoder(x[0]), encoder(x)[0], 1e-6, "without a batch");
}

TEST(EncoderTest, WorksInASequential) {
  Encoder encoder(encoder_options());
  torch::nn::Sequential model(encoder, torch::nn::Linear(8, 3));
  EXPECT_EQ(model->forward(torch::randn({2, 5, 8})).sizes(), (std::vector<int64_t>{2, 5, 3}));
}

TEST(DecoderTest, AppliesItsLayersOneAfterTheOther) {
  Decoder decoder(decoder_options());
  const auto x = torch::randn({2, 4, 8}), memory = torch::randn({2, 5, 6});
  const auto mask = Mask::lengths(torch::tensor({4, 2}), 4), memory_mask = Mask::lengths(torch::tensor({5, 3}), 5);
  const auto causal = mask & Mask::causal(CausalAlignment::upper_left);
  auto y = x;
  for (size_t i = 0; i < 2; ++i) {
    auto& layer = decoder->layers->at<DecoderLayerImpl>(i);
    const auto attended = std::get<0>(layer.self(y, y, y, causal));
    const auto whole = layer.forward(y, memory, causal, memory_mask);
    y = std::get<0>(layer.cross(attended, memory, memory, memory_mask));
    expect_close(whole, y, 1e-6, "layer");
  }
  expect_close(decoder(x, memory, mask, memory_mask), y, 1e-6, "decoder");
}

TEST(DecoderTest, IsCausalUnlessToldOtherwise) {
  for (const bool causal : {true, false}) {
    Decoder decoder(decoder_options().causal(causal));
    const auto x = torch::randn({1, 4, 8}), memory = torch::randn({1, 5, 6});
    auto other = x.clone();
    other.select(1, 3).normal_();
    const auto first = decoder(x, memory).narrow(1, 0, 3), second = decoder(other, memory).narrow(1, 0, 3);
    EXPECT_EQ(first.allclose(second, 1e-6, 1e-6), causal);
  }
}

TEST(StackModulesTest, RefuseLayersThatDoNotFitByName) {
  const auto of_encoder = [](const EncoderOptions& options) {
    return error_of<c10::ValueError>([&] { Encoder encoder(options); });
  };
  const auto of_decoder = [](const DecoderOptions& options) {
    return error_of<c10::ValueError>([&] { Decoder decoder(options); });
  };
  EXPECT_EQ(of_encoder(EncoderOptions({})), "[encoder] layers must not be empty, but are.");
  EXPECT_EQ(of_decoder(DecoderOptions({})), "[decoder] layers must not be empty, but are.");
  EXPECT_EQ(of_encoder(EncoderOptions({self_block(), self_block(10)})),
            "[encoder.layers[1]] attention must have a dim_query, dim_key and dim_value of 8, but has 10, 10 and 10.");
  EXPECT_EQ(of_encoder(EncoderOptions({cross_block()})),
            "[encoder.layers[0]] attention must have a dim_query, dim_key and dim_value of 8, but has 8, 6 and 6.");
  EXPECT_EQ(of_encoder(EncoderOptions({self_block().norm_context(false)})),
            "[encoder.layers[0]] norm_context must be true, for self-attention with norms before, but is false.");
  EXPECT_EQ(of_encoder(EncoderOptions({self_block()}).relative_position_bias(RelativePositionBiasOptions(4))),
            "[encoder.layers[0]] attention must have a num_heads of 4, as relative_position_bias, but has 2.");
  EXPECT_EQ(of_encoder(EncoderOptions({self_block()}).norm(NormOptions(NormKind::rms, 4))),
            "[encoder] norm must have a size of 8, the features of the layers, but has 4.");
  auto wider = cross_block();
  wider.attention(CrossAttentionOptions(8, 7, 7, 8));
  EXPECT_EQ(
      of_decoder(DecoderOptions({{self_block(), cross_block()}, {self_block(), wider}})),
      "[decoder.layers[1].cross] attention must have a dim_query of 8, and a dim_key and dim_value of 6, but has 8, 7 and "
      "7.");
  EXPECT_EQ(of_decoder(DecoderOptions({{self_block(10), cross_block()}})),
            "[decoder.layers[0].self] attention must have a dim_query, dim_key and dim_value of 8, but has 10, 10 and 10.");
  EXPECT_EQ(error_of<c10::ValueError>([] { DecoderLayer layer(DecoderLayerOptions(self_block(10), cross_block())); }),
            "[decoder_layer.self] attention must have a dim_query, dim_key and dim_value of 8, but has 10, 10 and 10.");
}

TEST(StackModulesTest, RefuseBadInputByName) {
  Encoder encoder(encoder_options());
  Decoder decoder(decoder_options());
  EXPECT_EQ(error_of<c10::ValueError>([&] { encoder(torch::randn({2, 5, 9})); }),
            "[encoder] x must have shape [B, L, 8], but has [2, 5, 9].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { decoder(torch::randn({8}), torch::randn({2, 5, 6})); }),
            "[decoder] x must have shape [B, L, 8], but has [8].");
}

TEST(StackModulesTest, NameTheLayerThatRefusesItsInput) {
  Encoder encoder(encoder_options());
  Decoder decoder(decoder_options());
  const auto x = torch::randn({2, 5, 8}), memory = torch::randn({2, 3, 6});
  const auto of_decoder = [&](const auto&... inputs) {
    return error_of<c10::ValueError>([&] { decoder->forward(inputs...); });
  };
  EXPECT_EQ(
      of_decoder(x, memory[0]),
      "[decoder.layers[0].cross] key and value of the context must have the batch of query, [2, 5, 8], but are unbatched.");
  EXPECT_EQ(of_decoder(x, x), "[decoder.layers[0].cross] key must have shape [B, Lk, 6], but has [2, 5, 8].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { encoder(x.to(torch::kDouble)); }),
            "[encoder.layers[0]] key must be float32, the type of the parameters, but is float64.");
  decoder->layers->at<DecoderLayerImpl>(1).self->options.dropout(2);
  EXPECT_EQ(of_decoder(x, memory), "[decoder.layers[1].self] dropout must lie in [0, 1], but is 2.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { decoder->layers->at<DecoderLayerImpl>(1).forward(x, memory); }),
            "[decoder_layer.self] dropout must lie in [0, 1], but is 2.");
}

TEST(StackModulesTest, PrintTheirParts) {
  std::ostringstream text;
  text << Decoder(DecoderOptions({{self_block().feed_forward(0), cross_block()}})
                      .norm(NormOptions(NormKind::rms, 8))
                      .relative_position_bias(RelativePositionBiasOptions(2).bidirectional(false)));
  for (const auto* part :
       {"xattn::Decoder(", "(layers): torch::nn::ModuleList", "(0): xattn::DecoderLayer(",
        "(self): xattn::CrossAttentionBlock(", "(cross): xattn::CrossAttentionBlock(",
        "(norm): xattn::Norm(NormOptions(NormKind::rms, 8)",
        "(relative_position_bias): "
        "xattn::RelativePositionBias(RelativePositionBiasOptions(2).num_buckets(32).max_distance(128).bidirectional(false))"}) {
    EXPECT_NE(text.str().find(part), std::string::npos) << text.str() << "\nlacks: " << part;
  }
  std::ostringstream encoder;
  encoder << Encoder(encoder_options());
  EXPECT_TRUE(encoder.str().starts_with("xattn::Encoder(")) << encoder.str();
}

// ---- Relative positions ----------------------------------------------------------------------------------------------------

TEST(RelativePositionBiasTest, PutsEachDistanceIntoT5sBucket) {
  const auto expected = open_checkpoint(data_path("stacks/buckets.safetensors"));
  for (const bool bidirectional : {true, false}) {
    RelativePositionBias bias(RelativePositionBiasOptions(1).bidirectional(bidirectional));
    bias->weight.data().copy_(torch::arange(32).unsqueeze(1));
    const auto all = bias->forward(201, 201)[0][0];  // distances -200 to 200: the first column backwards, then the first row
    const auto buckets = torch::cat({all.select(1, 0).flip(0), all[0].slice(0, 1)}).to(torch::kLong);
    EXPECT_TRUE(buckets.equal(expected.tensor(bidirectional ? "bidirectional" : "one_sided")));
  }
}

TEST(RelativePositionBiasTest, DependsOnTheDistanceAloneForEachHead) {
  RelativePositionBias bias(RelativePositionBiasOptions(3).num_buckets(8).max_distance(5));
  torch::nn::init::normal_(bias->weight);
  const auto biases = bias->forward(4, 6);
  ASSERT_EQ(biases.sizes(), (std::vector<int64_t>{1, 3, 4, 6}));
  EXPECT_TRUE(biases.slice(2, 1).slice(3, 1).equal(biases.slice(2, 0, 3).slice(3, 0, 5)));
  EXPECT_FALSE(biases.select(1, 0).equal(biases.select(1, 1)));
  EXPECT_EQ(bias->forward(0, 3).sizes(), (std::vector<int64_t>{1, 3, 0, 3}));
}

TEST(RelativePositionBiasTest, StartsAtZeroAndLearns) {
  RelativePositionBias bias(2);
  EXPECT_EQ(bias->forward(3, 3).abs().max().item<float>(), 0);
  bias->forward(3, 3).sum().backward();
  EXPECT_EQ(bias->weight.grad().sum().item<float>(), 2 * 3 * 3);
}

TEST(RelativePositionBiasTest, RefusesBadOptionsByName) {
  const auto error = [](const RelativePositionBiasOptions& options) {
    return error_of<c10::ValueError>([&] { RelativePositionBias bias(options); });
  };
  const std::string start = "[relative_position_bias] ";
  EXPECT_EQ(error(RelativePositionBiasOptions(0)), start + "num_heads must be at least 1, but is 0.");
  EXPECT_EQ(error(RelativePositionBiasOptions(1).num_buckets(7)), start + "num_buckets must be even and at least 4, but is 7.");
  EXPECT_EQ(error(RelativePositionBiasOptions(1).num_buckets(1).bidirectional(false)),
            start + "num_buckets must be at least 2, but is 1.");
  EXPECT_EQ(error(RelativePositionBiasOptions(1).max_distance(8)),
            start + "max_distance must be more than 8, the distances that have buckets of their own, but is 8.");
  EXPECT_EQ(error_of<c10::ValueError>([] { RelativePositionBias(1)->forward(-1, 2); }),
            start + "Lq and Lk must not be negative, but are -1 and 2.");
}

// ---- Files that do not fit -------------------------------------------------------------------------------------------------

// A changed copy of a family's weights, in a folder of its own, maybe beside a config.json.
struct Changed {
  explicit Changed(const std::string& family, std::optional<json> config = {})
      : tensors(load_tensors(data_path("stacks/" + family + ".safetensors"))) {
    if (config) write_bytes(dir.file("config.json"), config->dump());
  }
  Checkpoint saved() const {
    save_safetensors(dir.file("model.safetensors"), tensors);
    return open_checkpoint(dir.file("model.safetensors"));
  }
  std::string without_path(const std::string& message) const {
    const auto start = "[load] " + dir.file("model.safetensors") + ": ";
    EXPECT_TRUE(message.starts_with(start)) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message.substr(std::min(message.size(), start.size()));
  }
  std::string encoder_error(const StackOptionsFromFile& options = {}) const {
    return without_path(error_of<FileError>([&] { return encoder_from(saved(), options); }));
  }
  std::string decoder_error(const StackOptionsFromFile& options = {}) const {
    return without_path(error_of<FileError>([&] { return decoder_from(saved(), options); }));
  }
  void remove(const std::string& beginning) {
    std::erase_if(tensors, [&](const auto& item) { return item.first.starts_with(beginning); });
  }

  TempDir dir;
  NamedTensors tensors;
};

const StackOptionsFromFile kTold = {.num_heads = 2, .norm_placement = NormPlacement::after, .activation = Activation::gelu};

TEST(LoadStacksTest, ChoosesTheOnlyEncoderAndTheOnlyDecoder) {
  const Changed bart("bart");
  EXPECT_EQ(encoder_from(bart.saved(), kTold)->layers->size(), 2U);
  EXPECT_EQ(decoder_from(bart.saved(), kTold)->layers->size(), 2U);
  const Changed blip("blip");
  EXPECT_EQ(blip.decoder_error(),
            R"(prefix must be one of "text_decoder.bert.encoder.", "text_encoder.encoder.", but was not given)");
  EXPECT_EQ(blip.encoder_error({.prefix = "text_encoder.encoder"}),
            R"(prefix must be one of "vision_model.", but is "text_encoder.encoder")");
  EXPECT_EQ(Changed("bert").decoder_error(), "must hold a decoder in a layout that is known, but holds none");
}

TEST(LoadStacksTest, TakesAPrefixWithAndWithoutItsPoint) {
  const Changed bart("bart");
  auto options = kTold;
  options.prefix = "model.encoder";
  const auto without = copy_of(*encoder_from(bart.saved(), options));
  options.prefix = "model.encoder.";
  for (const auto& [name, tensor] : copy_of(*encoder_from(bart.saved(), options))) EXPECT_TRUE(tensor.equal(without.at(name)));
}

TEST(LoadStacksTest, NamesALayerThatIsMissing) {
  Changed torch("torch_after");
  for (const auto& [name, tensor] : NamedTensors(torch.tensors)) {
    if (name.starts_with("encoder.layers.1.")) torch.tensors["encoder.layers.3." + name.substr(17)] = tensor;
  }
  EXPECT_EQ(torch.encoder_error(kTold), R"(stack "encoder." must have layers up to 3, but layer 2 is missing)");
  torch.remove("encoder.layers.0.");
  EXPECT_EQ(torch.encoder_error(kTold), R"(stack "encoder." must have layers up to 3, but layer 0 is missing)");
}

TEST(LoadStacksTest, TakesNoTensorThatIsNamedByANumberForALayer) {
  Changed torch("torch_after");
  torch.tensors["encoder.layers.7"] = torch::ones(1);
  EXPECT_NE(torch.encoder_error(kTold).find("unexpected: layers.7"), std::string::npos) << torch.encoder_error(kTold);
}

TEST(LoadStacksTest, NamesWhatALayerLacks) {
  Changed bart("bart");
  bart.remove("model.decoder.layers.1.encoder_attn.");
  EXPECT_EQ(bart.decoder_error(kTold),
            "stack \"model.decoder.\" must have layers of one layout, but layer 1 is not like layer 0; missing: "
            "encoder_attn.k_proj.bias, encoder_attn.k_proj.weight, encoder_attn.out_proj.bias, encoder_attn.out_proj.weight, "
            "encoder_attn.q_proj.bias, encoder_attn.q_proj.weight, encoder_attn.v_proj.bias, encoder_attn.v_proj.weight");
  bart.tensors.at("model.encoder.layers.0.fc2.weight") = torch::ones({8, 13});
  EXPECT_EQ(bart.encoder_error(kTold),
            "stack \"model.encoder.\" must have layers of one layout, but layer 0 is not like layer 1; its shapes do not fit "
            "together");
}

TEST(LoadStacksTest, NamesALayerOfAnotherWidth) {
  Changed bart("bart");
  bart.tensors.at("model.encoder.layers.1.self_attn.k_proj.weight") = torch::ones({8, 13});
  EXPECT_EQ(bart.encoder_error(kTold),
            "layer \"model.encoder.layers.1.\" must have a dim_key and dim_value of 8, its dim_query, but has 13 and 8");
}

TEST(LoadStacksTest, NamesTensorsThatNoLayoutExplains) {
  Changed bart("bart");
  bart.tensors["model.encoder.layers.1.adapter.weight"] = torch::ones({8});
  bart.tensors["model.encoder.project.weight"] = torch::ones({8, 8});
  EXPECT_EQ(bart.encoder_error(kTold),
            "stack \"model.encoder.\" must have only names that layout fc1_fc2 explains; unexpected: layers.1.adapter.weight, "
            "project.weight");
  auto allowed = kTold;
  allowed.allow_unexpected = true;
  EXPECT_EQ(encoder_from(bart.saved(), allowed)->layers->size(), 2U);

  Changed adapted("bert");
  adapted.tensors["lora_te_bert_encoder_layer_0_attention_self_query.lora_down.weight"] = torch::ones({2, 8});
  EXPECT_EQ(
      adapted.encoder_error(kTold),
      "stack \"bert.encoder.\" must have only names that layout bert explains; unexpected: "
      "lora_te_bert_encoder_layer_0_attention_self_query.lora_down.weight; low-rank weights must first be merged into the "
      "others in Python, by merge_and_unload of peft or fuse_lora of diffusers, and all saved again");
}

TEST(LoadStacksTest, RefusesOtherPositionsThanAbsoluteOnes) {
  Changed relative("bert");
  relative.tensors["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch::ones({15, 4});
  EXPECT_EQ(relative.encoder_error(kTold),
            "stack \"bert.encoder.\" must have only names that layout bert explains; unexpected: "
            "layer.0.attention.self.distance_embedding.weight");
  EXPECT_EQ(Changed("bert", json{{"position_embedding_type", "relative_key"}}).encoder_error(kTold),
            "position_embedding_type in its config.json must be \"absolute\", but is \"relative_key\": not computed");
  EXPECT_EQ(Changed("bart", json{{"model_type", "detr"}}).encoder_error(kTold),
            "its config.json says model_type \"detr\", which adds positions in each layer: not computed");
  for (const auto* model : {"rt_detr_v2", "dab-detr", "maskformer", "mask2former", "oneformer"}) {
    EXPECT_EQ(
        Changed("bart", json{{"model_type", model}}).encoder_error(kTold),
        std::string("its config.json says model_type \"") + model + "\", which adds positions in each layer: not computed");
  }
}

TEST(LoadStacksTest, RefusesModelsOfTheSameNamesThatComputeOtherAttention) {
  const auto error = [](const json& config) { return Changed("bert", config).encoder_error(kTold); };
  for (const auto* model : {"bros", "canine", "mra", "nystromformer", "yoso"}) {
    EXPECT_TRUE(error({{"model_type", model}})
                    .starts_with(std::string("its config.json says model_type \"") + model + "\", which has "));
  }
  EXPECT_EQ(error({{"model_type", "big_bird"}, {"attention_type", "block_sparse"}}),
            "its config.json says attention_type \"block_sparse\", which has attention that is not to all keys: not computed");
  EXPECT_EQ(error({{"model_type", "roformer"}}),
            "its config.json says model_type \"roformer\", which has rotary embeddings of its queries and keys: not computed");
  const json full = {{"model_type", "big_bird"}, {"attention_type", "original_full"}};
  EXPECT_EQ(encoder_from(Changed("bert", full).saved(), kTold)->layers->size(), 2U);

  const json vision = {{"model_type", "composed"}, {"vision_config", {{"model_type", "video_llama_3_vision"}}}};
  EXPECT_EQ(
      Changed("blip", vision).encoder_error({.num_heads = 2, .activation = Activation::gelu}),
      "its config.json says model_type \"video_llama_3_vision\", which has rotary embeddings of its queries and keys: not "
      "computed");
}

TEST(LoadStacksTest, EveryNameOfADecodersSelfAttentionMustBeExplained) {
  const auto unexpected = [](const std::string& family, const std::string& prefix, const std::string& name) {
    Changed changed(family);
    changed.tensors[prefix + name] = torch::ones({8, 2});
    auto options = kTold;
    options.prefix = prefix;
    const auto message = changed.decoder_error(options);
    EXPECT_TRUE(message.ends_with("explains; unexpected: " + name)) << message;
  };
  unexpected("t5", "decoder.", "block.1.layer.0.SelfAttention.relative_attention_bias.weight");  // as in UMT5
  unexpected("bart", "model.decoder.", "layers.1.self_attn.q_norm.weight");
  unexpected("torch_after", "decoder.", "layers.1.self_attn.gate");
  unexpected("blip", "text_decoder.bert.encoder.", "layer.1.attention.self.distance_embedding.weight");
  unexpected("whisper_openai", "decoder.", "blocks.1.attn.gate");
}

TEST(LoadStacksTest, RefusesNormsBehindTheBranchesOfTimmsVit) {
  EXPECT_EQ(Changed("timm", json{{"architecture", "vit_base_patch16_rpn_224"}}).encoder_error(kTold),
            "its config.json says architecture \"vit_base_patch16_rpn_224\", which has its norms behind its branches: not "
            "computed");
}

TEST(LoadStacksTest, OneSelfAttentionOfT5IsNotReadWithoutTheBiasOfTheFirst) {
  Changed t5("t5");
  const auto in_block = [](int block, const std::string& name) {
    return "decoder.block." + std::to_string(block) + ".layer." + name;
  };
  LayerOptions options{.prefix = in_block(1, "0.SelfAttention"), .num_heads = 2};
  const auto error = [&] {
    return t5.without_path(error_of<FileError>([&] { return cross_attention_from(t5.saved(), options); }));
  };
  const std::string bias = "0.SelfAttention.relative_attention_bias.weight";
  const auto message =
      "layer \"" + in_block(1, "0.SelfAttention.") + "\" must have only names that layout t5 explains; unexpected: ";
  EXPECT_EQ(error(), message + in_block(0, bias));
  options.allow_unexpected = true;
  auto module = cross_attention_from(t5.saved(), options);
  const auto loading =
      error_of<LoadError>([&] { load_weights(*module, t5.saved(), {.prefix = in_block(1, "0.SelfAttention")}); });
  EXPECT_TRUE(loading.ends_with("unexpected: " + in_block(0, bias))) << loading;
  options = {.prefix = in_block(1, "1.EncDecAttention"), .num_heads = 2};
  EXPECT_EQ(cross_attention_from(t5.saved(), options)->options.num_heads(), 2);

  t5.tensors[in_block(1, bias)] = t5.tensors.at(in_block(0, bias));  // as in UMT5
  options.prefix = in_block(1, "0.SelfAttention");
  EXPECT_EQ(error(), message + "relative_attention_bias.weight");
}

TEST(LoadStacksTest, SaysWhatIsMissing) {
  const Changed bart("bart");
  const std::string rest = " is not among its weights, nor in a config.json beside it; give one of ";
  EXPECT_EQ(bart.encoder_error(), "the number of heads of \"model.encoder.layers.0.self_attn.\"" + rest + "1, 2, 4, 8");
  EXPECT_EQ(bart.encoder_error({.num_heads = 2}), "the norm_placement of \"model.encoder.layers.0.\"" + rest + "before, after");
  EXPECT_EQ(bart.decoder_error({.num_heads = 2, .norm_placement = NormPlacement::after}),
            "the activation of \"model.decoder.layers.0.\"" + rest + "relu, gelu, gelu_tanh, silu");
  EXPECT_EQ(Changed("bert", json{{"hidden_act", "quick_gelu"}}).encoder_error(),
            "the activation in its config.json, \"quick_gelu\", is not known; give one of relu, gelu, gelu_tanh, silu");
  EXPECT_EQ(Changed("bert").encoder_error({.num_heads = 2, .norm_placement = NormPlacement::before}),
            "norm_placement must be the one that layout bert_encoder needs, but is before");
}

TEST(LoadStacksTest, ReadsTheEncodersPartOfConfigJson) {
  const json config = {{"model_type", "encoder-decoder"},
                       {"encoder", {{"num_attention_heads", 4}, {"hidden_act", "relu"}, {"layer_norm_eps", 1e-3}}},
                       {"decoder", {{"num_attention_heads", 2}, {"hidden_act", "silu"}, {"layer_norm_eps", 1e-2}}}};
  const auto options = encoder_from(Changed("bert", config).saved())->options.layers().front();
  EXPECT_EQ(options.attention().num_heads(), 4);
  EXPECT_EQ(options.activation(), Activation::relu);
  EXPECT_EQ(options.norm_eps(), 1e-3);
  EXPECT_EQ(encoder_from(Changed("vit", config).saved())->norm->options.eps(), 1e-3);
  const json bart = {
      {"model_type", "bart"}, {"encoder_attention_heads", 4}, {"decoder_attention_heads", 2}, {"activation_function", "relu"}};
  const Changed changed("bart", bart);
  EXPECT_EQ(encoder_from(changed.saved())->options.layers()[1].attention().num_heads(), 4);
  EXPECT_EQ(decoder_from(changed.saved())->options.layers()[1].self().attention().num_heads(), 2);
}

TEST(LoadStacksTest, OptionsComeFirst) {
  const Changed bert("bert", json{{"num_attention_heads", 4}, {"hidden_act", "relu"}, {"layer_norm_eps", 1e-3}});
  auto encoder = encoder_from(
      bert.saved(),
      {.num_heads = 2, .activation = Activation::silu, .norm_eps = 0.5, .dropout = 0.25, .dtype = torch::kBFloat16});
  const auto& options = encoder->layers->at<CrossAttentionBlockImpl>(1).options;
  EXPECT_EQ(options.attention().num_heads(), 2);
  EXPECT_EQ(options.activation(), Activation::silu);
  EXPECT_EQ(options.norm_eps(), 0.5);
  EXPECT_EQ(options.dropout(), 0.25);
  for (const auto& parameter : encoder->parameters()) EXPECT_EQ(parameter.scalar_type(), torch::kBFloat16);
}

TEST(LoadStacksTest, T5MustHaveItsNormAndItsBiasInTheFirstLayerAlone) {
  Changed t5("t5");
  EXPECT_EQ(encoder_from(t5.saved())->relative_position_bias->options.max_distance(), 128);
  EXPECT_EQ(t5.encoder_error({.num_heads = 4}),
            "num_heads must be 2, as \"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight\" shows, but is 4");
  const std::string bias = "layer.0.SelfAttention.relative_attention_bias.weight";
  t5.tensors["encoder.block.1." + bias] = torch::ones({8, 2});  // as in UMT5
  EXPECT_EQ(t5.encoder_error(), "stack \"encoder.\" must have only names that layout t5 explains; unexpected: block.1." + bias);
  t5.tensors.erase("encoder.block.1." + bias);
  t5.remove("encoder.final_layer_norm.");
  EXPECT_EQ(t5.encoder_error(), R"(stack "encoder." must have a norm behind its layers, "final_layer_norm", but has none)");
  t5.tensors.erase("decoder.block.0." + bias);
  EXPECT_EQ(t5.decoder_error(),
            "stack \"decoder.\" must have a relative position bias, \"decoder.block.0." + bias + "\", but has none");
}

TEST(LoadStacksTest, ReadsWhisperAsMlxNamesIt) {
  const StackOptionsFromFile options = {.num_heads = 2};
  const Changed original("whisper_openai");
  Changed mlx("whisper_openai", json{{"n_audio_head", 4}, {"n_text_head", 2}});
  for (const auto& [name, tensor] : original.tensors) {
    const auto at = name.find("mlp.");
    if (at == std::string::npos) continue;
    mlx.tensors.erase(name);
    mlx.tensors[name.substr(0, at) + (name[at + 4] == '0' ? "mlp1" : "mlp2") + name.substr(at + 5)] = tensor;
  }
  const auto encoder = copy_of(*encoder_from(original.saved(), options));
  const auto decoder = copy_of(*decoder_from(original.saved(), options));
  for (const auto& [name, tensor] : copy_of(*encoder_from(mlx.saved()))) EXPECT_TRUE(tensor.equal(encoder.at(name))) << name;
  for (const auto& [name, tensor] : copy_of(*decoder_from(mlx.saved()))) EXPECT_TRUE(tensor.equal(decoder.at(name))) << name;
  EXPECT_EQ(encoder_from(mlx.saved())->options.layers()[0].attention().num_heads(), 4);
  EXPECT_EQ(decoder_from(mlx.saved())->options.layers()[0].self().attention().num_heads(), 2);
}

TEST(LoadStacksTest, ADecoderDoesNotTakeTheNormOfAnEncoder) {
  Changed whisper("whisper_openai");
  for (const auto* part : {"weight", "bias"}) {
    const std::string ending(part);
    whisper.tensors["encoder.ln." + ending] = whisper.tensors.at("encoder.ln_post." + ending);
  }
  EXPECT_EQ(whisper.encoder_error({.num_heads = 2}),
            "stack \"encoder.\" must have only names that layout whisper explains; unexpected: ln.bias, ln.weight");
  whisper.remove("decoder.ln.");
  EXPECT_EQ(whisper.decoder_error({.num_heads = 2}),
            R"(stack "decoder." must have a norm behind its layers, "ln", but has none)");
}

TEST(LoadStacksTest, ChecksTheNormBehindTheLayers) {
  Changed vit("vit");
  vit.tensors.at("vit.layernorm.bias") = torch::ones({9});
  EXPECT_EQ(vit.encoder_error({.num_heads = 2}), "\"vit.layernorm.bias\" must have shape [8], but has [9]");
  vit.remove("vit.layernorm.bias");
  for (const auto* name : {"gamma", "beta"}) vit.tensors[std::string("vit.layernorm.") + name] = torch::ones({8});
  EXPECT_EQ(vit.encoder_error({.num_heads = 2}),
            "stack \"vit.\" must have only names that layout vit explains; unexpected: layernorm.beta, layernorm.gamma");
  const auto encoder = encoder_from(vit.saved(), {.num_heads = 2, .allow_unexpected = true});
  EXPECT_TRUE(encoder->norm->weight.equal(vit.tensors.at("vit.layernorm.weight")));
  EXPECT_FALSE(encoder->norm->bias.defined());
}

TEST(LoadStacksTest, ReadsOldNamesOfNorms) {
  Changed old("bert");
  for (const auto& [name, tensor] : NamedTensors(old.tensors)) {
    const auto at = name.find("LayerNorm.");
    if (at == std::string::npos || !name.starts_with("bert.encoder")) continue;
    old.tensors.erase(name);
    old.tensors[name.substr(0, at) + (name.ends_with("weight") ? "LayerNorm.gamma" : "LayerNorm.beta")] = tensor;
  }
  const auto expected = copy_of(*encoder_from(Changed("bert").saved(), kTold));
  for (const auto& [name, tensor] : copy_of(*encoder_from(old.saved(), kTold))) EXPECT_TRUE(tensor.equal(expected.at(name)));
}

TEST(LoadStacksTest, RefusesHalfOfALearnedKeyAndValueAndOtherSizesOfThem) {
  Changed torch("torch_after");
  const auto options = StackOptionsFromFile{
      .prefix = "encoder", .num_heads = 2, .norm_placement = NormPlacement::after, .activation = Activation::gelu};
  torch.tensors["encoder.layers.1.self_attn.bias_k"] = torch::ones({1, 1, 8});
  EXPECT_EQ(torch.encoder_error(options),
            R"(layer "encoder.layers.1.self_attn." does not fit together; misshapen: bias_k and bias_v must both be there)");
  torch.tensors["encoder.layers.1.self_attn.bias_v"] = torch::ones({1, 1, 7});
  EXPECT_EQ(torch.encoder_error(options),
            R"("encoder.layers.1.self_attn.bias_v" must have shape [1, 1, 8], but has [1, 1, 7])");
  torch.tensors["encoder.layers.1.self_attn.bias_v"] = torch::ones({1, 1, 8});
  EXPECT_TRUE(encoder_from(torch.saved(), options)->options.layers()[1].attention().bias_kv());
}

TEST(LoadStacksTest, RefusesHalfOfTheBiasesOfQueryAndKeyNorms) {
  const auto error_with = [](const std::vector<std::string>& names) {
    Changed timm("timm");
    for (const auto& name : names) timm.tensors["blocks.0.attn." + name] = torch::ones({8});
    return timm.encoder_error({.num_heads = 2, .allow_unexpected = true});
  };
  const std::string start = R"(layer "blocks.0.attn." does not fit together; misshapen: )";
  EXPECT_EQ(error_with({"q_norm.weight", "q_norm.bias", "k_norm.weight"}),
            start + "q_norm.bias and k_norm.bias must both be there");
  EXPECT_EQ(error_with({"q_norm.bias", "k_norm.bias"}), start + "q_norm.weight and k_norm.weight must both be there");
  EXPECT_EQ(error_with({"k_norm.bias"}),
            start + "q_norm.bias and k_norm.bias must both be there, q_norm.weight and k_norm.weight must both be there");
}

TEST(LoadStacksTest, RefusesBiasesOfTheFeedForwardBranchThatDoNotFit) {
  const auto error_with = [](const std::string& removed, const std::string& name, const torch::Tensor& value) {
    Changed bart("bart");
    if (!removed.empty()) bart.remove("model.encoder.layers.1." + removed);
    if (value.defined()) bart.tensors["model.encoder.layers.1." + name] = value;
    auto options = kTold;
    options.allow_unexpected = true;
    return bart.encoder_error(options);
  };
  const std::string start = R"(block "model.encoder.layers.1." does not fit together; misshapen: )";
  EXPECT_EQ(error_with("fc1.bias", "fc2.bias", torch::ones({9})),
            start + "fc2.bias must be absent, as fc1.bias is, but has shape [9]");
  EXPECT_EQ(error_with("fc1.bias", "", {}), start + "fc2.bias must be absent, as fc1.bias is, but has shape [8]");
  EXPECT_EQ(error_with("fc2.bias", "", {}), start + "fc2.bias must have shape [8], but is absent");
  EXPECT_EQ(error_with("", "fc2.bias", torch::ones({9})), start + "fc2.bias must have shape [8], but has shape [9]");
}

TEST(LoadStacksTest, RefusesNormsOfMixedNames) {
  Changed bert("bert");
  for (const auto& [name, tensor] : NamedTensors(bert.tensors)) {
    if (!name.starts_with("bert.encoder.layer.0.") || !name.ends_with("LayerNorm.bias")) continue;
    bert.tensors.erase(name);
    bert.tensors[name.substr(0, name.size() - 4) + "beta"] = tensor;
  }
  EXPECT_EQ(bert.encoder_error(kTold),
            "block \"bert.encoder.layer.0.\" does not fit together; misshapen: attention.output.LayerNorm.beta must be named "
            "attention.output.LayerNorm.bias, as attention.output.LayerNorm.weight is named, output.LayerNorm.beta must be "
            "named output.LayerNorm.bias, as output.LayerNorm.weight is named");
}

TEST(LoadStacksTest, RefusesQuantizedWeights) {
  Changed bart("bart");
  auto& weight = bart.tensors.at("model.encoder.layers.1.fc1.weight");
  weight = torch::ones(weight.sizes(), torch::kChar);
  EXPECT_EQ(
      bart.encoder_error(kTold),
      "tensor \"model.encoder.layers.1.fc1.weight\" must have a floating point type, but has int8; quantized weights must "
      "first be dequantised in Python, and saved again");
}

TEST(LoadStacksTest, SelfAttentionIsNotTakenForABlockOfCrossAttention) {
  const Changed bert("bert");
  EXPECT_EQ(bert.without_path(error_of<FileError>([&] { return cross_attention_block_from(bert.saved()); })),
            "must hold a block around cross-attention in a layout that is known, but holds none");
}

}  // namespace
}  // namespace xattn::test
