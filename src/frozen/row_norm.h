// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "frozen/engine.h"

namespace xattn::detail::engine {

EngineNorm engine_norm(const NormWeights& norm);

/// Rows [n, features] of projected queries or keys, in place.
void normalise(const EngineNorm& norm, float* rows, int64_t n, int64_t features);

}  // namespace xattn::detail::engine
