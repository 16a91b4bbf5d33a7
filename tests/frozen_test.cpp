// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/frozen_linear.h>

#include "attention/mask_parts.h"
#include "compare.h"
#include "one_thread.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

// Sizes that are not multiples of a vector's, with heads that share keys.
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

// Results of a call, and of a context that is kept. An undefined query stands for the constant one.
std::vector<Tensor> results_of(const Frozen& frozen, const Inputs& x, const Mask& mask = {}) {
  const bool given = x.query.defined();
  const auto context = frozen.context(x.key, x.value, mask);
  const auto [output, weights] = given ? frozen.forward(x.query, x.key, x.value, mask) : frozen.forward(x.key, x.value, mask);
  const auto [again, its_weights] = given ? frozen.attend(x.query, context) : frozen.attend(context);
  return {output, weights, again, its_weights};
}

// Expects `results_of` to have the same bits with any number of threads as with one.
void expect_equal_bits_with_more_threads(const Frozen& frozen, const Inputs& x, const Mask& mask = {}) {
  const OneThread one_thread;
  const auto expected = results_of(frozen, x, mask);
  for (const int threads : {2, 3, 8}) {
    at::set_num_threads(threads);
    const auto results = results_of(frozen, x, mask);
    for (size_t i = 0; i < results.size(); ++i) {
      ASSERT_EQ(results[i].defined(), expected[i].defined());
      if (!results[i].defined()) continue;
      EXPECT_TRUE(results[i].equal(expected[i])) << x.key.sizes() << ", " << threads << " threads, result " << i;
    }
  }
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
          {"dense over batch and queries", Mask::dense(torch::rand({B, 1, Lq, Lk}) < 0.5)},
          {"dense over all", Mask::dense(some)},
          {"bias", Mask::bias(torch::randn({1, H, Lq, Lk}))},
          {"causal", Mask::causal(CausalAlignment::lower_right)},
          {"causal and lengths", Mask::causal(CausalAlignment::upper_left) & Mask::lengths(lengths, Lk)},
          {"causal and bias", Mask::causal(CausalAlignment::lower_right) & Mask::bias(torch::randn({B, H, Lq, Lk}))},
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
        for_each_pair([&, &mask = mask, &output = output, &weights = weights](const Orders& orders) {
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
              PlanMode::pin({Order::fold_into_context, Order::fold_into_context})}) {
          const auto [y, p] = module->freeze({.plan = plan}).forward(x.query, x.key, x.value);
          expect_close(y, output, allowed(layer), "output");
          expect_close(p, weights, allowed(layer), "weights");
        }
      }
    }
  }
}

TEST_F(FrozenTest, OneThreadAndSeveralGiveEqualBits) {
  // With few batch entries for the threads, or many operations (40 rows for 3 entries), all threads share each entry; otherwise
  // each thread computes whole entries.
  const auto& layer = kLayers[2];
  auto module = make(layer);
  for (const int64_t B : {1, 3}) {
    for (const int64_t Lq : {1, 3, 40}) {
      const auto x = inputs_of(layer, B, Lq, 77);
      for_each_pair([&](const Orders& orders) {
        expect_equal_bits_with_more_threads(module->freeze({.plan = PlanMode::pin(orders)}), x);
      });
    }
  }
}

TEST_F(FrozenTest, OneThreadAndSeveralGiveEqualBitsOnShortContexts) {  // of fewer panels than threads, which share each
  for (const auto& layer : {Layer{2, 2, 64, 64, 256, 256, 300, 256}, Layer{4, 2, 40, 72, 256, 300, 256, 80}}) {
    auto module = make(layer);
    for (const int64_t Lk : {1, 16, 40}) {
      for (const auto order : {Order::standard, Order::fold_into_context}) {
        const auto frozen = module->freeze({.plan = PlanMode::pin({order, order})});
        const auto x = inputs_of(layer, 1, 3, Lk);
        expect_equal_bits_with_more_threads(frozen, x);
        const auto [expected, weights] = exact(module, x, {});
        expect_close(std::get<0>(frozen.forward(x.query, x.key, x.value)), expected, allowed(layer), "output");
      }
    }
  }
}

