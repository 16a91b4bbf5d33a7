// SPDX-License-Identifier: Apache-2.0
#include "common/digits.h"

#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/grid_sampler.h>
#include <fmt/format.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>

namespace examples {
namespace {

void check(bool ok, const std::string& path, const std::string& expectation) {
  if (!ok) {
    throw xattn::FileError(fmt::format("{}: {}; scripts/make_digits.py writes such a file", path, expectation));
  }
}

Digits select(const torch::Tensor& images, const torch::Tensor& labels, const torch::Tensor& chosen) {
  return {images.index({chosen}).to(torch::kFloat32) / 16, labels.index({chosen}).to(torch::kInt64)};
}

}  // namespace

torch::Tensor jitter(const torch::Tensor& images, at::Generator& generator) {
  constexpr double kMost = 0.15;    // of each entry of the map from places to places; 0.15 moves by 0.6 pixels
  constexpr double kMostInk = 0.2;  // more or less than there is
  constexpr double kNoise = 0.05;   // its deviation; keeps the model from learning single pixels by heart
  const auto N = images.size(0);
  const auto draw = [&](torch::IntArrayRef shape, double most) { return (torch::rand(shape, generator) * 2 - 1) * most; };
  const auto maps = torch::eye(2, 3) + draw({N, 2, 3}, kMost);  // [N, 2, 3]
  const auto grid = at::affine_grid_generator(maps, {N, 1, kDigitSize, kDigitSize}, /*align_corners=*/false);
  const auto moved = at::grid_sampler(images.unsqueeze(1), grid, /*interpolation_mode=*/0, /*padding_mode=*/0,  // [N, 1, 8, 8]
                                      /*align_corners=*/false);
  const auto inked = moved.squeeze(1) * (1 + draw({N, 1, 1}, kMostInk));
  return inked + torch::randn(inked.sizes(), generator) * kNoise;
}

DigitSets load_digits(const std::string& path) {
  const auto file = xattn::open_checkpoint(path);
  const auto images = file.tensor("images");  // [N, 8, 8], ink from 0 to 16
  const auto labels = file.tensor("labels");  // [N]
  check(images.scalar_type() == torch::kUInt8 && images.dim() == 3 && images.size(1) == kDigitSize &&
            images.size(2) == kDigitSize,
        path, "images must be uint8 [N, 8, 8]");
  check(labels.scalar_type() == torch::kUInt8 && labels.dim() == 1 && labels.size(0) == images.size(0), path,
        "labels must be uint8 [N], one for each image");
  check((images <= 16).all().item<bool>() && (labels < kDigitKinds).all().item<bool>(), path,
        "ink must lie in 0 to 16, labels in 0 to 9");

  // Counted for each digit by itself, so that the held-out set has all of them in equal parts.
  auto held_out = torch::zeros(labels.sizes(), torch::kBool);  // [N]
  for (int64_t digit = 0; digit < kDigitKinds; ++digit) {
    const auto places = (labels == digit).nonzero().flatten();  // [number of such images]
    check(places.size(0) >= 5, path, fmt::format("there must be at least five images of a {}", digit));
    held_out.index_fill_(0, places.slice(/*dim=*/0, /*start=*/4, /*end=*/std::nullopt, /*step=*/5), true);
  }
  return {select(images, labels, ~held_out), select(images, labels, held_out)};
}

}  // namespace examples
