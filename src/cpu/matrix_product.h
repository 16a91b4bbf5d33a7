// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

// The matrix products of modules, differentiable to any order: in float32 on the CPU by this library's kernels (with AVX2 or
// AVX-512), elsewhere by LibTorch's operators. The bits of a result do not depend on the number of threads.
namespace xattn::detail {

/// a [..., m, k], b [..., k, n] -> [..., m, n]; two to four axes, the leading ones of equal sizes.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b);

/// The same plus a bias: [n], or for three axes [B, 1, n]; none if undefined.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias);

/// The same for logits: float16 is multiplied in float32, because a logit may exceed the largest float16.
at::Tensor logits_product(const at::Tensor& a, const at::Tensor& b);
at::Tensor logits_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias);

/// The type of a product of x: that of x, or autocast's if autocast is on.
at::ScalarType product_type(const at::Tensor& x);

/// x [..., in], weight [out, in], bias [out] or undefined -> [..., out].
at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace xattn::detail
