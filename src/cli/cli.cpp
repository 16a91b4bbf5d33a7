// SPDX-License-Identifier: Apache-2.0
#include "cli/cli.h"

#include <xattn/checkpoint.h>
#include <xattn/version.h>

#include <filesystem>

#include "files/write_beside.h"
#include "programs/program.h"

void xattn::cli::check_output(const std::string& output, const std::vector<std::string>& inputs) {
  std::error_code ignored;
  const bool exists = std::filesystem::exists(output, ignored);
  for (const auto& input : exists ? inputs : std::vector<std::string>()) {
    if (input.empty()) continue;
    for (const auto& file : open_checkpoint(input).files()) {
      if (std::filesystem::equivalent(file, output, ignored)) {
        throw program::UsageError("output", "must not be an input, but is " + file);
      }
    }
  }
  detail::check_writable("output", output);
}

int xattn::cli::run(int argc, char** argv) {
  program::Program program(
      "xattn", "Inspects files of weights, runs and verifies the attention layers in them, converts them, and explains plans.");
  program.version(version().text());
  program.footer("Example: xattn inspect weights.safetensors");
  add_inspect(program);
  add_run(program);
  add_verify(program);
  add_convert(program);
  add_explain(program);
  return program.run_subcommand(argc, argv, "expected inspect, run, verify, convert or explain, but none came");
}
