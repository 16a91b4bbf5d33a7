// SPDX-License-Identifier: Apache-2.0
#pragma once

// Visual question answering on boards of handwritten digits. Start reading with model.h, then questions.h, then task.cpp.
namespace vqa {

/// The program: parses the arguments, and returns what `main` returns.
int run(int argc, char** argv);

}  // namespace vqa
