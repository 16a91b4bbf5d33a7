// SPDX-License-Identifier: Apache-2.0
#pragma once

// Image captioning on boards of handwritten digits. Start reading with model.h, then decode.cpp, then task.cpp.
namespace caption {

/// The program: parses the arguments, and returns what `main` returns.
int run(int argc, char** argv);

}  // namespace caption
