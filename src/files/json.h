// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "files/mapped_file.h"

namespace xattn::detail {

inline constexpr size_t kMaxJson = 100'000'000;  ///< bytes: the index of a sharded set of a million tensors

/// A JSON document that comes from a file. Throws FileError, with "[reader] path: reason", unless it is one in UTF-8 of at most
/// `most` bytes and two million values, in which nothing lies deeper than 32 levels and no object has a name twice. Takes memory
/// of up to some thirty times its length, and at most some 200 bytes for each value beside the texts themselves.
XATTN_API nlohmann::json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most = kMaxJson);

}  // namespace xattn::detail
