// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>

namespace examples {

inline constexpr int64_t kHop = 160;  ///< samples from one frame to the next: a frame is 10 ms

/// The log-mel spectrogram that Whisper was trained on: samples float32 [n] at 16 kHz -> float32 [bins, n / kHop], about -1 to 1,
/// and within 2 of its largest element, which is that of the whole sound.
torch::Tensor log_mel(const torch::Tensor& samples, int64_t bins);

}  // namespace examples
