// SPDX-License-Identifier: Apache-2.0
#include "transcribe/search.h"

#include <fmt/format.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <ranges>
#include <set>
#include <sstream>
#include <utility>

#include "common/json_file.h"

namespace transcribe {
namespace {

using torch::Tensor;

constexpr auto kNever = -std::numeric_limits<float>::infinity();

// What is not speech, as OpenAI's program lists it, with and without a space in front (which marks never have). Signs of
// music may be several tokens: the first two bytes are those of U+2640 to U+267F.
constexpr auto kNotSpeech =
    "\" # ( ) * + / : ; < = > @ [ \\ ] ^ _ ` { | } ~ 「 」 『 』 << >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} "
    "♪♪ ♪♪♪ ♩ ♪ ♫ ♬ ♭ ♮ ♯ \xe2\x99 <|startoftranscript|> <|translate|> <|transcribe|> <|startofprev|> <|startoflm|>";

Tokens tokens_of(const char* texts, const std::vector<std::string>& prefixes, const examples::ByteVocabulary& vocabulary) {
  Tokens tokens;
  std::istringstream words(texts);
  for (std::string word; words >> word;) {
    for (const auto& prefix : prefixes) {
      if (const auto token = vocabulary.find(prefix + word)) tokens.push_back(*token);
    }
  }
  return tokens;
}

}  // namespace

Rules::Rules(const Model& model, const examples::ByteVocabulary& vocabulary)
    : start(vocabulary.at("<|startoftranscript|>")),
      end(vocabulary.at("<|endoftext|>")),
      no_timestamps(vocabulary.at("<|notimestamps|>")),
      no_speech(no_timestamps - 1),
      first_timestamp(no_timestamps + 1),
      longest(model.longest()),
      median_width(7) {
  const auto V = latest_start = model.vocabulary_size();
  bool multilingual = V >= 51'865;  // tokens of OpenAI's multilingual models, at least
  examples::JsonFile(model.folder(), "config.json").get("median_filter_width", median_width);
  const examples::JsonFile config(model.folder(), "generation_config.json");
  std::set<std::pair<int64_t, int64_t>> heads;
  config.get("is_multilingual", multilingual);
  config.get("suppress_tokens", suppressed);
  config.get("begin_suppress_tokens", suppressed_at_start);
  config.get("max_initial_timestamp_index", latest_start);
  config.get("alignment_heads", heads);
  config.get("max_length", longest);
  config.check(latest_start >= 0, fmt::format("max_initial_timestamp_index must not be negative, but is {}", latest_start));
  latest_start = std::min(latest_start, V);
  for (const auto& [layer, head] : heads) {
    config.check(layer >= 0 && layer < model.decoder_layers() && head >= 0 && head < model.heads(),
                 fmt::format("alignment_heads must be of {} layers with {} heads, but one is [{}, {}]", model.decoder_layers(),
                             model.heads(), layer, head));
    alignment_heads[static_cast<size_t>(layer)].push_back(head);
  }
  if (!config) {
    latest_start = 50;
    suppressed = tokens_of(kNotSpeech, {"", " "}, vocabulary);
    std::ranges::copy(tokens_of("- '", {" "}, vocabulary), std::back_inserter(suppressed));
    suppressed.push_back(no_speech);
    suppressed_at_start = {vocabulary.at(" "), end};
  }
  if (multilingual) {
    languages = vocabulary.marks_between(start, vocabulary.at("<|translate|>"));
    tasks = {{"transcribe", vocabulary.at("<|transcribe|>")}, {"translate", vocabulary.at("<|translate|>")}};
  }
  const auto check = [&model](bool ok, const std::string& fault) {
    if (!ok) throw xattn::FileError(fmt::format("{}: {}", model.folder(), fault));
  };
  check(!multilingual || !languages.empty(), "it has no tokens of languages");
  check(first_timestamp != V, "it has no tokens of timestamps");
  Tokens all = {start, end, no_timestamps, no_speech};
  for (const auto* more : {&suppressed, &suppressed_at_start}) all.insert(all.end(), more->begin(), more->end());
  for (const auto* more : {&languages, &tasks}) std::ranges::copy(*more | std::views::values, std::back_inserter(all));
  for (const auto token : all) {
    check(token >= 0 && token < V, fmt::format("tokens must be below {}, but one is {}", V, token));
  }
  longest = std::min(longest, model.longest());
  if (alignment_heads.empty()) {  // all of the upper half of the layers
    for (auto layer = model.decoder_layers() / 2; layer < model.decoder_layers(); ++layer) {
      for (int64_t head = 0; head < model.heads(); ++head) alignment_heads[static_cast<size_t>(layer)].push_back(head);
    }
  }
}

void Rules::forbid(float* row, int64_t V, const Tokens& text) const {
  const auto never = [&](int64_t begin, int64_t stop) { std::fill(row + begin, row + std::max(begin, stop), kNever); };
  for (const auto token : suppressed) row[token] = kNever;
  row[no_timestamps] = kNever;
  if (text.empty()) {  // a text begins with a timestamp
    for (const auto token : suppressed_at_start) row[token] = kNever;
    never(0, first_timestamp);
    never(std::min(V, first_timestamp + latest_start + 1), V);
    return;
  }
  // Timestamps come in pairs, the end of a segment and the beginning of the next, or alone in front of the end of the text.
  const bool after_one = is_timestamp(text.back());
  const bool after_two = after_one && (text.size() < 2 || is_timestamp(text[text.size() - 2]));
  if (after_two) {
    never(first_timestamp, V);
  } else if (after_one) {
    never(0, end);
  }
  // They never decrease, and a segment is not empty.
  const auto last = std::find_if(text.rbegin(), text.rend(), [this](int64_t token) { return is_timestamp(token); });
  if (last != text.rend()) never(first_timestamp, after_one && !after_two ? *last : *last + 1);
  // A timestamp follows if all of them together are more probable than any other token.
  const auto most_of = [row](int64_t begin, int64_t stop) { return *std::max_element(row + begin, row + stop); };
  const auto most = most_of(first_timestamp, V);
  if (most == kNever) return;
  double sum = 0;
  for (auto token = first_timestamp; token < V; ++token) sum += std::exp(static_cast<double>(row[token] - most));
  if (most + std::log(sum) > most_of(0, first_timestamp)) never(0, first_timestamp);
}

namespace {

// A beginning of a text, or with the mark of the end a whole one.
struct Hypothesis {
  Tokens tokens;
  double score = 0;            // the sum of log-probabilities, by which beams compete; of logits for one beam
  double log_probability = 0;  // the same among the tokens that were allowed
  int64_t beam = 0;            // the beginning that it continues

