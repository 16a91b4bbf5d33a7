// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/shares.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int64_t kByColumns = 0;  // the a_step of a block of a that `gather_columns` has copied: that of a tile is its rows

// The largest block of a that is multiplied with one panel of b after the other, and the columns of c that are done at a time: for
// AVX-512 these blocks of a and c and two panels, 450, 110 and 2 x 130 KB, fit into an L2 cache.
constexpr int64_t kDepth = 1024;
constexpr int64_t kHeight = 8 * kTileRows;
constexpr int64_t kWidth = 8 * kPanel;

// A tile of c, a few rows by a few vectors, whose sums live in registers while k runs.
template <class Element>
struct Tile {
  int64_t k;
  const float* a;
  int64_t a_stride, a_step;  // from row to row, and from each of k to the next
  RightSideOf<Element> b;
  float* c;
  int64_t c_stride, c_panel_stride;
  const float* bias;
  bool accumulate;
  int64_t last;                 // lanes of the last vector, where it is partial
  const char* ahead = nullptr;  // what to fetch into the cache meanwhile
  int64_t ahead_step = 0;       // bytes of it for each of k
};

// The tiles of m rows of c, of equal heights but for one: 16 rows are 8 + 8 rather than 14 + 2, as a low tile is a slow one.
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
  // Of a panel's sums, those of columns at even places and of those at odd places have a vector each: see load_apart.
  constexpr bool kApart = !kPartial && sizeof(Element) == sizeof(Bfloat16);
  const int64_t last = tile.last, row_stride = tile.b.row_stride, panel_stride = tile.b.panel_stride;
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

  constexpr int kHalf = (kRows + 1) / 2;  // from two pointers, the distances to all rows stay in registers
  const int64_t a_stride = tile.a_stride, a_step = tile.a_step;
  const float* a_upper = tile.a;
  const float* a_lower = tile.a + kHalf * a_stride;
  const Element* b = tile.b.data;
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

// The panels a tile of few rows spans: enough sums to hide the time that one addition takes.
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

// All rows of a block of c by the columns of one tile. Where there are several tiles, they fetch the panels behind, which come from
// further away, in equal shares: a core waits for few lines at a time. A tile that is the only one does little but read, which only
// takes longer when lines of other places are asked for besides.
template <class Element>
void compute_column(Tile<Element> tile, int64_t m, int64_t tiles, int64_t panels, const ComputeTile<Element>* compute) {
  const bool fetches = tile.b.row_stride == kPanel && tiles > 1;
  tile.ahead_step = fetches ? panels * kPanel * static_cast<int64_t>(sizeof(Element)) / tiles : 0;
  const bool by_columns = tile.a_step == kByColumns;
  const char* ahead = reinterpret_cast<const char*>(tile.b.data + panels * tile.b.panel_stride);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = nth_share(m, tiles, i);
    tile.ahead = ahead + i * tile.k * tile.ahead_step;
    if (by_columns) tile.a_step = rows;
    compute[rows](tile);
    tile.a += rows * (by_columns ? tile.k : tile.a_stride);
    tile.c += rows * tile.c_stride;
  }
}

// A block of c for a block of k: with each panel of b, or few of them, all tiles of the rows.
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
    tile.b.data += (1 << step) * tile.b.panel_stride;
    tile.c += (1 << step) * tile.c_panel_stride;
    if (tile.bias) tile.bias += columns;
  }
}

// Whether the rows of a tile of a, a whole number of pages apart, want more lines of one set of the L1 cache than its ways (8 and up).
inline bool share_a_set(int64_t rows, int64_t stride) {
  constexpr int64_t kPage = 1024;  // floats
  return kTileRows > 8 && rows > 8 && stride % kPage == 0;
}

// Copies a block of a to where its rows are an odd number of lines apart, and so share no set. Returns their distance.
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

// Copies a block of a that lies transposed, rows `step` apart of which each is one of k: tile by tile, of each k its rows.
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

// See Kernels::product. The sum of an element of c runs from the first of k to the last, whatever the tiles and blocks are: a sum
// that is stored and loaded again between two blocks is the same.
template <class Element>
void product(const ProductOf<Element>& p) {
  constexpr int64_t kFewSteps = 32;  // whose lines of a column find place in the L1 cache as they are
  const bool by_columns = p.a_step != 1 && p.k > kFewSteps;
  const bool divide = p.k > kDepth && (p.m > kTileRows || by_columns);
  const int64_t height = equal_part(p.m, kHeight), depth = divide ? equal_part(p.k, kDepth) : p.k,
                width = divide ? kWidth : p.n;
  const int64_t c_panel_stride = p.c_panel_stride ? p.c_panel_stride : kPanel;
  const bool by_rows = p.a_step == 1 && p.n > 2 * kPanel && depth <= kDepth && share_a_set(p.m, p.a_stride);
  float* const gathered = by_columns || by_rows ? thread_memory(kHeight * (kDepth + kLanes)) : nullptr;
  for (int64_t top = 0; top < p.m; top += height) {
    const int64_t m = p.m - top < height ? p.m - top : height;
    int64_t first = 0;
    do {  // once where k is 0
      const int64_t k = p.k - first < depth ? p.k - first : depth;
      const float* a = p.a + top * p.a_stride + first * p.a_step;
      const int64_t a_stride = by_rows ? gather(a, p.a_stride, m, k, gathered) : p.a_stride;
      if (by_columns) gather_columns(a, p.a_step, m, k, gathered);
      for (int64_t left = 0; left < p.n; left += width) {
        const int64_t panel = left / kPanel;
        const Tile<Element> tile{
            .k = k,
            .a = gathered ? gathered : a,
            .a_stride = a_stride,
            .a_step = by_columns ? kByColumns : p.a_step,
            .b = {p.b.data + panel * p.b.panel_stride + first * p.b.row_stride, p.b.row_stride, p.b.panel_stride},
            .c = p.c + top * p.c_stride + panel * c_panel_stride,
            .c_stride = p.c_stride,
            .c_panel_stride = c_panel_stride,
            .bias = p.bias && first == 0 ? p.bias + left : nullptr,
            .accumulate = p.accumulate || first > 0,
            .last = 0};
        compute_block(tile, m, p.n - left < width ? p.n - left : width);
      }
      first += depth;
    } while (first < p.k);
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
