// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <xattn/version.h>

#include <CLI/CLI.hpp>

#include "cli.h"
#include "program.h"

int main(int argc, char** argv) {
  CLI::App app("Looks into files of cross-attention weights, and runs the layers in them.", "xattn");
  app.set_version_flag("--version",
                       fmt::format("xattn {}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH));
  app.footer("Example: xattn inspect weights.safetensors");
  xattn::cli::add_inspect(app);
  xattn::cli::add_run(app);

  return program::run(app, argc, argv, [&app] {
    // CLI11's own check would come first, and hide a misspelt name.
    if (app.get_subcommands().empty()) throw CLI::ValidationError("expected inspect or run, but neither came");
  });
}
