// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen_block.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/block.h>
#include <xattn/decoupled.h>
#include <xattn/frozen_decoupled.h>
#include <xattn/frozen_linear.h>

#include <string>
#include <tuple>
#include <vector>

#include "compare.h"
#include "one_thread.h"
#include "test_util.h"

// Frozen blocks, decoupled layers and linear layers, against the module in float64.
namespace xattn::test {
namespace {

using torch::Tensor;

void randomise(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module.parameters()) parameter.add_(torch::randn_like(parameter) * 0.2);
}

CrossAttentionOptions small_attention() {
  return CrossAttentionOptions(24, 20, 12, 24).num_heads(4).kv_heads(2).attention_weights(AttentionWeights::per_head);
}

// Blocks with every norm, placement, gate and activation, with and without a second projection, biases and a feed-forward network.
std::vector<CrossAttentionBlockOptions> kinds_of_blocks() {
  std::vector<CrossAttentionBlockOptions> all;
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    for (const auto norm : {NormKind::none, NormKind::rms, NormKind::layer}) {
      all.push_back(CrossAttentionBlockOptions(small_attention()).norm(norm).norm_placement(placement));
    }
    for (const auto gate : {BlockGate::scalar, BlockGate::per_feature}) {
      all.push_back(CrossAttentionBlockOptions(small_attention()).gate(gate).norm_placement(placement).feed_forward_glu(true));
    }
    for (const auto activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
      all.push_back(
          CrossAttentionBlockOptions(small_attention()).activation(activation).norm_placement(placement).norm_bias(false));
    }
    all.push_back(CrossAttentionBlockOptions(small_attention()).feed_forward(0).norm_placement(placement));
    all.push_back(
        CrossAttentionBlockOptions(small_attention()).feed_forward(37).feed_forward_bias(false).norm_placement(placement));
  }
  return all;
}

struct BlockCase {
  explicit BlockCase(const CrossAttentionBlockOptions& options, int64_t B = 2, int64_t Lq = 5, int64_t Lk = 7)
      : block(options),
        query(torch::randn({B, Lq, options.attention().dim_query()})),
        key(torch::randn({B, Lk, options.attention().dim_key()})),
        value(torch::randn({B, Lk, options.attention().dim_value()})) {
    randomise(*block);
    block->eval();
  }

  // What the block returns in float64.
  std::tuple<Tensor, Tensor> exact(const Mask& mask = {}) const {
    const torch::NoGradGuard no_grad;
    auto copy = std::dynamic_pointer_cast<CrossAttentionBlockImpl>(block->clone());
    copy->to(torch::kDouble);
    return copy->forward(query.to(torch::kDouble), key.to(torch::kDouble), value.to(torch::kDouble), mask);
  }

  CrossAttentionBlock block;
  Tensor query, key, value;
};

void expect_both_close(const std::tuple<Tensor, Tensor>& found,
                       const std::tuple<Tensor, Tensor>& exact,
                       const std::string& what,
                       double allowed = 1e-5) {
  expect_close(std::get<0>(found), std::get<0>(exact), allowed, what + " output");
  expect_close(std::get<1>(found), std::get<1>(exact), allowed, what + " weights");
}

std::string printed(const torch::nn::Module& module) {
  std::ostringstream text;
  module.pretty_print(text);
  return text.str();
}

TEST(FrozenBlockTest, EqualsTheBlockForEveryKindOnKernelsAndOnOperators) {
  torch::manual_seed(1);
  for (const auto& options : kinds_of_blocks()) {
    for (const auto type : {torch::kFloat, torch::kDouble}) {
      BlockCase c(options);
      c.block->to(type);
      const auto frozen = c.block->freeze();
      ASSERT_EQ(frozen.uses_kernels(), type == torch::kFloat);
      const auto query = c.query.to(type), key = c.key.to(type), value = c.value.to(type);
      const auto mask = Mask::lengths(torch::tensor({7, 3}), 7);
      const auto exact = c.exact(mask);
      const auto what = printed(*c.block);
      expect_both_close(frozen.forward(query, key, value, mask), exact, what);
      expect_both_close(frozen.attend(query, frozen.context(key, value, mask)), exact, what + " with a context");
    }
  }
}

