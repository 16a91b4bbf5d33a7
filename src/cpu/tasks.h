// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"

// Divides work into tasks, by pure functions of its sizes. The division changes no bit of a result.
namespace xattn::detail::engine {

/// Bytes that a task reads besides its rows: weights, which are the same for all rows, and the context of one query.
struct BytesRead {
  int64_t weights, context;
};

/// Floats of scratch that a task needs: for each of its rows, and also for each row whose logits it holds at a time.
struct ScratchSize {
  int64_t row;
  int64_t logits = 0, rows_at_a_time = 0;

  int64_t of(int64_t rows) const { return rows * row + std::min(rows, rows_at_a_time) * logits; }
};

/// The properties of a computation on rows that its division depends on.
struct RowWork {
  int64_t rows;
  bool has_many_rows;      ///< whether its products run on the matrix unit
  bool is_uneven = false;  ///< whether later rows may cost more than earlier ones
  BytesRead reads;
  ScratchSize apart, together;  ///< of a task that one thread computes, and of one that all threads compute together
};

/// Its division into tasks of consecutive rows.
struct RowShares {
  bool together;        ///< whether all threads compute one task after another, rather than each thread tasks of its own
  int64_t rows, tasks;  ///< rows of a task; the last one may have fewer
  int64_t scratch;      ///< floats of a task
  int64_t at_once;      ///< tasks at a time
};
RowShares plan_shares(const RowWork& work, int64_t threads, const Kernels& kernels);

/// The division of `count` products of equal sizes into tasks, each of which computes some rows and some panels of one product.
struct ProductShares {
  int64_t threads;
  int64_t row_tasks, column_tasks;  ///< of each product
  int64_t rows, panels;             ///< of a task
  int64_t terms;                    ///< rows of the right side that a task packs at a time
};
ProductShares plan_product(
    int64_t count, const ProductSizes& sizes, bool has_many_rows, int64_t threads, const Kernels& kernels);

}  // namespace xattn::detail::engine
