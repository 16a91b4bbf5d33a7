// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

// One core's work on float32 memory. Nothing here depends on tensors or threads.
namespace xattn::detail {

/// The upper half of a float32. Storing a right side this way halves its memory, which saves time where reading is the
/// bottleneck.
struct Bfloat16 {
  uint16_t bits;
};

/// How the numbers of a right side are stored.
enum class Storage : uint8_t { float32, bfloat16 };

/// The right side of a product, [k, n], in panels of `Kernels::panel` columns: element (i, j) lies at
/// data[(j / panel) * panel_stride + i * row_stride + j % panel]. Two layouts are useful:
///   plain rows   row_stride = distance of rows, panel_stride = panel
///   packed       row_stride = panel, panel_stride = k * panel, padded with zeros to whole panels: see `Kernels::pack`
struct RightSide {
  const void* data = nullptr;
  Storage storage = Storage::float32;
  int64_t row_stride = 0;  ///< in elements, as panel_stride
  int64_t panel_stride = 0;

  RightSide advanced(int64_t elements) const {
    const auto bytes = elements * (storage == Storage::float32 ? 4 : 2);
    return {static_cast<const char*>(data) + bytes, storage, row_stride, panel_stride};
  }
  RightSide from_row(int64_t row) const { return advanced(row * row_stride); }
  RightSide from_panel(int64_t panel) const { return advanced(panel * panel_stride); }
};

/// The left side of a product, [m, k].
struct LeftSide {
  const float* data = nullptr;
  int64_t stride = 0;  ///< from row to row, in elements
  int64_t step = 1;    ///< from element to element of a row; not 1 where a is transposed, and then its stride is 1
};

/// The memory of the result of a product, [m, n].
struct ProductResult {
  float* data = nullptr;
  int64_t stride = 0;        ///< from row to row, in elements
  bool in_panels = false;    ///< whether it lies in panels, as a right side may; otherwise in plain rows
  int64_t panel_stride = 0;  ///< from panel to panel, if it does
};

struct ProductSizes {
  int64_t m = 0, n = 0, k = 0;
};

/// c [m, n] = a [m, k] b [k, n], plus `bias` in every row, plus the previous c if `accumulate`. All arithmetic is in float32,
/// however b is stored.
///
/// A row of c depends only on its own row of a: its bits do not depend on m, on the rows beside it, or on how the columns are
/// divided at panels. No memory outside the matrices is touched. c must not overlap the other operands.
struct Product {
  ProductSizes sizes;
  LeftSide a = {};
  RightSide b = {};
  ProductResult c = {};
  const float* bias = nullptr;  ///< [n]; none if null
  bool accumulate = false;
  int64_t all_rows = 0;  ///< rows of the whole product, for callers that choose a kernel by `has_many_rows`
};

/// Softmax in place, on the rows of x [rows, n]: x = exp(y - max y) / sum exp(y - max y) with y = scale * x + bias, over the
/// keys that are kept and visible; 0 for the others. A row of which a mask leaves no key above -inf becomes zeros. One with
/// NaN, or without a mask and all -inf, becomes NaN. The bits of a row do not depend on the other rows.
struct Softmax {
  int64_t rows = 0, n = 0;
  float* x = nullptr;
  int64_t x_stride = 0;
  float scale = 1;
  const float* bias = nullptr;   ///< [rows, n]; none if null
  int64_t bias_stride = 0;       ///< 0: one row for all
  const bool* keep = nullptr;    ///< [rows, n]; all kept if null
  int64_t keep_stride = 0;       ///< 0: one row for all
  int64_t visible = INT64_MAX;   ///< row 0 sees the first `visible` of its keys: none if it is negative, all if it is above n
  int64_t visible_step = 0;      ///< how many keys more each following row sees; at least 0
  float* log_sum_exp = nullptr;  ///< [rows], of y; -inf for a row that becomes zeros. Not written if null
  float* largest = nullptr;      ///< [rows], max y, or 0 for a row that becomes zeros; log_sum_exp is then that of y - max y
};

/// y = (x - mean) / sqrt(variance + eps) * weight + bias, for rows [rows, n]; without the mean, the variance is the mean
/// square. The bits of a row do not depend on the other rows. y may be x.
struct RowNorm {
  int64_t rows = 0, n = 0;
  const float* x = nullptr;
  float* y = nullptr;
  bool subtracts_mean = false;
  double eps = 0;
  const float* weight = nullptr;  ///< [n]
  const float* bias = nullptr;    ///< [n]; none if null
};

/// A function of one number, as between the linear layers of a feed-forward network.
enum class Pointwise : uint8_t { relu, gelu, gelu_tanh, silu };

/// What the kernels are compiled for: nothing in particular, or an extension of x86-64.
enum class InstructionSet : uint8_t { plain, avx2, avx512, amx };

inline constexpr std::array<std::string_view, 4> kInstructionSets = {"plain", "avx2", "avx512", "amx"};  ///< their names

inline std::string_view name_of(InstructionSet set) {
  return kInstructionSets.at(static_cast<size_t>(set));
}

/// The kernels for one instruction set.
struct Kernels {
  InstructionSet instruction_set;
  bool is_vectorised;            ///< whether these products are faster than LibTorch's operators
  int64_t panel;                 ///< columns of a panel of a RightSide
  int64_t tile_rows;             ///< rows of c that `product` computes at a time: fewer do not use all registers
  int64_t block_rows;            ///< rows of a that `product` multiplies by one panel after another: a core's cache holds them
  int64_t many_block_rows;       ///< the same for `product_of_many_rows`
  double flops;                  ///< operations a second of one core, on right sides packed ahead
  double flops_of_modules;       ///< the same for products of modules, which pack in each call or run on LibTorch's operators
  bool has_matrix_unit = false;  ///< whether `product_of_many_rows` is another kernel than `product`

