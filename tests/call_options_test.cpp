// SPDX-License-Identifier: Apache-2.0
#include <xattn/call_options.h>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/block.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/frozen.h>

#include <tuple>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

class CallOptionsTest : public testing::Test {
 protected:
  CallOptionsTest() { torch::manual_seed(0); }

  CrossAttentionOptions options(AttentionWeights weights) const {
    return CrossAttentionOptions(8, 12, 10, 8).num_heads(4).attention_weights(weights);
  }

  // The calls of a module whose options return `own` weights, by (query, key, value, options of the call) -> weights.
  template <class F>
  void for_each_call(AttentionWeights own, const F& check) {
    using T = const Tensor&;
    CrossAttention module(options(own));
    check("module", [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(module->forward(q, k, v, {}, call)); });
    check("context",
          [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(module->attend(q, module->context(k, v), call)); });
    const auto frozen = module->freeze();
    check("frozen", [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(frozen.forward(q, k, v, {}, call)); });
    check("frozen context",
          [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(frozen.attend(q, frozen.context(k, v), call)); });
    CrossAttention wide(options(own));
    wide->to(torch::kDouble);
    const auto on_operators = wide->freeze();
    check("frozen, float64", [&](T q, T k, T v, const CallOptions& call) {
      const auto to = [](T x) { return x.to(torch::kDouble); };
      return std::get<1>(on_operators.forward(to(q), to(k), to(v), {}, call));
    });
    CrossAttentionBlock block(options(own));
    check("block", [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(block->forward(q, k, v, {}, call)); });
    DecoupledCrossAttention decoupled(DecoupledCrossAttentionOptions(options(own)).added({{12, 10}}));
    check("decoupled",
          [&](T q, T k, T v, const CallOptions& call) { return std::get<1>(decoupled->forward(q, k, v, {{k, v}}, {}, call)); });
  }

  Tensor query_ = torch::randn({2, 3, 8}), key_ = torch::randn({2, 5, 12}), value_ = torch::randn({2, 5, 10});
};

TEST_F(CallOptionsTest, ACallReturnsTheWeightsThatItAsksFor) {
  for (const auto own : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    for_each_call(own, [&](const char* name, const auto& weights_of) {
      SCOPED_TRACE(name);
      const auto call = [&](const CallOptions& options) { return weights_of(query_, key_, value_, options); };
      EXPECT_FALSE(call({.weights = AttentionWeights::none}).defined());
      const auto all = call({.weights = AttentionWeights::per_head});
      ASSERT_EQ(all.sizes(), (std::vector<int64_t>{2, 4, 3, 5}));
      expect_close(call({.weights = AttentionWeights::mean}), all.mean(1), 1e-6, "mean");
      const auto chosen = call({.weights = AttentionWeights::per_head, .weight_heads = std::vector<int64_t>{2, 0}});
      expect_close(chosen, torch::stack({all.select(1, 2), all.select(1, 0)}, 1), 1e-6, "chosen heads");
      // Without options a call uses the module's, and no call affects the next one.
      const auto default_weights = call({});
      EXPECT_EQ(default_weights.defined(), own != AttentionWeights::none);
      if (own == AttentionWeights::mean) expect_close(default_weights, all.mean(1), 1e-6, "mean, of the module");
      if (own == AttentionWeights::per_head) expect_close(default_weights, all, 1e-6, "per head, of the module");
    });
  }
}

TEST_F(CallOptionsTest, RejectsHeadsWithoutWeightsOfHeads) {
  for_each_call(AttentionWeights::mean, [&](const char* name, const auto& weights_of) {
    const auto error =
        error_of<c10::ValueError>([&] { return weights_of(query_, key_, value_, {.weight_heads = std::vector<int64_t>{0}}); });
    EXPECT_NE(error.find("weight_heads must come with weights per_head, but come with mean."), std::string::npos) << name;
  });
}

TEST_F(CallOptionsTest, RejectsHeadsOutOfRange) {
  for_each_call(AttentionWeights::mean, [&](const char* name, const auto& weights_of) {
    const auto error = error_of<c10::ValueError>([&] {
      return weights_of(query_, key_, value_, {.weights = AttentionWeights::per_head, .weight_heads = std::vector<int64_t>{4}});
    });
    EXPECT_NE(error.find("weight_heads must be of the 4 heads, but name 4."), std::string::npos) << name << ": " << error;
  });
}

}  // namespace
}  // namespace xattn::test
