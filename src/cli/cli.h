// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace CLI {
class App;
}

// One function for each subcommand of the program: declares its arguments, and the job that runs once they are parsed. A job
// throws CLI::ParseError for wrong usage, anything else for a failure.
namespace xattn::cli {

void add_inspect(CLI::App& program);
void add_run(CLI::App& program);

}  // namespace xattn::cli
