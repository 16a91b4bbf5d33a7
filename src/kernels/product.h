// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"
#include "vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

constexpr int kPanel = 2 * kLanes;

// The largest block of a that is multiplied with one panel of b after the other: for AVX-512 it and a panel together, 900 and 256
// KB, are about what an L2 cache holds. Each block of k reads and writes c once more.
constexpr int64_t kDepth = 2048;
constexpr int64_t kHeight = 8 * kTileRows;

// A tile of c, a few rows by a few vectors, whose sums live in registers while k runs.
template <class Element>
struct Tile {
  int64_t k;
  const float* a;
  int64_t a_stride;
  RightSideOf<Element> b;
  float* c;
  int64_t c_stride;
  const float* bias;
  bool accumulate;
  int64_t last;                 // lanes of the last vector, where it is partial
  const char* ahead = nullptr;  // what to fetch into the cache meanwhile, a line of it for each of k
  int64_t ahead_step = 0;
};

constexpr int64_t kLine = 64;  // bytes

template <class Element, int kRows, int kVectors, bool kPartial>
void compute_tile(const Tile<Element>& tile) {
  const int64_t last = tile.last, row_stride = tile.b.row_stride, panel_stride = tile.b.panel_stride;
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
      for (int v = 0; v < kVectors; ++v) sums[r][v] += load_at(tile.c + r * tile.c_stride + v * kLanes, v);
    }
  }

  const float* a = tile.a;
  const Element* b = tile.b.data;
  const int64_t a_stride = tile.a_stride;
  const char* ahead = tile.ahead;
  for (int64_t i = 0; i < tile.k; ++i, ++a, b += row_stride, ahead += tile.ahead_step) {
    __builtin_prefetch(ahead);
    Vector b_row[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) b_row[v] = load_at(b + v / 2 * panel_stride + v % 2 * kLanes, v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector a_element = broadcast(a[r * a_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a_element * b_row[v];
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = tile.c + r * tile.c_stride + v * kLanes;
      is_partial(v) ? store_first(to, sums[r][v], last) : store(to, sums[r][v]);
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

// All rows of a block of c by the columns of one tile. The first tiles fetch the panels behind, which come from further away.
template <class Element>
void compute_column(Tile<Element> tile, int64_t m, int64_t tiles, int64_t panels, const ComputeTile<Element>* compute) {
  const bool is_packed = tile.b.row_stride == kPanel;
  const int64_t size = is_packed ? panels * tile.k * kPanel * static_cast<int64_t>(sizeof(Element)) : 0;  // bytes
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t rows = m / tiles + (i < m % tiles);  // 16 rows are 8 + 8 rather than 14 + 2: a low tile is a slow one
    const int64_t fetched = i * tile.k * kLine;
    tile.ahead = reinterpret_cast<const char*>(tile.b.data) + (fetched < size ? size + fetched : 0);
    tile.ahead_step = fetched < size ? kLine : 0;
    compute[rows](tile);
    tile.a += rows * tile.a_stride;
    tile.c += rows * tile.c_stride;
  }
}

// A block of c for a block of k: with each panel of b, or few of them, all tiles of the rows.
template <class Element>
void compute_block(Tile<Element> tile, int64_t m, int64_t n) {
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
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
    tile.c += columns;
    if (tile.bias) tile.bias += columns;
  }
}

// See Kernels::product. The sum of an element of c runs from the first of k to the last, whatever the tiles and blocks are: a sum
// that is stored and loaded again between two blocks is the same.
template <class Element>
void product(const ProductOf<Element>& p) {
  const int64_t depths = p.k > kDepth ? (p.k + kDepth - 1) / kDepth : 1;
  const int64_t depth = (p.k + depths - 1) / depths;
  for (int64_t top = 0; top < p.m; top += kHeight) {
    const int64_t m = p.m - top < kHeight ? p.m - top : kHeight;
    Tile<Element> tile{.k = 0,
                       .a = p.a + top * p.a_stride,
                       .a_stride = p.a_stride,
                       .b = p.b,
                       .c = p.c + top * p.c_stride,
                       .c_stride = p.c_stride,
                       .bias = p.bias,
                       .accumulate = p.accumulate,
                       .last = 0};
    for (int64_t i = 0; i < depths; ++i) {
      tile.k = p.k - i * depth < depth ? p.k - i * depth : depth;
      compute_block(tile, m, p.n);
      tile.a += depth;
      tile.b.data += depth * p.b.row_stride;
      tile.bias = nullptr;
      tile.accumulate = true;
    }
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
