// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kernels/kernels.h"

// What distinguishes the orders of products (plan.h): the one table that the planner, modules and frozen layers read.
namespace xattn::detail {

/// One row of the table of orders.
struct OrderTraits {
  std::string_view name;
  bool is_raw;         ///< it reads the context as it came
  bool is_folded;      ///< it reads a context that all weights of its chain have been multiplied into
  bool uses_product;   ///< it multiplies the two weights of a head with each other
  bool ends_in_heads;  ///< the projection of the query, or of the output, is a product of its own
};

/// In the order of the enum.
inline constexpr std::array<OrderTraits, kOrders> kOrderTraits = {{
    {"standard", false, false, false, true},
    {"fold_into_query", true, false, false, true},
    {"prefold", true, false, true, false},
    {"fold_into_context", false, true, false, false},
}};

constexpr const OrderTraits& traits(Order order) {
  return kOrderTraits[static_cast<size_t>(order)];
}
constexpr bool is_raw(Order order) {
  return traits(order).is_raw;
}
constexpr bool is_folded(Order order) {
  return traits(order).is_folded;
}
constexpr bool uses_product(Order order) {
  return traits(order).uses_product;
}
constexpr bool projects_query(Order logits) {
  return traits(logits).ends_in_heads;
}
constexpr bool ends_in_heads(Order values) {
  return traits(values).ends_in_heads;
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