TEST(FrozenBlockTest, EqualsTheBlockInEveryPinnedOrder) {
  torch::manual_seed(2);
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      BlockCase c(CrossAttentionBlockOptions(small_attention()).gate(BlockGate::scalar));
      const auto frozen = c.block->freeze({.plan = PlanMode::pin({logits, values})});
      const auto exact = c.exact();
      const auto what = std::string(name_of(logits)) + ", " + std::string(name_of(values));
      expect_both_close(frozen.forward(c.query, c.key, c.value), exact, what);
      expect_both_close(frozen.attend(c.query, frozen.context(c.key, c.value)), exact, what + " with a context");
    }
  }
}

TEST(FrozenBlockTest, EqualsTheBlockForManyRowsOnOneAndTwoThreads) {
  torch::manual_seed(3);
  BlockCase c(CrossAttentionBlockOptions(small_attention()).feed_forward(200), 3, 310, 90);
  const auto frozen = c.block->freeze();
  const auto exact = c.exact();
  expect_both_close(frozen.forward(c.query, c.key, c.value), exact, "threads");
  const OneThread one_thread;
  expect_both_close(frozen.forward(c.query, c.key, c.value), exact, "one thread");
}

TEST(FrozenBlockTest, TakesUnbatchedAndEmptyInputsAndViews) {
  torch::manual_seed(4);
  BlockCase c{CrossAttentionBlockOptions(small_attention())};
  const auto frozen = c.block->freeze();
  const auto [output, weights] = c.exact();
  expect_both_close(frozen.forward(c.query[1], c.key[1], c.value[1]), {output[1], weights[1]}, "unbatched");
  const auto strided = c.query.transpose(0, 1).contiguous().transpose(0, 1);
  expect_both_close(frozen.forward(at::_neg_view(-strided), c.key, c.value), {output, weights}, "a view");
  const auto empty = frozen.forward(c.query.narrow(1, 0, 0), c.key, c.value);
  EXPECT_EQ(std::get<0>(empty).sizes(), torch::IntArrayRef({2, 0, 24}));
  const auto no_batch = frozen.forward(c.query.narrow(0, 0, 0), c.key.narrow(0, 0, 0), c.value.narrow(0, 0, 0));
  EXPECT_EQ(std::get<0>(no_batch).sizes(), torch::IntArrayRef({0, 5, 24}));
}

TEST(FrozenBlockTest, NormalisesKeysAndValuesOfSelfAttention) {
  torch::manual_seed(5);
  const auto attention = CrossAttentionOptions(24, 24, 24, 24).num_heads(4);
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    BlockCase c(CrossAttentionBlockOptions(attention).norm_context(true).norm_placement(placement));
    c.key = c.value = c.query;
    const auto frozen = c.block->freeze();
    expect_both_close(frozen.forward(c.query, c.query, c.query), c.exact(), "itself");
    const auto copy = c.query.clone();
    expect_both_close(frozen.forward(c.query, copy, copy), c.exact(), "a copy");
    expect_both_close(frozen.attend(c.query, frozen.context(copy, copy)), c.exact(), "a context");
  }
  BlockCase forgetful{CrossAttentionBlockOptions(attention)};
  const auto frozen = forgetful.block->freeze();
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.forward(forgetful.query, forgetful.query, forgetful.query); }),
            "[frozen_block] key must be another tensor than the query, unless norm_context is set, but is the same: a block of "
            "self-attention with norms before normalises keys and values, too.");
}