TEST_F(FrozenTest, OneThreadAndSeveralGiveEqualBitsWithEveryMaskStorageAndRequest) {
  const auto& layer = kLayers[1];
  auto module = make(layer);
  for (const int64_t B : {1, 3}) {
    auto x = inputs_of(layer, B, 5, 37);
    const auto every_mask = masks(B, layer.H, 5, 37);
    for (const auto order : kAllOrders) {
      const auto plan = PlanMode::pin({order, order});
      for (const auto storage : {torch::kFloat, torch::kBFloat16}) {
        SCOPED_TRACE(std::string(name_of(order)) + " in " + c10::toString(storage));
        const auto frozen = module->freeze({.plan = plan, .storage = storage});
        for (const auto& [name, mask] : every_mask) {
          SCOPED_TRACE(name);
          expect_equal_bits_with_more_threads(frozen, x, mask);
        }
      }
      const auto constant = module->freeze({.query = x.query[0], .plan = plan});
      expect_equal_bits_with_more_threads(constant, {{}, x.key, x.value}, every_mask[1].second);
    }
  }
}

TEST_F(FrozenTest, OneThreadAndSeveralGiveEqualBitsOnALongContext) {
  const auto& layer = kLayers[1];
  auto module = make(layer);
  for (const auto wanted : {AttentionWeights::none, AttentionWeights::mean}) {  // in parts, or not
    module->options.attention_weights(wanted);
    const auto frozen = module->freeze({.plan = PlanMode::standard});
    for (const int64_t Lq : {1, 30}) {
      expect_equal_bits_with_more_threads(frozen, inputs_of(layer, 1, Lq, 5000));
      expect_equal_bits_with_more_threads(frozen, inputs_of(layer, 3, Lq, 5000),
                                          Mask::lengths(torch::tensor({5000, 0, 1500}), 5000));
    }
  }
}

TEST_F(FrozenTest, EqualsTheDefinitionUnderCausalMasksWithEqualBitsForAnyThreads) {
  const auto& layer = kLayers[1];
  auto module = make(layer);
  const int64_t B = 2;
  for (const auto& [Lq, Lk] : {std::pair<int64_t, int64_t>(130, 250), {250, 130}, {7, 300}, {60, 5000}}) {
    const auto x = inputs_of(layer, B, Lq, Lk);
    for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
      const auto causal = Mask::causal(alignment);
      for (const auto& mask : {causal, causal & Mask::lengths(torch::tensor({Lk / 2, Lk}), Lk),
                               causal & Mask::key_padding(torch::rand({B, Lk}) < 0.7)}) {
        for (const auto wanted : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
          module->options.attention_weights(wanted);
          const auto [output, weights] = exact(module, x, mask);
          for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
            SCOPED_TRACE(std::to_string(Lq) + " queries, " + std::to_string(Lk) + " keys, " + std::string(name_of(order)));
            const auto frozen = module->freeze({.plan = PlanMode::pin({order, order})});
            const auto [y, p] = frozen.forward(x.query, x.key, x.value, mask);
            expect_close(y, output, allowed(layer) + tolerance(torch::kFloat, Lk), "output");
            expect_close(p, weights, allowed(layer) + tolerance(torch::kFloat, Lk), "weights");
            if (order == Order::standard) expect_equal_bits_with_more_threads(frozen, x, mask);
          }
        }
      }
    }
  }
}

TEST_F(FrozenTest, ABatchEntryHasTheBitsThatItHasAlone) {
  const auto& layer = kLayers[1];
  const int64_t B = 3, Lq = 5, Lk = 37;
  auto module = make(layer);
  const auto x = inputs_of(layer, B, Lq, Lk);
  for (const auto& [name, mask] : masks(B, layer.H, Lq, Lk)) {
    SCOPED_TRACE(name);
    for_each_pair([&, &mask = mask](const Orders& orders) {
      const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
      const auto all = results_of(frozen, x, mask);
      for (int64_t b = 0; b < B; ++b) {
        const auto entry = [b](const Tensor& t) { return t.narrow(0, b, 1); };
        const auto alone = results_of(frozen, {entry(x.query), entry(x.key), entry(x.value)}, mask.slice(b, b + 1));
        for (size_t i = 0; i < alone.size(); ++i) EXPECT_TRUE(alone[i].equal(entry(all[i]))) << b << ", result " << i;
      }
    });
  }
}

