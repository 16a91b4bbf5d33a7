// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Layout.h>
#include <c10/core/ScalarType.h>

#include <string_view>

#include "base/check.h"
#include "base/describe.h"

// Checks of what every function needs of a tensor.
namespace xattn::detail {

/// Throws c10::TypeError for a sparse, nested or quantized tensor, or one in another library's layout. An undefined one passes.
inline void check_dense(std::string_view caller, std::string_view name, const at::Tensor& x) {
  if (!x.defined() || (x.layout() == at::kStrided && !x.is_nested() && !x.is_quantized())) return;
  check_type(false, caller, "{} must be dense, but is {}.", name,
             x.is_nested()      ? "nested"
             : x.is_quantized() ? "quantized"
             : x.is_mkldnn()    ? "in the layout of oneDNN"
                                : "sparse");
}

/// Throws c10::TypeError for a type that attention is not computed in. An undefined tensor passes.
inline void check_computed_type(std::string_view caller, std::string_view name, const at::Tensor& x) {
  if (!x.defined()) return;
  const auto type = x.scalar_type();
  check_type(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, caller,
             "{} must be float64, float32, bfloat16 or float16, but is {}.", name, type_of(x));
}

}  // namespace xattn::detail
