// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>

namespace xattn::test {

/// Functions that distributed_test.cpp starts as processes, by name; they take and return what `main` does.
inline std::map<std::string, int (*)(int, char**)>& processes() {
  static std::map<std::string, int (*)(int, char**)> all;
  return all;
}

}  // namespace xattn::test
