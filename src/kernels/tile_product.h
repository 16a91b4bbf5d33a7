// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/shares.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

constexpr int kPanel = 2 * kLanes;

// The largest block of a that is multiplied by one panel of b after another, [kHeight, kDepth], and the columns of c of one
// such pass: with AVX-512 these blocks of a and c and two panels take 450, 110 and 2 x 130 KB of an L2 cache.
constexpr int64_t kDepth = 1024;
constexpr int64_t kHeight = 8 * kTileRows;
constexpr int64_t kWidth = 8 * kPanel;

// A tile of c, a few rows by a few vectors. Its sums stay in registers over all of k.
//
// The two flags are adjacent because another order of the fields, and so of their copies, makes small products 2 % slower.
template <class Element>
struct Tile {
  int64_t k;
  const float* a;
  int64_t a_stride, a_step;  // from row to row, and from term to term
  const Element* b;
  int64_t b_row_stride, b_panel_stride;
  float* c;
  int64_t c_stride, c_panel_stride;
  const float* bias;
  bool accumulate;
  bool a_is_gathered;           // whether gather_columns has copied a; a_step is then the tile's number of rows
  int64_t last;                 // lanes of the last vector, where it is partial
  const char* ahead = nullptr;  // memory to prefetch meanwhile
  int64_t ahead_step = 0;       // bytes of it for each term
};

// The number of tiles of m rows of c. Their heights differ by at most one row: 16 rows are 8 + 8 rather than 14 + 2, because
// tiles of few rows are slow.
inline int64_t tiles_of(int64_t m) {
  return divided_up(m, kTileRows);
}

// Applies f to the two vectors of each row and panel.
template <int kRows, int kVectors, class F>
inline void each_pair(Vector (&sums)[kRows][kVectors], F f) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v += 2) f(sums[r][v], sums[r][v + 1]);
  }
}

template <class Element, int kRows, int kVectors, bool kPartial>
void compute_tile(const Tile<Element>& tile) {
  // Whether one vector of a panel holds the sums of its even columns and one those of its odd columns: see load_apart.
  constexpr bool kApart = !kPartial && std::is_same_v<Element, Bfloat16>;
  const int64_t last = tile.last, row_stride = tile.b_row_stride, panel_stride = tile.b_panel_stride;
  const auto c_at = [&tile](int r, int v) { return tile.c + r * tile.c_stride + v / 2 * tile.c_panel_stride + v % 2 * kLanes; };
  const auto is_partial = [](int v) { return kPartial && v == kVectors - 1; };
  const auto load_at = [=](const auto* from, int v) { return is_partial(v) ? load_first(from, last) : load(from); };

  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Vector bias = tile.bias ? load_at(tile.bias + v * kLanes, v) : Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r][v] = bias;
  }
  if (tile.accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] += load_at(c_at(r, v), v);
    }
  }
  if constexpr (kApart) each_pair(sums, [](Vector& x, Vector& y) { take_apart(x, y, Lanes{}); });

  constexpr int kHalf = (kRows + 1) / 2;  // with two pointers, the distances to all rows fit into registers
  const int64_t a_stride = tile.a_stride, a_step = tile.a_step;
  const float* a_upper = tile.a;
  const float* a_lower = tile.a + kHalf * a_stride;
  const Element* b = tile.b;
  const char* ahead = tile.ahead;
  for (int64_t i = 0; i < tile.k; ++i, a_upper += a_step, a_lower += a_step, b += row_stride, ahead += tile.ahead_step) {
    __builtin_prefetch(ahead);
    Vector b_row[kVectors];
    if constexpr (kApart) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v += 2) load_apart(b + v / 2 * panel_stride, b_row[v], b_row[v + 1]);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) b_row[v] = load_at(b + v / 2 * panel_stride + v % 2 * kLanes, v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector a_element = broadcast(r < kHalf ? a_upper[r * a_stride] : a_lower[(r - kHalf) * a_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a_element * b_row[v];
    }
  }

  if constexpr (kApart) each_pair(sums, [](Vector& x, Vector& y) { put_together(x, y, Lanes{}); });
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      is_partial(v) ? store_first(c_at(r, v), sums[r][v], last) : store(c_at(r, v), sums[r][v]);
    }
  }
}

