// SPDX-License-Identifier: Apache-2.0
#include <xattn/plan.h>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/cross_attention.h>

#include <cmath>

#include "attention/choose_kernel.h"
#include "attention/heads.h"
#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

PlanRequest request(int64_t B, int64_t H, int64_t Lq, int64_t Lk, int64_t Eq, int64_t Ek, int64_t inner) {
  PlanRequest r;
  r.B = B;
  r.H = r.G = H;
  r.Lq = Lq;
  r.Lk = Lk;
  r.Eq = Eq;
  r.Ek = r.Ev = Ek;
  r.d = r.e = inner / H;
  r.Eo = inner;
  r.rates = Rates::cpu(1);
  return r;
}

// Machines on which every operation costs the same, so that the cheapest plan is the one of fewest operations.
PlanRequest by_operations(PlanRequest r) {
  r.rates = {.flops = 1e9, .memory = 1e18, .softmax = 1e18};
  return r;
}

TEST(PlanTest, OperationsAreThoseOfTheProductsThatRun) {
  // Counted by hand: B = 1, H = 2, Lq = 3, Lk = 5, Eq = 7, Ek = Ev = 11, d = e = 4, Eo = 8; [m, k] [k, n] takes 2 m k n.
  const auto r = request(1, 2, 3, 5, 7, 11, 8);
  const auto plan = cost_of({}, r);
  const double project_q = 2 * 3 * 7 * 8, project_k = 2 * 5 * 11 * 8;
  EXPECT_EQ(plan.logits[0].operations, project_q + project_k + 2 * 2 * 3 * 4 * 5);
  EXPECT_EQ(plan.logits[1].operations, project_q + 2 * 2 * 3 * 4 * 11 + 2 * 2 * 3 * 11 * 5);
  EXPECT_EQ(plan.logits[2].operations, 2 * 2 * 7 * 4 * 11 + 2 * 2 * 3 * 7 * 11 + 2 * 2 * 3 * 11 * 5);
  EXPECT_EQ(plan.logits[3].operations, project_k + 2 * 2 * 5 * 4 * 7 + 2 * 2 * 3 * 7 * 5);
  const double project_v = 2 * 5 * 11 * 8, project_o = 2 * 3 * 8 * 8;
  EXPECT_EQ(plan.values[0].operations, project_v + 2 * 2 * 3 * 5 * 4 + project_o);
  EXPECT_EQ(plan.values[1].operations, 2 * 2 * 3 * 5 * 11 + 2 * 2 * 3 * 11 * 4 + project_o);
  EXPECT_EQ(plan.values[2].operations, 2 * 2 * 11 * 4 * 8 + 2 * 2 * 3 * 5 * 11 + 2 * 2 * 3 * 11 * 8);
  EXPECT_EQ(plan.values[3].operations, project_v + 2 * 2 * 5 * 4 * 8 + 2 * 2 * 3 * 5 * 8);
  EXPECT_EQ(plan.operations, plan.logits[0].operations + plan.values[0].operations);
}

TEST(PlanTest, TheReferenceExampleTakesFourPointThreeSixTimesFewerOperations) {
  auto r = by_operations(request(2, 1, 4, 6, 128, 256, 512));
  r.weights_are_frozen = true;
  const auto plan = make_plan(r);
  EXPECT_EQ(plan.orders, (Orders{Order::prefold, Order::prefold}));
  EXPECT_NEAR(cost_of({}, r).operations / plan.operations, 4.36, 0.005);
}

TEST(PlanTest, FoldingIntoTheQueryWinsWhereOneOverQueriesAndFeaturesIsMore) {
  // 1/Lq + 1/Ek > 1/Lk + 1/d, for the logits; the same with Ev and e for the values.
  for (const int64_t Lq : {1, 10, 40, 70, 100, 500}) {
    for (const int64_t Lk : {5, 50, 500}) {
      const auto r = by_operations(request(2, 8, Lq, Lk, 512, 640, 512));
      const auto plan = cost_of({}, r);
      const bool wins = 1.0 / Lq + 1.0 / 640 > 1.0 / Lk + 1.0 / 64;
      EXPECT_EQ(plan.logits[1].seconds < plan.logits[0].seconds, wins) << Lq << " queries, " << Lk << " keys";
      EXPECT_EQ(plan.values[1].seconds < plan.values[0].seconds, wins) << Lq << " queries, " << Lk << " keys";
    }
  }
}

