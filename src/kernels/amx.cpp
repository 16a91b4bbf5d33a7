// SPDX-License-Identifier: Apache-2.0
#ifdef XATTN_AMX
#define XATTN_KERNELS amx
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/shares.h"
#include "kernels/vector.h"

// Products on the matrix unit of Intel processors (AMX), which multiplies bfloat16 and adds in float32. A float32 is the exact
// sum of three bfloat16, its parts. Two numbers have nine products of parts; the sum of the six largest is off by at most 2^-23
// of the product, no more than rounding. G. Henry, P. T. P. Tang, A. Heinecke, "Leveraging the bfloat16 Artificial Intelligence
// Datatype For Higher-Precision Computations", 2019, https://arxiv.org/abs/1904.06376. The six products take 3/8 of the time of
// one vector product. Splitting the right side into parts also takes time, which pays off only if many rows share it.
namespace xattn::detail::amx {
namespace {

constexpr int64_t kRows = 16;                  // of a tile: sums, or the left side
constexpr int64_t kTerms = 32;                 // of a step: a lane holds two consecutive terms
constexpr int64_t kTile = kRows * kTerms;      // numbers of bfloat16
constexpr int64_t kStep = 3 * 2 * kTile;       // numbers of a block of the left side: three parts of two tiles
constexpr int64_t kPanelColumns = 2 * kLanes;  // a step computes two tiles by two of sums

// The sizes of a pass: 983 KB of parts of the left side and twice 98 KB of the right, for an L2 cache of 2 MB.
constexpr int64_t kMostRows = 320;
constexpr int64_t kMostTerms = 512;

// Splits x into three vectors whose upper halves sum to x. The lower halves must be ignored.
inline void divide(Vector x, Unsigned (&parts)[3]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    parts[i] = (reinterpret_cast<Unsigned>(x) + 0x8000) & 0xffff0000;
    x -= reinterpret_cast<Vector>(parts[i]);
  }
  parts[2] = reinterpret_cast<Unsigned>(x);
}

// Stores the upper halves of the lanes of x, then those of y.
inline void store_halves(uint16_t* to, Unsigned x, Unsigned y) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const auto upper = []<int... kLane>(Halves a, Halves b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (2 * kLane + 1)..., (2 * kLanes + 2 * kLane + 1)...);
  };
  const Halves halves = upper(reinterpret_cast<Halves>(x), reinterpret_cast<Halves>(y), Lanes{});
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// Stores the upper halves of x and y, alternating lane by lane.
inline void store_pairs(uint16_t* to, Unsigned x, Unsigned y) {
  const Unsigned pairs = x >> 16 | (y & 0xffff0000);
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}

// The rows of a block of the left side, divided as equally as possible between an upper and a lower tile.
struct Rows {
  int64_t count;
  int64_t upper() const { return (count + 1) / 2; }
  int64_t lower() const { return count > 1 ? count / 2 : 1; }  // a tile has at least one row
};

// The parts of a block of the left side, made step by step: [k / kTerms, 3, 2 (upper, lower), kRows, kTerms].
struct Block {
  const float* from = nullptr;
  int64_t stride = 0, step = 1;  // of rows and terms
  Rows rows = {};
  int64_t k = 0;  // padded with zeros to whole steps
  uint16_t* to = nullptr;
  int64_t next = 0;

  // Divides one step, if it is whole and its terms are consecutive.
  [[gnu::always_inline]] void divide_whole_step() {
    if (step != 1 || (next + 1) * kTerms > k) return;
    const float* row = from + next * kTerms;
    for (int64_t i = 0; i < rows.count; ++i, row += stride) {
      __builtin_prefetch(row + 2 * kTerms);
      __builtin_prefetch(row + 2 * kTerms + kLanes);
      put(i, load(row), load(row + kLanes));
    }
    ++next;
  }

  [[gnu::noinline]] void divide_rest() {
    while (step == 1 && (next + 1) * kTerms <= k) divide_whole_step();
    for (; next < divided_up(k, kTerms); ++next) {
      const int64_t first = next * kTerms, terms = k - first < kTerms ? k - first : kTerms;
      step == 1 ? divide_step_in_rows(first, terms) : divide_step_in_columns(first, terms);
    }
  }

  void divide_step_in_rows(int64_t first, int64_t terms) {
    const int64_t low = terms < kLanes ? terms : kLanes;
    for (int64_t i = 0; i < rows.count; ++i) {
      const float* row = from + i * stride + first;
      put(i, load_first(row, low), load_first(row + low, terms - low));
    }
  }

