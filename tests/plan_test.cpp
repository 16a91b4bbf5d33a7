// SPDX-License-Identifier: Apache-2.0
#include <xattn/plan.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

constexpr Order kAllOrders[] = {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context,
                                Order::prefold_into_context};

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

// Machines on which an operation costs the same wherever it stands, so that the cheapest plan is the one of fewest operations.
PlanRequest by_operations(PlanRequest r) {
  r.rates = {.flops = 1e9, .memory = 1e18, .softmax = 1e18};
  return r;
}

TEST(PlanTest, OperationsAreThoseOfTheProductsThatRun) {
  // Counted by hand for B = 1, H = 2, Lq = 3, Lk = 5, Eq = 7, Ek = Ev = 11, d = e = 4, Eo = 8; a product [m, k] [k, n] takes 2 m k n.
  const auto r = request(1, 2, 3, 5, 7, 11, 8);
  const auto plan = cost_of({}, r);
  const double project_q = 2 * 3 * 7 * 8, project_k = 2 * 5 * 11 * 8;
  EXPECT_EQ(plan.logits[0].operations, project_q + project_k + 2 * 2 * 3 * 4 * 5);
  EXPECT_EQ(plan.logits[1].operations, project_q + 2 * 2 * 3 * 4 * 11 + 2 * 2 * 3 * 11 * 5);
  EXPECT_EQ(plan.logits[2].operations, 2 * 2 * 7 * 4 * 11 + 2 * 2 * 3 * 7 * 11 + 2 * 2 * 3 * 11 * 5);
  EXPECT_EQ(plan.logits[3].operations, project_k + 2 * 2 * 5 * 4 * 7 + 2 * 2 * 3 * 7 * 5);
  EXPECT_EQ(plan.logits[4].operations, 2 * 2 * 7 * 4 * 11 + 2 * 2 * 5 * 11 * 7 + 2 * 2 * 3 * 7 * 5);
  const double project_v = 2 * 5 * 11 * 8, project_o = 2 * 3 * 8 * 8;
  EXPECT_EQ(plan.values[0].operations, project_v + 2 * 2 * 3 * 5 * 4 + project_o);
  EXPECT_EQ(plan.values[1].operations, 2 * 2 * 3 * 5 * 11 + 2 * 2 * 3 * 11 * 4 + project_o);
  EXPECT_EQ(plan.values[2].operations, 2 * 2 * 11 * 4 * 8 + 2 * 2 * 3 * 5 * 11 + 2 * 2 * 3 * 11 * 8);
  EXPECT_EQ(plan.values[3].operations, project_v + 2 * 2 * 5 * 4 * 8 + 2 * 2 * 3 * 5 * 8);
  EXPECT_EQ(plan.values[4].operations, 2 * 2 * 11 * 4 * 8 + 2 * 2 * 5 * 11 * 8 + 2 * 2 * 3 * 5 * 8);
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
  EXPECT_EQ(cost_of({}, r).operations, 3 * apart.operations);
  r.training = false;
  r.G = 2;  // keys of a quarter of the heads are projected
  EXPECT_EQ(apart.logits[0].operations - cost_of({}, r).logits[0].operations, 2.0 * 100 * 64 * (64 - 16));
}

TEST(PlanTest, ProductsOfWeightsAreChargedUntilTheyAreFrozen) {
  auto r = by_operations(request(2, 1, 4, 6, 128, 256, 512));
  EXPECT_NE(make_plan(r).orders.logits, Order::prefold);
  r.B = 10000;  // at very many rows they pay all the same
  EXPECT_EQ(make_plan(r).orders.values, Order::prefold);
}

TEST(PlanTest, AConstantQueryCostsNothingUntilItMeetsTheKeys) {
  auto r = by_operations(request(8, 12, 1, 196, 768, 768, 768));
  r.weights_are_frozen = r.query_is_constant = true;
  EXPECT_EQ(cost_of({Order::fold_into_query, Order::standard}, r).logits[1].operations, 2.0 * 8 * 12 * 768 * 196);
}

// ---- Legality: each rule, and the wrong result that breaking it would give --------------------------------------------------

struct Layer {
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
  const Layer x;
  const auto right = torch::matmul(rms(torch::matmul(x.Xq, x.Wq)), torch::matmul(x.Xk, x.Wk).t());
  const auto prefolded = torch::matmul(torch::matmul(x.Xq, torch::matmul(x.Wq, x.Wk.t())), x.Xk.t());
  EXPECT_GT((right - prefolded).abs().max().item<double>(), 0.1);
}

TEST(LegalityTest, ANormOfTheKeyForbidsWhatTouchesWkAfterTheQuery) {
  auto r = request(1, 4, 1, 1000, 64, 64, 64);
  r.key_norm = true;
  expect_illegal(r, {Order::standard, Order::fold_into_context});
  torch::manual_seed(0);
  const Layer x;
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
  r.free_key = true;
  expect_illegal(r, {Order::standard});
  for (const auto order : kAllOrders) EXPECT_EQ(illegal_for_values(order, r).empty(), order == Order::standard);
}

TEST(LegalityTest, AProductThatIsLargerThanBothWeightsIsNotMadeAndCannotBeChosen) {
  auto r = request(1, 12, 1, 512, 768, 768, 768);  // 12 products of 768 x 768 in place of two weights
  EXPECT_FALSE(logits_product_pays(r));
  expect_illegal(r, {Order::standard, Order::fold_into_query, Order::prefold, Order::fold_into_context,
                     Order::prefold_into_context});  // one that is made in the call
  r.weights_are_frozen = true;
  expect_illegal(r, {Order::standard, Order::fold_into_query, Order::fold_into_context});
  EXPECT_TRUE(logits_product_pays(request(2, 1, 4, 6, 128, 256, 512)));
}

// ---- Rates, text, errors ---------------------------------------------------------------------------------------------------

TEST(RatesTest, MeasuredRatesServeAPlan) {
  auto r = request(1, 12, 1, 1500, 768, 768, 768);
  r.rates = Rates::measure();  // whatever else the machine does meanwhile
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
  EXPECT_NE(text.find("illegal: a norm of the key stands behind Wk"), std::string::npos) << text;
  EXPECT_NE(text.find("<- chosen"), std::string::npos);
  EXPECT_NE(text.find("attention: logits in memory, because the order is not the standard one"), std::string::npos) << text;
  EXPECT_NE(explain(request(1, 8, 500, 500, 64, 64, 64)).find("attention: a fused kernel"), std::string::npos);
}

TEST(PlanTest, RefusesSizesThatCannotBe) {
  auto r = request(1, 4, 1, 1, 8, 8, 8);
  r.Lq = -1;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(r); }), "[plan] Lq must not be negative, but is -1.");
  r.Lq = 1;
  r.G = 3;
  EXPECT_EQ(error_of<c10::ValueError>([&] { make_plan(r); }), "[plan] H must be a multiple of G, but they are 4 and 3.");
  r.G = 4;
  r.rates = {};
  EXPECT_NE(error_of<c10::ValueError>([&] { make_plan(r); }).find("rates must be above 0"), std::string::npos);
}

}  // namespace
}  // namespace xattn::test
