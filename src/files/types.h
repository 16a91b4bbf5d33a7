// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

// The types that tensors in files may have.
namespace xattn::detail {

/// A type, and how each format names it. Pickles call torch.float32 "float32", and store it in a "FloatStorage".
struct FileType {
  at::ScalarType type;
  std::string_view safetensors;  ///< empty if the format does not have it
  uint64_t pt2;                  ///< from torch/_export/serde/schema.py and not from c10
  bool has_storage_class;        ///< in Python; tensors of other types lie in an "UntypedStorage" and name their type
};

/// In the order in which tensors lie in a safetensors file: decreasing alignment, then as in the official implementation.
inline constexpr std::array kFileTypes{FileType{at::kUInt64, "U64", 35, false},
                                       FileType{at::kLong, "I64", 5, true},
                                       FileType{at::kDouble, "F64", 8, true},
                                       FileType{at::kComplexFloat, "C64", 10, true},
                                       FileType{at::kFloat, "F32", 7, true},
                                       FileType{at::kUInt32, "U32", 34, false},
                                       FileType{at::kInt, "I32", 4, true},
                                       FileType{at::kBFloat16, "BF16", 13, true},
                                       FileType{at::kHalf, "F16", 6, true},
                                       FileType{at::kUInt16, "U16", 28, false},
                                       FileType{at::kShort, "I16", 3, true},
                                       FileType{at::kFloat8_e5m2fnuz, "F8_E5M2FNUZ", 32, false},
                                       FileType{at::kFloat8_e4m3fnuz, "F8_E4M3FNUZ", 31, false},
                                       FileType{at::kFloat8_e8m0fnu, "F8_E8M0", 33, false},
                                       FileType{at::kFloat8_e4m3fn, "F8_E4M3", 29, false},
                                       FileType{at::kFloat8_e5m2, "F8_E5M2", 30, false},
                                       FileType{at::kChar, "I8", 2, true},
                                       FileType{at::kByte, "U8", 1, true},
                                       FileType{at::kBool, "BOOL", 12, true},
                                       FileType{at::kComplexDouble, "", 11, true},
                                       FileType{at::kComplexHalf, "", 9, false}};

/// The type for which `is_meant` is true; null if there is none.
template <class IsMeant>
const FileType* find_type(const IsMeant& is_meant) {
  const auto* found = std::ranges::find_if(kFileTypes, is_meant);
  return found == kFileTypes.end() ? nullptr : found;
}

inline const FileType* find_type(at::ScalarType type) {
  return find_type([type](const FileType& each) { return each.type == type; });
}

}  // namespace xattn::detail
