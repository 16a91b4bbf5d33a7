// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen.h>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <thread>

#include "compare.h"
#include "one_thread.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

constexpr Order kAllOrders[] = {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context,
                                Order::prefold_into_context};

// Sizes of which none is a multiple of what vectors hold, with heads that share keys.
struct Layer {
  int64_t H, G, d, e, Eq, Ek, Ev, Eo;
};
constexpr Layer kLayers[] = {{1, 1, 16, 16, 8, 12, 10, 16}, {4, 2, 6, 5, 9, 33, 17, 22}, {8, 8, 40, 40, 70, 48, 48, 70}};

CrossAttention make(const Layer& l, bool biases = true) {
  CrossAttention module(CrossAttentionOptions(l.Eq, l.Ek, l.Ev, l.Eo)
                            .num_heads(l.H)
                            .kv_heads(l.G)
                            .head_dim(l.d)
                            .value_head_dim(l.e)
                            .qkv_bias(biases)
                            .output_bias(biases)
                            .attention_weights(AttentionWeights::per_head));
  return module;
}

struct Inputs {
  Tensor query, key, value;
};
Inputs inputs_of(const Layer& l, int64_t B, int64_t Lq, int64_t Lk) {
  return {torch::randn({B, Lq, l.Eq}), torch::randn({B, Lk, l.Ek}), torch::randn({B, Lk, l.Ev})};
}

// The definition in float64, with the weights of a float32 module.
std::tuple<Tensor, Tensor> exact(const CrossAttention& module, const Inputs& x, const Mask& mask) {
  auto wide = std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone());
  wide->options.plan(PlanMode::standard);
  wide->to(torch::kDouble);
  wide->eval();
  const torch::NoGradGuard no_grad;
  return wide->forward(x.query.to(torch::kDouble), x.key.to(torch::kDouble), x.value.to(torch::kDouble), mask);
}

double allowed(const Layer& l) {
  return tolerance(torch::kFloat, l.Eq + l.Ek + l.Ev + l.H * (l.d + l.e));
}

class FrozenTest : public testing::Test {
 protected:
  FrozenTest() { torch::manual_seed(0); }

  template <class F>
  void for_each_pair(const F& check) {
    for (const auto logits : kAllOrders) {
      for (const auto values : kAllOrders) {
        SCOPED_TRACE(std::string(name_of(logits)) + ", " + std::string(name_of(values)));
        check(Orders{logits, values});
      }
    }
  }
};

std::vector<std::pair<std::string, Mask>> masks(int64_t B, int64_t H, int64_t Lq, int64_t Lk) {
  const auto lengths = torch::randint(1, Lk + 1, {B});
  auto with_empty = lengths.clone();
  with_empty[0] = 0;
  const auto some = torch::rand({B, H, Lq, Lk}) < 0.6;
  return {{"none", {}},
          {"lengths", Mask::lengths(lengths, Lk)},
          {"lengths of which one is 0", Mask::lengths(with_empty, Lk)},
          {"key padding", Mask::key_padding(torch::rand({B, Lk}) < 0.7)},
          {"dense over queries", Mask::dense(torch::rand({Lq, Lk}) < 0.5)},
          {"dense over all", Mask::dense(some)},
          {"bias", Mask::bias(torch::randn({1, H, Lq, Lk}))},
          {"causal and lengths", Mask::causal(CausalAlignment::upper_left) & Mask::lengths(lengths, Lk)},
          {"bias of a key and lengths", Mask::bias(torch::randn({B, 1, 1, Lk})) & Mask::lengths(with_empty, Lk)}};
}

TEST_F(FrozenTest, EqualsTheDefinitionInEveryOrderWithEveryMask) {
  for (const auto& layer : kLayers) {
    for (const bool biases : {true, false}) {
      auto module = make(layer, biases);
      const auto x = inputs_of(layer, 3, 5, 37);
      for (const auto& [name, mask] : masks(3, layer.H, 5, 37)) {
        SCOPED_TRACE(name);
        const auto [output, weights] = exact(module, x, mask);
        for_each_pair([&](const Orders& orders) {
          const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
          ASSERT_TRUE(frozen.uses_kernels());
          const auto [y, p] = frozen.forward(x.query, x.key, x.value, mask);
          expect_close(y, output, allowed(layer), "output");
          expect_close(p, weights, allowed(layer), "weights");
        });
      }
    }
  }
}

