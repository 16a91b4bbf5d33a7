// SPDX-License-Identifier: Apache-2.0
#pragma once

// Image captioning on boards of handwritten digits. Start reading with model.h, then task.cpp.
namespace caption {

/// The program: parses the arguments and runs a subcommand. Returns the exit status.
int run(int argc, char** argv);

}  // namespace caption
