// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>

namespace examples {

inline constexpr int64_t kSampleRate = 16'000;  ///< in Hz, of sounds in memory

struct Sound {
  torch::Tensor samples;  ///< float32 [n], at kSampleRate; the mean of the channels
  int64_t channels;       ///< of the file

  double seconds() const { return static_cast<double>(samples.numel()) / kSampleRate; }
};

/// Reads a sound file of any kind that libsndfile knows (WAV, FLAC, Ogg, ...) and resamples it by libsamplerate. Throws
/// std::runtime_error, naming the file, if it cannot be read, is truncated, or has no samples, or samples that are not finite.
Sound read_sound(const std::string& path);

/// The bytes of a WAV file with 16 bits for each sample.
std::string encode_wav(const torch::Tensor& samples);

}  // namespace examples
