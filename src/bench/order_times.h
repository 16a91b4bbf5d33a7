// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "programs/shapes.h"

// Measures a frozen layer's choice of orders of products, in float32 on the CPU: the choice is timed beside pinned orders.
// In all results `chosen` and `best` name the orders of the logits and of the values, and times are medians in microseconds.
namespace bench {

/// Shows where one order overtakes another, for a layer of 8 heads of 64 over 512 features and a grid of lengths. Returns a
/// list of {Lq, Lk, chosen, us}: `us` holds the times by order, and the time of the choice under `automatic`.
nlohmann::ordered_json measure_crossover(double seconds);

/// The choice for a row beside the fastest of all pairs of orders: {row, chosen, us, best, best_us, left_out}. Pairs that need
/// more than four times the operations of the choice are left out, and counted. Null for a row with gradients.
nlohmann::ordered_json measure_regret(const shapes::Shape& shape, double seconds);

}  // namespace bench
