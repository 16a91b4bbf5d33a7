// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <string>

#include "base/text.h"

// A tensor's shape and type in messages.
namespace xattn::detail {

/// "[2, 6, 128]", or "undefined".
inline std::string shape_of(const at::Tensor& tensor) {
  return tensor.defined() ? formatted("[{}]", joined(tensor.sizes())) : "undefined";
}

/// "float32", as Python spells it, or "undefined".
inline std::string type_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::string(c10::getDtypeNames(tensor.scalar_type()).first) : "undefined";
}

}  // namespace xattn::detail
