// SPDX-License-Identifier: Apache-2.0
// The C++ of the project's pages, compiled and run. Each ```cpp block of a page must occur here, word by word.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/xattn.h>

#include <cmath>
#include <filesystem>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "attention/mask_parts.h"
#include "test_util.h"

#ifndef XATTN_NO_DISTRIBUTED
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#endif

namespace xattn::test {
namespace {

// The words of each line, so that a block compares wherever it stands.
std::string words_of(const std::string& text) {
  std::istringstream lines(text);
  std::string result;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    for (std::string word; words >> word;) result += word + " ";
  }
  return result;
}

TEST(ReadmeTest, EveryBlockOfCodeStandsInThisFile) {
  const auto here = words_of(read_bytes(XATTN_SOURCE_DIR "/tests/readme_test.cpp"));
  const std::string open = "```cpp\n", close = "```";
  int blocks = 0;
  const auto check_page = [&](const std::filesystem::path& page) {
    const auto text = read_bytes(page.string());
    for (auto at = text.find(open); at != std::string::npos; at = text.find(open, at)) {
      at += open.size();
      const auto block = text.substr(at, text.find(close, at) - at);
      EXPECT_NE(here.find(words_of(block)), std::string::npos) << page << " has a block that is not in this file:\n" << block;
      at += block.size();
      ++blocks;
    }
  };
  check_page(XATTN_SOURCE_DIR "/README.md");
  for (const auto& entry : std::filesystem::recursive_directory_iterator(XATTN_SOURCE_DIR "/src")) {
    if (entry.path().filename() == "README.md") check_page(entry.path());
  }
  EXPECT_GE(blocks, 14);
}

TEST(ReadmeTest, Example) {
  testing::internal::CaptureStdout();
  xattn::CrossAttention attention(128, 256, 256, 512);  // dim_query, dim_key, dim_value, dim_output
  auto query = torch::randn({2, 4, 128});               // [B, Lq, dim_query]: 4 words
  auto image = torch::randn({2, 6, 256});               // [B, Lk, dim_key]: 6 regions
  auto [output, weights] = attention->forward(query, /*key=*/image, /*value=*/image);
  std::cout << "Output shape: " << output.sizes() << "\n";
  std::cout << "Attention weights shape: " << weights.sizes() << "\n";
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "Output shape: [2, 4, 512]\nAttention weights shape: [2, 4, 6]\n");
}

#ifndef XATTN_NO_DISTRIBUTED
TEST(ReadmeTest, ContextParallel) {
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(c10::make_intrusive<c10d::HashStore>(), /*rank=*/0, /*size=*/1);
  xattn::CrossAttention attention(16, 16, 16, 16);
  auto query = torch::randn({2, 3, 16}), own_key = torch::randn({2, 5, 16}), own_value = torch::randn({2, 5, 16});
  // On every rank, with its own keys and values, and the same weights:
  xattn::ContextParallel parallel(attention, group);
  auto [output, weights] = parallel.forward(query, own_key, own_value);  // the output of the whole context, on all ranks
  output.sum().backward();                                               // and its gradients
  EXPECT_TRUE(torch::allclose(output, std::get<0>(attention->forward(query, own_key, own_value)), 1e-5, 1e-6));
  EXPECT_TRUE(attention->key_linear->weight.grad().defined());
}
#endif

TEST(ReadmeTest, SelfAttention) {
  auto x = torch::randn({2, 5, 384});
  xattn::CrossAttentionBlock layer(
      xattn::CrossAttentionBlockOptions(xattn::CrossAttentionOptions(384, 384, 384, 384).num_heads(6)).norm_context(true));
  auto [encoded, none] = layer->forward(x, x, x, {}, {.weights = xattn::AttentionWeights::none});
  EXPECT_EQ(encoded.sizes(), x.sizes());
  EXPECT_FALSE(none.defined());
}

