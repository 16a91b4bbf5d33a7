// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Constants that decide how work is divided among threads and caches. "Measured" means chosen by measurement, on AVX-512 with 2
// MB of L2. None is measured at run time, because some determine the order of sums and so their last bits. `Kernels` has the
// sizes of tiles and blocks of rows.
namespace xattn::detail {

// Caches, in bytes.
constexpr int64_t kCoreCache = 2 << 20;      // L2 of a core
constexpr int64_t kSharedCache = 64 << 20;   // measured: larger weights come from memory, not from the cache that cores share
constexpr int64_t kScratchFloats = 3 << 16;  // of a task: 786 KB, which fits into L2 beside a panel of weights
constexpr int64_t kMostScratchFloats = 1 << 25;  // of a task: 128 MB, however long the context is
constexpr int64_t kHugePage = 2 << 20;           // on x86-64 and on ARM with pages of 4 KB

// Threads.
constexpr int64_t kOperationsOfATask = 1 << 18;     // about 1 us of arithmetic: fewer cost less than waking a thread
constexpr int64_t kOperationsOfACall = 20'000'000;  // measured: below this, synchronising threads costs more than it saves
constexpr int64_t kRowsOfAThread = 4;          // measured: with fewer rows for each thread, all threads compute the same rows
constexpr int64_t kRowsOfAThreadOnUnit = 128;  // measured: rows with which a product on the matrix unit is fast
constexpr int64_t kUnevenTasksOfAThread = 8;   // at least, of unequal costs: threads then end within 1/8 of their time

// One number of an elementwise operation takes about as long as so many operations of arithmetic: estimates from the bytes that it
// reads and writes, or from its instructions. They only decide from which size on it is divided.
constexpr int64_t kOperationsOfAnAddition = 8;
constexpr int64_t kOperationsOfAConversion = 16;
constexpr int64_t kOperationsOfANorm = 16;
constexpr int64_t kOperationsOfAnActivation = 64;

// Products that pack their right side in the call.
constexpr int64_t kPackedBytes = 1 << 19;      // of a right side at a time: a quarter of L2, beside a left side that fits too
constexpr int64_t kPackedBytesOnce = 4 << 20;  // measured, where the left side is read from memory once for each of these
constexpr int64_t kPackedTerms = 1024;         // of a right side at a time: the depth of a block in tile_product.h

// Contexts.
constexpr int64_t kMostRowsUnpacked = 24;      // measured: for so few rows, packing a right side costs more than it saves
constexpr int64_t kMostRowsPackOnRead = 112;   // a block of AVX-512: so many rows are one task, which reads a context once
constexpr int64_t kMostKeyShares = 8;          // measured, for contexts that are read once: see frozen/attend.cpp
constexpr int64_t kLeastKeysOfAShare = 64;     // measured, as above
constexpr int64_t kKeyBlockBytes = 384 << 10;  // of a share at a time: they stay in L2 from the logits to the weighted values

}  // namespace xattn::detail
