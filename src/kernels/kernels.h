// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

// One core's work on float32 memory, for the frozen inference path: it knows neither tensors nor threads.
namespace xattn::detail {

/// The upper half of a float32: a way to store a right side in half the memory, where reading it is what takes the time.
struct Bfloat16 {
  uint16_t bits;
};

/// The right side of a product, [k, n], in panels of `Kernels::panel` columns: element (i, j) lies at
/// data[(j / panel) * panel_stride + i * row_stride + j % panel]. Two layouts are of use:
///   plain rows   row_stride = distance of rows, panel_stride = panel
///   packed       row_stride = panel, panel_stride = k * panel, filled up with zeros to whole panels: see `Kernels::pack`
template <class Element>
struct RightSideOf {
  const Element* data = nullptr;
  int64_t row_stride = 0;
  int64_t panel_stride = 0;
};
using RightSide = RightSideOf<float>;

/// c [m, n] = a [m, k] b [k, n], plus `bias` in every row, plus what c held where `accumulate`. All in float32, whatever stores b.
///
/// A row of c depends on its own row of a alone: neither m, nor the rows beside it, nor a division of the columns at panels
/// change a bit of it. No memory outside of the matrices is touched. c overlaps nothing else.
template <class Element>
struct ProductOf {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;  ///< from row to row, in elements, as c_stride
  int64_t a_step = 1;    ///< from element to element of a row; another than 1 where a lies transposed, and a_stride is 1
  RightSideOf<Element> b;
  float* c = nullptr;
  int64_t c_stride = 0;
  int64_t c_panel_stride = 0;   ///< from panel to panel of a c that lies in panels, as b may; 0: c lies in plain rows
  const float* bias = nullptr;  ///< [n]; none if null
  bool accumulate = false;
};
using Product = ProductOf<float>;

/// Softmax in place, on the rows of x [rows, n]: x = exp(y - max y) / sum exp(y - max y) with y = scale * x + bias, over the keys
/// that are kept; 0 for the others. A row without a kept key above -inf becomes zeros, one with a NaN among them becomes NaN.
/// A row depends on nothing but itself, as above.
struct Softmax {
  int64_t rows = 0, n = 0;
  float* x = nullptr;
  int64_t x_stride = 0;
  float scale = 1;
  const float* bias = nullptr;   ///< [rows, n]; none if null
  int64_t bias_stride = 0;       ///< 0: one row for all
  const bool* keep = nullptr;    ///< [rows, n]; all kept if null
  int64_t keep_stride = 0;       ///< 0: one row for all
  float* log_sum_exp = nullptr;  ///< [rows], of y; -inf for a row that becomes zeros. Not wanted if null
  float* largest = nullptr;      ///< [rows], the max y, or 0 for a row that becomes zeros; log_sum_exp is then of y - max y
};

constexpr int64_t kFewRows = 24;  ///< of a product, up to which packing its right side takes longer than it saves

/// The kernels for one instruction set. Those that take Bfloat16 differ in how b is stored, and in nothing else.
struct Kernels {
  const char* name;  ///< "amx", "avx512", "avx2", "plain"
  int64_t panel;     ///< columns of a panel of a RightSide

  void (*product)(const Product&);
  void (*product_bfloat16)(const ProductOf<Bfloat16>&);

  /// The same, faster where the processor has a unit for products of matrices and `has_many_rows` says so: see product_in_parts.h.
  /// The sums have another order, and so other last bits. There, an infinity gives NaN, and so does a number above 3.39e38; terms
  /// below 2e-31 count with fewer digits.
  void (*product_of_many_rows)(const Product&);
  void (*product_of_many_rows_bfloat16)(const ProductOf<Bfloat16>&);
  bool has_unit() const { return product_of_many_rows != product; }

  /// The same as `product` for b that lies transposed, as weights and keys do: element (i, j) at data[j * row_stride + i]. For few
  /// rows m, as packing b takes as long as a product with about 8; the sums have another order, and so other last bits, than above.
  /// a lies in rows.
  void (*product_transposed)(const Product&);
  void (*product_transposed_bfloat16)(const ProductOf<Bfloat16>&);

  /// The numbers that packing writes: k for each column of whole panels.
  int64_t packed_size(int64_t k, int64_t n) const { return (n + panel - 1) / panel * panel * k; }
  template <class Element>
  RightSideOf<Element> packed(const Element* data, int64_t k) const {
    return {data, panel, k * panel};
  }
  template <class Element>
  RightSideOf<Element> rows(const Element* data, int64_t row_stride) const {
    return {data, row_stride, panel};
  }

  /// Packs b [k, n], rows of consecutive numbers `stride` apart.
  void (*pack)(const float* b, int64_t stride, int64_t k, int64_t n, float* packed);
  void (*pack_bfloat16)(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* packed);
  /// Packs the transpose of b [n, k]: a weight as torch stores it, or keys.
  void (*pack_transposed)(const float* b, int64_t stride, int64_t k, int64_t n, float* packed);
  void (*pack_transposed_bfloat16)(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* packed);

  void (*softmax)(const Softmax&);
};

/// At least so many floats that belong to this thread, until it asks again: for the kernels' own copies.
float* thread_memory(int64_t floats);

/// The fastest that this processor runs. Chosen at the first call; thread-safe.
const Kernels& kernels();

/// Whether a product of so many rows by so many columns, each a sum of `depth` terms, is one for `product_of_many_rows`: where there
/// is a unit, terms for most of the 32 that it adds at a time, and rows enough for each of the processor's cores, as they may share
/// them out. Not for each thread that is at work now, as bits are not to depend on these; for the same reason, who divides a
/// product asks for the whole.
bool has_many_rows(int64_t rows, int64_t columns, int64_t depth);
int64_t least_many_rows();
constexpr int64_t kLeastManyColumns = 96, kLeastManyDepth = 24;

/// All that this processor runs, the fastest first: for tests.
std::span<const Kernels* const> all_kernels();

}  // namespace xattn::detail
