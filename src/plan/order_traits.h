// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <cstdint>

#include "kernels/kernels.h"

// What an order of products (plan.h) reads: asked by the planner, by modules and by frozen layers.
namespace xattn::detail {

/// Whether the context stays as it came.
constexpr bool is_raw(Order order) {
  return order == Order::fold_into_query || order == Order::prefold;
}
/// Whether the context takes in all of the weights.
constexpr bool is_folded(Order order) {
  return order == Order::fold_into_context || order == Order::prefold_into_context;
}
/// Whether the two weights of a head are multiplied with each other.
constexpr bool uses_product(Order order) {
  return order == Order::prefold || order == Order::prefold_into_context;
}

/// How a frozen layer lays out Xk and Xv where they are all that is kept of a context.
enum class Raw {
  packed,
  rows,      ///< as they came, for the rows of a task or two, each of which packs the keys as it reads them
  few_rows,  ///< as they came, for so few rows that packing takes longer than it saves
};

/// For so many query rows of H heads, which are multiplied with the keys in one product.
constexpr Raw raw_for(int64_t query_rows, int64_t H) {
  constexpr int64_t kRowsOfATask = 112;  // about: they read the context once, and so are alone in needing it packed
  return query_rows <= kFewRows / H ? Raw::few_rows : query_rows <= kRowsOfATask / H ? Raw::rows : Raw::packed;
}

}  // namespace xattn::detail
