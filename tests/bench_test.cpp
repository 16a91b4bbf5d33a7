// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/plan.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>

#include "programs/shapes.h"

namespace xattn {
namespace {

TEST(ShapesTest, NamesDiffer) {
  std::set<std::string> names;
  for (const auto& s : shapes::all()) EXPECT_TRUE(names.insert(s.name).second) << s.name;
}

TEST(ShapesTest, OperationsAndCheapestOrdersAreThoseCountedByHand) {
  struct Expected {
    const char* row;
    double gflop;
    Orders orders;
    double times_fewer;
  };
  constexpr auto kStandard = Order::standard;
  constexpr auto kQuery = Order::fold_into_query;
  constexpr auto kPrefold = Order::prefold;
  constexpr auto kContext = Order::fold_into_context;
  for (const auto& [row, gflop, orders, times_fewer] :
       {Expected{"reference example (B2 Lq4 Lk6)", 0.01163, {kPrefold, kPrefold}, 4.36},
        {"SD1.5 64x64", 4.314, {kStandard, kStandard}, 1},
        {"SD1.5 16x16", 4.163, {kContext, kContext}, 1.29},
        {"SD1.5 16x16, context kept", 3.557, {kContext, kContext}, 2.20},
        {"PixArt-a 512px, 30 of 120 tokens valid", 13.28, {kContext, kContext}, 2.22},
        {"Wan2.1-1.3B, 40 distinct keys", 317.8, {kStandard, kContext}, 1.52},
        {"Whisper-tiny decode", 0.8876, {kQuery, kQuery}, 59.16},
        {"Perceiver ImageNet conv", 4.044, {kQuery, kPrefold}, 1.68},
        {"FLAN-T5-base teacher 128, forward + backward", 3 * 13.69, {kStandard, kStandard}, 1}}) {
    const auto operations = shapes::count_operations(shapes::matching(row).at(0));
    EXPECT_NEAR(1e-9 * operations.standard, gflop, 1e-3 * gflop) << row;
    EXPECT_EQ(operations.orders, orders) << row;
    EXPECT_NEAR(operations.times_fewer, times_fewer, 0.01 * times_fewer) << row;
  }
}

TEST(ShapesTest, TheCheapestOrdersNeedNoMoreOperationsThanTheStandardOne) {
  for (const auto& shape : shapes::all()) EXPECT_GE(shapes::count_operations(shape).times_fewer, 1) << shape.name;
}

TEST(ShapesTest, ANameOrAPartOfIt) {
  const auto& name = shapes::all().front().name;
  ASSERT_EQ(shapes::matching(name).size(), 1U);
  EXPECT_GT(shapes::matching("sd1.5").size(), 1U);
  EXPECT_TRUE(shapes::matching("no such layer").empty());
}

// Runs the program, which must succeed, and returns its output.
std::string bench(const std::string& arguments) {
  auto* pipe = popen((XATTN_BENCH_PATH " " + arguments + " 2> /dev/null").c_str(), "r");
  std::string text;
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) text += static_cast<char>(c);
  EXPECT_EQ(pclose(pipe), 0) << arguments;
  return text;
}

// The program compares each candidate with float64 before it is timed, and fails if one is wrong.
TEST(BenchTest, EveryCandidateOfTheSmallRowsIsCorrect) {
  const auto report =
      nlohmann::json::parse(bench("--limit 0.4 --seconds 1e-4 --threads 1 --weights none mean per-head --json"));
  std::set<std::string> candidates;
  const std::string rounding = "frozen, bfloat16";  // stores weights and context with 8 significant bits
  for (const auto& result : report.at("results")) {
    candidates.insert(result.at("candidate"));
    EXPECT_LT(result.at("error"), result.at("candidate") == rounding ? 2e-2 : 1e-5) << result;
    EXPECT_GT(result.at("us"), 0);
  }
  EXPECT_EQ(candidates, (std::set<std::string>{"eager", "folded", "frozen", rounding, "mha", "module", "sdpa"}));
  EXPECT_TRUE(report.at("peaks").contains("1"));
  for (const auto& skipped : report.at("skipped")) EXPECT_NE(skipped.at("reason"), "");
}

// All rows of blocks, which takes seconds.
const nlohmann::json& results_of_blocks() {
  static const auto report = nlohmann::json::parse(bench("blocks --check --threads 2 --json"));
  return report.at("results");
}

TEST(BenchTest, EveryCandidateOfEveryBlockIsCorrect) {
  std::map<std::string, std::set<std::string>> candidates;
  for (const auto& result : results_of_blocks()) {
    const std::string name = result.at("candidate");
    candidates[result.at("row")].insert(name);
    EXPECT_LT(result.at("error"), name == "frozen, bfloat16" ? 2e-2 : 1e-5) << result;
  }
  std::istringstream rows(bench("blocks --list"));
  size_t count = 0;
  for (std::string row; std::getline(rows, row); ++count) {
    std::set<std::string> expected = {"eager", "frozen", "frozen, bfloat16"};
    if (row.find("vocabulary") == std::string::npos) expected.insert({"sdpa", "module"});
    if (row.find("contexts kept") != std::string::npos && row.find("12 blocks") != std::string::npos) {
      expected.insert("frozen, shared");
    }
    EXPECT_EQ(candidates[row], expected) << row;
  }
  EXPECT_EQ(count, candidates.size());
}

TEST(BenchTest, SharedContextsTakeNoMemoryAndBfloat16HalfOfIt) {
  std::map<std::string, int64_t> bytes;
  for (const auto& result : results_of_blocks()) {
    const std::string row = result.at("row");
    if (row.find("12 blocks, contexts kept") != std::string::npos && result.contains("context_bytes")) {
      bytes[result.at("candidate")] = result.at("context_bytes");
    }
  }
  constexpr int64_t kProjected = 12 * 2 * 1500 * 768 * 4;  // keys and values of all blocks, in float32
  EXPECT_GE(bytes.at("frozen"), kProjected);
  EXPECT_LT(bytes.at("frozen"), 1.1 * kProjected);
  EXPECT_LE(bytes.at("frozen, bfloat16"), 0.5 * static_cast<double>(bytes.at("frozen")) + 1024);
  EXPECT_EQ(bytes.at("frozen, shared"), 0);
}

TEST(BenchTest, NamesOfBlocksDiffer) {
  std::istringstream rows(bench("blocks --list"));
  std::set<std::string> names;
  for (std::string row; std::getline(rows, row);) EXPECT_TRUE(names.insert(row).second) << row;
  EXPECT_GT(names.size(), 10U);
}

}  // namespace
}  // namespace xattn