TEST_F(FrozenTest, TheOutputIsTheSameWhateverWeightsAreWanted) {
  using W = AttentionWeights;
  const auto& layer = kLayers[1];
  auto module = make(layer);
  const std::vector<int64_t> chosen = {3, 1};
  for (const int64_t Lk : {77, 5000}) {
    auto valid = torch::ones({3, Lk}, torch::kBool);  // masks whole parts of the long context; or all of it
    valid[0].narrow(0, 0, Lk / 2).fill_(false);
    valid[1].narrow(0, Lk / 3, Lk / 2).fill_(false);
    valid[2].fill_(false);
    const std::vector<std::pair<std::string, Mask>> all_masks = {
        {"none", {}},
        {"lengths", Mask::lengths(torch::tensor({Lk / 4, Lk / 2, Lk}), Lk)},
        {"padding", Mask::key_padding(valid)}};
    for (const int64_t Lq : {1, 20}) {
      const auto x = inputs_of(layer, 3, Lq, Lk);
      for (const auto& [name, mask] : all_masks) {
        SCOPED_TRACE(name + ", " + std::to_string(Lq) + " queries, " + std::to_string(Lk) + " keys");
        module->options.attention_weights(W::per_head).weight_heads({});
        const auto [output, weights] = exact(module, x, mask);
        const std::vector<std::tuple<W, std::vector<int64_t>, Tensor>> wishes = {
            {W::none, {}, {}},
            {W::mean, {}, weights.mean(1)},
            {W::per_head, {}, weights},
            {W::per_head, chosen, weights.index_select(1, torch::tensor(chosen))}};
        for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
          for (const auto& [wanted, heads, expected] : wishes) {
            module->options.attention_weights(wanted).weight_heads(heads);
            const auto results = results_of(module->freeze({.plan = PlanMode::pin({order, order})}), x, mask);
            for (const size_t i : {0, 2}) {
              expect_close(results[i], output, allowed(layer), "output");
              expect_close(results[i + 1], expected, allowed(layer), "weights");
            }
          }
        }
      }
    }
  }
}

