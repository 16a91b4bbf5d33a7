// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "files/mapped_file.h"

namespace xattn::detail {

inline constexpr size_t kMaxJson = 100'000'000;  ///< bytes: the index of a sharded set of a million tensors

/// Parses a JSON document from a file. Throws FileError, with "[reader] path: reason", unless it is valid JSON in UTF-8 of at
/// most `most` bytes, two million values and 32 levels, in which no object has a name twice. Takes up to about thirty times its
/// length in memory, and about 200 bytes for each value besides the texts.
XATTN_API nlohmann::json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most = kMaxJson);

}  // namespace xattn::detail