TEST(PlanTest, AContextUsedAgainIsProjectedFromTheRowsOnThatPayForIt) {
  // n* = 1 / (1/d + 1/Lk - 1/Ek) = 67 rows for Whisper-small, one query a call.
  auto r = by_operations(request(1, 12, 1, 1500, 768, 768, 768));
  r.weights_are_frozen = true;
  for (const int64_t rows : {1, 10, 60, 66, 68, 100, 10000}) {
    r.context_rows = rows;
    const auto expected = rows < 67 ? Order::fold_into_query : Order::standard;
    EXPECT_EQ(make_plan(r).orders, (Orders{expected, expected})) << rows;
  }
  r.context_rows = PlanRequest::kKept;
  EXPECT_EQ(make_plan(r).orders, Orders{});
}

TEST(PlanTest, SharedHeadsAndBackwardCountAsTheyShould) {
  auto r = request(1, 8, 4, 100, 64, 64, 64);
  const auto apart = cost_of({}, r);
  r.training = true;
  const auto trained = cost_of({}, r);
  EXPECT_EQ(trained.operations, 3 * apart.operations);
  for (size_t i = 0; i < kOrders; ++i) EXPECT_EQ(trained.logits[i].operations, 3 * apart.logits[i].operations);
  EXPECT_EQ(trained.operations, trained.logits[0].operations + trained.values[0].operations);
  r.training = false;
  auto started = r;  // in a forward pass whose operations cost as much to start as recorded ones
  started.rates.start_product *= 3;
  EXPECT_DOUBLE_EQ(trained.seconds, 3 * cost_of({}, started).seconds);
  r.G = 2;  // keys of a quarter of the heads are projected
  EXPECT_EQ(apart.logits[0].operations - cost_of({}, r).logits[0].operations, 2.0 * 100 * 64 * (64 - 16));
}

TEST(PlanTest, AFrozenLayerIsChargedForPackingAContextForManyRowsUnlessItIsKept) {
  const auto packing = [](int64_t Lq, RunsOn runs_on) {
    auto r = request(1, 4, Lq, 1000, 64, 96, 64);
    r.runs_on = runs_on;
    const auto now = cost_of({}, r);
    r.context_rows = PlanRequest::kKept;
    return now.logits[1].seconds - cost_of({}, r).logits[1].seconds;
  };
  EXPECT_EQ(packing(28, RunsOn::frozen_kernels), 0);
  EXPECT_NEAR(packing(29, RunsOn::frozen_kernels), 2 * 4 * 1000 * 96 / request(1, 4, 29, 1000, 64, 96, 64).rates.memory, 1e-12);
  EXPECT_EQ(packing(29, RunsOn::module_kernels), 0);
}

TEST(PlanTest, StoredWeightsAndProjectedContextsAreReadInTheirOwnTypeAndRawOnesAreNot) {
  PlanRequest r{.H = 8, .G = 8, .Lq = 1, .Lk = 1000, .Eq = 512, .Ek = 512, .Ev = 512, .d = 64, .e = 64, .Eo = 512};
  r.weights_are_frozen = true;
  r.context_rows = PlanRequest::kKept;
  r.runs_on = RunsOn::frozen_kernels;
  r.rates = Rates::kernels(1);
  const auto bytes = [&r](Order order) { return cost_of({order, order}, r).logits[static_cast<size_t>(order)].bytes; };
  const auto standard = bytes(Order::standard), folded = bytes(Order::fold_into_query);
  r.stored_element = 2;
  const double weight = 512 * 512, keys = 1000 * 512;
  EXPECT_EQ(standard - bytes(Order::standard), 2 * (weight + keys));
  EXPECT_EQ(folded - bytes(Order::fold_into_query), 2 * (weight + weight));
  EXPECT_EQ(cost_of({}, r).logits[0].operations, 2 * (weight + keys));
}

TEST(PlanTest, WhatHasAnEmptyAxisCostsNothing) {
  const auto plan = make_plan(request(1, 4, 3, 0, 8, 8, 8));
  EXPECT_EQ(plan.orders, Orders{});
  for (const auto& cost : plan.logits) EXPECT_TRUE(std::isfinite(cost.seconds)) << name_of(cost.order);
  EXPECT_EQ(cost_of({}, request(0, 4, 3, 5, 8, 8, 8)).operations, 0);
}

