// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <cstdint>

#include "cpu/tuning.h"

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

/// How a frozen layer stores Xk and Xv in orders that keep them as they are.
enum class ContextLayout {
  packed,
  pack_on_read,  ///< in rows; each task packs keys when it reads them
  unpacked,      ///< in rows, for so few query rows that packing takes longer than it saves
};

/// The layout for so many query rows of H heads, which are multiplied by the keys in one product.
constexpr ContextLayout context_layout(int64_t query_rows, int64_t H) {
  return query_rows <= kMostRowsUnpacked / H     ? ContextLayout::unpacked
         : query_rows <= kMostRowsPackOnRead / H ? ContextLayout::pack_on_read
                                                 : ContextLayout::packed;
}

}  // namespace xattn::detail
