// SPDX-License-Identifier: Apache-2.0
#include "transcribe/transcript.h"

#include <c10/util/Exception.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <ranges>

#include "base/text.h"
#include "common/mel.h"

namespace transcribe {
namespace {

using torch::Tensor;

// Adds the time that a job takes to a sum, and returns its result.
template <class Job>
auto timed(double& seconds, const Job& job) {
  const auto begin = std::chrono::steady_clock::now();
  auto result = job();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

void check_known(const char* what, const std::string& name, const std::map<std::string, int64_t>& known) {
  TORCH_CHECK_VALUE(known.contains(name), what, " must be one of ", xattn::detail::joined(known | std::views::keys, " "),
                    ", but is ", name);
}

// The most probable language behind the start.
std::string language_of(const Whisper& whisper, const Contexts& sound) {
  const auto logits = Decoding(whisper.model, sound).append(torch::tensor({{whisper.rules.start}}))[0][0];
  const auto score = [&](const auto& language) { return logits[language.second].template item<float>(); };
  return std::ranges::max_element(whisper.rules.languages, {}, score)->first;
}

// Cuts a text at the pairs of timestamps into segments, with times from the beginning of the window. `frames` are those of the
// window, and then those that are done: what follows the last pair is heard again.
std::vector<Segment> cut(const Tokens& text, const Rules& rules, int64_t& frames) {
  const auto seconds = [&rules](int64_t token) { return static_cast<double>(token - rules.first_timestamp) * kTokenSeconds; };
  const auto is_timestamp = [&](size_t i) { return rules.is_timestamp(text.at(i)); };
  std::vector<Segment> segments;
  size_t begin = 0;
  const auto add = [&](size_t stop, double from, double to) {
    segments.push_back({from, to, {text.begin() + static_cast<int64_t>(begin), text.begin() + static_cast<int64_t>(stop)}});
    begin = stop;
  };
  for (size_t i = 1; i < text.size(); ++i) {
    if (is_timestamp(i - 1) && is_timestamp(i)) add(i, seconds(text[begin]), seconds(text[i - 1]));
  }
  if (begin == 0) {  // no pair
    const auto tokens = frames / kFramesOfToken;
    auto end = static_cast<double>(tokens) * kTokenSeconds;
    const auto last = std::find_if(text.rbegin(), text.rend(), [&](int64_t token) { return rules.is_timestamp(token); });
    if (last != text.rend() && *last != rules.first_timestamp) end = seconds(*last);
    add(text.size(), 0, end);
  } else if (is_timestamp(text.size() - 1) && !is_timestamp(text.size() - 2)) {  // nothing is said behind it
    add(text.size(), seconds(text[begin]), seconds(text.back()));
  } else {
    segments.back().tokens.push_back(text[begin]);
    frames = (text[begin - 1] - rules.first_timestamp) * kFramesOfToken;
  }
  return segments;
}

}  // namespace

Transcript transcribe(const Whisper& whisper, const Tensor& samples, const Options& options, const Progress& progress) {
  const torch::NoGradGuard no_grad;
  constexpr double kNoSpeech = 0.6, kUnlikely = -1;  // the thresholds of OpenAI's program
  const auto& [model, vocabulary, rules] = whisper;
  Transcript transcript = {.language = options.language.value_or("en")};
  const bool multilingual = !rules.languages.empty();
  if (multilingual) {
    check_known("task", options.task, rules.tasks);
    if (options.language) check_known("language", *options.language, rules.languages);
  } else {
    TORCH_CHECK_VALUE(transcript.language == "en" && options.task == "transcribe", "this model only transcribes English");
  }
  auto& [language, all, mel, tokens, seconds] = transcript;
  mel = timed(seconds.mel, [&] { return examples::log_mel(samples, whisper.model.bins()); });
  Tokens prompt = {rules.start};
  const auto is_text = [end = rules.end](int64_t token) { return token < end; };
  for (int64_t seek = 0, done = 0; seek < mel.size(1); seek += done) {
    if (progress) progress(seek, mel.size(1));
    const auto frames = done = std::min(model.window(), mel.size(1) - seek);
    const auto part = mel.narrow(1, seek, frames);
    if (part.min().equal(part.max())) continue;  // models hear words in digital silence
    const auto window = torch::constant_pad_nd(part, {0, model.window() - frames});
    const auto memory = timed(seconds.encoder, [&] { return whisper.model.encode(window); });
    // About 100 tokens say what 30 seconds of speech do.
    const auto sound = timed(seconds.contexts, [&] { return whisper.model.contexts(memory, 100 * options.beams); });
    if (multilingual && prompt.size() == 1) {
      if (!options.language) language = language_of(whisper, sound);
      prompt.insert(prompt.end(), {rules.languages.at(language), rules.tasks.at(options.task)});
    }
    const auto heard = timed(seconds.decoding, [&] { return search(whisper, sound, prompt, options.beams); });
    tokens += static_cast<int64_t>(heard.tokens.size());
    if (heard.no_speech > kNoSpeech && heard.log_probability < kUnlikely) continue;
    auto segments = cut(heard.tokens, rules, done);
    Tokens text;
    for (const auto& segment : segments) std::ranges::copy_if(segment.tokens, std::back_inserter(text), is_text);
    auto words = options.words ? split_words(text, vocabulary, language) : Words();
    words = timed(seconds.words, [&] { return align(whisper, sound, prompt, words, frames); });
    const auto offset = static_cast<double>(seek) * kFrameSeconds;
    auto word = words.begin();
    for (auto& segment : segments) {
      segment.begin += offset;
      segment.end += offset;
      segment.text = vocabulary.text(segment.tokens);
      for (auto left = std::ranges::count_if(segment.tokens, is_text); left > 0 && word != words.end(); ++word) {
        left -= static_cast<int64_t>(word->tokens.size());
        word->begin += offset;
        word->end += offset;
        if (seek > 0) word->attention.reset();  // takes more memory than the rest; only the first window is drawn
        segment.words.push_back(std::move(*word));
      }
      all.push_back(std::move(segment));
    }
  }
  if (progress) progress(mel.size(1), mel.size(1));
  return transcript;
}

}  // namespace transcribe