TEST(PlanTest, ProductsOfWeightsAreChargedUntilTheyAreFrozen) {
  auto r = by_operations(request(2, 1, 4, 6, 128, 256, 512));
  EXPECT_NE(make_plan(r).orders.logits, Order::prefold);
  r.B = 10000;  // with very many rows, products of weights pay off all the same
  EXPECT_EQ(make_plan(r).orders.values, Order::prefold);
}

TEST(PlanTest, AConstantQueryCostsNothingUntilItMeetsTheKeys) {
  auto r = by_operations(request(8, 12, 1, 196, 768, 768, 768));
  r.weights_are_frozen = r.query_is_constant = true;
  EXPECT_EQ(cost_of({Order::fold_into_query, Order::standard}, r).logits[1].operations, 2.0 * 8 * 12 * 768 * 196);
}

// ---- Legality: each rule, and the wrong result that breaking it would give --------------------------------------------------

struct RandomLayer {
  torch::Tensor Xq = torch::randn({3, 4}, torch::kDouble), Xk = torch::randn({5, 6}, torch::kDouble);
  torch::Tensor Wq = torch::randn({4, 8}, torch::kDouble), Wk = torch::randn({6, 8}, torch::kDouble);
};

torch::Tensor rms(const torch::Tensor& x) {
  return x / x.square().mean(-1, true).sqrt();
}

void expect_illegal(const PlanRequest& r, std::vector<Order> legal) {
  for (const auto order : kAllOrders) {
    const bool is_legal = std::find(legal.begin(), legal.end(), order) != legal.end();
    EXPECT_EQ(illegal_for_logits(order, r).empty(), is_legal) << name_of(order);
  }
  EXPECT_NE(std::find(legal.begin(), legal.end(), make_plan(r).orders.logits), legal.end());
}

TEST(LegalityTest, ANormOfTheQueryForbidsWhatTouchesWqBeforeIt) {
  auto r = request(1, 4, 1, 2, 16, 1000, 64);  // few keys: without the norm the context would be folded
  ASSERT_NE(make_plan(by_operations(r)).orders.logits, Order::standard);
  r.query_norm = true;
  expect_illegal(r, {Order::standard, Order::fold_into_query});
  torch::manual_seed(0);
  const RandomLayer x;
  const auto right = torch::matmul(rms(torch::matmul(x.Xq, x.Wq)), torch::matmul(x.Xk, x.Wk).t());
  const auto prefolded = torch::matmul(torch::matmul(x.Xq, torch::matmul(x.Wq, x.Wk.t())), x.Xk.t());
  EXPECT_GT((right - prefolded).abs().max().item<double>(), 0.1);
}

TEST(LegalityTest, ANormOfTheKeyForbidsWhatTouchesWkAfterTheQuery) {
  auto r = request(1, 4, 1, 1000, 64, 64, 64);
  r.key_norm = true;
  expect_illegal(r, {Order::standard, Order::fold_into_context});
  torch::manual_seed(0);
  const RandomLayer x;
  const auto right = torch::matmul(torch::matmul(x.Xq, x.Wq), rms(torch::matmul(x.Xk, x.Wk)).t());
  const auto folded = torch::matmul(torch::matmul(torch::matmul(x.Xq, x.Wq), x.Wk.t()), x.Xk.t());
  EXPECT_GT((right - folded).abs().max().item<double>(), 0.1);
}

TEST(LegalityTest, NormsOnBothSidesLeaveTheStandardOrderAndTheValuesFree) {
  auto r = request(1, 4, 1, 1000, 64, 64, 64);
  r.query_norm = r.key_norm = true;
  expect_illegal(r, {Order::standard});
  for (const auto order : kAllOrders) EXPECT_TRUE(illegal_for_values(order, r).empty());
  EXPECT_EQ(make_plan(r).orders, (Orders{Order::standard, Order::fold_into_query}));
}

