// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xattn/load.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <vector>

// Several processes on loopback; each compares its results with those of one process alone: see ranks/rank.cpp.
namespace xattn::test {
namespace {

namespace fs = std::filesystem;

class DistributedTest : public testing::TestWithParam<int> {
 protected:
  DistributedTest() : folder_(fs::temp_directory_path() / ("xattn_ranks." + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~DistributedTest() override { fs::remove_all(folder_); }

  void run(const std::string& scenario,
           int size,
           std::chrono::seconds limit = std::chrono::seconds(120),
           bool last_stops = false) {
    start_all({XATTN_TESTS_PATH, "rank", scenario}, size, limit, last_stops);
  }

  // The processes use a store that is already running, as torchrun's agent has one, so that no port can be taken. A last rank
  // that stops is killed when the others have ended.
  void start_all(const std::vector<std::string>& command, int size, std::chrono::seconds limit, bool last_stops = false) {
    c10d::TCPStoreOptions options;
    options.port = 0;
    options.isServer = true;
    options.waitWorkers = false;
    const c10d::TCPStore store("127.0.0.1", options);
    std::vector<pid_t> processes;
    for (int rank = 0; rank < size; ++rank) {
      processes.push_back(start(command, rank,
                                {"RANK=" + std::to_string(rank), "WORLD_SIZE=" + std::to_string(size), "MASTER_ADDR=127.0.0.1",
                                 "MASTER_PORT=" + std::to_string(store.getPort()), "TORCHELASTIC_USE_AGENT_STORE=True"}));
    }
    const auto last = processes.back();
    if (last_stops) processes.pop_back();
    wait(command.back(), processes, limit);
    if (!last_stops) return;
    int status = 0;
    EXPECT_EQ(waitpid(last, &status, WNOHANG | WUNTRACED), last) << "the last rank has not stopped";
    EXPECT_TRUE(WIFSTOPPED(status)) << "the last rank has not stopped";
    kill(last, SIGKILL);
    waitpid(last, &status, 0);
  }

  pid_t start(std::vector<std::string> command, int rank, std::vector<std::string> variables) {
    for (char** each = environ; *each; ++each) variables.emplace_back(*each);
    const auto pointers = [](std::vector<std::string>& strings) {
      std::vector<char*> result;
      for (auto& string : strings) result.push_back(string.data());
      result.push_back(nullptr);
      return result;
    };
    const auto arguments = pointers(command), environment = pointers(variables);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, said_by(rank).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    pid_t process = 0;
    EXPECT_EQ(posix_spawn(&process, command.front().c_str(), &actions, nullptr, arguments.data(), environment.data()), 0);
    posix_spawn_file_actions_destroy(&actions);
    return process;
  }

  void wait(const std::string& scenario, std::vector<pid_t> processes, std::chrono::seconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    for (size_t rank = 0; rank < processes.size(); ++rank) {
      int status = 0;
      while (waitpid(processes[rank], &status, WNOHANG) == 0) {
        if (std::chrono::steady_clock::now() > end) {
          kill(processes[rank], SIGKILL);
          ADD_FAILURE() << scenario << ": rank " << rank << " hangs";
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      std::ostringstream said;
      said << std::ifstream(said_by(static_cast<int>(rank))).rdbuf();
      EXPECT_FALSE(WIFSIGNALED(status)) << scenario << ", rank " << rank << " ended by signal " << WTERMSIG(status);
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << scenario << ", rank " << rank << ": " << said.str();
    }
  }

  fs::path said_by(int rank) const { return folder_ / std::to_string(rank); }

  fs::path folder_;
};

TEST_P(DistributedTest, OutputWeightsAndGradientsAreThoseOfOneProcess) {
  run("equal", GetParam());
}

TEST_P(DistributedTest, EachRanksOwnQueriesGetWhatOneProcessGivesThem) {
  run("own-queries", GetParam());
}

TEST_P(DistributedTest, LargeLogitsEmptySharesAndContextsWithoutGradientsAreAsInOneProcess) {
  run("corners", GetParam());
}

TEST_P(DistributedTest, WhatIsExchangedDoesNotGrowWithTheContext) {
  run("traffic", GetParam());
}

TEST_P(DistributedTest, RefusesBadInputOnAllRanksAlike) {
  run("errors", GetParam());
}

TEST_P(DistributedTest, ARankThatDiesMakesTheOthersFailInTime) {
  if (GetParam() > 1) run("death", GetParam(), std::chrono::seconds(60));
}

TEST_P(DistributedTest, ARankThatDiesBeforeItsBackwardPassMakesTheOthersFailInTime) {
  if (GetParam() > 1) run("death-in-backward", GetParam(), std::chrono::seconds(60));
}

TEST_P(DistributedTest, ARankThatFallsSilentMakesTheOthersFailInTime) {
  if (GetParam() > 1) run("silence", GetParam(), std::chrono::seconds(60), /*last_stops=*/true);
}

#ifdef XATTN_VQA_PATH
// A program that trains: several processes go through the same losses as one, and reach the same model.
TEST_P(DistributedTest, ProcessesTrainAsOne) {
  const auto train = [this](int size) {
    const auto file = folder_ / ("trained." + std::to_string(size));
    start_all({XATTN_VQA_PATH, "train", "--device", "cpu", "--steps", "8", "--boards", "1", "--output", file.string()}, size,
              std::chrono::seconds(200));
    return load_tensors(file.string());
  };
  if (GetParam() == 1) return;  // the single process that others are compared with
  const auto alone = train(1), together = train(GetParam());
  ASSERT_EQ(alone.size(), together.size());
  for (const auto& [name, expected] : alone) {
    ASSERT_TRUE(together.contains(name)) << name;
    const auto a = together.at(name).to(torch::kDouble), b = expected.to(torch::kDouble);
    // Adam divides gradients by their size, so one that is all rounding still moves its parameter by a step, 8 of at most 2e-3.
    const bool follows_rounding = name.starts_with("model.") && (a - b).abs().max().item<double>() < 1e-3;
    EXPECT_TRUE(torch::allclose(a, b, 1e-3, 1e-4) || follows_rounding) << name << ": off by " << (a - b).abs().max();
  }
}

TEST_P(DistributedTest, ATrainingThatLosesAProcessSaysSo) {
  if (GetParam() > 1)
    start_all({XATTN_TESTS_PATH, "trainee", (folder_ / "lost").string(), "5", "dies"}, GetParam(), std::chrono::seconds(60));
}

// A stopped training continues with any number of processes, with the losses and the state of one that never stopped.
TEST_P(DistributedTest, ATrainingGoesOnWithAnotherNumberOfProcesses) {
  const auto train = [this](const std::string& name, int size, int last) {
    start_all({XATTN_TESTS_PATH, "trainee", (folder_ / name).string(), std::to_string(last)}, size, std::chrono::seconds(60));
  };
  train("alone", 1, 24);
  train("stopped", GetParam(), 9);
  train("stopped", GetParam() % 4 + 1, 17);
  train("stopped", 1, 24);
  const auto expected = load_tensors((folder_ / "alone").string()), found = load_tensors((folder_ / "stopped").string());
  ASSERT_EQ(found.size(), expected.size());
  EXPECT_EQ(expected.at("curve.loss").size(1), 24);
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(found.contains(name)) << name;
    EXPECT_TRUE(torch::allclose(found.at(name).to(torch::kDouble), tensor.to(torch::kDouble), 1e-8, 1e-10)) << name;
  }
}
#endif

INSTANTIATE_TEST_SUITE_P(Ranks, DistributedTest, testing::Values(1, 2, 3, 4));

}  // namespace
}  // namespace xattn::test
