// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

// Shared by the reader and the writer of safetensors files; names of types are in types.h.
namespace xattn::detail {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

inline constexpr std::string_view kSafetensors = "safetensors";           // in messages
inline constexpr std::string_view kSafetensorsMetadata = "__metadata__";  // the name that tensors must not have
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;            // bytes, the limit of the official implementation

}  // namespace xattn::detail
