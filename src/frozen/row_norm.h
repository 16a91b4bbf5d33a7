// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "modules/norm_weights.h"

namespace xattn::detail::engine {

/// Normalises rows [n, features] of projected queries or keys in place: each head or the whole row, by the size of the norm.
void normalise_rows(const NormWeights& norm, float* rows, int64_t n, int64_t features);

}  // namespace xattn::detail::engine
