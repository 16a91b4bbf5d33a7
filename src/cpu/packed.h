// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "kernels/kernels.h"

// The memory of tensors as operands of the kernels.
namespace xattn::detail {

/// Packed right sides [k, n], one matrix after the other; float32 or bfloat16.
struct Packed {
  at::Tensor data;
  int64_t k = 0, n = 0;
};

namespace engine {

constexpr int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
constexpr int64_t round_up(int64_t n, int64_t unit) {
  return divided_up(n, unit) * unit;
}

inline const float* data(const at::Tensor& x) {
  return x.const_data_ptr<float>();
}
inline float* mutable_data(const at::Tensor& x) {
  return x.mutable_data_ptr<float>();
}

// x [..., n] with rows of consecutive numbers, copied if necessary.
inline at::Tensor with_rows(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline Storage storage_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? Storage::float32 : Storage::bfloat16;
}

// The packed right side, with k rows, that begins at element `offset` of x.
inline RightSide packed(const at::Tensor& x, int64_t offset, int64_t k) {
  return kernels().packed(x.const_data_ptr(), k, storage_of(x)).advanced(offset);
}

inline RightSide packed(const Packed& p, int64_t which = 0) {
  return packed(p.data, which * kernels().packed_size(p.k, p.n), p.k);
}

// The same for plain rows.
inline RightSide plain_rows(const at::Tensor& x, int64_t offset, int64_t row_stride) {
  return kernels().rows(x.const_data_ptr(), row_stride, storage_of(x)).advanced(offset);
}

// y [n, weight.n] = x [n, weight.k] W + bias, rows of consecutive numbers; part of a product of `all_rows` rows.
inline Product projection(const float* x, int64_t n, const Packed& weight, const at::Tensor& bias, float* y, int64_t all_rows) {
  return {.sizes = {n, weight.n, weight.k},
          .a = {x, weight.k},
          .b = packed(weight),
          .c = {y, weight.n},
          .bias = data(bias),
          .all_rows = all_rows};
}

// Computes part of a product. has_many: `has_many_rows` of the whole product.
inline void multiply_part(const Product& p, bool has_many) {
  (has_many ? kernels().product_of_many_rows : kernels().product)(p);
}

inline void multiply(const Product& p) {
  multiply_part(p, has_many_rows(p.all_rows, p.sizes.n, p.sizes.k));
}

// The same for a transposed b.
inline void multiply_transposed(const Product& p) {
  kernels().product_transposed(p);
}

// Packs the transpose of b [n, k] into `to`, from element `offset` on.
inline void pack_transposed(const float* b, int64_t stride, int64_t k, int64_t n, const at::Tensor& to, int64_t offset) {
  const auto place = static_cast<char*>(to.mutable_data_ptr()) + offset * to.element_size();
  kernels().pack_transposed(b, stride, k, n, place, storage_of(to));
}

// Pads the last panel with zeros, for a matrix [n, columns] in panels.
inline void pad_last_panel(float* panels, int64_t panel_stride, int64_t n, int64_t columns) {
  const auto panel = kernels().panel, used = columns % panel;
  if (used == 0) return;
  auto* last = panels + columns / panel * panel_stride;
  for (int64_t row = 0; row < n; ++row) std::fill(last + row * panel + used, last + (row + 1) * panel, 0.0f);
}

}  // namespace engine

}  // namespace xattn::detail
