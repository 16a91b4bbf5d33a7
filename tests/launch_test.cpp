// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

namespace xattn::test {
namespace {

using Variables = std::map<std::string, std::string>;

// The environment of programs that start others, and nothing of what started this one.
class LaunchTest : public testing::Test {
 protected:
  LaunchTest() {
    for (const auto* name : kNames) {
      if (const char* value = std::getenv(name)) before_[name] = value;
    }
  }
  ~LaunchTest() override { set(before_); }

  static void set(const Variables& variables) {
    for (const auto* name : kNames) unsetenv(name);
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  }

  static std::optional<launch::Place> find(const Variables& variables) {
    set(variables);
    return launch::find_place();
  }

  static std::string refusal(const Variables& variables) {
    try {
      find(variables);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }

 private:
  static constexpr const char* kNames[] = {"RANK",
                                           "WORLD_SIZE",
                                           "LOCAL_RANK",
                                           "MASTER_ADDR",
                                           "MASTER_PORT",
                                           "OMPI_COMM_WORLD_RANK",
                                           "OMPI_COMM_WORLD_SIZE",
                                           "OMPI_COMM_WORLD_LOCAL_RANK",
                                           "TORCHELASTIC_USE_AGENT_STORE"};
  Variables before_;
};

TEST_F(LaunchTest, AProgramStartedByItselfHasNoPlace) {
  EXPECT_FALSE(find({}).has_value());
  EXPECT_FALSE(find({{"MASTER_ADDR", "a"}, {"MASTER_PORT", "1"}, {"WORLD_SIZE", "2"}}).has_value());
}

TEST_F(LaunchTest, ReadsWhatTorchrunSets) {
  const auto place = find({{"RANK", "5"},
                           {"WORLD_SIZE", "8"},
                           {"LOCAL_RANK", "1"},
                           {"MASTER_ADDR", "node0"},
                           {"MASTER_PORT", "29500"},
                           {"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->rank, 5);
  EXPECT_EQ(place->size, 8);
  EXPECT_EQ(place->local_rank, 1);
  EXPECT_EQ(place->address, "node0");
  EXPECT_EQ(place->port, 29500);
  EXPECT_TRUE(place->store_is_there);
}

TEST_F(LaunchTest, ReadsWhatMpirunSets) {
  const auto place = find({{"OMPI_COMM_WORLD_RANK", "2"},
                           {"OMPI_COMM_WORLD_SIZE", "3"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                           {"MASTER_ADDR", "10.0.0.1"},
                           {"MASTER_PORT", "65535"}});
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->rank, 2);
  EXPECT_EQ(place->size, 3);
  EXPECT_EQ(place->local_rank, 0);
  EXPECT_EQ(place->port, 65535);
  EXPECT_FALSE(place->store_is_there);
}

TEST_F(LaunchTest, NamesTheVariableThatIsMissingOrMakesNoSense) {
  const Variables right = {{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "29500"}};
  const auto with = [&](const std::string& name, const std::string& value) {
    auto variables = right;
    variables[name] = value;
    return refusal(variables);
  };
  const auto without = [&](const std::string& name) {
    auto variables = right;
    variables.erase(name);
    return refusal(variables);
  };
  EXPECT_EQ(refusal(right), "");
  EXPECT_EQ(without("WORLD_SIZE"), "WORLD_SIZE must be set beside the rank, but is not");
  EXPECT_EQ(without("MASTER_ADDR"), "MASTER_ADDR must be set beside the rank, but is not");
  EXPECT_EQ(without("MASTER_PORT"), "MASTER_PORT must be set beside the rank, but is not");
  EXPECT_EQ(with("RANK", "2"), "RANK must be a number from 0 to 1, but is '2'");
  EXPECT_EQ(with("RANK", "one"), "RANK must be a number from 0 to 1, but is 'one'");
  EXPECT_EQ(with("WORLD_SIZE", "0"), "WORLD_SIZE must be a number from 1 to 2147483647, but is '0'");
  EXPECT_EQ(with("MASTER_PORT", "65536"), "MASTER_PORT must be a number from 1 to 65535, but is '65536'");
  EXPECT_EQ(with("MASTER_PORT", "29500x"), "MASTER_PORT must be a number from 1 to 65535, but is '29500x'");
}

}  // namespace
}  // namespace xattn::test
