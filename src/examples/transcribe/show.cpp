// SPDX-License-Identifier: Apache-2.0
#include "transcribe/show.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/printed.h"
#include "common/drawing.h"
#include "common/page.h"
#include "common/png.h"
#include "speech.html.h"

namespace transcribe {
namespace {

using Json = nlohmann::ordered_json;
using torch::Tensor;

constexpr int64_t kScale = 2;  // pixels for a bin, and for a frame of a token

// A spectrogram, dark where it is loud and low sounds at the bottom: [bins, frames] -> uint8 [height, width, 3].
Tensor draw_spectrogram(const Tensor& mel, const Tensor& loudest) {
  const auto halved = torch::avg_pool1d(mel, kFramesOfToken, kFramesOfToken, 0, /*ceil_mode=*/true);  // [bins, width]
  const auto grey = ((loudest - halved) / 2).clamp(0, 1).mul(255).to(torch::kUInt8);  // log_mel has a range of 2
  return grey.flip(0).repeat_interleave(kScale, 0).unsqueeze(2).expand({-1, -1, 3}).contiguous();
}

// The spectrogram of the whole sound, with one column at least.
Tensor mel_of(const Transcript& transcript) {
  return torch::constant_pad_nd(transcript.mel, {0, std::max<int64_t>(0, kFramesOfToken - transcript.mel.size(1))});
}

std::string clock(double seconds) {
  const int64_t milliseconds = std::llround(seconds * 1000);
  return fmt::format("{:02}:{:02}.{:03}", milliseconds / 60'000, milliseconds / 1000 % 60, milliseconds % 1000);
}

double rounded(double seconds) {
  return std::round(seconds * 1000) / 1000;
}

}  // namespace

// nlohmann's library finds these by their names.
void to_json(Json& json, const Word& word) {
  json = {{"word", word.text}, {"start", rounded(word.begin)}, {"end", rounded(word.end)}};
}

void to_json(Json& json, const Segment& segment) {
  json = {{"start", rounded(segment.begin)},
          {"end", rounded(segment.end)},
          {"text", segment.text},
          {"tokens", segment.tokens},
          {"words", segment.words}};
}

std::string text_of(const Transcript& transcript) {
  std::string all;
  const auto add = [&all](const char* indent, const std::string& text, double begin, double end) {
    all += fmt::format("{}[{} --> {}] {}\n", indent, clock(begin), clock(end), xattn::detail::one_line(text));
  };
  for (const auto& segment : transcript.segments) {
    if (!segment.text.empty()) add("", segment.text, segment.begin, segment.end);
    for (const auto& word : segment.words) add("  ", word.text, word.begin, word.end);
  }
  return all;
}

std::string json_of(const Transcript& transcript, const examples::Sound& sound) {
  std::string text;
  for (const auto& segment : transcript.segments) text += segment.text;
  const auto& [mel, encoder, contexts, decoding, words] = transcript.seconds;
  const Json json = {
      {"language", transcript.language},
      {"text", text},
      {"segments", transcript.segments},
      {"duration", rounded(sound.seconds())},
      {"tokens", transcript.tokens},
      {"seconds", {{"mel", mel}, {"encoder", encoder}, {"contexts", contexts}, {"decoding", decoding}, {"words", words}}}};
  return xattn::detail::printed_json(json.dump(-1, ' ', false, Json::error_handler_t::replace)) + "\n";
}

Tensor draw(const Transcript& transcript) {
  const auto mel = mel_of(transcript);
  Words words;
  for (const auto& segment : transcript.segments) {
    std::ranges::copy_if(segment.words, std::back_inserter(words), [](const Word& word) { return word.attention.defined(); });
  }
  constexpr int64_t kGap = 8, kRow = examples::kCharacterHeight + 4, kColumns = 1500;
  size_t longest = 0;
  for (const auto& word : words) longest = std::max(longest, word.text.size());
  const auto columns =
      words.empty() ? std::min<int64_t>(kColumns, mel.size(1) / kFramesOfToken) : words.front().attention.size(0);
  const auto spectrogram = draw_spectrogram(mel.narrow(1, 0, std::min(mel.size(1), columns * kFramesOfToken)), mel.max());
  const auto left = static_cast<int64_t>(longest) * examples::kCharacterWidth + 2 * kGap;
  const auto top = kGap + static_cast<int64_t>(words.size()) * kRow;
  const auto picture = torch::full({top + spectrogram.size(0) + kGap, left + columns * kScale + kGap, 3}, 255, torch::kUInt8);
  const auto paper = torch::tensor({246, 244, 240}), heat = torch::tensor({232, 93, 4});
  for (size_t i = 0; i < words.size(); ++i) {
    const auto y = kGap + static_cast<int64_t>(i) * kRow;
    examples::draw_text(picture, y, kGap, words[i].text);
    const auto& attention = words[i].attention;
    const auto share = (attention / attention.max()).repeat_interleave(kScale).unsqueeze(1);  // [width, 1]
    const auto colours = (paper * (1 - share) + heat * share).to(torch::kUInt8);
    picture.narrow(0, y, kRow - 2).narrow(1, left, colours.size(0)).copy_(colours);
  }
  const auto wide = spectrogram.repeat_interleave(kScale, 1);
  picture.narrow(0, top, wide.size(0)).narrow(1, left, wide.size(1)).copy_(wide);
  return picture;
}

void write_page(const std::string& path, const std::string& file, const Transcript& transcript, const examples::Sound& sound) {
  const auto mel = mel_of(transcript);
  constexpr int64_t kFrames = 3000;  // of a picture
  auto pictures = Json::array();
  for (const auto& part : mel.split(kFrames, 1)) {
    pictures.push_back(examples::data_url("image/png", examples::encode_png(draw_spectrogram(part, mel.max()))));
  }
  examples::write_page(path, kSpeechHtml,
                       {{"title", std::filesystem::path(file).filename().string()},
                        {"language", transcript.language},
                        {"duration", rounded(sound.seconds())},
                        {"seconds_of_picture", static_cast<double>(kFrames) * kFrameSeconds},
                        {"sound", examples::data_url("audio/wav", examples::encode_wav(sound.samples))},
                        {"pictures", std::move(pictures)},
                        {"segments", transcript.segments}});
}

}  // namespace transcribe