template <class Element>
using ComputeTile = void (*)(const Tile<Element>&);

// The number of panels in a tile of few rows: enough sums to hide the latency of an addition.
constexpr int widest(int rows) {
  int panels = 1;
  while (panels < 4 && 2 * panels * rows <= kTileRows) panels *= 2;
  return panels;
}

// compute_tile for each number of rows.
template <class Element>
struct Tiles {
  ComputeTile<Element> of_panels[3][kTileRows + 1];   // 1, 2, 4 whole panels
  ComputeTile<Element> of_vectors[2][kTileRows + 1];  // one or two vectors, the last of them partial
};

template <int kRows, class Element>
constexpr void add_tiles(Tiles<Element>& tiles) {
  tiles.of_panels[0][kRows] = compute_tile<Element, kRows, 2, false>;
  if constexpr (widest(kRows) >= 2) tiles.of_panels[1][kRows] = compute_tile<Element, kRows, 4, false>;
  if constexpr (widest(kRows) >= 4) tiles.of_panels[2][kRows] = compute_tile<Element, kRows, 8, false>;
  tiles.of_vectors[0][kRows] = compute_tile<Element, kRows, 1, true>;
  tiles.of_vectors[1][kRows] = compute_tile<Element, kRows, 2, true>;
  if constexpr (kRows > 1) add_tiles<kRows - 1>(tiles);
}

template <class Element>
constexpr Tiles<Element> kTiles = [] {
  Tiles<Element> tiles{};
  add_tiles<kTileRows>(tiles);
  return tiles;
}();

// Computes all rows of a block of c for the columns of one tile. Several tiles prefetch the next panels in equal shares,
// because a core can wait for only a few cache lines at a time. A single tile is bound by reading b, and prefetching other
// lines would only slow it down.
template <class Element>
void compute_column(Tile<Element> tile, int64_t m, int64_t tiles, int64_t panels, const ComputeTile<Element>* compute) {
  const bool fetches = tile.b_row_stride == kPanel && tiles > 1;
  tile.ahead_step = fetches ? panels * kPanel * static_cast<int64_t>(sizeof(Element)) / tiles : 0;
  const char* ahead = reinterpret_cast<const char*>(tile.b + panels * tile.b_panel_stride);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = nth_share(m, tiles, i);
    tile.ahead = ahead + i * tile.k * tile.ahead_step;
    if (tile.a_is_gathered) tile.a_step = rows;
    compute[rows](tile);
    tile.a += rows * (tile.a_is_gathered ? tile.k : tile.a_stride);
    tile.c += rows * tile.c_stride;
  }
}

// Computes a block of c over a block of k: all row tiles for one panel of b, or a few panels, at a time.
template <class Element>
void compute_block(Tile<Element> tile, int64_t m, int64_t n) {
  const int64_t tiles = tiles_of(m);
  int step = 2;
  while ((1 << step) > widest(static_cast<int>((m + tiles - 1) / tiles))) --step;
  while (n > 0) {
    while (step > 0 && n < (kPanel << step)) --step;
    const int64_t columns = n < kPanel ? n : kPanel << step;
    if (n >= kPanel) {
      compute_column(tile, m, tiles, 1 << step, kTiles<Element>.of_panels[step]);
    } else {
      tile.last = n > kLanes ? n - kLanes : n;
      compute_column(tile, m, tiles, 1, kTiles<Element>.of_vectors[n > kLanes]);
    }
    n -= columns;
    tile.b += (1 << step) * tile.b_panel_stride;
    tile.c += (1 << step) * tile.c_panel_stride;
    if (tile.bias) tile.bias += columns;
  }
}

// Whether rows of a tile of a, a whole number of pages apart, need more lines of one L1 cache set than it has ways (8 and up).
inline bool share_a_set(int64_t rows, int64_t stride) {
  constexpr int64_t kPage = 1024;  // floats
  return kTileRows > 8 && rows > 8 && stride % kPage == 0;
}

