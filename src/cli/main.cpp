// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <xattn/checkpoint.h>
#include <xattn/version.h>

#include <CLI/CLI.hpp>
#include <filesystem>

#include "cli.h"
#include "program.h"

void xattn::cli::check_output(const std::string& output, const std::vector<std::string>& inputs) {
  std::error_code ignored;
  if (!std::filesystem::exists(output, ignored)) return;
  for (const auto& input : inputs) {
    if (input.empty()) continue;
    for (const auto& file : open_checkpoint(input).files()) {
      if (std::filesystem::equivalent(file, output, ignored)) {
        throw CLI::ValidationError("output", "must not be an input, but is " + file);
      }
    }
  }
}

int main(int argc, char** argv) {
  CLI::App app("Looks into files of weights, runs the attention layers in them, writes them anew, and tells plans.", "xattn");
  app.set_version_flag("--version",
                       fmt::format("xattn {}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH));
  app.footer("Example: xattn inspect weights.safetensors");
  xattn::cli::add_inspect(app);
  xattn::cli::add_run(app);
  xattn::cli::add_verify(app);
  xattn::cli::add_convert(app);
  xattn::cli::add_explain(app);

  return program::run(app, argc, argv, [&app] {
    // CLI11's own check would come first, and hide a misspelt name.
    if (app.get_subcommands().empty())
      throw CLI::ValidationError("expected inspect, run, verify, convert or explain, but none came");
  });
}
