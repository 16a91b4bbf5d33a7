// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace examples {

/// Dynamic time warping: the cheapest way through costs float32 [rows, columns] from the first corner to the last, one row or one
/// column at a time or both. Returns the column at which it enters each row.
std::vector<int64_t> time_warp(const torch::Tensor& costs);

}  // namespace examples