TEST(ReadmeTest, Decoding) {
  const auto attention = xattn::CrossAttentionOptions(384, 384, 384, 384).num_heads(6);
  xattn::CrossAttentionBlock self_block(xattn::CrossAttentionBlockOptions(attention).norm_context(true).feed_forward(0));
  xattn::CrossAttentionBlock cross_block{xattn::CrossAttentionBlockOptions(attention)};
  const auto regions = torch::randn({1, 9, 384}), x = torch::randn({2, 1, 384});
  const std::vector<std::pair<torch::Tensor, torch::Tensor>> steps = {{torch::tensor({1, 0}), torch::randn({2, 1, 384})},
                                                                      {torch::tensor({0, 0}), torch::randn({2, 1, 384})}};
  auto self = self_block->freeze(), cross = cross_block->freeze();  // norm_context and no feed-forward; the other with one
  auto image = cross.context(regions, regions);                     // [1, Lk, 384], shared by all beams
  auto past = self.context(x, x, xattn::Mask::causal(xattn::CausalAlignment::lower_right),  // x [beams, 1, 384]: the first word
                           {.expected_queries = 448, .capacity = 448});
  auto y = std::get<0>(cross.attend(std::get<0>(self.attend(x, past)), image));
  for (const auto& [beams, word] : steps) {  // the beams that go on, and their next words
    past = past.select(beams).append(word, word);
    y = std::get<0>(cross.attend(std::get<0>(self.attend(word, past)), image));
  }
  EXPECT_EQ(past.length(), 3);
  EXPECT_EQ(y.sizes(), torch::IntArrayRef({2, 1, 384}));
}

TEST(ReadmeTest, Masks) {
  auto x = torch::randn({2, 77, 16});
  auto text_lengths = torch::tensor({12, 77});
  xattn::CrossAttention attention(16, 16, 16, 16);
  {
    using xattn::Mask;
    auto mask = Mask::lengths(text_lengths, /*Lk=*/77) & Mask::causal(xattn::CausalAlignment::upper_left);
    auto [output, weights] = attention->forward(x, x, x, mask);
    EXPECT_EQ(weights.slice(2, 12)[0].abs().max().item<double>(), 0);
  }
  auto key_padding_mask = torch::zeros({2, 77}, torch::kBool);  // true = ignored
  auto attn_mask = torch::Tensor();
  auto same = xattn::Mask::from_multihead_attention(key_padding_mask, attn_mask, /*num_heads=*/8);
  EXPECT_TRUE(detail::allowed_keys(same, 1, 77, torch::kCPU).all().item<bool>());
}

TEST(ReadmeTest, Context) {
  auto image = torch::randn({2, 10, 320});
  auto text = torch::randn({2, 77, 768});
  auto lengths = torch::tensor({12, 77});
  xattn::CrossAttention to_text(xattn::CrossAttentionOptions(320, 768, 768, 320)
                                    .num_heads(8)
                                    .qkv_bias(false)
                                    .attention_weights(xattn::AttentionWeights::none));
  auto context = to_text->context(text, text, xattn::Mask::lengths(lengths, 77));  // the key/value side, made once
  auto [output, none] = to_text->attend(image, context);                           // as often as you like; differentiable
  EXPECT_EQ(output.sizes(), image.sizes());
  EXPECT_FALSE(none.defined());
}

TEST(ReadmeTest, Frozen) {
  auto text = torch::randn({2, 77, 768});
  auto lengths = torch::tensor({12, 77});
  const std::vector<torch::Tensor> steps(3, torch::randn({2, 10, 320}));
  std::vector<torch::Tensor> outputs;
  xattn::CrossAttention to_text(xattn::CrossAttentionOptions(320, 768, 768, 320).num_heads(8));
  auto frozen = to_text->freeze();
  auto prepared = frozen.context(text, text, xattn::Mask::lengths(lengths, 77), {.expected_queries = 50 * 4096});  // 50 steps
  for (const auto& step : steps) outputs.push_back(std::get<0>(frozen.attend(step, prepared)));
  EXPECT_EQ(outputs.size(), 3);
  const auto given = std::get<0>(to_text->forward(steps[0], text, text, xattn::Mask::lengths(lengths, 77)));
  EXPECT_TRUE(outputs[2].allclose(given, 1e-4, 1e-5));
}

TEST(ReadmeTest, EqualKeys) {
  xattn::CrossAttention attention(16, 16, 16, 16);
  auto query = torch::randn({2, 3, 16}), key = torch::randn({2, 10, 16}), pad = torch::randn({2, 1, 16});
  auto all = torch::cat({key, pad.expand({-1, 40, -1})}, 1);  // 40 equal keys behind 10 others
  auto merged = torch::cat({key, pad}, 1);                    // one that stands for them
  auto bias = torch::cat({torch::zeros({10}), torch::tensor({std::log(40.0f)})}).view({1, 1, 11});
  auto output = std::get<0>(attention->forward(query, merged, merged, xattn::Mask::bias(bias)));  // as with all
  EXPECT_TRUE(output.allclose(std::get<0>(attention->forward(query, all, all)), 1e-4, 1e-5));
}

