// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "programs/shapes.h"

// How well a frozen layer chooses its orders of products, in float32 on the CPU: its own choice is timed beside pinned orders.
// In all results `chosen` and `best` name the orders of the logits and of the values, and times are medians in microseconds.
namespace bench {

/// Where one order overtakes another: a layer of 8 heads of 64 over 512 features, over a grid of lengths. A list of {Lq, Lk,
/// chosen, us}: `us` holds the times by order, and that of the choice under `automatic`.
nlohmann::ordered_json measure_crossover(double seconds);

/// The choice for a row beside the fastest of all pairs of orders: {row, chosen, us, best, best_us, left_out}. Pairs that need
/// more than four times the operations of the choice are left out, and counted. Null for a row with gradients.
nlohmann::ordered_json measure_regret(const shapes::Shape& shape, double seconds);

}  // namespace bench