TEST_F(FrozenTest, EqualsTheDefinitionAtManyLengths) {
  const auto& layer = kLayers[2];
  auto module = make(layer);
  for (const int64_t B : {1, 2, 5}) {
    for (const int64_t Lq : {0, 1, 2, 13, 60, 300}) {
      for (const int64_t Lk : {0, 1, 4, 33, 77, 500}) {
        SCOPED_TRACE(std::to_string(B) + " x " + std::to_string(Lq) + " queries, " + std::to_string(Lk) + " keys");
        const auto x = inputs_of(layer, B, Lq, Lk);
        const auto [output, weights] = exact(module, x, {});
        for (const auto& plan :
             {PlanMode::automatic, PlanMode::standard, PlanMode::pin({Order::fold_into_query, Order::prefold}),
              PlanMode::pin({Order::fold_into_context, Order::prefold_into_context})}) {
          const auto [y, p] = module->freeze({.plan = plan}).forward(x.query, x.key, x.value);
          expect_close(y, output, allowed(layer), "output");
          expect_close(p, weights, allowed(layer), "weights");
        }
      }
    }
  }
}

TEST_F(FrozenTest, OneThreadAndSeveralGiveEqualBits) {
  const auto& layer = kLayers[2];
  auto module = make(layer);
  const auto threads = at::get_num_threads();
  for (const int64_t Lq : {1, 3, 40}) {
    const auto x = inputs_of(layer, 2, Lq, 77);
    for_each_pair([&](const Orders& orders) {
      const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
      at::set_num_threads(1);
      const auto [y1, p1] = frozen.forward(x.query, x.key, x.value);
      at::set_num_threads(2);
      const auto [y2, p2] = frozen.forward(x.query, x.key, x.value);
      at::set_num_threads(threads);
      EXPECT_TRUE(torch::equal(y1, y2)) << Lq;
      EXPECT_TRUE(torch::equal(p1, p2)) << Lq;
    });
  }
}

TEST_F(FrozenTest, AConstantQueryIsFoldedAndGivesWhatAGivenOneDoes) {
  for (const auto& layer : kLayers) {
    auto module = make(layer);
    auto x = inputs_of(layer, 3, 4, 50);
    x.query = x.query.narrow(0, 0, 1).expand({3, -1, -1});
    const auto [output, weights] = exact(module, x, {});
    for_each_pair([&](const Orders& orders) {
      const auto frozen = module->freeze({.query = x.query[0], .plan = PlanMode::pin(orders)});
      const auto [y, p] = frozen.forward(x.key, x.value);
      expect_close(y, output, allowed(layer), "output");
      expect_close(p, weights, allowed(layer), "weights");
      expect_close(std::get<0>(frozen.attend(frozen.context(x.key, x.value))), output, allowed(layer), "attend");
    });
  }
}

TEST_F(FrozenTest, ChosenHeadsAndTheirMeanAreThoseOfAllHeads) {
  const auto& layer = kLayers[1];
  auto module = make(layer);
  const auto x = inputs_of(layer, 2, 5, 21);
  const auto all = std::get<1>(exact(module, x, {}));
  for (const int64_t Lq : {5, 1}) {  // one query row takes the path of many threads
    const Inputs few = {x.query.narrow(1, 0, Lq), x.key, x.value};
    for_each_pair([&](const Orders& orders) {
      module->options.attention_weights(AttentionWeights::per_head).weight_heads({3, 1});
      const auto chosen = std::get<1>(module->freeze({.plan = PlanMode::pin(orders)}).forward(few.query, few.key, few.value));
      expect_close(chosen, all.narrow(2, 0, Lq).index_select(1, torch::tensor({3, 1})), allowed(layer), "chosen heads");
      module->options.attention_weights(AttentionWeights::mean).weight_heads({});
      const auto mean = std::get<1>(module->freeze({.plan = PlanMode::pin(orders)}).forward(few.query, few.key, few.value));
      expect_close(mean, all.narrow(2, 0, Lq).mean(1), allowed(layer), "mean");
    });
  }
}

TEST_F(FrozenTest, Bfloat16StorageRoundsWeightsAndNothingElse) {
  const auto& layer = kLayers[2];
  auto module = make(layer);
  {
    const torch::NoGradGuard no_grad;  // weights that bfloat16 holds exactly
    for (auto& parameter : module->parameters()) {
      if (parameter.dim() == 2) parameter.copy_(parameter.to(torch::kBFloat16));
    }
  }
  const auto x = inputs_of(layer, 2, 5, 77);
  const auto [output, weights] = exact(module, x, {});
  for (const auto order : {Order::fold_into_query, Order::standard, Order::fold_into_context}) {
    const auto frozen = module->freeze({.plan = PlanMode::pin({order, order}), .storage = torch::kBFloat16});
    const auto [y, p] = frozen.forward(x.query, x.key, x.value);
    // Raw contexts are not rounded; projected and folded ones are, to 8 bits.
    const bool raw = order == Order::fold_into_query;
    expect_close(y, output, raw ? allowed(layer) : tolerance(torch::kBFloat16, 1), "output");
    expect_close(p, weights, raw ? allowed(layer) : tolerance(torch::kBFloat16, 1), "weights");
    const auto context = frozen.context(x.key, x.value);
    EXPECT_LE(context.bytes(), module->freeze({.plan = PlanMode::pin({order, order})}).context(x.key, x.value).bytes());
  }
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->freeze({.storage = torch::kHalf}); }),
            "[frozen] storage must be float32 or bfloat16, but is float16.");
}