struct CaptionerImpl : torch::nn::Module {
  CaptionerImpl() {
    fusion = register_module("fusion", xattn::CrossAttention(64, 128, 128, 64));
    head = register_module("head", torch::nn::Linear(64, 1000));
  }

  torch::Tensor forward(const torch::Tensor& words, const torch::Tensor& regions) {
    auto [fused, weights] = fusion(words, regions, regions);
    return head(fused);
  }

  xattn::CrossAttention fusion = nullptr;
  torch::nn::Linear head = nullptr;
};
TORCH_MODULE(Captioner);

struct BlipImpl : torch::nn::Module {
  explicit BlipImpl(const xattn::Checkpoint& file) {
    const auto features = file.tensors().at("text_decoder.bert.embeddings.word_embeddings.weight").shape;
    words = register_module("words", torch::nn::Embedding(features[0], features[1]));
    vision = register_module("vision", xattn::encoder_from(file, {.prefix = "vision_model"}));
    decoder = register_module("decoder", xattn::decoder_from(file, {.prefix = "text_decoder.bert.encoder"}));
  }

  xattn::Encoder vision = nullptr;
  xattn::Decoder decoder = nullptr;
  torch::nn::Embedding words = nullptr;
};
TORCH_MODULE(Blip);

TEST(ReadmeTest, Training) {
  auto words = torch::randn({2, 5, 64});
  auto regions = torch::randn({2, 9, 128});
  auto next_words = torch::randint(1000, {2, 5});
  Captioner model;
  torch::optim::AdamW optimizer(model->parameters(), /*lr=*/1e-3);
  auto loss = torch::cross_entropy_loss(model(words, regions).flatten(0, 1), next_words.flatten());
  optimizer.zero_grad();
  loss.backward();
  optimizer.step();
  EXPECT_TRUE(model->fusion->key_linear->weight.grad().defined());
}

TEST(ReadmeTest, Loading) {
  const TempDir directory;
  const auto path = directory.file("model.safetensors");
  const Captioner trained;
  xattn::save_safetensors(path, *trained);
  Captioner model;
  xattn::CrossAttention attention(64, 128, 128, 64);
  {
    auto report = xattn::load_weights(*model, path);               // everything, by name, or an error and no change
    xattn::load_weights(*attention, path, {.prefix = "fusion."});  // one layer of a larger file
    xattn::load_weights(*model, path, {.allow_missing = true});    // keep what the file does not have
    std::cout << report.summary() << "\n";
    EXPECT_EQ(report.loaded.size(), 10);
  }
  EXPECT_TRUE(attention->key_linear->weight.equal(trained->fusion->key_linear->weight));
}

TEST(ReadmeTest, WholeModel) {
  const TempDir dir;
  const auto tuned = dir.path(), folder = data_path("models/blip");
  auto file = xattn::open_checkpoint(folder);
  Blip model(file);
  const xattn::LoadOptions as = {.allow_unexpected = true,
                                 .rename = {{"^vision_model", "vision"},
                                            {"^text_decoder\\.bert\\.encoder", "decoder"},
                                            {"^text_decoder\\.bert\\.embeddings\\.word_embeddings", "words"}}};
  std::cout << xattn::load_weights(*model, file, as).summary() << "\n";
  for (const auto& name : file.unread()) std::cout << name << " is not used\n";
  // ... train ...
  xattn::save_safetensors(tuned + "/model.safetensors", *model, {.like = file, .load = as});  // config.json is copied by you
  EXPECT_EQ(open_checkpoint(tuned).tensors().size(), file.tensors().size());
}

TEST(ReadmeTest, RealWeights) {
  const TempDir directory;
  const auto path = data_path("layouts/bart.safetensors"), new_path = directory.file("model.pt");
  {
    auto checkpoint = xattn::open_checkpoint(path);                                        // names, types, shapes, metadata
    auto weight = checkpoint.tensor("model.decoder.layers.0.encoder_attn.q_proj.weight");  // this tensor only
    xattn::save_state_dict(new_path, {{"weight", weight}});  // for torch.load(..., weights_only=True)
    EXPECT_TRUE(torch::equal(open_checkpoint(new_path).tensor("weight"), weight));
  }
  auto checkpoint = xattn::open_checkpoint(path);  // names, types, shapes, metadata
  auto attention = xattn::cross_attention_from(checkpoint, {.prefix = "model.decoder.layers.0.encoder_attn", .num_heads = 8});
  auto block = xattn::cross_attention_block_from(checkpoint, {.prefix = "model.decoder.layers.0",
                                                              .num_heads = 8,
                                                              .norm_placement = xattn::NormPlacement::after,
                                                              .activation = xattn::Activation::gelu});
  EXPECT_TRUE(torch::equal(block->attention->query_linear->weight, attention->query_linear->weight));
}

