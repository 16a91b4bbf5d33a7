// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "plan/runs_on.h"
#include "ranks/processes.h"

// Runs the tests; or, started by distributed_test.cpp as `xattn_tests NAME ARGUMENT...`, one of the processes of such a test.
// Both on the kernels that XATTN_KERNELS names, if it is set; exits with 77 if this processor cannot run them.
int main(int argc, char** argv) {
  const char* kernels = std::getenv("XATTN_KERNELS");
  if (kernels && !xattn::detail::use_kernels_named(kernels)) {
    std::cout << "This processor cannot run the kernels for " << kernels << ".\n";
    return 77;
  }
  const auto& processes = xattn::test::processes();
  if (const auto found = processes.find(argc > 1 ? argv[1] : ""); found != processes.end()) {
    return found->second(argc - 1, argv + 1);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
