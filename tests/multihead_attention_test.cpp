// SPDX-License-Identifier: Apache-2.0
#include <xattn/multihead_attention.h>

#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;
using torch::nn::MultiheadAttention;
using torch::nn::MultiheadAttentionOptions;

// PyTorch's axes to ours and back: [B, L, E] <-> [L, B, E].
Tensor turned(const Tensor& x) {
  return x.transpose(0, 1);
}

class MultiheadAttentionTest : public testing::TestWithParam<torch::Device> {
 protected:
  static constexpr int64_t kB = 2, kLq = 4, kLk = 6, kE = 8, kHeads = 2;

  MultiheadAttentionTest() { torch::manual_seed(0); }

  // float64, with biases that are not zero, as PyTorch's are at first.
  MultiheadAttention make(const MultiheadAttentionOptions& options) const {
    MultiheadAttention module(options);
    module->to(GetParam(), torch::kDouble);
    const torch::NoGradGuard no_grad;
    if (options.bias()) {
      module->in_proj_bias.normal_();
      module->out_proj->bias.normal_();
    }
    return module;
  }
  Tensor random(at::IntArrayRef shape) const { return torch::randn(shape, torch::dtype(torch::kDouble).device(GetParam())); }

  // Compares both on the same inputs and masks, with weights of each head.
  void expect_same(MultiheadAttention& theirs,
                   const Tensor& query,
                   const Tensor& key,
                   const Tensor& value,
                   const Tensor& key_padding_mask = {},
                   const Tensor& attn_mask = {}) const {
    auto ours = from_multihead_attention(theirs);
    ours->options.attention_weights(AttentionWeights::per_head);
    const auto mask = Mask::from_multihead_attention(key_padding_mask, attn_mask, kHeads);
    const auto [output, weights] = ours->forward(query, key, value, mask);
    const auto [expected, expected_weights] =
        theirs->forward(turned(query), turned(key), turned(value), key_padding_mask, true, attn_mask, false);
    expect_close(output, turned(expected), 1e-12, "output");
    expect_close(weights, expected_weights, 1e-12, "weights");

    ours->options.attention_weights(AttentionWeights::mean);
    const auto mean =
        std::get<1>(theirs->forward(turned(query), turned(key), turned(value), key_padding_mask, true, attn_mask));
    expect_close(std::get<1>(ours->forward(query, key, value, mask)), mean, 1e-12, "mean of weights");
  }

  torch::Device device_ = GetParam();
  Tensor query_ = random({kB, kLq, kE}), key_ = random({kB, kLk, kE}), value_ = random({kB, kLk, kE});
  Tensor padding_ = torch::tensor({{0, 0, 0, 0, 1, 1}, {0, 0, 0, 0, 0, 0}}, device_).to(torch::kBool);  // true = ignored
  MultiheadAttentionOptions options_{kE, kHeads};
};

// ---- Cases in which both agree --------------------------------------------------------------------------------------------

TEST_P(MultiheadAttentionTest, AgreesInSelfAndCrossAttention) {
  for (const bool bias : {true, false}) {
    for (const bool bias_kv : {true, false}) {
      auto theirs = make(MultiheadAttentionOptions(options_).bias(bias).add_bias_kv(bias_kv));
      expect_same(theirs, query_, query_, query_);
      expect_same(theirs, query_, key_, key_);
      expect_same(theirs, query_, key_, value_);
    }
  }
}

TEST_P(MultiheadAttentionTest, AgreesUnderPaddingAndFloatMasks) {
  const auto causal = torch::full({kLq, kLk}, -INFINITY, query_.options()).triu(1);
  for (const bool bias_kv : {true, false}) {
    auto theirs = make(MultiheadAttentionOptions(options_).add_bias_kv(bias_kv));
    expect_same(theirs, query_, key_, value_, padding_);
    expect_same(theirs, query_, key_, value_, {}, causal);
    expect_same(theirs, query_, key_, value_, padding_, random({kLq, kLk}));
  }
}

TEST_P(MultiheadAttentionTest, AgreesWithProjectionsKeptApart) {
  // Only where key and value have the same width: see the refusal below.
  for (const bool bias : {true, false}) {
    auto theirs = make(MultiheadAttentionOptions(options_).kdim(5).vdim(5).bias(bias));
    const auto context = random({kB, kLk, 5});
    expect_same(theirs, query_, context, context, padding_);
  }
}

TEST_P(MultiheadAttentionTest, AgreesInGradients) {
  auto theirs = make(options_);
  auto ours = from_multihead_attention(theirs);
  const auto mask = Mask::from_multihead_attention(padding_, {}, kHeads);
  std::get<0>(ours->forward(query_, key_, value_, mask)).sin().sum().backward();
  std::get<0>(theirs->forward(turned(query_), turned(key_), turned(value_), padding_)).sin().sum().backward();
  const auto packed =
      torch::cat({ours->query_linear->weight.grad(), ours->key_linear->weight.grad(), ours->value_linear->weight.grad()});
  expect_close(packed, theirs->in_proj_weight.grad(), 1e-12, "gradient of in_proj_weight");
  expect_close(ours->output_linear->weight.grad(), theirs->out_proj->weight.grad(), 1e-12, "gradient of out_proj.weight");
}