TEST(LegalityTest, AKeyThatNoProjectionMadeForbidsEveryFold) {
  auto r = request(1, 4, 1, 1000, 64, 64, 64);
  r.bias_kv = true;
  expect_illegal(r, {Order::standard});
  for (const auto order : kAllOrders) EXPECT_EQ(illegal_for_values(order, r).empty(), order == Order::standard);

  // Folds cover only keys and values made by Wk and Wv, and would give them the share of a row's weights that bias_kv takes.
  torch::manual_seed(0);
  const torch::NoGradGuard no_grad;
  CrossAttention module(CrossAttentionOptions(4, 6, 6, 8).bias_kv(true).qkv_bias(false).output_bias(false));
  module->to(torch::kDouble);
  const auto Wq = module->query_linear->weight.t(), Wk = module->key_linear->weight.t(), Wv = module->value_linear->weight.t(),
             Wo = module->output_linear->weight.t(), scale = torch::tensor(1 / std::sqrt(8.0), torch::kDouble);
  const RandomLayer x;
  const auto q = torch::matmul(x.Xq, Wq) * scale;
  const auto k = torch::cat({torch::matmul(x.Xk, Wk), module->bias_k[0]}),
             v = torch::cat({torch::matmul(x.Xk, Wv), module->bias_v[0]});
  const auto right = torch::matmul(torch::matmul(torch::softmax(torch::matmul(q, k.t()), -1), v), Wo);
  const auto folded_logits = torch::matmul(torch::matmul(q, Wk.t()), x.Xk.t());
  const auto folded = torch::matmul(torch::matmul(torch::matmul(torch::softmax(folded_logits, -1), x.Xk), Wv), Wo);
  EXPECT_GT((right - folded).abs().max().item<double>(), 0.05);
  expect_close(std::get<0>(module->forward(x.Xq, x.Xk, x.Xk)), right, tolerance(torch::kDouble, 40), "output");
}

TEST(LegalityTest, InTrainingAProductOfWeightsIsMadeAndChargedInEachCall) {
  auto r = request(2, 1, 4, 6, 128, 256, 512);
  r.weights_are_frozen = true;
  ASSERT_EQ(make_plan(by_operations(r)).orders, (Orders{Order::prefold, Order::prefold}));
  const auto kept = cost_of({}, r);
  r.weights_are_frozen = false;
  r.training = true;
  const double of_product = 2.0 * 128 * 512 * 256;
  EXPECT_EQ(cost_of({}, r).logits[2].operations, 3 * (kept.logits[2].operations + of_product));
  EXPECT_NE(make_plan(by_operations(r)).orders.logits, Order::prefold);

  // A stored product would miss the changes of an optimizer's step.
  torch::manual_seed(0);
  const RandomLayer x;
  const auto product = torch::matmul(x.Wq, x.Wk.t()), stepped = x.Wq - 0.1 * torch::randn({4, 8}, torch::kDouble);
  const auto right = torch::matmul(torch::matmul(x.Xq, stepped), torch::matmul(x.Xk, x.Wk).t());
  EXPECT_GT((right - torch::matmul(torch::matmul(x.Xq, product), x.Xk.t())).abs().max().item<double>(), 0.1);
}

TEST(LegalityTest, DroppedWeightsForbidTheFusedKernelThatWouldKeepThemAll) {
  auto r = request(1, 8, 500, 500, 64, 64, 64);
  const auto fused = make_plan(r);
  ASSERT_TRUE(detail::is_fused(fused.kernel));
  r.drops_weights = true;
  EXPECT_EQ(make_plan(r).kernel, AttentionKernel::tensor_operations);
  EXPECT_EQ(make_plan(r).kernel_reason, "dropout is above 0");
  EXPECT_GT(cost_of({}, r).seconds, fused.seconds);
}

TEST(LegalityTest, AProductThatIsLargerThanBothWeightsIsNotMadeAndCannotBeChosen) {
  auto r = request(1, 12, 1, 512, 768, 768, 768);  // 12 products of 768 x 768 in place of two weights
  EXPECT_FALSE(logits_product_pays(r));
  expect_illegal(r, {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context});  // made in the call
  r.weights_are_frozen = true;
  expect_illegal(r, {Order::standard, Order::fold_into_query, Order::fold_into_context});
  EXPECT_TRUE(logits_product_pays(request(2, 1, 4, 6, 128, 256, 512)));
}

// ---- The attention kernel: orders_test.cpp compares with what runs ----------------------------------------------------------