TEST_F(FrozenTest, AContextServesBeamsSlicesAndBatches) {
  const auto& layer = kLayers[1];
  auto module = make(layer);
  const int64_t B = 3, n = 2, Lq = 4, Lk = 21;
  const auto x = inputs_of(layer, B, Lq, Lk);
  const auto beams = torch::randn({B * n, Lq, layer.Eq});
  const auto mask = Mask::lengths(torch::tensor({21, 0, 9}), Lk) & Mask::causal(CausalAlignment::lower_right);
  const auto repeated = [&](const Tensor& t) { return t.repeat_interleave(n, 0); };
  const auto [output, weights] =
      exact(module, {beams, repeated(x.key), repeated(x.value)},
            Mask::lengths(torch::tensor({21, 21, 0, 0, 9, 9}), Lk) & Mask::causal(CausalAlignment::lower_right));
  for_each_pair([&](const Orders& orders) {
    for (const auto type : {torch::kFloat, torch::kDouble}) {
      auto typed = std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone());
      typed->to(type);
      const auto frozen = typed->freeze({.plan = PlanMode::pin(orders)});
      EXPECT_EQ(frozen.uses_kernels(), type == torch::kFloat);
      const auto context = frozen.context(x.key.to(type), x.value.to(type), mask);
      const auto [y, p] = frozen.attend(beams.to(type), context);
      expect_close(y, output, allowed(layer), "beams");
      expect_close(p, weights, allowed(layer), "weights of beams");

      const auto last = context.slice(1, 3);
      const auto [y_last, p_last] = frozen.attend(beams.narrow(0, n, 2 * n).to(type), last);
      expect_close(y_last, output.narrow(0, n, 2 * n), allowed(layer), "slice");
      const auto joined = FrozenContext::cat({context.slice(0, 1), last});
      EXPECT_EQ(joined.batch_size(), B);
      expect_close(std::get<0>(frozen.attend(beams.to(type), joined)), output, allowed(layer), "cat");
    }
  });
}

TEST_F(FrozenTest, AContextMovesBetweenDevicesAndIsAskedForWhereTheWeightsAre) {
  const auto& layer = kLayers[0];
  const auto frozen = make(layer)->freeze();
  const auto x = inputs_of(layer, 2, 3, 5);
  const auto context = frozen.context(x.key, x.value, Mask::lengths(torch::tensor({5, 2}), 5));
  const auto expected = std::get<0>(frozen.attend(x.query, context));
  for (const auto& device : devices()) {
    const auto moved = context.to(device);
    EXPECT_EQ(moved.bytes(), context.bytes());
    EXPECT_TRUE(torch::equal(std::get<0>(frozen.attend(x.query, moved.to(torch::kCPU))), expected));
  }
  EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.attend(x.query, context.to(torch::kMeta)); }),
            "[frozen] context must be on cpu, as the weights, but is on meta.");
}

TEST_F(FrozenTest, KeysBehindHostLengthsAreNeverRead) {
  for (const auto& layer : {kLayers[0], kLayers[1]}) {
    auto module = make(layer);
    const auto x = inputs_of(layer, 2, 3, 9);
    const auto mask = Mask::lengths(torch::tensor({4, 2}), 9);
    const auto [output, weights] = exact(module, x, mask);
    const auto spoilt = [](const Tensor& t) {
      auto copy = t.clone();
      copy.narrow(1, 4, 5).fill_(std::numeric_limits<float>::quiet_NaN());
      return copy;
    };
    const auto key = spoilt(x.key), value = spoilt(x.value);
    const auto [y, p] = module->forward(x.query, key, value, mask);
    expect_close(y, output, allowed(layer), "module");
    expect_close(p, weights, allowed(layer), "weights");
    const auto [y_frozen, p_frozen] = module->freeze().forward(x.query, key, value, mask);
    expect_close(y_frozen, output, allowed(layer), "frozen");
    expect_close(p_frozen, weights, allowed(layer), "weights of frozen");
  }
}

TEST_F(FrozenTest, ThreadsShareOneAndItsContextAndGetTheSameBits) {
  const OneThread one_thread;
  const auto& layer = kLayers[2];
  auto module = make(layer);
  const auto x = inputs_of(layer, 2, 9, 77);
  const auto frozen = module->freeze();
  const auto context = frozen.context(x.key, x.value);
  const auto expected = std::get<0>(frozen.attend(x.query, context));
  std::vector<std::thread> threads;
  std::vector<Tensor> results(4);
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) result = std::get<0>(frozen.attend(x.query, context));
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_TRUE(torch::equal(result, expected));
}

