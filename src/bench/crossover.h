// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace bench {

/// Where one order of products overtakes another: a frozen layer of 8 heads of 64 over 512 features, over a grid of lengths, with
/// its orders pinned and with those that it chooses by itself. A list of {Lq, Lk, chosen, us}: `chosen` names the orders of the
/// logits and of the values, `us` holds the median times by order, and of the choice under `automatic`.
nlohmann::ordered_json measure_crossover(double seconds);

}  // namespace bench
