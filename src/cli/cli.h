// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

// One function for each subcommand of the program: declares its arguments, and the job that runs once they are parsed. A job
// throws CLI::ParseError for wrong usage, anything else for a failure.
namespace xattn::cli {

void add_convert(CLI::App& program);
void add_explain(CLI::App& program);
void add_inspect(CLI::App& program);
void add_run(CLI::App& program);
void add_verify(CLI::App& program);

/// Throws CLI::ParseError if the output is one of the inputs, files of weights or tensors, or of their shards, whether or not their
/// names differ: a hard link is the same file. An input without a name is none.
void check_output(const std::string& output, const std::vector<std::string>& inputs);

}  // namespace xattn::cli