TEST(FrozenBlockTest, AttendsWithSeveralQueriesToOneContext) {
  torch::manual_seed(6);
  BlockCase c{CrossAttentionBlockOptions(small_attention())};
  const auto beams = torch::randn({6, 5, 24});
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    c.block->to(type);
    const auto frozen = c.block->freeze();
    const auto key = c.key.to(type), value = c.value.to(type), queries = beams.to(type);
    const auto found = frozen.attend(queries, frozen.context(key, value));
    c.query = beams;
    const auto repeated = frozen.forward(queries, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0));
    expect_both_close(found, repeated, "three queries for each context");
  }
}

// A decoder layer, word by word with beams that change places, and all at once.
TEST(FrozenBlockTest, DecodesStepByStepAsAllAtOnce) {
  torch::manual_seed(9);
  const auto attention = CrossAttentionOptions(24, 24, 24, 24).num_heads(4);
  CrossAttentionBlock self_attention(CrossAttentionBlockOptions(attention).norm_context(true).feed_forward(0));
  CrossAttentionBlock cross_attention{CrossAttentionBlockOptions(small_attention())};
  const int64_t beams = 3, words = 10;
  auto x = torch::randn({beams, words, 24});
  const auto key = torch::randn({1, 7, 20}), value = torch::randn({1, 7, 12});
  const auto causal = Mask::causal(CausalAlignment::lower_right);
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    for (auto* block : {&self_attention, &cross_attention}) randomise(**block), (*block)->to(type);
    x = x.to(type);
    const auto own = self_attention->freeze(), cross = cross_attention->freeze();
    const auto memory = cross.context(key.to(type), value.to(type));
    const auto first = x.narrow(1, 0, 1);
    auto past = own.context(first, first, causal, {.expected_queries = words, .capacity = words});
    std::vector<Tensor> outputs;
    for (int64_t i = 0; i < words; ++i) {
      const auto word = x.narrow(1, i, 1);
      if (i > 0) past = past.append(word, word);
      outputs.push_back(std::get<0>(cross.attend(std::get<0>(own.attend(word, past)), memory)));
      if (i != 4) continue;
      const auto order = torch::tensor({2, 0, 0});
      past = past.select(order);
      x = x.index_select(0, order);
      for (auto& output : outputs) output = output.index_select(0, order);
    }
    const auto all = std::get<0>(cross.attend(std::get<0>(own.forward(x, x, x, causal)), memory));
    expect_close(torch::cat(outputs, 1), all, 1e-5, "step by step");
  }
}

TEST(FrozenBlockTest, RecordsNoGradientAndIgnoresAutocastAndLaterTraining) {
  torch::manual_seed(7);
  BlockCase c{CrossAttentionBlockOptions(small_attention()).dropout(0.5)};
  const auto frozen = c.block->freeze();
  const auto exact = c.exact();
  c.block->train();
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : c.block->parameters()) parameter.zero_();
  }
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto result = frozen.forward(c.query, c.key, c.value);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_FALSE(std::get<0>(result).requires_grad());
  expect_both_close(result, exact, "after the module has changed");
}

TEST(FrozenBlockTest, RoundsAllWeightsOnceWithBfloat16Storage) {
  torch::manual_seed(8);
  BlockCase c(CrossAttentionBlockOptions(small_attention()).feed_forward_glu(true), 1, 1, 7);
  const auto plan = PlanMode::standard;
  const auto frozen = c.block->freeze({.plan = plan, .storage = torch::kBFloat16});
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : c.block->named_parameters()) {
      if (item.value().dim() == 2) item.value().copy_(item.value().to(torch::kBFloat16));
    }
  }
  // Queries and results are those of rounded weights; keys and values of the context are rounded too.
  expect_both_close(frozen.forward(c.query, c.key, c.value), c.exact(), "bfloat16", 2e-2);
  const auto full = c.block->freeze({.plan = plan});
  EXPECT_LT(static_cast<double>(frozen.bytes()), 0.6 * static_cast<double>(full.bytes()));
}

