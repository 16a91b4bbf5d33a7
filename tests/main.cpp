// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ranks/processes.h"

// Runs the tests; or, started by distributed_test.cpp as `xattn_tests NAME ARGUMENT...`, one of the processes of such a test.
int main(int argc, char** argv) {
  const auto& processes = xattn::test::processes();
  if (const auto found = processes.find(argc > 1 ? argv[1] : ""); found != processes.end()) {
    return found->second(argc - 1, argv + 1);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
