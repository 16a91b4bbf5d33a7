// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "kernels/kernels.h"

// Products of tensors' memory by the kernels, with right sides of either storage.
namespace xattn::detail {

/// A right side of products, laid out for the kernels.
struct Packed {
  at::Tensor data;
  int64_t k = 0, n = 0;  ///< of each of the matrices that lie one behind the other
};

namespace engine {

inline const float* data(const at::Tensor& x) {
  return x.const_data_ptr<float>();
}
inline float* mutable_data(const at::Tensor& x) {
  return x.mutable_data_ptr<float>();
}

constexpr int64_t kOperationsOfATask = 1 << 18;  // fewer are done before another thread has woken

// x [..., n], its rows of consecutive numbers.
inline at::Tensor with_rows(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// A RightSide of float32 or bfloat16: one of the two pointers is null.
struct Right {
  const float* wide = nullptr;
  const Bfloat16* half = nullptr;
  int64_t row_stride = 0, panel_stride = 0;

  Right advanced(int64_t elements) const {
    return {wide ? wide + elements : nullptr, half ? half + elements : nullptr, row_stride, panel_stride};
  }
  Right from_row(int64_t row) const { return advanced(row * row_stride); }
  Right from_panel(int64_t panel) const { return advanced(panel * panel_stride); }
};

inline Right right(const at::Tensor& x, int64_t offset, int64_t row_stride, int64_t panel_stride) {
  if (x.scalar_type() == at::kFloat) return {data(x) + offset, nullptr, row_stride, panel_stride};
  return {nullptr, static_cast<const Bfloat16*>(x.const_data_ptr()) + offset, row_stride, panel_stride};
}

inline Right packed(const at::Tensor& x, int64_t offset, int64_t k) {
  return right(x, offset, kernels().panel, k * kernels().panel);
}

inline Right packed(const Packed& p, int64_t which = 0) {
  return packed(p.data, which * kernels().packed_size(p.k, p.n), p.k);
}

inline Right plain_rows(const at::Tensor& x, int64_t offset, int64_t row_stride) {
  return right(x, offset, row_stride, kernels().panel);
}

// A Product of either.
struct Step {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_stride = 0, a_step = 1;
  Right b = {};
  float* c = nullptr;
  int64_t c_stride = 0;
  int64_t c_panel_stride = 0;
  const float* bias = nullptr;
  bool accumulate = false;
  int64_t all_rows = 0;  // of the whole of which m may be a part, where these many may be work for a unit for matrices
};

template <class Element>
ProductOf<Element> as_product(const Step& s, const Element* b) {
  return {.m = s.m,
          .n = s.n,
          .k = s.k,
          .a = s.a,
          .a_stride = s.a_stride,
          .a_step = s.a_step,
          .b = {b, s.b.row_stride, s.b.panel_stride},
          .c = s.c,
          .c_stride = s.c_stride,
          .c_panel_stride = s.c_panel_stride,
          .bias = s.bias,
          .accumulate = s.accumulate};
}

// Of a part of a product, has_many: of the whole.
inline void multiply_part(const Step& s, bool has_many) {
  const auto& run = kernels();
  s.b.half ? (has_many ? run.product_of_many_rows_bfloat16 : run.product_bfloat16)(as_product(s, s.b.half))
           : (has_many ? run.product_of_many_rows : run.product)(as_product(s, s.b.wide));
}

inline void multiply(const Step& s) {
  multiply_part(s, has_many_rows(s.all_rows, s.n, s.k));
}

// The same with b as rows that are its columns.
inline void multiply_transposed(const Step& s) {
  s.b.half ? kernels().product_transposed_bfloat16(as_product(s, s.b.half))
           : kernels().product_transposed(as_product(s, s.b.wide));
}

// Rows of b [n, k], packed as columns into place `offset` of `to`.
inline void pack_transposed(const float* b, int64_t stride, int64_t k, int64_t n, const at::Tensor& to, int64_t offset) {
  if (to.scalar_type() == at::kFloat) {
    kernels().pack_transposed(b, stride, k, n, mutable_data(to) + offset);
  } else {
    kernels().pack_transposed_bfloat16(b, stride, k, n, static_cast<Bfloat16*>(to.mutable_data_ptr()) + offset);
  }
}

// The last panel of a matrix that has so many columns, n rows of it, behind these with zeros.
inline void fill_up(float* panels, int64_t panel_stride, int64_t n, int64_t columns) {
  const auto panel = kernels().panel, used = columns % panel;
  if (used == 0) return;
  auto* last = panels + columns / panel * panel_stride;
  for (int64_t row = 0; row < n; ++row) std::fill(last + row * panel + used, last + (row + 1) * panel, 0.0f);
}

}  // namespace engine

}  // namespace xattn::detail