TEST_F(FrozenTest, AFrozenCopyDoesNotFollowTheModule) {
  auto module = make(kLayers[0]);
  const auto x = inputs_of(kLayers[0], 1, 2, 3);
  const auto frozen = module->freeze();
  const auto before = std::get<0>(frozen.forward(x.query, x.key, x.value));
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : module->parameters()) parameter.zero_();
  }
  EXPECT_TRUE(torch::equal(std::get<0>(frozen.forward(x.query, x.key, x.value)), before));
  EXPECT_FALSE(before.requires_grad());
  EXPECT_FALSE(before.is_inference());
}

TEST_F(FrozenTest, WhatTheKernelsCannotDoRunsOnOperators) {
  CrossAttention module(CrossAttentionOptions(8, 12, 10, 16).num_heads(4).bias_kv(true));
  const Inputs x = {torch::randn({2, 3, 8}), torch::randn({2, 5, 12}), torch::randn({2, 5, 10})};
  const auto frozen = module->freeze();
  EXPECT_FALSE(frozen.uses_kernels());
  const auto mask = Mask::lengths(torch::tensor({5, 2}), 5);
  const auto [output, weights] = exact(module, x, mask);
  const auto [y, p] = frozen.forward(x.query, x.key, x.value, mask);
  expect_close(y, output, 1e-5, "output");
  expect_close(p, weights, 1e-5, "weights");
}

TEST_F(FrozenTest, NormsRunOnTheKernelsInEveryOrderTheyAllow) {
  for (const auto kind : {NormKind::rms, NormKind::layer}) {
    for (const auto scope : {NormScope::per_head, NormScope::across_heads}) {
      CrossAttention module(CrossAttentionOptions(9, 33, 17, 22)
                                .num_heads(4)
                                .kv_heads(2)
                                .head_dim(6)
                                .value_head_dim(5)
                                .qk_norm(kind)
                                .qk_norm_scope(scope)
                                .attention_weights(AttentionWeights::per_head));
      const torch::NoGradGuard no_grad;
      for (auto& parameter : module->parameters()) parameter.uniform_(-1, 1);  // norms start as ones and zeros
      const Inputs x = {torch::randn({2, 40, 9}), torch::randn({2, 21, 33}), torch::randn({2, 21, 17})};
      const auto mask = Mask::lengths(torch::tensor({21, 4}), 21);
      const auto [output, weights] = exact(module, x, mask);
      for (const auto values : kAllOrders) {
        const auto frozen = module->freeze({.plan = PlanMode::pin({Order::standard, values})});
        EXPECT_TRUE(frozen.uses_kernels());
        const auto [y, p] = frozen.forward(x.query, x.key, x.value, mask);
        expect_close(y, output, 2e-5, "output");
        expect_close(p, weights, 2e-5, "weights");
      }
    }
  }
}

TEST_F(FrozenTest, AnnouncedRowsChooseTheFormOfAContext) {
  CrossAttention module(CrossAttentionOptions(256, 256, 256, 256).num_heads(4));
  const auto frozen = module->freeze();
  const auto key = torch::randn({1, 500, 256});
  EXPECT_EQ(frozen.context(key, key, {}, {.expected_queries = 1}).orders(),
            (Orders{Order::fold_into_query, Order::fold_into_query}));
  EXPECT_EQ(frozen.context(key, key).orders(), Orders{});
  const auto few = torch::randn({1, 4, 256});
  EXPECT_EQ(frozen.context(few, few, {}, {.expected_queries = 4096}).orders(),
            (Orders{Order::fold_into_context, Order::fold_into_context}));
}

TEST_F(FrozenTest, RefusesBadInputByName) {
  auto module = make(kLayers[0]);
  const auto frozen = module->freeze(), other = module->freeze();
  const auto x = inputs_of(kLayers[0], 2, 3, 5);
  const auto context = frozen.context(x.key, x.value);
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.attend(torch::randn({3, 3, 8}), context); }),
            "[frozen] query must have shape [2, Lq, 8] to match its context, but has [3, 3, 8].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { other.attend(x.query, context); }),
            "[frozen] context must be made by the Frozen that attends to it, but is another's.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.forward(x.key, x.value); }),
            "[frozen] query must be given to freeze or to forward, but is given to neither.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { module->freeze({.query = torch::randn({3, 9})}); }),
            "[frozen] query must have shape [Lq, 8], but has [3, 9].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { frozen.context(x.key, x.value, {}, {.expected_queries = -7}); }),
            "[frozen] expected_queries must not be negative, but is -7.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { context.slice(1, 3); }), "[frozen] slice must lie in [0, 2], but is [1, 3).");
}

}  // namespace
}  // namespace xattn::test
