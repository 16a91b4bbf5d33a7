// SPDX-License-Identifier: Apache-2.0
#include "digits.h"

#include <fmt/format.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>

namespace vqa {
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

DigitSets load_digits(const std::string& path) {
  const xattn::SafetensorsFile file(path);
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

}  // namespace vqa
