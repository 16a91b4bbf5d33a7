// SPDX-License-Identifier: Apache-2.0
#pragma once

// Visual question answering on boards of handwritten digits. Start reading with model.h, then questions.h, then task.cpp.
namespace vqa {

/// The program: parses the arguments and runs a subcommand. Returns the exit status.
int run(int argc, char** argv);

}  // namespace vqa
