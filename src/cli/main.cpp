// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <xattn/version.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <string>

#include "cli.h"

namespace {

enum ExitStatus { kSuccess = 0, kFailure = 1, kWrongUsage = 2 };

ExitStatus fail(ExitStatus status, const std::string& message) {
  std::cerr << "xattn: " << message.substr(0, message.find('\n')) << "\n";
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App program("Looks into files of cross-attention weights, and runs the layers in them.", "xattn");
  program.set_version_flag("--version",
                           fmt::format("xattn {}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH));
  program.footer("Example: xattn inspect weights.safetensors");
  xattn::cli::add_inspect(program);
  xattn::cli::add_run(program);

  try {
    program.parse(argc, argv);
    // CLI11's own check would come first, and hide a misspelt name.
    if (program.get_subcommands().empty()) return fail(kWrongUsage, "expected inspect or run, but neither came");
    return kSuccess;
  } catch (const CLI::Success& help) {
    return program.exit(help);
  } catch (const CLI::ParseError& error) {
    return fail(kWrongUsage, error.what());
  } catch (const c10::Error& error) {
    return fail(kFailure, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(kFailure, error.what());
  }
}