TEST(FrozenBlockTest, HoldsItsWeightsOnceUntilACallFolds) {
  const auto attention = CrossAttentionOptions(512, 512, 512, 512).num_heads(8);
  CrossAttentionBlock block{CrossAttentionBlockOptions(attention)};
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    block->to(type);
    int64_t weights = 0;
    for (const auto& parameter : block->parameters()) weights += static_cast<int64_t>(parameter.nbytes());
    const auto frozen = block->freeze();
    EXPECT_GE(frozen.bytes(), weights);
    EXPECT_LT(static_cast<double>(frozen.bytes()), 1.1 * static_cast<double>(weights));
    if (type != torch::kFloat) continue;
    const auto half = block->freeze({.storage = torch::kBFloat16});
    EXPECT_LT(static_cast<double>(half.bytes()), 0.55 * static_cast<double>(weights));

    const auto before = frozen.bytes();
    const auto folding = block->freeze({.plan = PlanMode::pin({Order::fold_into_query, Order::standard})});
    EXPECT_LE(folding.bytes(), before);
    const auto x = torch::randn({1, 1, 512}), context = torch::randn({1, 9, 512});
    folding.forward(x, context, context);
    EXPECT_EQ(folding.bytes(), before + 4 * 512 * 512) << "one more copy of the keys' weight";
    folding.forward(x, context, context);
    EXPECT_EQ(folding.bytes(), before + 4 * 512 * 512);
  }
}

TEST(FrozenMemoryTest, HoldsWeightsOnceAndAPinnedPlanOnlyWhatItReads) {
  CrossAttention attention(CrossAttentionOptions(256, 192, 192, 256).num_heads(4));
  int64_t weights = 0;
  for (const auto& parameter : attention->parameters()) weights += static_cast<int64_t>(parameter.nbytes());
  EXPECT_LT(static_cast<double>(attention->freeze().bytes()), 1.1 * static_cast<double>(weights));
  EXPECT_LT(static_cast<double>(attention->freeze({.storage = torch::kBFloat16}).bytes()), 0.55 * static_cast<double>(weights));
  CrossAttention one_head(64, 48, 48, 256);  // whose products of weights are smaller than their factors
  const auto products = one_head->freeze({.plan = PlanMode::pin({Order::prefold, Order::prefold})});
  EXPECT_LT(products.bytes(), one_head->freeze({.plan = PlanMode::standard}).bytes());
  const auto x = torch::randn({2, 3, 64}), context = torch::randn({2, 5, 48});
  const torch::NoGradGuard no_grad;
  expect_both_close(products.forward(x, context, context), one_head->forward(x, context, context), "products alone");
}

TEST(FrozenBlockTest, NamesWhatIsWrong) {
  BlockCase c{CrossAttentionBlockOptions(small_attention())};
  const auto frozen = c.block->freeze();
  EXPECT_EQ(error_of<c10::ValueError>([&] { FrozenBlock().forward(c.query, c.key, c.value); }),
            "[frozen_block] block must be made by CrossAttentionBlock::freeze, but is empty.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)c.block->freeze({.query = c.query[0]}); }),
            "[frozen_block] query must be left out, because it is added to the output, but is given.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.forward(c.query.narrow(2, 0, 23), c.key, c.value); }),
            "[frozen_block] query must have shape [B, Lq, 24], but has [2, 5, 23].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.forward(c.query.to(torch::kDouble), c.key, c.value); }),
            "[frozen] query must be float32, the type of the parameters, but is float64.");
  const auto other = CrossAttentionBlock(CrossAttentionBlockOptions(small_attention()))->freeze();
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.attend(c.query, other.context(c.key, c.value)); }),
            "[frozen] context must be made by the Frozen that attends to it, but is another's.");
  c.block->to(torch::kDouble);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)c.block->freeze({.storage = torch::kBFloat16}); }),
            "[frozen] storage must be left out where the kernels do not run, but is given: they need float32 on the CPU and no "
            "bias_kv.");
}

// ---- Decoupled layers -------------------------------------------------------------------------------------------------------