TEST(KernelTest, DependsOnOrdersGradientsWeightsAndWhatALayerRunsOn) {
  using enum AttentionKernel;
  const auto kernel = [](RunsOn runs_on, Orders orders, const auto& change) {
    auto r = request(1, 8, 500, 500, 64, 64, 64);
    r.runs_on = runs_on;
    change(r);
    return cost_of(orders, r).kernel;
  };
  const auto nothing = [](PlanRequest&) {};
  const auto train = [](PlanRequest& r) { r.training = true; };
  const auto weights = [](PlanRequest& r) { r.returns_weights = true; };
  const auto both = [](PlanRequest& r) { r.training = r.returns_weights = true; };
  const auto learn_mask = [](PlanRequest& r) { r.training = r.mask_is_learned = true; };
  const auto other_values = [](PlanRequest& r) { r.training = true, r.e = 16; };
  const auto no_keys = [](PlanRequest& r) { r.Lk = 0; };
  const struct {
    RunsOn runs_on;
    AttentionKernel plain, training, with_weights, with_both, with_learned_mask, with_other_values, without_keys;
  } kRows[] = {{RunsOn::module_kernels, heads, heads, heads, tensor_operations, tensor_operations, heads, tensor_operations},
               {RunsOn::libtorch_cpu, fused_cpu, fused_cpu, tensor_operations, tensor_operations, tensor_operations,
                tensor_operations, tensor_operations},
               {RunsOn::libtorch_cuda, scaled_dot_product_attention, scaled_dot_product_attention, tensor_operations,
                tensor_operations, tensor_operations, scaled_dot_product_attention, tensor_operations}};
  for (const auto& row : kRows) {
    SCOPED_TRACE(static_cast<int>(row.runs_on));
    EXPECT_EQ(kernel(row.runs_on, {}, nothing), row.plain);
    EXPECT_EQ(kernel(row.runs_on, {}, train), row.training);
    EXPECT_EQ(kernel(row.runs_on, {}, weights), row.with_weights);
    EXPECT_EQ(kernel(row.runs_on, {}, both), row.with_both);
    EXPECT_EQ(kernel(row.runs_on, {}, learn_mask), row.with_learned_mask);
    EXPECT_EQ(kernel(row.runs_on, {}, other_values), row.with_other_values);
    EXPECT_EQ(kernel(row.runs_on, {}, no_keys), row.without_keys);
    EXPECT_EQ(kernel(row.runs_on, {Order::fold_into_query, Order::standard}, nothing), tensor_operations);
  }
  EXPECT_EQ(kernel(RunsOn::frozen_kernels, {}, nothing), heads);
  EXPECT_EQ(kernel(RunsOn::frozen_kernels, {}, weights), heads);
  EXPECT_EQ(kernel(RunsOn::frozen_kernels, {Order::standard, Order::prefold}, weights), chain);
}

TEST(KernelTest, GoesThroughAContextInPartsWhereTheEngineDoes) {
  using detail::engine::Heads;
  for (const int64_t Lk : {4096, 4097}) {
    for (const auto weights : {AttentionWeights::none, AttentionWeights::mean}) {
      detail::engine::SoftmaxStage softmax({.weights = weights}, 1, 1, Lk, 1);
      const auto map = detail::engine::empty_weights({.weights = weights}, 1, 1, 1, Lk, /*all_keys=*/true);
      softmax.write_to(map, {});
      const Heads heads{.H = 1, .G = 1, .d = 8, .e = 8, .Lk = Lk, .keys = {}, .values = {}, .are_packed = true, .capacity = Lk};
      const bool in_parts = scratch_of_heads(heads, softmax, {.all = true}).row < Lk;
      auto r = request(1, 1, 1, Lk, 8, 8, 8);
      r.returns_weights = weights != AttentionWeights::none;
      for (const auto runs_on : {RunsOn::module_kernels, RunsOn::frozen_kernels}) {
        r.runs_on = runs_on;
        EXPECT_EQ(cost_of({}, r).kernel, in_parts ? AttentionKernel::heads_in_parts : AttentionKernel::heads) << Lk;
      }
    }
  }
}

// ---- Rates, text, errors ---------------------------------------------------------------------------------------------------

