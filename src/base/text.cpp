// SPDX-License-Identifier: Apache-2.0
#define FMT_HEADER_ONLY 1

#include "base/text.h"

#include <fmt/format.h>

#include <string>

namespace xattn::detail {

std::string vformatted(fmt::string_view format, fmt::format_args arguments) {
  return fmt::vformat(format, arguments);
}

}  // namespace xattn::detail