struct DecoupledCase {
  explicit DecoupledCase(const CrossAttentionOptions& attention, int64_t B = 2, int64_t Lq = 6)
      : module(DecoupledCrossAttentionOptions(attention).added(
            {AddedContextOptions(10, 14).scale(0.7), AddedContextOptions(20, 20).scale(-1.5).value_bias(false)})),
        query(torch::randn({B, Lq, 24})),
        key(torch::randn({B, 9, 20})),
        value(torch::randn({B, 9, 12})),
        added({{torch::randn({B, 4, 10}), torch::randn({B, 4, 14}), Mask::lengths(torch::full({B}, 3), 4)},
               {torch::randn({B, 0, 20}), torch::randn({B, 0, 20})}}) {
    added[1] = {torch::randn({B, 17, 20}), torch::randn({B, 17, 20})};
    randomise(*module);
    module->eval();
  }

  std::tuple<Tensor, Tensor> exact(const Mask& mask = {}) const {
    const torch::NoGradGuard no_grad;
    auto copy = std::dynamic_pointer_cast<DecoupledCrossAttentionImpl>(module->clone());
    copy->options = module->options;
    copy->to(torch::kDouble);
    const auto wide = [](const Tensor& x) { return x.to(torch::kDouble); };
    std::vector<KeyValue> all;
    for (const auto& each : added) all.push_back({wide(each.key), wide(each.value), each.mask});
    return copy->forward(wide(query), wide(key), wide(value), all, mask);
  }

  std::tuple<Tensor, Tensor> with_contexts(const FrozenDecoupled& frozen, const Mask& mask, const ContextOptions& how) const {
    std::vector<FrozenContext> contexts;
    for (size_t i = 0; i < added.size(); ++i) {
      contexts.push_back(frozen.added_context(i, added[i].key, added[i].value, added[i].mask, how));
    }
    return frozen.attend(query, frozen.context(key, value, mask, how), contexts);
  }

  DecoupledCrossAttention module;
  Tensor query, key, value;
  std::vector<KeyValue> added;
};

TEST(FrozenDecoupledTest, EqualsTheModuleInEveryOrderOnKernelsAndOnOperators) {
  torch::manual_seed(11);
  const auto lengths = Mask::lengths(torch::tensor({0, 5}), 9);
  for (const auto& mask : {Mask(), lengths}) {
    for (const auto logits : kAllOrders) {
      for (const auto values : {Order::standard, Order::fold_into_query}) {
        DecoupledCase c(small_attention());
        const auto exact = c.exact(mask);
        const auto what = std::string(name_of(logits)) + ", " + std::string(name_of(values));
        for (const auto type : {torch::kFloat, torch::kDouble}) {
          c.module->to(type);
          c.query = c.query.to(type), c.key = c.key.to(type), c.value = c.value.to(type);
          for (auto& each : c.added) each.key = each.key.to(type), each.value = each.value.to(type);
          const auto frozen = c.module->freeze({.plan = PlanMode::pin({logits, values})});
          ASSERT_EQ(frozen.uses_kernels(), type == torch::kFloat);
          expect_both_close(frozen.forward(c.query, c.key, c.value, c.added, mask), exact, what);
          expect_both_close(c.with_contexts(frozen, mask, {}), exact, what + " with contexts");
        }
      }
    }
  }
}

TEST(FrozenDecoupledTest, EqualsTheModuleByItsOwnPlansNormsAndThreads) {
  torch::manual_seed(12);
  for (const auto norm : {NormKind::none, NormKind::rms}) {
    DecoupledCase c(small_attention().qk_norm(norm), 3, 230);
    const auto exact = c.exact();
    const auto frozen = c.module->freeze();
    expect_both_close(frozen.forward(c.query, c.key, c.value, c.added), exact, "planned");
    expect_both_close(c.with_contexts(frozen, {}, {.expected_queries = 2}), exact, "contexts for few queries");
    expect_both_close(c.with_contexts(frozen, {}, {}), exact, "contexts for many queries");
    const OneThread one_thread;
    expect_both_close(frozen.forward(c.query, c.key, c.value, c.added), exact, "one thread");
  }
}