  void divide_step_in_columns(int64_t first, int64_t terms) {
    for (int64_t top = 0; top < rows.count; top += kLanes) {
      const int64_t count = rows.count - top < kLanes ? rows.count - top : kLanes;
      Vector x[2][kLanes];
      for (int64_t i = 0; i < kTerms; ++i)
        x[i / kLanes][i % kLanes] = i < terms ? load_first(from + top + (first + i) * step, count) : Vector{};
      transpose(x[0]);
      transpose(x[1]);
      for (int64_t i = 0; i < count; ++i) put(top + i, x[0][i], x[1][i]);
    }
  }

  [[gnu::always_inline]] void put(int64_t row, Vector x, Vector y) {
    uint16_t* const place = to + next * kStep + (row < rows.upper() ? row : row - rows.upper() + kRows) * kTerms;
    Unsigned x_parts[3], y_parts[3];
    divide(x, x_parts);
    divide(y, y_parts);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) store_halves(place + i * 2 * kTile, x_parts[i], y_parts[i]);
  }
};

// The parts of a panel of the right side, made two rows at a time: [k / kTerms, parts, 2, kTerms / 2, kLanes, 2].
template <class Element>
struct Panel {
  static constexpr int64_t kAhead = 16;  // rows to prefetch
  static constexpr int64_t kParts = std::is_same_v<Element, Bfloat16> ? 1 : 3;

  const Element* from = nullptr;
  int64_t row_stride = 0;
  int64_t k = 0, columns = 0;  // padded with zeros
  uint16_t* to = nullptr;
  int64_t next = 0;   // pair of rows
  int64_t whole = 0;  // pairs of rows that have kPanelColumns numbers each

  [[gnu::always_inline]] void divide_whole_pairs(int64_t count) {
    for (; count > 0 && next < whole; --count, ++next) {
      const Element* x = from + 2 * next * row_stride;
      const Element* y = x + row_stride;
      for (int64_t i = 0; i < 2 * kPanelColumns * static_cast<int64_t>(sizeof(Element)); i += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + kAhead * row_stride) + i);
      put(0, load(x), load(y));
      put(1, load(x + kLanes), load(y + kLanes));
    }
  }

  // Divides the rest, up to the end of the last step.
  [[gnu::noinline]] void divide_rest() {
    divide_whole_pairs(whole);
    for (; next < divided_up(k, kTerms) * kTerms / 2; ++next) {
      for (int64_t half = 0; half < 2; ++half) put(half, load_half(2 * next, half), load_half(2 * next + 1, half));
    }
  }

  [[gnu::always_inline]] void put(int64_t half, Vector x, Vector y) {
    uint16_t* const place = to + ((next >> 4) * kParts * 2 + half) * kTile + (next & 15) * kTerms;
    if constexpr (kParts == 1) {
      store_pairs(place, reinterpret_cast<Unsigned>(x), reinterpret_cast<Unsigned>(y));
    } else {
      Unsigned x_parts[3], y_parts[3];
      divide(x, x_parts);
      divide(y, y_parts);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) store_pairs(place + i * 2 * kTile, x_parts[i], y_parts[i]);
    }
  }

  Vector load_half(int64_t row, int64_t half) const {
    const int64_t left = columns - half * kLanes;
    return row < k && left > 0 ? load_first(from + row * row_stride + half * kLanes, left < kLanes ? left : kLanes) : Vector{};
  }
};

// The sums of a block.
struct Sums {
  float* c;
  int64_t stride;
  const float* first;  // the initial value of each row; that of c if null
  const char* next;    // the c of the next block, as many rows, to prefetch
};

// The tile registers: sums (upper and lower rows, left and right columns), rows, columns. The intrinsics need literals.
#define XATTN_UPPER_LEFT 0
#define XATTN_UPPER_RIGHT 1
#define XATTN_LOWER_LEFT 2
#define XATTN_LOWER_RIGHT 3
#define XATTN_UPPER 4
#define XATTN_LOWER 5
#define XATTN_LEFT 6
#define XATTN_RIGHT 7

// Makes the compiler finish its stores here, because it cannot see the memory that tiles read.
inline void will_be_read(const void* memory) {
  asm volatile("" : : "r"(memory) : "memory");
}

inline void configure(Rows rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes_of_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } tiles;
  const auto upper = static_cast<uint8_t>(rows.upper()), lower = static_cast<uint8_t>(rows.lower());
  tiles.rows[XATTN_UPPER_LEFT] = tiles.rows[XATTN_UPPER_RIGHT] = tiles.rows[XATTN_UPPER] = upper;
  tiles.rows[XATTN_LOWER_LEFT] = tiles.rows[XATTN_LOWER_RIGHT] = tiles.rows[XATTN_LOWER] = lower;
  tiles.rows[XATTN_LEFT] = tiles.rows[XATTN_RIGHT] = kRows;
  will_be_read(&tiles);
  _tile_loadconfig(&tiles);
}

