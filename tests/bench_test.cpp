// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/plan.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "programs/shapes.h"

namespace xattn {
namespace {

// Without a price on anything but operations.
PlanRequest request_of(const shapes::Shape& s) {
  auto request = shapes::plan_request(s);
  request.Lk = s.Lk;
  request.query_is_constant = request.training = false;
  request.weights_are_frozen = true;
  request.rates = {.flops = 1e9, .memory = 1e18, .softmax = 1e18};
  return request;
}

Order order_of(char letter) {
  switch (letter) {
    case 'S': return Order::standard;
    case 'F': return Order::fold_into_query;
    case 'P': return Order::prefold;
    default: return Order::fold_into_context;
  }
}

TEST(ShapesTest, NamesDiffer) {
  std::set<std::string> names;
  for (const auto& s : shapes::all()) EXPECT_TRUE(names.insert(s.name).second) << s.name;
}

TEST(ShapesTest, OperationsAndCheapestOrdersAreThoseOfThePlanner) {
  for (const auto& s : shapes::all()) {
    auto request = request_of(s);
    const auto passes = s.timed == shapes::Timed::backward ? 3 : 1;
    EXPECT_NEAR(1e-9 * cost_of({}, request).operations * passes, s.gflop, 1e-3 * s.gflop) << s.name;
    if (s.timed == shapes::Timed::backward) continue;  // its orders are the cheapest of some only
    request.Lk = s.valid;
    const auto standard = cost_of({}, request).operations;
    request.query_is_constant = s.learned_query;
    const auto best = make_plan(request).operations;
    EXPECT_NEAR(standard / best, s.times_fewer, 0.01 * s.times_fewer) << s.name;
    const auto stated = cost_of({order_of(s.orders.at(0)), order_of(s.orders.at(1))}, request).operations;
    EXPECT_NEAR(stated, best, 0.01 * best) << s.name;
  }
}

TEST(ShapesTest, ANameOrAPartOfIt) {
  const auto& name = shapes::all().front().name;
  ASSERT_EQ(shapes::matching(name).size(), 1U);
  EXPECT_GT(shapes::matching("sd1.5").size(), 1U);
  EXPECT_TRUE(shapes::matching("no such layer").empty());
}

// What the program prints, where it ends well.
std::string bench(const std::string& arguments) {
  auto* pipe = popen((XATTN_BENCH_PATH " " + arguments + " 2> /dev/null").c_str(), "r");
  std::string text;
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) text += static_cast<char>(c);
  EXPECT_EQ(pclose(pipe), 0) << arguments;
  return text;
}

// It compares each candidate with float64 before it is timed, and fails if one is wrong.
TEST(BenchTest, EveryCandidateOfTheSmallRowsIsCorrect) {
  const auto report =
      nlohmann::json::parse(bench("--limit 0.4 --seconds 1e-4 --threads 1 --weights none mean per-head --json"));
  std::set<std::string> candidates;
  const std::string rounding = "frozen, bfloat16";  // what it keeps, to 8 bits
  for (const auto& result : report.at("results")) {
    candidates.insert(result.at("candidate"));
    EXPECT_LT(result.at("error"), result.at("candidate") == rounding ? 2e-2 : 1e-5) << result;
    EXPECT_GT(result.at("us"), 0);
  }
  EXPECT_EQ(candidates, (std::set<std::string>{"eager", "folded", "frozen", rounding, "mha", "module", "sdpa"}));
  EXPECT_TRUE(report.at("peaks").contains("1"));
  for (const auto& skipped : report.at("skipped")) EXPECT_NE(skipped.at("reason"), "");
}

}  // namespace
}  // namespace xattn
