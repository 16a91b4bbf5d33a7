// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/byte_vocabulary.h"
#include "transcribe/model.h"

namespace transcribe {

using examples::Tokens;

inline constexpr double kTokenSeconds = 0.02;  ///< from one timestamp to the next, and of an element of the memory
inline constexpr int64_t kFramesOfToken = 2;

/// What a model was trained to write, and what it must not: by its generation_config.json, or as OpenAI's program does it.
struct Rules {
  /// Throws xattn::FileError, naming the file, if one is damaged, a token is missing or a number is out of range; so all tokens
  /// here are below V.
  Rules(const Model& model, const examples::ByteVocabulary& vocabulary);

  bool is_timestamp(int64_t token) const { return token >= first_timestamp; }

  /// Sets the logits of tokens that must not follow `text`, which is without the prompt, to -inf. row: float32 [V].
  void forbid(float* row, int64_t V, const Tokens& text) const;

  int64_t start, end, no_timestamps, no_speech;
  std::map<std::string, int64_t> languages, tasks;  ///< by name: "en"; empty if the model only transcribes English
  int64_t first_timestamp;                          ///< 0.00 seconds into the window
  int64_t latest_start;                             ///< of the first timestamp, in tokens
  Tokens suppressed, suppressed_at_start;
  int64_t longest;        ///< tokens of a text with its prompt
  Heads alignment_heads;  ///< heads of cross-attention that follow the speech
  int64_t median_width;   ///< of the filter over their attention
};

/// All that is read from the files of a model.
struct Whisper {
  explicit Whisper(const std::string& path, std::optional<torch::ScalarType> storage = {})
      : model(path, storage), vocabulary(model.folder()), rules(model, vocabulary) {}

  Model model;
  examples::ByteVocabulary vocabulary;
  Rules rules;
};

/// A text about a window.
struct Heard {
  Tokens tokens;           ///< without the prompt and the mark of the end
  double log_probability;  ///< the mean over the tokens and that mark
  double no_speech;        ///< the probability that the window has none
};

/// The most probable text behind the prompt. With one beam each next token is the most probable one (greedy search); with n beams
/// the n most probable beginnings are kept, and the text with the best mean log-probability wins.
Heard search(const Whisper& whisper, const Contexts& sound, const Tokens& prompt, int64_t beams);

}  // namespace transcribe
