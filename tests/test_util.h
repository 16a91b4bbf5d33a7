// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

namespace xattn::test {

/// A file of tests/data, from whatever directory the tests are run.
inline std::string data_path(const std::string& name) {
  return XATTN_TEST_DATA "/" + name;
}

/// The message, without backtrace, of the E that `call` throws. Fails the test if it throws anything else, or nothing.
template <class E, class F>
std::string error_of(F&& call) {
  try {
    std::forward<F>(call)();
    ADD_FAILURE() << "expected an error, but nothing was thrown";
  } catch (const E& error) {
    if constexpr (std::is_base_of_v<c10::Error, E>) {
      return error.what_without_backtrace();
    } else {
      return error.what();
    }
  } catch (const std::exception& error) {
    ADD_FAILURE() << "expected an error of another type, but this was thrown: " << error.what();
  }
  return "";
}

/// A new empty directory, removed with all that is in it at the end of the test.
class TempDir {
 public:
  TempDir() : path_(testing::TempDir() + "xattn_XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) {
      throw std::filesystem::filesystem_error("mkdtemp", path_, std::error_code(errno, std::generic_category()));
    }
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace xattn::test