TEST(ReadmeTest, SecondContext) {
  const auto unet_path = data_path("layouts/unet_whole.safetensors"),
             adapter_path = data_path("layouts/ip_adapter_up.safetensors");
  auto unet = xattn::with_ip_adapter(xattn::open_checkpoint(unet_path), xattn::open_checkpoint(adapter_path));
  auto layer = xattn::decoupled_cross_attention_from(
      unet, {.prefix = "up_blocks.0.attentions.1.transformer_blocks.0.attn2", .num_heads = 2}, /*scale=*/0.6);
  auto weight = open_checkpoint(adapter_path).tensor("ip_adapter.5.to_k_ip.weight");
  EXPECT_TRUE(layer->added_projections[0]->key_linear->weight.equal(weight));
}

TEST(ReadmeTest, OwnLayout) {
  const test::TempDir dir;
  const auto draw = [](int64_t out, int64_t in) { return torch::randn({out, in}); };
  const NamedTensors tensors = {{"ask.weight", draw(16, 16)}, {"tell.weight", draw(32, 24)}, {"say.weight", draw(16, 16)}};
  save_safetensors(dir.file("x.safetensors"), tensors);
  auto checkpoint = open_checkpoint(dir.file("x.safetensors"));
  xattn::Layout mine{.name = "mine",
                     .projections = {xattn::LinearNames{"ask.weight", "ask.bias"},
                                     {"tell.weight", "tell.bias", 0, 2, 2},  // keys, then values
                                     {"tell.weight", "tell.bias", 1, 2, 2},
                                     {"say.weight", "say.bias"}}};
  auto attention = xattn::cross_attention_from(checkpoint, {.layout = mine, .num_heads = 8});
  EXPECT_TRUE(attention->value_linear->weight.equal(tensors.at("tell.weight").slice(0, 16)));
}

TEST(ReadmeTest, Core) {
  auto q = torch::randn({2, 8, 4, 64}), k = torch::randn({2, 2, 6, 64}), v = torch::randn({2, 2, 6, 64});
  // q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e]
  auto result = xattn::attention(q, k, v, {.weights = xattn::AttentionWeights::per_head, .log_sum_exp = true});
  // result.output [B, H, Lq, e], result.weights [B, H, Lq, Lk], result.log_sum_exp [B, H, Lq]
  EXPECT_EQ(result.weights.sizes(), (std::vector<int64_t>{2, 8, 4, 6}));
}

TEST(ReadmeTest, Block) {
  auto words = torch::randn({2, 5, 512});
  auto regions = torch::randn({2, 49, 1024});
  xattn::CrossAttentionBlock block(
      xattn::CrossAttentionBlockOptions(xattn::CrossAttentionOptions(512, 1024, 1024, 512).num_heads(8))
          .norm(xattn::NormKind::rms)
          .gate(xattn::BlockGate::scalar));  // starts at zero: a new block changes nothing
  auto [output, weights] = block->forward(words, /*key=*/regions, /*value=*/regions);
  EXPECT_TRUE(output.equal(words));
  EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{2, 5, 49}));
}

TEST(ReadmeTest, Maps) {
  xattn::CrossAttention attention(64, 128, 128, 64);
  auto query = torch::randn({1, 4, 64});
  auto context = torch::randn({1, 49, 128});
  auto image = torch::zeros({224, 224, 3}, torch::kUInt8);
  auto weights = std::get<1>(attention->forward(query, context, context));  // [1, 4, 49]: 4 words attend to 7 x 7 regions
  auto maps = xattn::attention_maps(weights, {.rows = 7, .columns = 7});    // [1, 4, 7, 7]
  auto picture = xattn::overlay_map(image, maps[0][2]);                     // [224, 224, 3]: where word 2 attends
  auto regions = xattn::attention_entropy(weights).exp();                   // [1, 4]: effective number of regions per word
  EXPECT_EQ(picture.sizes(), image.sizes());
  EXPECT_GT(regions.min().item<double>(), 1);
}

}  // namespace
}  // namespace xattn::test
