// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <filesystem>
#include <span>
#include <string>

#include "fuzz/targets.h"
#include "test_util.h"

namespace xattn::test {
namespace {

// The inputs in tests/data/fuzz: seeds from which fuzzers start, and their findings in `crashes`.
class FuzzTest : public testing::TestWithParam<FuzzTarget> {};

TEST_P(FuzzTest, ReadsOrRefusesEachStoredInput) {
  int inputs = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(data_path("fuzz/" + std::string(GetParam().name)))) {
    if (!entry.is_regular_file()) continue;
    SCOPED_TRACE(entry.path().string());
    const auto bytes = read_bytes(entry.path().string());
    EXPECT_NO_THROW(GetParam().run(std::as_bytes(std::span(bytes))));
    ++inputs;
  }
  EXPECT_GT(inputs, 3);
}

INSTANTIATE_TEST_SUITE_P(Targets, FuzzTest, testing::ValuesIn(kFuzzTargets), [](const auto& target) {
  return std::string(target.param.name);
});

}  // namespace
}  // namespace xattn::test
