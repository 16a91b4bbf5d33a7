// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string>
#include <string_view>
#include <utility>

// How the library refuses bad input: one mould for all messages, "[caller] argument must be ..., but is ....", thrown as one of
// torch's typed errors.
namespace xattn::detail {

/// Throws c10::ValueError with "[caller] message" unless `ok`. The message is only formatted when it is needed.
template <typename... Args>
void check_value(bool ok, std::string_view caller, fmt::format_string<Args...> format, Args&&... args) {
  TORCH_CHECK_VALUE(ok, fmt::format("[{}] {}", caller, fmt::format(format, std::forward<Args>(args)...)));
}

/// The same for types and devices: throws c10::TypeError.
template <typename... Args>
void check_type(bool ok, std::string_view caller, fmt::format_string<Args...> format, Args&&... args) {
  TORCH_CHECK_TYPE(ok, fmt::format("[{}] {}", caller, fmt::format(format, std::forward<Args>(args)...)));
}

/// "[2, 6, 128]", or "undefined".
inline std::string shape_of(const at::Tensor& tensor) {
  return tensor.defined() ? fmt::format("[{}]", fmt::join(tensor.sizes(), ", ")) : "undefined";
}

/// "float32", the spelling of Python: shorter than c10::toString and known to everybody.
inline std::string_view type_name(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return "float64";
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kBool: return "bool";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    case at::kShort: return "int16";
    case at::kChar: return "int8";
    case at::kByte: return "uint8";
    default: return c10::toString(type);
  }
}

/// "float32 tensor", with the device where it matters: what came, for messages.
inline std::string_view type_of(const at::Tensor& tensor) {
  return tensor.defined() ? type_name(tensor.scalar_type()) : "undefined";
}

}  // namespace xattn::detail
