// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace program {
class Command;
}

namespace xattn::cli {

/// The program `xattn`: parses the arguments and runs a subcommand. Returns the exit status.
int run(int argc, char** argv);

// Each function declares one subcommand: its arguments, and the job that runs when they are parsed. A job throws
// program::UsageError for wrong usage, and other errors for a failure.

void add_convert(program::Command& xattn);
void add_explain(program::Command& xattn);
void add_inspect(program::Command& xattn);
void add_run(program::Command& xattn);
void add_verify(program::Command& xattn);

/// Throws program::UsageError if the output is one of the inputs (files of tensors) or of their shards; a hard link counts as
/// the same file. Empty names of inputs are skipped. Throws FileError if the output cannot be written.
void check_output(const std::string& output, const std::vector<std::string>& inputs);

}  // namespace xattn::cli
