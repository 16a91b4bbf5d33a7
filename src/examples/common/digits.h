// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <torch/types.h>

#include <cstdint>
#include <string>

namespace examples {

inline constexpr int64_t kDigitSize = 8;  ///< pixels, both ways
inline constexpr int64_t kDigitKinds = 10;

/// Images of handwritten digits with what they show.
struct Digits {
  torch::Tensor images;  ///< float32 [N, 8, 8], ink from 0 to 1
  torch::Tensor labels;  ///< int64 [N], 0 to 9
};

/// Two sets that share no image. Some of the writers are in both.
struct DigitSets {
  Digits training;
  Digits held_out;
};

/// The images [N, 8, 8] as other hands might have written them: each turned, stretched, slanted and moved by a little, drawn
/// at random, with more or less ink, and with some noise.
torch::Tensor jitter(const torch::Tensor& images, at::Generator& generator);

/// Reads the file that scripts/make_digits.py writes. Every fifth image of each digit is held out, always the same ones.
/// Throws xattn::FileError, naming the file, if it cannot be read or holds something else.
DigitSets load_digits(const std::string& path);

}  // namespace examples
