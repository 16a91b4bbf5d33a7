// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cpu/tuning.h"

// The properties of the orders of products (plan.h), in the one table that the planner, modules and frozen layers read.
namespace xattn::detail {

/// One row of the table of orders.
struct OrderTraits {
  std::string_view name;
  bool is_raw;                ///< it reads the context as given
  bool is_folded;             ///< it reads a context that all weights of its chain have been multiplied into
  bool uses_product;          ///< it multiplies the two weights of a head with each other
  bool has_outer_projection;  ///< the projection of the query, or of the output, is a product of its own
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
  return traits(logits).has_outer_projection;
}
constexpr bool ends_in_heads(Order values) {
  return traits(values).has_outer_projection;
}

/// How a frozen layer stores Xk and Xv in orders that keep them as they are.
enum class ContextLayout {
  packed,
  pack_on_read,  ///< in rows; each task packs keys when it reads them
  unpacked,      ///< in rows, for so few query rows that packing takes longer than it saves
};

/// The layout for this many query rows of H heads, which are multiplied by the keys in one product.
constexpr ContextLayout context_layout(int64_t query_rows, int64_t H) {
  return query_rows <= kMostRowsUnpacked / H     ? ContextLayout::unpacked
         : query_rows <= kMostRowsPackOnRead / H ? ContextLayout::pack_on_read
                                                 : ContextLayout::packed;
}

}  // namespace xattn::detail