TEST(FrozenDecoupledTest, TakesOtherScalesAndSkipsAContextOfScaleZero) {
  torch::manual_seed(13);
  DecoupledCase c(small_attention());
  const auto frozen = c.module->freeze();
  for (const auto& scales : std::vector<std::vector<double>>{{0, 0}, {0.25, 0}, {0, 2}, {1, 1}}) {
    for (size_t i = 0; i < scales.size(); ++i) c.module->options.added()[i].scale(scales[i]);
    const auto scaled = frozen.with_scales(scales);
    EXPECT_EQ(scaled.bytes(), frozen.bytes());
    expect_both_close(scaled.forward(c.query, c.key, c.value, c.added), c.exact(), "other scales");
    expect_both_close(c.with_contexts(scaled, {}, {}), c.exact(), "other scales with contexts");
  }
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)frozen.with_scales({1}); }),
            "[frozen_decoupled] scales must be one for each added context, 2, but are 1.");
}

TEST(FrozenDecoupledTest, SharesTheProjectionsOfQueryAndOutput) {
  DecoupledCrossAttention module(
      DecoupledCrossAttentionOptions(CrossAttentionOptions(320, 768, 768, 320).num_heads(8)).added({{768, 768}}));
  int64_t weights = 0;
  for (const auto& parameter : module->parameters()) weights += static_cast<int64_t>(parameter.nbytes());
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    module->to(type);
    const auto in_type = static_cast<double>(weights) * (type == torch::kDouble ? 2 : 1);
    EXPECT_LT(static_cast<double>(module->freeze().bytes()), 1.1 * in_type);
  }
}

TEST(FrozenDecoupledTest, NamesWhatIsWrong) {
  DecoupledCase c(small_attention());
  const auto frozen = c.module->freeze();
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)FrozenDecoupled().context(c.key, c.value); }),
            "[frozen_decoupled] layer must be made by DecoupledCrossAttention::freeze, but is empty.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.forward(c.query, c.key, c.value, {}); }),
            "[frozen_decoupled] added must have as many contexts as the options, 2, but has 0.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)frozen.added_context(2, c.key, c.value); }),
            "[frozen_decoupled] index must be below the number of added contexts, 2, but is 2.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)frozen.added_context(0, c.key, c.value); }),
            "[frozen_decoupled.added0] key must have shape [B, Lk, 10], but has [2, 9, 20].");
  const auto context = frozen.context(c.key, c.value);
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.attend(c.query, context, {context, context}); }),
            "[frozen_decoupled.added0] context must be made by the layer that attends to it, but is another's.");
  EXPECT_EQ(
      error_of<c10::ValueError>([&] { (void)c.module->freeze({.plan = PlanMode::pin({Order::standard, Order::prefold})}); }),
      "[frozen_decoupled] plan must have an order of the values that ends in heads, standard or fold_into_query, but has "
      "prefold.");
  auto added = c.added;
  added[0].key = added[0].key.narrow(0, 0, 1), added[0].value = added[0].value.narrow(0, 0, 1);
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.forward(c.query, c.key, c.value, added); }),
            "[frozen_decoupled] added[0] must be a batch of 2, as the first context, but is a batch of 1.");
}

// ---- Linear layers ----------------------------------------------------------------------------------------------------------

TEST(FrozenLinearTest, EqualsTheLinearLayerForEveryShape) {
  torch::manual_seed(21);
  const torch::NoGradGuard no_grad;
  for (const bool bias : {true, false}) {
    for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {24, 37}, {384, 1000}, {130, 16}}) {
      torch::nn::Linear linear(torch::nn::LinearOptions(in, out).bias(bias));
      for (const auto type : {torch::kFloat, torch::kDouble}) {
        linear->to(type);
        const FrozenLinear frozen(*linear);
        EXPECT_EQ(frozen.uses_kernels(), type == torch::kFloat);
        EXPECT_EQ(std::pair(frozen.in_features(), frozen.out_features()), std::pair(in, out));
        for (const auto& shape : std::vector<std::vector<int64_t>>{{in}, {1, in}, {3, 50, in}, {0, in}, {2, 1, 4, in}}) {
          const auto x = torch::randn(shape).to(type);
          const auto exact = torch::nn::functional::linear(x.to(torch::kDouble), linear->weight.to(torch::kDouble),
                                                           bias ? linear->bias.to(torch::kDouble) : Tensor());
          expect_close(frozen.forward(x), exact, tolerance(type, in + 1), "linear");
        }
      }
    }
  }
}