TEST_F(FrozenTest, AConstantQueryIsFoldedAndGivesWhatAGivenOneDoes) {
  for (const auto& layer : kLayers) {
    auto module = make(layer);
    auto x = inputs_of(layer, 3, 4, 50);
    x.query = x.query.narrow(0, 0, 1).expand({3, -1, -1});
    const auto [output, weights] = exact(module, x, {});
    for_each_pair([&, &output = output, &weights = weights](const Orders& orders) {
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
    const auto bound = raw ? allowed(layer) : tolerance(torch::kBFloat16, 1);
    expect_close(y, output, bound, "output");
    expect_close(p, weights, bound, "weights");
    const auto context = frozen.context(x.key, x.value);
    const auto [z, q] = frozen.attend(x.query, context);
    expect_close(z, output, bound, "output from a context");
    expect_close(q, weights, bound, "weights from a context");
    const auto in_float = module->freeze({.plan = PlanMode::pin({order, order})}).context(x.key, x.value).bytes();
    const auto key_bias = order == Order::fold_into_context ? 4 * 2 * layer.H * 77 : 0;  // of folded keys: not rounded
    EXPECT_EQ(context.bytes(), raw ? in_float : (in_float + key_bias) / 2);
  }
  EXPECT_EQ(error_of<c10::ValueError>([&] { return module->freeze({.storage = torch::kHalf}); }),
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
  for_each_pair([&, &output = output, &weights = weights](const Orders& orders) {
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

TEST_F(FrozenTest, AConstantQueryIsHeldOnce) {
  auto module = make(kLayers[0]);
  const auto x = inputs_of(kLayers[0], 1, 4, 5);
  for (const auto order : {Order::standard, Order::fold_into_context}) {  // the second reads the query as it is
    const FreezeOptions how{.plan = PlanMode::pin({order, Order::standard})};
    auto with_query = how;
    with_query.query = x.query[0];
    const auto more = module->freeze(with_query).bytes() - module->freeze(how).bytes();
    const auto folded = order == Order::standard ? 4 * module->query_linear->weight.size(0) * 4 : 0;
    EXPECT_EQ(more, static_cast<int64_t>(x.query.nbytes()) + folded) << name_of(order);
  }
}

TEST_F(FrozenTest, TheMaskOfAContextIncludesItsLengths) {
  auto module = make(kLayers[0]);
  const auto x = inputs_of(kLayers[0], 2, 3, 9);
  const auto context = module->freeze().context(x.key, x.value, Mask::lengths(torch::tensor({4, 2}), 9));
  EXPECT_EQ(detail::host_lengths(context.mask()), (std::vector<int64_t>{4, 2}));
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

TEST_F(FrozenTest, AContextOfNoKeysGivesTheBiasOfTheOutput) {
  for (const auto& layer : {kLayers[0], kLayers[1]}) {
    const int64_t B = 2, Lq = 3, Lk = 0;
    auto module = make(layer);
    const auto x = inputs_of(layer, B, Lq, Lk);
    const auto expected = module->output_linear->bias.expand({B, Lq, layer.Eo});
    const std::vector<std::pair<std::string, Mask>> all_masks = {
        {"none", {}},
        {"bias", Mask::bias(torch::zeros({B, layer.H, Lq, Lk}))},
        {"bias of a key", Mask::bias(torch::zeros({1, 1, 1, Lk}))},
        {"dense", Mask::dense(torch::ones({Lq, Lk}, torch::kBool))},
        {"lengths", Mask::lengths(torch::zeros({B}, torch::kLong), Lk)}};
    for (const auto& [name, mask] : all_masks) {
      SCOPED_TRACE(name);
      for_each_pair([&, &mask = mask](const Orders& orders) {
        const auto results = results_of(module->freeze({.plan = PlanMode::pin(orders)}), x, mask);
        for (const size_t i : {0, 2}) {
          EXPECT_TRUE(results[i].equal(expected));
          EXPECT_EQ(results[i + 1].sizes(), (std::vector<int64_t>{B, layer.H, Lq, Lk}));
        }
      });
    }
  }
}

TEST_F(FrozenTest, AContextDoesNotFollowTheTensorsItWasMadeOf) {
  const auto& layer = kLayers[1];
  for (const auto type : {torch::kFloat, torch::kDouble}) {  // on kernels, and on operators
    auto module = make(layer);
    module->to(type);
    const auto given = inputs_of(layer, 2, 3, 21);
    const auto query = given.query.to(type);
    for (const auto rows : {int64_t{1}, ContextOptions::kMany}) {
      for_each_pair([&](const Orders& orders) {
        const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
        auto key = given.key.to(type, /*non_blocking=*/false, /*copy=*/true);
        auto value = given.value.to(type, /*non_blocking=*/false, /*copy=*/true);
        const auto context = frozen.context(key, value, {}, {.expected_queries = rows});
        const auto before = std::get<0>(frozen.attend(query, context));
        key.zero_();
        value.zero_();
        EXPECT_TRUE(std::get<0>(frozen.attend(query, context)).equal(before)) << type << ", " << rows;
      });
    }
  }
}

// For the rows of one task, keys are packed as they are read; for many rows, beforehand. The products are the same, and so are
// the bits. For a few rows keys are not packed at all.
TEST_F(FrozenTest, AContextThatStaysAsItCameGivesTheSameHoweverItIsLaidOut) {
  const Layer& l = kLayers[1];
  for (const auto order : {Order::fold_into_query, Order::prefold}) {
    auto module = make(l);
    module->options.plan(PlanMode::pin({order, order}));
    const auto frozen = module->freeze();
    for (const int64_t Lk : {1, 31, 77, 300}) {
      const auto x = inputs_of(l, 2, 9, Lk);  // 36 rows of heads
      const auto [expected, expected_weights] = exact(module, x, {});
      const auto of = [&](int64_t rows) {
        return frozen.attend(x.query, frozen.context(x.key, x.value, {}, {.expected_queries = rows}));
      };
      const auto [few, few_weights] = of(6);
      const auto [some, some_weights] = of(9);
      const auto [many, many_weights] = of(ContextOptions::kMany);
      expect_close(few, expected, allowed(l), "few");
      expect_close(few_weights, expected_weights, allowed(l), "few weights");
      expect_close(some, expected, allowed(l), "some");
      expect_close(some_weights, expected_weights, allowed(l), "some weights");
      EXPECT_TRUE(torch::equal(some, many) && torch::equal(some_weights, many_weights)) << Lk << " keys";
    }
  }
}

// A context of several megabytes and few query rows: both chains read it block by block. All biases; rows may be empty.
TEST_F(FrozenTest, ALargeContextWhoseValuesAreItsKeysIsReadOnceAndGivesTheSame) {
  const Layer l{4, 2, 6, 5, 9, 600, 600, 22};
  const int64_t B = 2, Lq = 3, Lk = 1000;
  auto module = make(l);
  auto x = inputs_of(l, B, Lq, Lk);
  x.value = x.key;
  for (const auto order : {Order::fold_into_query, Order::prefold}) {
    module->options.plan(PlanMode::pin({order, order}));
    const auto frozen = module->freeze();
    for (const auto& [name, mask] : masks(B, l.H, Lq, Lk)) {
      SCOPED_TRACE(name);
      const auto [output, weights] = exact(module, x, mask);
      const auto [y, p] = frozen.forward(x.query, x.key, x.value, mask);
      expect_close(y, output, allowed(l), "output");
      expect_close(p, weights, allowed(l), "weights");
      expect_equal_bits_with_more_threads(frozen, x, mask);
    }
  }
}

TEST_F(FrozenTest, OneTensorAsKeyAndValueIsKeptOnce) {
  CrossAttention module(CrossAttentionOptions(8, 12, 12, 16).num_heads(2));
  const auto key = torch::randn({2, 21, 12}), copy = key.clone();
  for (const auto type : {torch::kFloat, torch::kDouble}) {  // on kernels, and on operators
    module->to(type);
    const auto frozen = module->freeze({.plan = PlanMode::pin({Order::fold_into_query, Order::fold_into_query})});
    const auto x = key.to(type), y = copy.to(type);
    const auto bytes = static_cast<int64_t>(x.nbytes());
    const ContextOptions few{.expected_queries = 1};
    const auto one = frozen.context(x, x, {}, few), two = frozen.context(x, y, {}, few);
    EXPECT_EQ(one.bytes(), bytes);
    EXPECT_EQ(two.bytes(), 2 * bytes);
    EXPECT_EQ(frozen.context(x[0], x[0], {}, few).bytes(), bytes / 2);
    const auto query = torch::randn({2, 1, 8}, type);
    EXPECT_TRUE(std::get<0>(frozen.attend(query, one)).equal(std::get<0>(frozen.attend(query, two))));
  }
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

TEST_F(FrozenTest, OperatorsKeepTheScaleOfTheModule) {
  for (const bool bias_kv : {true, false}) {
    for (const auto type : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
      CrossAttention module(CrossAttentionOptions(8, 12, 10, 16).num_heads(4).bias_kv(bias_kv).scale(3));
      module->to(type);
      const Inputs x = {torch::randn({2, 3, 8}).to(type), torch::randn({2, 5, 12}).to(type), torch::randn({2, 5, 10}).to(type)};
      const auto [output, weights] = exact(module, x, {});
      const auto frozen = module->freeze({.plan = PlanMode::standard});
      const auto [y, p] = frozen.forward(x.query, x.key, x.value);
      const auto limit = type == torch::kFloat ? 1e-5 : tolerance(type, 60);
      expect_close(y, output, limit, std::string("output in ") + c10::toString(type));
      expect_close(p, weights, limit, std::string("weights in ") + c10::toString(type));
    }
  }
}

TEST_F(FrozenTest, EmptyAxesGiveEmptyResultsOrTheBiasOfTheOutput) {
  for (const auto type : {torch::kFloat, torch::kDouble}) {  // on kernels, and on operators
    for (const auto wanted : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
      auto module = make(kLayers[1]);
      module->options.attention_weights(wanted);
      module->to(type);
      for (const auto& [B, Lq, Lk] : {std::tuple(0, 3, 4), std::tuple(2, 0, 4), std::tuple(2, 3, 0), std::tuple(0, 0, 0)}) {
        const auto& l = kLayers[1];
        const Inputs x = {torch::randn({B, Lq, l.Eq}).to(type), torch::randn({B, Lk, l.Ek}).to(type),
                          torch::randn({B, Lk, l.Ev}).to(type)};
        for_each_pair([&, &B = B, &Lk = Lk, &Lq = Lq](const Orders& orders) {
          for (const auto& mask : {Mask(), Mask::lengths(torch::zeros({B}, torch::kLong), Lk)}) {
            const auto results = results_of(module->freeze({.plan = PlanMode::pin(orders)}), x, mask);
            for (const size_t i : {0, 2}) {
              EXPECT_EQ(results[i].sizes(), (std::vector<int64_t>{B, Lq, l.Eo}));
              if (Lk == 0) {
                EXPECT_TRUE(results[i].equal(module->output_linear->bias.expand({B, Lq, l.Eo})));
              }
              if (wanted == AttentionWeights::mean) {
                EXPECT_EQ(results[i + 1].sizes(), (std::vector<int64_t>{B, Lq, Lk}));
              }
            }
          }
        });
      }
    }
  }
}

TEST_F(FrozenTest, NegatedViewsAreReadWithTheirSign) {
  const auto& layer = kLayers[1];
  const auto bias = torch::randn({1, layer.H, 5, 37});
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    auto module = make(layer);
    module->to(type);
    const auto x = inputs_of(layer, 3, 5, 37);
    const Inputs negated = {at::_neg_view(x.query.to(type)), at::_neg_view(x.key.to(type)), at::_neg_view(x.value.to(type))};
    const Inputs plain = {-x.query.to(type), -x.key.to(type), -x.value.to(type)};
    const auto b = bias.to(type);
    for_each_pair([&](const Orders& orders) {
      const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
      const auto expected = results_of(frozen, plain, Mask::bias(-b)),
                 found = results_of(frozen, negated, Mask::bias(at::_neg_view(b)));
      for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(found[i].equal(expected[i])) << i;
    });
  }
  // A key and its negated view share their memory, but are not one tensor.
  CrossAttention module(CrossAttentionOptions(8, 12, 12, 16));
  const auto frozen = module->freeze({.plan = PlanMode::pin({Order::fold_into_query, Order::fold_into_query})});
  const auto query = torch::randn({2, 3, 8}), key = torch::randn({2, 5, 12});
  const auto expected = std::get<0>(frozen.attend(query, frozen.context(key, -key)));
  EXPECT_TRUE(std::get<0>(frozen.attend(query, frozen.context(key, at::_neg_view(key)))).equal(expected));
}

TEST_F(FrozenTest, RowsOfVeryNegativeFiniteBiasesAreAverages) {
  for (const int64_t Lk : {70, 5000}) {  // a long context is read in parts, or once, share by share
    for (const int64_t Lq : {1, 40}) {
      CrossAttention module(CrossAttentionOptions(8, 200, 200, 200).num_heads(2).attention_weights(AttentionWeights::none));
      const auto query = torch::randn({1, Lq, 8}), context = torch::randn({1, Lk, 200});
      for (const double least : {-1e9, -1e30}) {
        const auto mask = Mask::bias(torch::full({Lq, Lk}, least));
        const torch::NoGradGuard no_grad;
        const auto mean = module->output_linear(module->value_linear(context.mean(1, /*keepdim=*/true))).expand({1, Lq, 200});
        for_each_pair([&](const Orders& orders) {
          if (least == -1e9 && Lk * Lq > 5000) return;  // one of the two is enough
          const auto frozen = module->freeze({.plan = PlanMode::pin(orders)});
          expect_close(std::get<0>(frozen.forward(query, context, context, mask)), mean, 1e-5, std::to_string(Lk) + " keys");
        });
      }
    }
  }
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

TEST_F(FrozenTest, AutocastChangesNeitherResultsNorTheTypesItTakes) {
  const auto frozen = make(kLayers[0])->freeze();
  const auto x = inputs_of(kLayers[0], 2, 3, 5);
  const auto expected = results_of(frozen, x);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto results = results_of(frozen, x);
  const auto error = [&](const Inputs& wrong) {
    return error_of<c10::TypeError>([&] { frozen.forward(wrong.query, wrong.key, wrong.value); });
  };
  const auto message = [](const std::string& name, at::ScalarType type) {
    return "[frozen] " + name + " must be float32, the type of the parameters, but is " +
           std::string(c10::getDtypeNames(type).first) + ".";
  };
  for (const auto type : {torch::kHalf, torch::kBFloat16, torch::kDouble}) {
    EXPECT_EQ(error({x.query.to(type), x.key, x.value}), message("query", type));
    EXPECT_EQ(error({x.query, x.key.to(type), x.value}), message("key", type));
    EXPECT_EQ(error({x.query, x.key, x.value.to(type)}), message("value", type));
    EXPECT_EQ(error_of<c10::TypeError>([&] { return frozen.context(x.key.to(type), x.value); }), message("key", type));
    EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.attend(x.query.to(type), frozen.context(x.key, x.value)); }),
              message("query", type));
  }
  at::autocast::set_autocast_enabled(at::kCPU, false);
  for (size_t i = 0; i < results.size(); ++i) EXPECT_TRUE(results[i].equal(expected[i])) << i;
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
  EXPECT_EQ(error_of<c10::ValueError>([&] { return module->freeze({.query = torch::randn({3, 9})}); }),
            "[frozen] query must have shape [Lq, 8], but has [3, 9].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { return frozen.context(x.key, x.value, {}, {.expected_queries = -7}); }),
            "[frozen] expected_queries must not be negative, but is -7.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { frozen.forward(x.query.to(torch::kMeta), x.key, x.value); }),
            "[frozen] query must be on cpu, as the parameters, but is on meta.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { return frozen.context(x.key.to(torch::kMeta), x.value); }),
            "[frozen] key must be on cpu, as the parameters, but is on meta.");
  auto changed = make(kLayers[0]);
  changed->options.weight_heads({1});
  EXPECT_EQ(error_of<c10::ValueError>([&] { return changed->freeze(); }),
            "[frozen] weight_heads must be of the 1 heads, but name 1.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { return context.slice(1, 3); }),
            "[frozen] slice must lie in [0, 2], but is [1, 3).");
  EXPECT_EQ(error_of<c10::ValueError>([&] { return context.slice(2, 1); }),
            "[frozen] slice must lie in [0, 2], but is [2, 1).");
  const auto raw = module->freeze({.plan = PlanMode::pin({Order::fold_into_query, Order::fold_into_query})});
  const auto for_few = raw.context(x.key, x.value, {}, {.expected_queries = 1}), for_many = raw.context(x.key, x.value);
  EXPECT_EQ(error_of<c10::ValueError>([&] { return FrozenContext::cat({for_few, for_many}); }),  // their layouts differ
            "[frozen] contexts must be batches of one Frozen, of one length and orders, but they differ.");
}

// The kernels would read behind their ends, or take the numbers of one head for all.
TEST(FrozenParametersTest, OfOtherSizesThanTheOptionsAreRefused) {
  CrossAttention module(CrossAttentionOptions(16, 16, 16, 32).num_heads(4).qk_norm(NormKind::rms));
  module->query_norm->weight.set_data(torch::rand({32}));  // one number for each feature of all heads
  EXPECT_EQ(error_of<c10::ValueError>([&] { return module->freeze(); }),
            "[frozen] options must fit the parameters, but say another kind, size or eps for query_norm.");
  CrossAttention biased(CrossAttentionOptions(16, 16, 16, 32));
  biased->key_linear->bias.set_data(torch::zeros({1}));
  EXPECT_EQ(error_of<c10::ValueError>([&] { return biased->freeze(); }),
            "[frozen] options must fit the parameters, but say [32] for key_linear.bias, which has [1].");
  const torch::nn::Linear linear(8, 512);
  linear->bias.set_data(torch::zeros({1}));
  EXPECT_EQ(error_of<c10::ValueError>([&] { return FrozenLinear(*linear); }),
            "[frozen_linear] linear must have a bias [512] or none, but has [1].");
}

TEST(FrozenContextTest, ASliceMayBeEmpty) {
  const auto frozen = CrossAttention(CrossAttentionOptions(8, 12, 12, 6).num_heads(2).head_dim(3))->freeze();
  const auto x = torch::randn({3, 5, 12});
  for (const auto& mask : {Mask(), Mask::lengths(torch::tensor({2, 5, 1}), 5)}) {
    const auto none = frozen.context(x, x, mask).slice(1, 1);
    EXPECT_EQ(none.batch_size(), 0);
    const auto [output, weights] = frozen.attend(torch::randn({0, 4, 8}), none);
    EXPECT_EQ(output.sizes(), (std::vector<int64_t>{0, 4, 6}));
    EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{0, 4, 5}));
  }
}

TEST(FrozenContextTest, KeepsKeysAndValuesThatAreOneTensorAsOne) {
  const auto frozen = CrossAttention(CrossAttentionOptions(8, 12, 12, 8).num_heads(2))->freeze();
  const auto x = torch::randn({2, 5, 12});
  const auto context = frozen.context(x, x, {}, {.expected_queries = 1});
  EXPECT_EQ(context.to(torch::kCPU).bytes(), context.bytes());
  EXPECT_EQ(FrozenContext::cat({context, context}).bytes(), 2 * context.bytes());
  EXPECT_EQ(context.slice(0, 1).bytes(), context.bytes() / 2);
}

}  // namespace
}  // namespace xattn::test
