// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <string_view>

// Shared by the reader and the writer of safetensors files.
namespace xattn::detail {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

inline constexpr std::string_view kSafetensors = "safetensors";           // in messages
inline constexpr std::string_view kSafetensorsMetadata = "__metadata__";  // the name that tensors must not have
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;            // bytes, the limit of the official implementation

/// A type of tensors and its name in the format.
struct SafetensorsType {
  at::ScalarType type;
  std::string_view name;
};

/// In the order in which tensors lie in a file: decreasing alignment, then as in the official implementation.
inline constexpr std::array kSafetensorsTypes{SafetensorsType{at::kUInt64, "U64"},
                                              SafetensorsType{at::kLong, "I64"},
                                              SafetensorsType{at::kDouble, "F64"},
                                              SafetensorsType{at::kComplexFloat, "C64"},
                                              SafetensorsType{at::kFloat, "F32"},
                                              SafetensorsType{at::kUInt32, "U32"},
                                              SafetensorsType{at::kInt, "I32"},
                                              SafetensorsType{at::kBFloat16, "BF16"},
                                              SafetensorsType{at::kHalf, "F16"},
                                              SafetensorsType{at::kUInt16, "U16"},
                                              SafetensorsType{at::kShort, "I16"},
                                              SafetensorsType{at::kFloat8_e5m2fnuz, "F8_E5M2FNUZ"},
                                              SafetensorsType{at::kFloat8_e4m3fnuz, "F8_E4M3FNUZ"},
                                              SafetensorsType{at::kFloat8_e8m0fnu, "F8_E8M0"},
                                              SafetensorsType{at::kFloat8_e4m3fn, "F8_E4M3"},
                                              SafetensorsType{at::kFloat8_e5m2, "F8_E5M2"},
                                              SafetensorsType{at::kChar, "I8"},
                                              SafetensorsType{at::kByte, "U8"},
                                              SafetensorsType{at::kBool, "BOOL"}};

inline const SafetensorsType* find_safetensors_type(at::ScalarType type) {
  const auto* found = std::ranges::find(kSafetensorsTypes, type, &SafetensorsType::type);
  return found == kSafetensorsTypes.end() ? nullptr : found;
}

inline const SafetensorsType* find_safetensors_type(std::string_view name) {
  const auto* found = std::ranges::find(kSafetensorsTypes, name, &SafetensorsType::name);
  return found == kSafetensorsTypes.end() ? nullptr : found;
}

}  // namespace xattn::detail
