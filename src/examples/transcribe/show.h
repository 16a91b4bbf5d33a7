// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <string>

#include "common/sound.h"
#include "transcribe/transcript.h"

// A transcript as text, JSON, a picture and a page.
namespace transcribe {

/// A line for each segment, with its times; after it, if there are words, a line for each.
std::string text_of(const Transcript& transcript);

/// One line: {"language", "text", "segments": [{"start", "end", "text", "tokens", "words": [{"word", "start", "end"}]}], "seconds", ...}
std::string json_of(const Transcript& transcript, const examples::Sound& sound);

/// The words of the first window above its spectrogram, each with its attention over time: uint8 [height, width, 3].
torch::Tensor draw(const Transcript& transcript);

/// Writes a page about the sound in this file: pointing at a word lights its stretch of the spectrogram, a click plays it. Throws
/// as examples::write_file.
void write_page(const std::string& path, const std::string& file, const Transcript& transcript, const examples::Sound& sound);

}  // namespace transcribe
