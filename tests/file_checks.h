// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xattn/checkpoint.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <string>
#include <utility>

#include "test_util.h"

// Expectations shared by the tests of all file formats.
namespace xattn::test {

/// The FileError that `call` throws, without its start, "[reader] path: "; it must be one line.
template <class F>
std::string refusal_by(const std::string& reader, const std::string& path, F&& call) {
  const auto message = error_of<FileError>(std::forward<F>(call));
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  const auto start = "[" + reader + "] " + path + ": ";
  EXPECT_TRUE(message.starts_with(start)) << message;
  return message.substr(std::min(message.size(), start.size()));
}

/// The same names, types and values.
inline void expect_equal(const NamedTensors& tensors, const NamedTensors& expected) {
  EXPECT_EQ(tensors.size(), expected.size());
  for (const auto& [name, value] : expected) {
    ASSERT_TRUE(tensors.contains(name)) << name;
    EXPECT_EQ(tensors.at(name).scalar_type(), value.scalar_type()) << name;
    EXPECT_TRUE(at::equal(tensors.at(name), value)) << name;
  }
}

/// Expects `save(path, tensors)` to keep the old file, and to leave no other, when the new one does not fit on the disk.
template <class Save>
void expect_old_file_kept_on_full_disk(const Save& save) {
  // Files cannot grow beyond 512 bytes, as on a full disk.
  const TempDir dir;
  save(dir.file("x"), {{"old", at::ones({1})}});
  const auto old = read_bytes(dir.file("x"));
  const NamedTensors large = {{"new", at::ones({10000})}};
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{512, 512};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      save(dir.file("x"), large);
    } catch (const FileError& error) {
      _exit(std::string(error.what()).ends_with("/x: cannot be written: File too large") ? 7 : 8);
    }
    _exit(9);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(read_bytes(dir.file("x")), old);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1);
}

/// Expects `save(path, lazy tensors)` to refuse a tensor that is made otherwise than announced, and to change nothing.
template <class Save>
void expect_only_announced_tensors(const std::string& reader, const Save& save) {
  const TempDir dir;
  const auto refusal = [&](const at::Tensor& made) {
    const LazyTensors tensors{{{"a", {at::kFloat, {2, 3}}}, {"b", {at::kFloat, {1}}}},
                              [&](const std::string& name) { return name == "a" ? made : at::ones({1}); }};
    return error_of<c10::ValueError>([&] { save(dir.file("x"), tensors); });
  };
  const auto message = [&](const std::string& made) {
    return "[" + reader + "] tensor \"a\" must be made as announced, float32 [2, 3], but is " + made + ".";
  };
  const auto expect_refusals = [&] {
    EXPECT_EQ(refusal(at::ones({2, 3}, at::kDouble)), message("float64 [2, 3]"));
    EXPECT_EQ(refusal(at::ones({2, 3}, at::kInt)), message("int32 [2, 3]"));
    EXPECT_EQ(refusal(at::ones({3, 2})), message("float32 [3, 2]"));
    EXPECT_EQ(refusal(at::ones({2, 4})), message("float32 [2, 4]"));
    EXPECT_EQ(refusal(at::Tensor()), message("undefined undefined"));
  };
  expect_refusals();
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  save(dir.file("x"), lazy({{"old", at::ones({1})}}));
  const auto old = read_bytes(dir.file("x"));
  expect_refusals();
  EXPECT_EQ(read_bytes(dir.file("x")), old);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1);
}

}  // namespace xattn::test