inline void load_rows(const uint16_t* a, int part) {
  _tile_loadd(XATTN_UPPER, a + part * 2 * kTile, 64);
  _tile_loadd(XATTN_LOWER, a + part * 2 * kTile + kTile, 64);
}
inline void load_columns(const uint16_t* b, int part) {
  _tile_loadd(XATTN_LEFT, b + part * 2 * kTile, 64);
  _tile_loadd(XATTN_RIGHT, b + part * 2 * kTile + kTile, 64);
}
inline void add_products() {
  _tile_dpbf16ps(XATTN_UPPER_LEFT, XATTN_UPPER, XATTN_LEFT);
  _tile_dpbf16ps(XATTN_UPPER_RIGHT, XATTN_UPPER, XATTN_RIGHT);
  _tile_dpbf16ps(XATTN_LOWER_LEFT, XATTN_LOWER, XATTN_LEFT);
  _tile_dpbf16ps(XATTN_LOWER_RIGHT, XATTN_LOWER, XATTN_RIGHT);
}

// Computes the sums of a block and a panel over `steps`. While the unit works, the core divides pairs of rows of the next panel
// and a step of the next block.
template <class Element>
[[gnu::noinline]] void compute_sums(const uint16_t* a,
                                    const uint16_t* b,
                                    int64_t steps,
                                    Rows rows,
                                    const Sums& sums,
                                    Panel<Element>& behind,
                                    int64_t pairs,
                                    Block& below) {
  float* const lower = sums.c + (rows.count > 1 ? rows.upper() : 1) * sums.stride;
  const int64_t bytes = sums.stride * static_cast<int64_t>(sizeof(float));
  will_be_read(sums.c);
  will_be_read(sums.first);
  if (sums.first) {
    _tile_loadd(XATTN_UPPER_LEFT, sums.first, 0);
    _tile_loadd(XATTN_UPPER_RIGHT, sums.first + kLanes, 0);
    _tile_loadd(XATTN_LOWER_LEFT, sums.first, 0);
    _tile_loadd(XATTN_LOWER_RIGHT, sums.first + kLanes, 0);
  } else {
    _tile_loadd(XATTN_UPPER_LEFT, sums.c, bytes);
    _tile_loadd(XATTN_UPPER_RIGHT, sums.c + kLanes, bytes);
    _tile_loadd(XATTN_LOWER_LEFT, lower, bytes);
    _tile_loadd(XATTN_LOWER_RIGHT, lower + kLanes, bytes);
  }
  const int64_t fetched = steps > 0 ? divided_up(rows.count, steps) : 0;  // rows to prefetch in each step
  const char* next = sums.next;
  for (int64_t step = 0; step < steps; ++step, a += kStep, b += Panel<Element>::kParts * 2 * kTile) {
    // Each product reloads one side only, and the largest product comes last.
    if constexpr (Panel<Element>::kParts == 3) {
      load_rows(a, 0);
      load_columns(b, 2);
      add_products();
      load_columns(b, 1);
      add_products();
      load_rows(a, 1);
      add_products();
    }
    behind.divide_whole_pairs(pairs);
    below.divide_whole_step();
    for (int64_t i = 0; i < fetched; ++i, next += bytes) {
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + 64, 1);
    }
    load_columns(b, 0);
    if constexpr (Panel<Element>::kParts == 1) load_rows(a, 1);
    add_products();
    load_rows(a, 2);
    add_products();
    load_rows(a, 0);
    add_products();
  }
  _tile_stored(XATTN_UPPER_LEFT, sums.c, bytes);
  _tile_stored(XATTN_UPPER_RIGHT, sums.c + kLanes, bytes);
  _tile_stored(XATTN_LOWER_LEFT, lower, bytes);
  _tile_stored(XATTN_LOWER_RIGHT, lower + kLanes, bytes);
}

// A copy of sums that fills two tiles by two: for a panel that is not whole, or a block of one row.
struct Copy {
  alignas(64) float c[2 * kRows * kPanelColumns];

  // from + bias
  void load_from(const float* from, int64_t stride, int64_t rows, int64_t columns, const float* bias) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) c[i * kPanelColumns + j] = from[i * stride + j] + bias[j];
    }
  }
  void store_to(float* to, int64_t stride, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[i * stride + j] = c[i * kPanelColumns + j];
    }
  }
};