  void (*product)(const Product&);

  /// The same, on the processor's matrix unit if it has one: faster where `has_many_rows` returns true, see amx.cpp.
  /// On that unit, sums have another order and so other last bits, infinities and numbers above 3.39e38 give NaN, and terms
  /// below 2e-31 count with fewer digits.
  void (*product_of_many_rows)(const Product&);

  /// The same as `product` for a transposed b, as weights and keys are: element (i, j) at data[j * row_stride + i]. a lies in
  /// rows. For few rows m, because packing b takes as long as a product of about 8 rows. Sums have another order than in
  /// `product`.
  void (*product_transposed)(const Product&);

  /// Number of elements that packing writes: k for each column of whole panels.
  int64_t packed_size(int64_t k, int64_t n) const { return (n + panel - 1) / panel * panel * k; }
  RightSide packed(const void* data, int64_t k, Storage storage = Storage::float32) const {
    return {data, storage, panel, k * panel};
  }
  RightSide rows(const void* data, int64_t row_stride, Storage storage = Storage::float32) const {
    return {data, storage, row_stride, panel};
  }

  /// Packs b [k, n], rows of consecutive numbers `stride` apart.
  void (*pack)(const float* b, int64_t stride, int64_t k, int64_t n, void* packed, Storage storage);
  /// Packs the transpose of b [n, k]: a weight as torch stores it, or keys.
  void (*pack_transposed)(const float* b, int64_t stride, int64_t k, int64_t n, void* packed, Storage storage);

  void (*softmax)(const Softmax&);
  void (*normalise)(const RowNorm&);
  /// x = f(x) * multiplier in place, for n numbers; without the multiplier if it is null. Differs from the exact functions by
  /// at most 2e-7 of |x|.
  void (*activate)(Pointwise f, float* x, const float* multiplier, int64_t n);
};

/// Memory of this thread for at least this many floats, valid until the thread's next call. The kernels keep copies there.
float* thread_memory(int64_t floats);

/// The fastest kernels that this processor can run, unless `use_kernels` chose others. Thread-safe.
const Kernels& kernels();

/// Changes what `kernels` returns, one of `all_kernels`. REQUIRES: nothing has been packed or planned yet.
void use_kernels(const Kernels& chosen);

/// Whether `product_of_many_rows` should compute a product of this many rows and columns, each element a sum of `depth` terms.
/// It should if there is a matrix unit, the terms fill most of the 32 that it adds at a time, and each of the processor's cores
/// would get enough rows. The number of threads does not count, because bits must not depend on it; for the same reason, a
/// caller that divides a product passes the sizes of the whole.
bool has_many_rows(int64_t rows, int64_t columns, int64_t depth);
int64_t least_many_rows();
constexpr int64_t kLeastManyColumns = 96, kLeastManyDepth = 24;

/// All kernels that this processor can run, the fastest first.
std::span<const Kernels* const> all_kernels();

}  // namespace xattn::detail