// ---- Conversion -----------------------------------------------------------------------------------------------------------

TEST_P(MultiheadAttentionTest, CarriesSizesDropoutTypeAndModeOver) {
  auto theirs = make(MultiheadAttentionOptions(options_).kdim(5).vdim(3).dropout(0.25));
  theirs->to(torch::kBFloat16);
  const auto training = from_multihead_attention(theirs);
  EXPECT_TRUE(training->is_training());
  theirs->eval();
  const auto ours = from_multihead_attention(theirs);
  EXPECT_FALSE(ours->is_training());
  EXPECT_EQ(ours->options.dim_key(), 5);
  EXPECT_EQ(ours->options.dim_value(), 3);
  EXPECT_EQ(ours->options.num_heads(), kHeads);
  EXPECT_EQ(ours->options.dropout(), 0.25);
  EXPECT_EQ(ours->key_linear->weight.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(ours->key_linear->weight.device(), device_);
  EXPECT_TRUE(ours->value_linear->weight.equal(theirs->v_proj_weight));
  EXPECT_TRUE(ours->value_linear->bias.equal(theirs->in_proj_bias.slice(0, 2 * kE)));
}

TEST_P(MultiheadAttentionTest, CopiesAreTrainedApart) {
  auto theirs = make(options_);
  auto ours = from_multihead_attention(theirs);
  const auto before = theirs->in_proj_weight.clone();
  torch::optim::SGD optimizer(ours->parameters(), 0.1);
  std::get<0>(ours->forward(query_, key_, value_)).sum().backward();
  optimizer.step();
  EXPECT_TRUE(theirs->in_proj_weight.equal(before));
  EXPECT_FALSE(ours->value_linear->weight.equal(before.slice(0, 2 * kE)));
}

TEST_P(MultiheadAttentionTest, RefusesWhatHasNoCounterpart) {
  EXPECT_EQ(error_of<c10::ValueError>([&] { from_multihead_attention(make(options_.add_zero_attn(true))); }),
            "[from_multihead_attention] module must have add_zero_attn(false), but has true: CrossAttention has no key of "
            "zeros.");
  EXPECT_EQ(error_of<c10::ValueError>([] { from_multihead_attention(nullptr); }),
            "[from_multihead_attention] module must hold a MultiheadAttention, but is empty.");
}

// ---- Where both differ. If PyTorch changes one of these, its test fails: then update the header. --------------------------

TEST_P(MultiheadAttentionTest, TheirsReturnsWeightsAfterDropoutOursBefore) {
  auto theirs = make(MultiheadAttentionOptions(options_).dropout(0.5));
  const auto rows = [](const Tensor& weights) { return weights.sum(-1); };
  const auto dropped = std::get<1>(theirs->forward(turned(query_), turned(key_), turned(value_)));
  const auto whole = std::get<1>(from_multihead_attention(theirs)->forward(query_, key_, value_));
  EXPECT_FALSE(rows(dropped).allclose(torch::ones_like(rows(dropped))));
  EXPECT_TRUE(rows(whole).allclose(torch::ones_like(rows(whole))));
}

// https://github.com/pytorch/pytorch/issues/80494
TEST_P(MultiheadAttentionTest, TheirsAddsABooleanMaskAsZeroOrOneOursHidesItsKeys) {
  auto theirs = make(options_);
  const auto ignored = torch::ones({kLq, kLk}, torch::dtype(torch::kBool).device(device_)).triu(1);
  const auto added = std::get<1>(theirs->forward(turned(query_), turned(key_), turned(value_), {}, true, ignored));
  const auto as_numbers =
      std::get<1>(theirs->forward(turned(query_), turned(key_), turned(value_), {}, true, ignored.to(torch::kDouble)));
  EXPECT_TRUE(added.equal(as_numbers));
  const auto mask = Mask::from_multihead_attention({}, ignored, kHeads);
  const auto hidden = std::get<1>(from_multihead_attention(theirs)->forward(query_, key_, value_, mask));
  EXPECT_TRUE(hidden.masked_select(ignored).eq(0).all().item<bool>());
}

// https://github.com/pytorch/pytorch/issues/120793
TEST_P(MultiheadAttentionTest, TheirsRefusesKeysAndValuesOfDifferentWidthsOursTakesThem) {
  auto theirs = make(options_.kdim(5).vdim(3));
  const auto key = random({kB, kLk, 5}), value = random({kB, kLk, 3});
  const auto error = error_of<c10::Error>([&] { theirs->forward(turned(query_), turned(key), turned(value)); });
  EXPECT_NE(error.find("key.sizes() == value.sizes()"), std::string::npos) << error;
  const auto output = std::get<0>(from_multihead_attention(theirs)->forward(query_, key, value));
  const auto head = [](const Tensor& x, const Tensor& weight, const Tensor& bias) {
    return torch::linear(x, weight, bias).unflatten(-1, {kHeads, -1}).transpose(1, 2);
  };
  const auto biases = theirs->in_proj_bias.chunk(3);
  const auto expected = torch::scaled_dot_product_attention(head(query_, theirs->q_proj_weight, biases[0]),
                                                            head(key, theirs->k_proj_weight, biases[1]),
                                                            head(value, theirs->v_proj_weight, biases[2]));
  expect_close(output, theirs->out_proj(expected.transpose(1, 2).flatten(2)), 1e-12, "output");
}

TEST_P(MultiheadAttentionTest, TheirsThrowsOnAPaddingMaskInHalfTypesOursTakesIt) {
  for (const auto type : {torch::kHalf, torch::kBFloat16}) {
    auto theirs = make(options_);
    theirs->to(type);
    const auto query = query_.to(type), key = key_.to(type);
    const auto error = error_of<c10::Error>([&] { theirs->forward(turned(query), turned(key), turned(key), padding_); });
    EXPECT_NE(error.find("masked_fill\" not implemented"), std::string::npos) << error;
    const auto mask = Mask::from_multihead_attention(padding_, {}, kHeads);
    const auto weights = std::get<1>(from_multihead_attention(theirs)->forward(query, key, key, mask));
    EXPECT_TRUE(weights[0].slice(1, 4).eq(0).all().item<bool>());
  }
}

TEST_P(MultiheadAttentionTest, TheirsMakesARowWithoutKeysNaNOursTheOutputBias) {
  auto theirs = make(options_);
  const auto nothing = torch::ones_like(padding_);
  const auto output = std::get<0>(theirs->forward(turned(query_), turned(key_), turned(value_), nothing));
  EXPECT_TRUE(output.isnan().all().item<bool>());
  const auto mask = Mask::from_multihead_attention(nothing, {}, kHeads);
  const auto zeros = std::get<0>(from_multihead_attention(theirs)->forward(query_, key_, value_, mask));
  EXPECT_TRUE(zeros.equal(theirs->out_proj->bias.expand_as(zeros)));
}

TEST_P(MultiheadAttentionTest, TheirsTakesNoMaskOfEachBatchEntryAndHeadOursDoes) {
  auto theirs = make(options_);
  const auto bias = random({kB * kHeads, kLq, kLk});
  const auto error =
      error_of<c10::Error>([&] { theirs->forward(turned(query_), turned(key_), turned(value_), {}, true, bias); });
  EXPECT_NE(error.find("broadcast"), std::string::npos) << error;
  const auto output = std::get<0>(
      from_multihead_attention(theirs)->forward(query_, key_, value_, Mask::from_multihead_attention({}, bias, kHeads)));
  EXPECT_TRUE(output.isfinite().all().item<bool>());
}

// (PyTorch's module does not take unbatched inputs: it reads the third of two axes.)
TEST_P(MultiheadAttentionTest, TheirsTakesSequencesFirstOursBatchesFirstOrNone) {
  auto theirs = make(options_);
  auto ours = from_multihead_attention(theirs);
  const auto output = std::get<0>(theirs->forward(query_, query_, query_));  // attends over what is our batch axis
  expect_close(output, turned(std::get<0>(ours->forward(turned(query_), turned(query_), turned(query_)))), 1e-12, "turned");
  const auto unbatched = std::get<0>(ours->forward(query_[0], key_[0], value_[0]));
  expect_close(unbatched, std::get<0>(ours->forward(query_, key_, value_))[0], 1e-12, "unbatched");
}

// Comparing values reads both tensors, and on a GPU waits for them.
TEST_P(MultiheadAttentionTest, TheirsComparesKeyAndValueInEveryCallOursNever) {
  auto theirs = make(options_);
  auto ours = from_multihead_attention(theirs);
  static std::atomic<int> comparisons;
  const auto count_in = [](const auto& call) {
    comparisons = 0;
    const auto handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
          if (std::string_view(function.name()) == "aten::equal") ++comparisons;
          return nullptr;
        }).scopes({at::RecordScope::FUNCTION}));
    call();
    at::removeCallback(handle);
    return comparisons.load();
  };
  EXPECT_GT(count_in([&] { theirs->forward(turned(query_), turned(key_), turned(value_)); }), 0);
  EXPECT_EQ(count_in([&] { ours->forward(query_, key_, value_); }), 0);
}

INSTANTIATE_TEST_SUITE_P(Devices, MultiheadAttentionTest, testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace xattn::test
