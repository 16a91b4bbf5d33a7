// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace program {
class Command;
}

namespace xattn::cli {

/// The program `xattn`: parses the arguments, and returns what `main` returns.
int run(int argc, char** argv);

// One function for each subcommand: declares its arguments, and the job that runs once they are parsed. A job throws
// program::UsageError for wrong usage, anything else for a failure.

void add_convert(program::Command& xattn);
void add_explain(program::Command& xattn);
void add_inspect(program::Command& xattn);
void add_run(program::Command& xattn);
void add_verify(program::Command& xattn);

/// Throws program::UsageError if the output is one of the inputs, files of weights or tensors, or of their shards, whether or not their
/// names differ: a hard link is the same file. An input without a name is none. Throws FileError if the output cannot be written.
void check_output(const std::string& output, const std::vector<std::string>& inputs);

}  // namespace xattn::cli
