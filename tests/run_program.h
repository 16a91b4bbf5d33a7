// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "test_util.h"

// How tests run our programs.
namespace xattn::test {

struct ProgramResult {
  int status;
  std::string out, err;
};

/// Runs a program's `main` in this process, so that LibTorch is loaded once and not at every call, and in this directory.
/// `line` is the command that a user would type: words separated by spaces, or in quotes of one kind.
inline ProgramResult run_here(int (*program)(int, char**), const std::string& line, const std::string& directory) {
  std::vector<std::string> words;
  char quote = 0;
  bool inside = false;
  for (const char c : line) {
    if (quote == 0 ? c == '\'' || c == '"' : c == quote) {
      quote = quote == 0 ? c : 0;
      if (!inside) words.emplace_back();
      inside = true;
    } else if (c == ' ' && quote == 0) {
      inside = false;
    } else {
      if (!inside) words.emplace_back();
      inside = true;
      words.back() += c;
    }
  }
  std::vector<char*> arguments;
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);

  struct Restored {
    std::filesystem::path directory = std::filesystem::current_path();
    std::streambuf* out = std::cout.rdbuf();
    std::streambuf* err = std::cerr.rdbuf();
    int threads = at::get_num_threads();
    ~Restored() {
      std::filesystem::current_path(directory);
      std::cout.rdbuf(out);
      std::cerr.rdbuf(err);
      at::set_num_threads(threads);
    }
  } restored;
  std::ostringstream out, err;
  std::filesystem::current_path(directory);
  std::cout.rdbuf(out.rdbuf());
  std::cerr.rdbuf(err.rdbuf());
  const int status = program(static_cast<int>(words.size()), arguments.data());
  return {status, out.str(), err.str()};
}

/// Runs the program as a user starts it, in this directory.
inline ProgramResult run_process(const std::string& line, const TempDir& dir) {
  const int status = std::system(("cd " + dir.path() + " && " + line + " > .out 2> .err").c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_bytes(dir.file(".out")), read_bytes(dir.file(".err"))};
}

}  // namespace xattn::test