// Computes rows [0, m) of c over the terms of p.a and b: for each panel, one block of rows after another.
template <class Element>
void multiply_parts(const Product& p, const Element* b, int64_t m, uint16_t* memory) {
  const int64_t blocks = divided_up(m, 2 * kRows), steps = divided_up(p.sizes.k, kTerms),
                panels = divided_up(p.sizes.n, kPanelColumns);
  const int64_t size_of_block = steps * kStep, c_panel_stride = p.c.in_panels ? p.c.panel_stride : kPanelColumns;
  const auto rows_of = [m, blocks](int64_t i) { return Rows{nth_share(m, blocks, i)}; };
  const auto first_of = [m, blocks](int64_t i) { return m / blocks * i + (i < m % blocks ? i : m % blocks); };
  const auto block_at = [&](int64_t i) {
    return Block{.from = p.a.data + first_of(i) * p.a.stride,
                 .stride = p.a.stride,
                 .step = p.a.step,
                 .rows = rows_of(i),
                 .k = p.sizes.k,
                 .to = memory + i * size_of_block};
  };
  uint16_t* now = memory + blocks * size_of_block;  // panels, which take no more memory than blocks
  uint16_t* behind = now + size_of_block;
  const auto panel_at = [&p, b, panels](int64_t i, uint16_t* to) {
    if (i >= panels) return Panel<Element>{};
    const int64_t columns = p.sizes.n - i * kPanelColumns;
    return Panel<Element>{.from = b + i * p.b.panel_stride,
                          .row_stride = p.b.row_stride,
                          .k = p.sizes.k,
                          .columns = columns,
                          .to = to,
                          .whole = columns >= kPanelColumns ? p.sizes.k / 2 : 0};
  };
  panel_at(0, now).divide_rest();
  block_at(0).divide_rest();
  alignas(64) float bias[kPanelColumns] = {};
  Copy copy;
  int64_t configured = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t left = p.sizes.n - panel * kPanelColumns, columns = left < kPanelColumns ? left : kPanelColumns;
    for (int64_t j = 0; j < kPanelColumns; ++j) bias[j] = p.bias && j < columns ? p.bias[panel * kPanelColumns + j] : 0;
    auto next = panel_at(panel + 1, behind);
    for (int64_t i = 0; i < blocks; ++i) {
      const auto rows = rows_of(i);
      if (rows.count != configured) configure(rows);
      configured = rows.count;
      float* c = p.c.data + panel * c_panel_stride + first_of(i) * p.c.stride;
      const float* c_behind =
          i + 1 < blocks ? c + rows.count * p.c.stride : p.c.data + (panel + 1 < panels ? panel + 1 : 0) * c_panel_stride;
      const bool is_whole = columns == kPanelColumns && rows.count > 1 && !(p.accumulate && p.bias);
      if (!is_whole && p.accumulate) copy.load_from(c, p.c.stride, rows.count, columns, bias);
      const Sums sums{.c = is_whole ? c : copy.c,
                      .stride = is_whole ? p.c.stride : kPanelColumns,
                      .first = p.accumulate ? nullptr : bias,
                      .next = reinterpret_cast<const char*>(c_behind)};
      auto below = panel == 0 && i + 1 < blocks ? block_at(i + 1) : Block{};
      compute_sums(memory + i * size_of_block, now, steps, rows, sums, next, divided_up(kTerms / 2, blocks), below);
      below.divide_rest();
      if (!is_whole) copy.store_to(c, p.c.stride, rows.count, columns);
    }
    next.divide_rest();
    uint16_t* const done = now;
    now = behind, behind = done;
  }
}

// The terms are divided in the same way for any rows and columns, so that the bits of a row do not depend on them.
template <class Element>
[[gnu::noinline]] void product_in_parts(const Product& p) {
  const int64_t blocks = divided_up(equal_part(p.sizes.m, kMostRows), 2 * kRows), height = blocks * 2 * kRows;
  const int64_t steps = divided_up(equal_part(p.sizes.k, kMostTerms), kTerms), depth = steps * kTerms;
  // For the blocks and two panels. A float holds two of the numbers.
  auto* const memory = reinterpret_cast<uint16_t*>(thread_memory((blocks + 2) * steps * kStep / 2));
  for (int64_t top = 0; top < p.sizes.m; top += height) {
    auto part = p;
    part.a.data += top * p.a.stride;
    part.c.data += top * p.c.stride;
    int64_t first = 0;
    do {  // once if k is 0
      part.sizes.k = p.sizes.k - first < depth ? p.sizes.k - first : depth;
      multiply_parts(part, static_cast<const Element*>(p.b.data) + first * p.b.row_stride,
                     p.sizes.m - top < height ? p.sizes.m - top : height, memory);
      first += depth;
      part.a.data += depth * p.a.step;
      part.bias = nullptr;
      part.accumulate = true;
    } while (first < p.sizes.k);
  }
  _tile_release();
}

}  // namespace

extern const int64_t kBlockRows;
const int64_t kBlockRows = kMostRows;

void product(const Product& p) {
  p.b.storage == Storage::float32 ? product_in_parts<float>(p) : product_in_parts<Bfloat16>(p);
}

}  // namespace xattn::detail::amx
#endif
