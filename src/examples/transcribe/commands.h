// SPDX-License-Identifier: Apache-2.0
#pragma once

// Speech to text with Whisper: an encoder and a decoder that others trained, on this library. Start reading with model.h, then
// search.cpp and words.cpp.
namespace transcribe {

/// The program: parses the arguments and runs the job. Returns the exit status.
int run(int argc, char** argv);

}  // namespace transcribe
