// SPDX-License-Identifier: Apache-2.0
#include "common/write_file.h"

#include <fmt/format.h>

#include <ostream>

#include "files/write_beside.h"
#include "programs/interrupt.h"

namespace examples {
namespace {

constexpr std::string_view kOutput = "output";

}  // namespace

void write_file(const std::string& path, std::string_view bytes) {
  const program::Interrupt interrupt;
  xattn::detail::write_beside(
      kOutput, path, [bytes](std::ostream& out) { out.write(bytes.data(), static_cast<std::streamsize>(bytes.size())); });
  interrupt.check(fmt::format("stopped; {} is written", path));
}

void check_output(const std::string& path) {
  xattn::detail::check_writable(kOutput, path);
}

}  // namespace examples
