// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <string>

#include "base/text.h"

// A tensor's shape, type and device in messages: functions for `formatted` and the checks, which call them if they need the
// text. The tensor must outlive them.
namespace xattn::detail {

/// "[2, 6, 128]", or "undefined".
inline auto shape_of(const at::Tensor& tensor) {
  return [&tensor] { return tensor.defined() ? formatted("[{}]", joined(tensor.sizes())) : "undefined"; };
}

/// "float32", as Python spells it, or "undefined".
inline auto type_of(const at::Tensor& tensor) {
  return [&tensor] { return std::string(tensor.defined() ? c10::getDtypeNames(tensor.scalar_type()).first : "undefined"); };
}

/// "cuda:0".
inline auto name_of(at::Device device) {
  return [device] { return device.str(); };
}

}  // namespace xattn::detail
