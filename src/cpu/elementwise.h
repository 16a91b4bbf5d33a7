// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <utility>

// What modules compute between their products. In float32 on the CPU, and without gradients, it runs on the kernels' threads:
// LibTorch's (OpenMP) wait actively after a call, on the cores that the kernels need next. Elsewhere, and for inputs with other
// strides than those named, it runs on LibTorch's operators.
namespace xattn::detail {

/// Zeros on the CPU, for a result of any size.
at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType type = at::kFloat);

/// to.copy_(from), for tensors of one type and of equal sizes.
void copy_to(const at::Tensor& from, const at::Tensor& to);

/// x times a number.
at::Tensor scaled(const at::Tensor& x, double factor);

/// x.contiguous()
at::Tensor contiguous(const at::Tensor& x);

/// x + factor * y, of one shape and with the same strides.
at::Tensor added(const at::Tensor& x, const at::Tensor& y, double factor = 1);

/// x + tanh(gate) * branch; all contiguous. gate: [features] or [1], or undefined for none.
at::Tensor added(const at::Tensor& x, const at::Tensor& branch, const at::Tensor& gate);

/// x for two uses. The gradients of both are then added on the kernels' threads, rather than on LibTorch's by the autograd engine.
std::pair<at::Tensor, at::Tensor> for_two_uses(const at::Tensor& x);

namespace engine {

/// tanh(gate) for each of the features; undefined if the gate is.
at::Tensor open_gate(const at::Tensor& gate, int64_t features);

/// y = x + gate * branch, for n rows. gate: as `open_gate` returns it. y may be x or the branch.
void add_rows(const float* x, const at::Tensor& gate, const float* branch, float* y, int64_t n, int64_t features);

}  // namespace engine

}  // namespace xattn::detail
