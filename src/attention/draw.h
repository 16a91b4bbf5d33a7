// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention_map.h>

#include <cstdint>
#include <string_view>

// The steps of `overlay_map`. Bad input throws c10::ValueError or c10::TypeError; results are on the CPU and have no gradient.
namespace xattn::detail {

/// map [rows, columns] -> float32 [height, width]. Values are not rescaled.
at::Tensor resize_map(const at::Tensor& map,
                      int64_t height,
                      int64_t width,
                      Interpolation interpolation = Interpolation::bilinear);

/// map [...] with values from 0 to 1 -> uint8 RGB [..., 3], from black through purple and orange to light yellow: "inferno" of
/// matplotlib (N. Smith and S. van der Walt, 2015, CC0, https://bids.github.io/colormap), in which equal steps look equal and
/// lightness increases throughout, also when printed in grey. Values outside the range take the colour of its nearest end, NaN
/// that of 0.
at::Tensor color_map(const at::Tensor& map);

/// Throws c10::TypeError unless x is of a floating point type and holds numbers.
void check_floating(std::string_view caller, std::string_view name, const at::Tensor& x);

}  // namespace xattn::detail
