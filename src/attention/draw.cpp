// SPDX-License-Identifier: Apache-2.0
#include "attention/draw.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/upsample_bilinear2d.h>

#include <iterator>

#include "base/check.h"
#include "base/describe.h"

namespace xattn {

using at::Tensor;
using detail::check_floating;
using detail::check_type;
using detail::check_value;
using detail::shape_of;
using detail::type_of;

namespace {

// Every seventeenth of the 256 colours of inferno, 0xRRGGBB. Colours between them are interpolated linearly.
constexpr int kInferno[] = {0x000004, 0x0C0826, 0x240C4F, 0x420A68, 0x5D126E, 0x781C6D, 0x932667, 0xAE305C,
                            0xC73E4C, 0xDD513A, 0xED6925, 0xF8850F, 0xFCA50A, 0xFAC62D, 0xF2E661, 0xFCFFA4};

void check_grid(std::string_view caller, const Tensor& map) {
  check_floating(caller, "map", map);
  check_value(map.dim() == 2 && map.numel() > 0, caller, "map must have shape [rows, columns], but has {}.", shape_of(map));
}

Tensor for_picture(const Tensor& x) {
  return x.detach().to(at::kCPU, at::kFloat);
}

// The one of `from` cells that contains the centre of each of `to` pixels. Integer arithmetic is exact for centres on borders.
Tensor cell_of_pixel(int64_t from, int64_t to) {
  return (at::arange(1, 2 * to, 2) * from).floor_divide(2 * to);
}

}  // namespace

void detail::check_floating(std::string_view caller, std::string_view name, const Tensor& x) {
  check_type(x.defined() && x.is_floating_point(), caller, "{} must be of a floating point type, but is {}.", name, type_of(x));
  check_type(!x.is_meta(), caller, "{} must hold numbers, but is on meta.", name);
}

Tensor detail::resize_map(const Tensor& map, int64_t height, int64_t width, Interpolation interpolation) {
  constexpr auto kCaller = "resize_map";
  check_grid(kCaller, map);
  check_value(height >= 1, kCaller, "height must be at least 1, but is {}.", height);
  check_value(width >= 1, kCaller, "width must be at least 1, but is {}.", width);
  const auto grid = for_picture(map);
  if (interpolation == Interpolation::nearest) {
    return grid.index_select(0, cell_of_pixel(map.size(0), height)).index_select(1, cell_of_pixel(map.size(1), width));
  }
  return at::upsample_bilinear2d(grid.unsqueeze(0).unsqueeze(0), {height, width}, /*align_corners=*/false)[0][0];
}

Tensor detail::color_map(const Tensor& map) {
  check_floating("color_map", "map", map);
  constexpr auto kSteps = std::ssize(kInferno) - 1;
  const auto codes = at::tensor(at::ArrayRef<int>(kInferno)).unsqueeze(1);
  const auto colors = codes.bitwise_right_shift(at::tensor({16, 8, 0})).bitwise_and(0xFF).to(at::kFloat);  // [16, 3]
  const auto place = for_picture(map).nan_to_num(/*nan=*/0.0).clamp(0, 1) * kSteps;
  const auto below = place.to(at::kLong).clamp_max(kSteps - 1);
  const auto share = (place - below).unsqueeze(-1);
  return at::lerp(at::embedding(colors, below), at::embedding(colors, below + 1), share).round().to(at::kByte);
}

Tensor overlay_map(const Tensor& image, const Tensor& map, const OverlayOptions& options) {
  constexpr auto kCaller = "overlay_map";
  check_type(image.defined() && image.scalar_type() == at::kByte, kCaller, "image must be uint8, but is {}.", type_of(image));
  check_type(!image.is_meta(), kCaller, "image must hold numbers, but is on meta.");
  check_value(image.dim() == 3 && image.size(2) == 3 && image.numel() > 0, kCaller,
              "image must have shape [H, W, 3], but has {}.", shape_of(image));
  check_grid(kCaller, map);
  check_value(options.opacity >= 0 && options.opacity <= 1, kCaller, "opacity must lie in [0, 1], but is {}.", options.opacity);
  check_value(options.maximum.value_or(1) > 0, kCaller, "maximum must be above 0, but is {}.", options.maximum.value_or(1));

  const auto grid = for_picture(map).nan_to_num(/*nan=*/0.0);
  const auto largest = options.maximum.value_or(grid.max().item<double>());
  const auto shares = (grid / (largest > 0 ? largest : 1)).clamp(0, 1);  // a map of zeros stays zero
  const auto strength = detail::resize_map(shares, image.size(0), image.size(1), options.interpolation);  // [H, W], from 0 to 1
  const auto opacity = (options.opacity * strength).unsqueeze(-1);                                        // [H, W, 1]
  return at::lerp(for_picture(image), detail::color_map(strength).to(at::kFloat), opacity).round().to(at::kByte);
}

}  // namespace xattn
