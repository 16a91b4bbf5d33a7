// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "mapped_file.h"

namespace xattn::detail {

/// A JSON document that comes from a file. Throws FileError, with "[reader] path: reason", unless it is one in UTF-8 in which
/// nothing lies deeper than 32 levels and no object has a name twice. Takes memory of up to some thirty times its length.
nlohmann::json parse_json(std::string_view reader, const std::string& path, Bytes text);

}  // namespace xattn::detail