TEST(FrozenLinearTest, ReadsRowsOfItsWeightAsAnEmbedding) {
  const auto tokens = torch::tensor({{0, 299, 7}, {64, 63, 0}});
  for (const auto type : {torch::kFloat32, torch::kFloat64}) {  // on the kernels and on LibTorch's operators
    torch::nn::Linear linear(20, 300);
    linear->to(type);
    const FrozenLinear frozen(*linear);
    EXPECT_TRUE(frozen.embedding(tokens).equal(torch::embedding(linear->weight, tokens)));
    EXPECT_TRUE(frozen.embedding(tokens[0][1].to(torch::kInt)).equal(linear->weight[299]));
    EXPECT_EQ(frozen.embedding(tokens.narrow(1, 0, 0)).sizes(), (std::vector<int64_t>{2, 0, 20}));
    EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.embedding(tokens + 1); }),
              "[frozen_linear] indices must lie in [0, 300), but hold 300.");
    EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.embedding(torch::ones({2})); }),
              "[frozen_linear] indices must be of an integer type, but are float32.");
    EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.embedding({}); }),
              "[frozen_linear] indices must be of an integer type, but are undefined.");
    if (!frozen.uses_kernels()) continue;
    const auto rounded = linear->weight.to(torch::kBFloat16).to(torch::kFloat32);
    EXPECT_TRUE(FrozenLinear(*linear, torch::kBFloat16).embedding(tokens).equal(torch::embedding(rounded, tokens)));
  }
}

TEST(FrozenLinearTest, GivesARowTheSameBitsOnAnyNumberOfThreads) {
  torch::manual_seed(22);
  const FrozenLinear frozen(*torch::nn::Linear(200, 5000));
  const auto x = torch::randn({3, 200});
  const auto y = frozen.forward(x);
  const OneThread one_thread;
  EXPECT_TRUE(frozen.forward(x).equal(y));
}

TEST(FrozenLinearTest, StoresBfloat16InHalfTheMemory) {
  torch::manual_seed(23);
  const torch::NoGradGuard no_grad;
  torch::nn::Linear linear(256, 512);
  const FrozenLinear full(*linear), half(*linear, torch::kBFloat16);
  EXPECT_EQ(full.bytes(), 4 * (256 * 512 + 512));
  EXPECT_EQ(half.bytes(), 2 * 256 * 512 + 4 * 512);
  linear->weight.copy_(linear->weight.to(torch::kBFloat16));
  const auto x = torch::randn({2, 256});
  expect_close(half.forward(x), linear->forward(x), tolerance(torch::kFloat, 257), "rounded weights");
}

TEST(FrozenLinearTest, NamesWhatIsWrong) {
  torch::nn::Linear linear(4, 3);
  const FrozenLinear frozen(*linear);
  EXPECT_EQ(error_of<c10::ValueError>([] { (void)FrozenLinear().forward(torch::ones({4})); }),
            "[frozen_linear] layer must be made from a torch::nn::Linear, but is empty.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)frozen.forward(torch::ones({2, 5})); }),
            "[frozen_linear] x must have shape [..., 4], but has [2, 5].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { (void)frozen.forward(torch::ones({2, 4}, torch::kDouble)); }),
            "[frozen_linear] x must be float32, the type of the weight, but is float64.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { FrozenLinear(*linear, torch::kHalf); }),
            "[frozen_linear] storage must be float32 or bfloat16, but is float16.");
}

}  // namespace
}  // namespace xattn::test
