// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/tile_product.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

// Packs row by row, because b comes from memory and the packed panels stay in the cache.
template <class Element>
void pack_as(const float* b, int64_t stride, int64_t k, int64_t n, Element* packed) {
  for (int64_t i = 0; i < k; ++i, b += stride, packed += kPanel) {
    Element* to = packed;
    int64_t j = 0;
    for (; j + kPanel <= n; j += kPanel, to += k * kPanel) {
      store(to, load(b + j));
      store(to + kLanes, load(b + j + kLanes));
    }
    if (j == n) continue;
    const int64_t left = n - j;
    store(to, left >= kLanes ? load(b + j) : load_first(b + j, left));
    store(to + kLanes, left > kLanes ? load_first(b + j + kLanes, left - kLanes) : Vector{});
  }
}

// Packs a block of kLanes by kLanes at a time.
template <class Element>
void pack_transposed_as(const float* b, int64_t stride, int64_t k, int64_t n, Element* packed) {
  for (int64_t j = 0; j < (n + kPanel - 1) / kPanel * kPanel; j += kLanes) {
    Element* to = packed + j / kPanel * kPanel * k + j % kPanel;
    const int64_t rows = n - j < kLanes ? n - j : kLanes;
    const float* from = b + j * stride;
    for (int64_t i = 0; i < k; i += kLanes) {
      const int64_t columns = k - i < kLanes ? k - i : kLanes;
      Vector block[kLanes];
      if (rows == kLanes && columns == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) block[r] = load(from + r * stride + i);
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(to + (i + r) * kPanel, block[r]);
      } else {
        for (int r = 0; r < kLanes; ++r) block[r] = r < rows ? load_first(from + r * stride + i, columns) : Vector{};
        transpose(block);
        for (int r = 0; r < columns; ++r) store(to + (i + r) * kPanel, block[r]);
      }
    }
  }
}

void pack(const float* b, int64_t stride, int64_t k, int64_t n, void* packed, Storage storage) {
  storage == Storage::float32 ? pack_as(b, stride, k, n, static_cast<float*>(packed))
                              : pack_as(b, stride, k, n, static_cast<Bfloat16*>(packed));
}

void pack_transposed(const float* b, int64_t stride, int64_t k, int64_t n, void* packed, Storage storage) {
  storage == Storage::float32 ? pack_transposed_as(b, stride, k, n, static_cast<float*>(packed))
                              : pack_transposed_as(b, stride, k, n, static_cast<Bfloat16*>(packed));
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