TEST(RatesTest, MeasuredRatesServeAPlan) {
  auto r = request(1, 12, 1, 1500, 768, 768, 768);
  r.rates = Rates::measure();  // whatever other load the machine has
  for (const auto rate : {r.rates.flops, r.rates.memory, r.rates.cache, r.rates.softmax, r.rates.fused}) {
    EXPECT_TRUE(std::isfinite(rate) && rate > 0) << rate;
  }
  const auto plan = make_plan(r);
  EXPECT_GT(plan.seconds, 0);
  EXPECT_LE(plan.seconds, cost_of({}, r).seconds);
}

TEST(ExplainTest, NamesEveryOrderItsCostAndTheReason) {
  auto r = request(1, 12, 1, 1500, 768, 768, 768);
  r.key_norm = true;
  const auto text = explain(r);
  for (const auto order : kAllOrders) EXPECT_NE(text.find(std::string(name_of(order))), std::string::npos);
  EXPECT_NE(text.find("illegal: a norm of the key follows Wk"), std::string::npos) << text;
  EXPECT_NE(text.find("<- chosen"), std::string::npos);
  const auto expect_end = [](const PlanRequest& request, const std::string& end) {
    EXPECT_TRUE(explain(request).ends_with(end + "\n")) << explain(request);
  };
  expect_end(r, "attention by tensor_operations: all logits in memory, because the order is not the standard one");
  r = request(1, 8, 500, 500, 64, 64, 64);
  r.returns_weights = true;
  expect_end(r,
             "attention by heads: this library's kernel, one head after the other, logits in the cache, because the type is "
             "float32, and no gradient is required; weights come from the same pass");
  r.training = true;
  expect_end(r, "attention by tensor_operations: all logits in memory, because weights and gradients are requested");
  EXPECT_NE(explain(r).find("output 64; forward and backward\n"), std::string::npos) << explain(r);
  r = request(1, 12, 1, 1500, 768, 768, 768);
  r.weights_are_frozen = r.returns_weights = true;
  r.runs_on = RunsOn::frozen_kernels;
  expect_end(
      r,
      "attention by chain: this library's kernels, the whole chain for a few rows at a time, because the layer is frozen, "
      "and the order is not the standard one; weights come from the same pass");
}

TEST(ExplainTest, SaysWhatWasPinned) {
  auto r = request(1, 12, 1, 1500, 768, 768, 768);
  r.pinned = Orders{Order::standard, Order::prefold};
  EXPECT_EQ(make_plan(r).orders, *r.pinned);
  const auto text = explain(r);
  EXPECT_EQ(text.find("<- chosen"), std::string::npos) << text;
  EXPECT_NE(text.find("<- pinned"), std::string::npos) << text;
}

TEST(ExplainTest, DividesByNoTimeOfZero) {
  auto r = request(1, 4, 0, 0, 8, 8, 8);
  for (const auto& pinned : {std::optional<Orders>(), std::optional(Orders{})}) {
    r.pinned = pinned;
    EXPECT_EQ(explain(r).find("nan times"), std::string::npos) << explain(r);
    EXPECT_EQ(explain(r).find("inf times"), std::string::npos) << explain(r);
  }
}

TEST(PlanTest, RefusesSizesThatCannotBe) {
  auto r = request(1, 4, 1, 1, 8, 8, 8);
  r.Lq = -1;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(r); }), "[plan] Lq must not be negative, but is -1.");
  r.Lq = 1;
  r.context_rows = -2;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(r); }),
            "[plan] context_rows must not be negative, or be kKept, but is -2.");
  PlanRequest stored;
  stored.rates = Rates::cpu(1);
  stored.stored_element = -1;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(stored); }), "[plan] stored_element must not be negative, but is -1.");
  r.context_rows = PlanRequest::kKept;
  r.G = 3;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(r); }), "[plan] H must be a multiple of G, but they are 4 and 3.");
  r.G = 4;
  r.shares_context = r.key_norm = true;
  EXPECT_NE(error_of<c10::ValueError>([&] { make_plan(r); }).find("request must allow an order of each chain, but allows none"),
            std::string::npos);
  r.rates = {};
  EXPECT_NE(error_of<c10::ValueError>([&] { make_plan(r); }).find("rates must be above 0"), std::string::npos);
}

}  // namespace
}  // namespace xattn::test
