// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "transcribe/words.h"

namespace transcribe {

inline constexpr double kFrameSeconds = 0.01;

struct Options {
  std::optional<std::string> language = {};  ///< detected in the first window if not given
  std::string task = "transcribe";           ///< or "translate": to English
  int64_t beams = 1;
  bool words = false;
};

struct Segment {
  double begin, end;  ///< in seconds
  Tokens tokens;      ///< with its timestamps
  std::string text = {};
  Words words = {};  ///< if they were asked for
};

/// Where the time went, in seconds.
struct Seconds {
  double mel = 0, encoder = 0, contexts = 0, decoding = 0, words = 0;
};

struct Transcript {
  std::string language = "en";  ///< as given or detected; "en" if there was neither
  std::vector<Segment> segments = {};
  torch::Tensor mel = {};  ///< the spectrogram of the whole sound, [bins, frames]
  int64_t tokens = 0;      ///< that the decoder wrote
  Seconds seconds = {};
};

using Progress = std::function<void(int64_t done, int64_t all)>;  ///< of frames

/// Transcribes speech, float32 [n] at 16 kHz, window by window: the next one begins at the last timestamp of this one. A window
/// is passed over if it has probably no speech. There is no fallback to higher temperatures, and no window reads what was said
/// before it.
/// Throws c10::ValueError for a language, or a task, that the model does not know.
Transcript transcribe(const Whisper& whisper,
                      const torch::Tensor& samples,
                      const Options& options,
                      const Progress& progress = {});

}  // namespace transcribe
