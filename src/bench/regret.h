// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "programs/shapes.h"

namespace bench {

/// How well a frozen layer plans: the time of the orders that it chooses against the fastest of all 25 pairs, in float32 on the
/// CPU. {row, chosen, us, best, best_us, left_out}: `chosen` and `best` name the orders of the logits and of the values; pairs that
/// need more than four times the operations of the chosen one are left out, and counted. Null for a row with gradients.
nlohmann::ordered_json measure_regret(const shapes::Shape& shape, double seconds);

}  // namespace bench
