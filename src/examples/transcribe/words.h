// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "transcribe/search.h"

namespace transcribe {

struct Word {
  std::string text;  ///< with the space in front of it, and the punctuation around it
  Tokens tokens;
  double begin, end;        ///< in seconds
  torch::Tensor attention;  ///< float32 [Lk]: to each 20 ms, the mean over tokens and heads; only in the first window
};

using Words = std::vector<Word>;

/// Joins tokens of text to words: at spaces, or in languages without them at characters.
Words split_words(const Tokens& text, const examples::ByteVocabulary& vocabulary, const std::string& language);

/// The words of a text about a window with their times in it, from those that `split_words` gives. As in OpenAI's program, the
/// decoder reads the whole text once more without timestamps; dynamic time warping then follows the attention of the alignment
/// heads, each of them normalised over the text and smoothed over time. frames: of the spectrogram that are sound.
Words align(const Whisper& whisper, const Contexts& sound, const Tokens& prompt, Words words, int64_t frames);

}  // namespace transcribe
