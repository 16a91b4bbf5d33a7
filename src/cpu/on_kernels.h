// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

// Where modules compute.
namespace xattn::detail {

/// Whether computations on these tensors run on the library's kernels (AVX2 or AVX-512): all are float32 on the CPU.
bool run_on_kernels(std::initializer_list<at::Tensor> all);

/// Whether gradients of a function of these tensors are recorded; some may be undefined.
bool is_recorded(std::initializer_list<at::Tensor> all);

}  // namespace xattn::detail
