// SPDX-License-Identifier: Apache-2.0
#include "files/check_file.h"

#include <algorithm>
#include <system_error>

namespace xattn::detail {

std::string list(std::string_view what, const std::vector<std::string>& names) {
  constexpr size_t kMostNames = 100;
  constexpr size_t kMostOfEntry = 2 * kMostOfName;  // a name and its defect
  if (names.empty()) return "";
  std::vector<std::string> listed;
  for (size_t i = 0; i < std::min(names.size(), kMostNames); ++i) listed.push_back(shown(names[i], kMostOfEntry));
  const auto more = names.size() - listed.size();
  return formatted("; {}: {}{}", what, joined(listed), more == 0 ? "" : formatted(" and {} more", more));
}

std::string system_reason(int error) {
  return std::generic_category().message(error);
}

}  // namespace xattn::detail