  double mean() const { return score / static_cast<double>(tokens.size()); }
};
using Hypotheses = std::vector<Hypothesis>;

// The `count` best continuations of the beginnings, the best first. logits: float32 [n, V], may be overwritten. Each row is
// computed by itself, because LibTorch does that in one thread; its others would spin on the cores that the decoder needs next.
Hypotheses continuations(const Hypotheses& beginnings, const Tensor& logits, const Rules& rules, size_t count) {
  struct Candidate {
    double score;
    int64_t beam, token;
  };
  const auto better = [](const Candidate& a, const Candidate& b) { return a.score > b.score; };
  std::vector<Candidate> best;  // the best first
  std::vector<Tensor> log_probabilities;
  for (int64_t beam = 0; beam < logits.size(0); ++beam) {
    const auto row = count > 1 ? logits[beam].log_softmax(0) : logits[beam];  // the order of one row needs no softmax
    const auto V = row.size(0);
    const auto& text = beginnings.at(static_cast<size_t>(beam));
    auto* scores = row.data_ptr<float>();
    rules.forbid(scores, V, text.tokens);
    log_probabilities.push_back(row.log_softmax(0));  // among the tokens that are allowed
    for (int64_t token = 0; token < V; ++token) {
      const Candidate next{text.score + scores[token], beam, token};
      if (best.size() == count && !better(next, best.back())) continue;
      if (best.size() == count) best.pop_back();
      best.insert(std::upper_bound(best.begin(), best.end(), next, better), next);
    }
  }
  Hypotheses found;
  for (const auto& [score, beam, token] : best) {
    auto& next = found.emplace_back(beginnings.at(static_cast<size_t>(beam)));
    next.tokens.push_back(token);
    next.score = score;
    next.log_probability += log_probabilities[static_cast<size_t>(beam)].const_data_ptr<float>()[token];
    next.beam = beam;
  }
  return found;
}

}  // namespace

Heard search(const Whisper& whisper, const Contexts& sound, const Tokens& prompt, int64_t beams) {
  const auto& rules = whisper.rules;
  Decoding decoding(whisper.model, sound);
  auto logits = decoding.append(torch::tensor(prompt).unsqueeze(0));  // [1, T, V]
  const auto no_speech = logits[0][0].softmax(0)[rules.no_speech].item<double>();
  const auto most = static_cast<size_t>(std::max<int64_t>(1, rules.longest - static_cast<int64_t>(prompt.size())));
  const auto n = static_cast<size_t>(beams);
  Hypotheses beginnings(1), whole;
  const auto better = [](const Hypothesis& a, const Hypothesis& b) { return a.mean() > b.mean(); };
  while (true) {
    // As many again as there are beams, because half of them may end here.
    const auto found = continuations(beginnings, logits.select(1, -1), rules, n > 1 ? 2 * n : 1);
    beginnings.clear();
    for (size_t k = 0; k < found.size(); ++k) {
      const bool ends = found[k].tokens.back() == rules.end || found[k].tokens.size() == most;
      if (ends && k < n) whole.push_back(found[k]);
      if (!ends && beginnings.size() < n) beginnings.push_back(found[k]);
    }
    std::ranges::stable_sort(whole, better);
    whole.resize(std::min(whole.size(), n));
    if (beginnings.empty() || (whole.size() == n && !better(beginnings.front(), whole.back()))) break;
    Tokens last, texts;
    for (const auto& beginning : beginnings) {
      last.push_back(beginning.tokens.back());
      texts.push_back(beginning.beam);
    }
    if (beams > 1) decoding.select(torch::tensor(texts));
    logits = decoding.append(torch::tensor(last).unsqueeze(1));
  }
  auto& [tokens, score, log_probability, beam] = whole.front();
  const auto mean = log_probability / static_cast<double>(tokens.size());
  if (tokens.back() == rules.end) tokens.pop_back();
  return {tokens, mean, no_speech};
}

}  // namespace transcribe