// Copies a block of a into rows an odd number of cache lines apart, which share no set. Returns the distance of the rows.
inline int64_t gather(const float* a, int64_t stride, int64_t m, int64_t k, float* to) {
  const int64_t to_stride = ((k + kLanes - 1) / kLanes | 1) * kLanes;
  for (int64_t r = 0; r < m; ++r, a += stride, to += to_stride) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
      __builtin_prefetch(a + stride + i);
      store(to + i, load(a + i));
    }
    if (i < k) store_first(to + i, load_first(a + i, k - i), k - i);
  }
  return to_stride;
}

// Copies a block of a transposed a, with terms `step` apart, tile by tile: in a tile the rows of one term are consecutive.
inline void gather_columns(const float* a, int64_t step, int64_t m, int64_t k, float* to) {
  constexpr int64_t kAhead = 8;  // rows
  const int64_t tiles = tiles_of(m);
  for (int64_t i = 0; i < k; ++i, a += step) {
    float* to_tile = to;
    const float* from = a;
    for (int64_t r = 0; r < m; r += kLanes) __builtin_prefetch(a + kAhead * step + r);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t rows = nth_share(m, tiles, tile);
      float* next = to_tile + i * rows;
      int64_t r = 0;
      for (; r + kLanes <= rows; r += kLanes) store(next + r, load(from + r));
      if (r < rows) store_first(next + r, load_first(from + r, rows - r), rows - r);
      from += rows;
      to_tile += k * rows;
    }
  }
}

// Each sum runs from the first term to the last, however tiles and blocks divide it: storing a sum between two blocks and
// loading it again changes no bit. Not inlined, because both types in one function would make each slower.
template <class Element>
[[gnu::noinline]] void product_of(const Product& p) {
  constexpr int64_t kFewSteps = 32;  // terms of a transposed a whose cache lines fit into the L1 cache without a copy
  const bool by_columns = p.a.step != 1 && p.sizes.k > kFewSteps;
  const bool divide = p.sizes.k > kDepth && (p.sizes.m > kTileRows || by_columns);
  const int64_t height = equal_part(p.sizes.m, kHeight), depth = divide ? equal_part(p.sizes.k, kDepth) : p.sizes.k,
                width = divide ? kWidth : p.sizes.n;
  const int64_t c_panel_stride = p.c.in_panels ? p.c.panel_stride : kPanel;
  const bool by_rows = p.a.step == 1 && p.sizes.n > 2 * kPanel && depth <= kDepth && share_a_set(p.sizes.m, p.a.stride);
  float* const gathered = by_columns || by_rows ? thread_memory(kHeight * (kDepth + kLanes)) : nullptr;
  for (int64_t top = 0; top < p.sizes.m; top += height) {
    const int64_t m = p.sizes.m - top < height ? p.sizes.m - top : height;
    int64_t first = 0;
    do {  // once if k is 0
      const int64_t k = p.sizes.k - first < depth ? p.sizes.k - first : depth;
      const float* a = p.a.data + top * p.a.stride + first * p.a.step;
      const int64_t a_stride = by_rows ? gather(a, p.a.stride, m, k, gathered) : p.a.stride;
      if (by_columns) gather_columns(a, p.a.step, m, k, gathered);
      for (int64_t left = 0; left < p.sizes.n; left += width) {
        const int64_t panel = left / kPanel;
        const Tile<Element> tile{.k = k,
                                 .a = gathered ? gathered : a,
                                 .a_stride = a_stride,
                                 .a_step = p.a.step,
                                 .b = static_cast<const Element*>(p.b.data) + panel * p.b.panel_stride + first * p.b.row_stride,
                                 .b_row_stride = p.b.row_stride,
                                 .b_panel_stride = p.b.panel_stride,
                                 .c = p.c.data + top * p.c.stride + panel * c_panel_stride,
                                 .c_stride = p.c.stride,
                                 .c_panel_stride = c_panel_stride,
                                 .bias = p.bias && first == 0 ? p.bias + left : nullptr,
                                 .accumulate = p.accumulate || first > 0,
                                 .a_is_gathered = by_columns,
                                 .last = 0};
        compute_block(tile, m, p.sizes.n - left < width ? p.sizes.n - left : width);
      }
      first += depth;
    } while (first < p.sizes.k);
  }
}

void product(const Product& p) {
  p.b.storage == Storage::float32 ? product_of<float>(p) : product_of<Bfloat16>(p);
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
