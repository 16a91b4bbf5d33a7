// SPDX-License-Identifier: Apache-2.0

// The program transcribe: what transformers computes with the same files, written by scripts/speech_fixtures.py.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sndfile.h>
#include <torch/torch.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>
#include <xattn/state_dict.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/byte_vocabulary.h"
#include "common/mel.h"
#include "common/png.h"
#include "common/sound.h"
#include "common/time_warp.h"
#include "compare.h"
#include "run_program.h"
#include "test_util.h"
#include "transcribe/commands.h"
#include "transcribe/show.h"
#include "transcribe/transcript.h"

namespace transcribe {
namespace {

using examples::ByteVocabulary;
using examples::encode_wav;
using examples::kSampleRate;
using examples::read_sound;
using nlohmann::json;
using torch::Tensor;
using xattn::test::data_path;
using xattn::test::read_bytes;
using xattn::test::TempDir;
using xattn::test::write_bytes;

const auto kSound = data_path("speech/sound.wav");

Tokens tokens_of(const Tensor& x) {
  return {x.const_data_ptr<int64_t>(), x.const_data_ptr<int64_t>() + x.numel()};
}

struct Fixture {
  explicit Fixture(const std::string& name)
      : expected(xattn::open_checkpoint(data_path("speech/" + name + ".expect.safetensors"))),
        whisper(data_path("speech/" + name)) {}

  Tensor told(const std::string& name) const { return expected.tensor(name); }
  Tensor first_window() const { return told("mel").narrow(1, 0, model.window()); }
  Transcript transcribed(const Options& options = {}) const { return transcribe(whisper, read_sound(kSound).samples, options); }

  xattn::Checkpoint expected;
  Whisper whisper;
  const Model& model = whisper.model;
};

// PyTorch computed it in float32, through four layers.
void expect_close(const Tensor& actual, const Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_LT((actual - expected).abs().max().item<double>(), 2e-5 * expected.abs().max().item<double>());
}

void expect_text(const Transcript& transcript, const Tensor& tokens, const Tensor& times) {
  Tokens all;
  for (const auto& segment : transcript.segments) all.insert(all.end(), segment.tokens.begin(), segment.tokens.end());
  EXPECT_EQ(all, tokens_of(tokens));
  ASSERT_EQ(static_cast<int64_t>(transcript.segments.size()), times.size(0));
  for (int64_t i = 0; i < times.size(0); ++i) {
    const auto& segment = transcript.segments.at(static_cast<size_t>(i));
    EXPECT_NEAR(segment.begin, times[i][0].item<double>(), 1e-6);
    EXPECT_NEAR(segment.end, times[i][1].item<double>(), 1e-6);
  }
}

class SpeechTest : public testing::TestWithParam<const char*> {};

TEST_P(SpeechTest, SpectrogramIsThatOfTransformers) {
  const Fixture fixture(GetParam());
  const auto mel = examples::log_mel(read_sound(kSound).samples, fixture.model.bins());
  ASSERT_EQ(mel.sizes(), fixture.told("mel").sizes());
  EXPECT_LT((mel - fixture.told("mel")).abs().max().item<double>(), 1e-4);  // of logarithms of float32 sums
}

TEST_P(SpeechTest, EncoderGivesTheMemoryOfTransformers) {
  const Fixture fixture(GetParam());
  expect_close(fixture.model.encode(fixture.first_window()), fixture.told("memory"));
}

TEST_P(SpeechTest, DecoderGivesTheLogitsOfTransformersTokenByToken) {
  const Fixture fixture(GetParam());
  const auto sound = fixture.model.contexts(fixture.told("memory"), 10);
  Decoding decoding(fixture.model, sound);
  std::vector<Tensor> logits;
  for (const auto token : tokens_of(fixture.told("read"))) logits.push_back(decoding.append(torch::tensor({{token}}))[0]);
  expect_close(torch::cat(logits), fixture.told("logits"));
}

TEST_P(SpeechTest, GreedySearchWritesTheTextOfTransformers) {
  const Fixture fixture(GetParam());
  const auto transcript = fixture.transcribed();
  expect_text(transcript, fixture.told("greedy"), fixture.told("times"));
  EXPECT_EQ(transcript.language, fixture.expected.metadata().at("language"));
}

TEST_P(SpeechTest, ThreeBeamsWriteTheTextOfTransformers) {
  const Fixture fixture(GetParam());
  expect_text(fixture.transcribed({.beams = 3}), fixture.told("beams"), fixture.told("beam_times"));
}

TEST_P(SpeechTest, WordsOfTheFirstWindowHaveTheTimesOfTransformers) {
  const Fixture fixture(GetParam());
  std::vector<Word> words;
  for (const auto& segment : fixture.transcribed({.words = true}).segments) {
    words.insert(words.end(), segment.words.begin(), segment.words.end());
  }
  const auto texts = json::parse(fixture.expected.metadata().at("words"));
  const auto times = fixture.told("word_times");
  ASSERT_GE(words.size(), texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(words[i].tokens, texts[i].get<Tokens>());
    EXPECT_NEAR(words[i].begin, times[static_cast<int64_t>(i)][0].item<double>(), 1e-6) << i;
    EXPECT_NEAR(words[i].end, times[static_cast<int64_t>(i)][1].item<double>(), 1e-6) << i;
  }
}

TEST_P(SpeechTest, AttentionOfAWordSumsToOne) {
  const Fixture fixture(GetParam());
  const auto transcript = fixture.transcribed({.words = true});
  const auto& word = transcript.segments.at(0).words.at(0);
  ASSERT_EQ(word.attention.sizes(), torch::IntArrayRef({fixture.model.window() / 2}));
  EXPECT_NEAR(word.attention.sum().item<double>(), 1, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Models, SpeechTest, testing::Values("english", "multilingual"), [](const auto& info) {
  return std::string(info.param);
});

// ---- Parts -----------------------------------------------------------------------------------------------------------------

TEST(TimeWarpTest, FollowsTheCheapestWay) {
  const auto costs = torch::tensor({{0, 0, 9, 9, 9}, {9, 9, 0, 0, 9}, {9, 9, 9, 9, 0}}, torch::kFloat32);
  EXPECT_EQ(examples::time_warp(costs), (std::vector<int64_t>{0, 2, 4}));
  EXPECT_EQ(examples::time_warp(torch::zeros({3, 1})), (std::vector<int64_t>{0, 0, 0}));
  EXPECT_EQ(examples::time_warp(torch::zeros({1, 3})), (std::vector<int64_t>{0}));
}

Tokens spell(const ByteVocabulary& vocabulary, const std::vector<std::string>& texts) {
  Tokens tokens;
  for (const auto& text : texts) tokens.push_back(vocabulary.at(text));
  return tokens;
}

std::vector<std::string> words_of(const ByteVocabulary& vocabulary, const Tokens& tokens, const std::string& language) {
  std::vector<std::string> words;
  for (const auto& word : split_words(tokens, vocabulary, language)) words.push_back(word.text);
  return words;
}

TEST(SplitWordsTest, SplitsAtSpacesAndPunctuationButNotInsideCharacters) {
  const ByteVocabulary vocabulary(data_path("speech/english"));
  const auto tokens = spell(vocabulary, {" hope", "ing", ",", " it", "\xe9\x82", "\xa3", "a"});
  EXPECT_EQ(words_of(vocabulary, tokens, "en"), (std::vector<std::string>{" hopeing", ",",
                                                                          " it\xe9\x82\xa3"
                                                                          "a"}));
  EXPECT_EQ(words_of(vocabulary, tokens, "ja"), (std::vector<std::string>{" hope", "ing", ",", " it", "\xe9\x82\xa3", "a"}));
}

TEST(ByteVocabularyTest, ReadsVocabJsonWithAddedTokens) {
  const TempDir dir;
  const auto tokenizer = json::parse(read_bytes(data_path("speech/multilingual/tokenizer.json")));
  json added;
  for (const auto& mark : tokenizer["added_tokens"]) added[mark["content"].get<std::string>()] = mark["id"];
  write_bytes(dir.file("vocab.json"), tokenizer["model"]["vocab"].dump());
  write_bytes(dir.file("added_tokens.json"), added.dump());
  const ByteVocabulary separate(dir.path()), whole(data_path("speech/multilingual"));
  for (const auto* text : {" the", "\xff", "\n", "<|translate|>"}) EXPECT_EQ(separate.at(text), whole.at(text)) << text;
  const auto languages = separate.marks_between(separate.at("<|startoftranscript|>"), separate.at("<|translate|>"));
  EXPECT_EQ(languages, (std::map<std::string, int64_t>{{"en", 283}, {"de", 284}, {"ja", 285}}));
}

TEST(RulesTest, TimestampsComeInPairsAndGrow) {
  const Fixture fixture("english");
  const auto& rules = fixture.whisper.rules;
  const auto V = fixture.model.vocabulary_size();
  const auto zero = rules.first_timestamp, word = fixture.whisper.vocabulary.at(" age");
  const auto allowed = [&](const Tokens& text) {
    auto row = torch::zeros({V});
    row[word] = row[rules.end] = 100;  // more probable than all timestamps together
    rules.forbid(row.data_ptr<float>(), V, text);
    return row;
  };
  const auto is_allowed = [](const Tensor& row, int64_t token) { return !std::isinf(row[token].item<float>()); };
  const auto first = allowed({});
  EXPECT_FALSE(is_allowed(first, word));
  EXPECT_TRUE(is_allowed(first, zero + rules.latest_start));
  EXPECT_FALSE(is_allowed(first, zero + rules.latest_start + 1));
  EXPECT_FALSE(is_allowed(allowed({zero}), zero + 1));
  const auto third = allowed({zero + 2, word});
  EXPECT_FALSE(is_allowed(third, zero + 2));
  EXPECT_TRUE(is_allowed(third, zero + 3));
  const auto closed = allowed({zero, word, zero + 5});
  EXPECT_FALSE(is_allowed(closed, word));
  EXPECT_TRUE(is_allowed(closed, zero + 5));
  EXPECT_TRUE(is_allowed(closed, rules.end));
  EXPECT_TRUE(is_allowed(allowed({zero, word, zero + 5, zero + 5}), word));
}

TEST(RulesTest, WithoutAConfigurationAreThoseOfOpenAi) {
  const TempDir dir;
  for (const auto* file : {"config.json", "model.safetensors", "tokenizer.json"}) {
    std::filesystem::copy(data_path(std::string("speech/english/") + file), dir.file(file));
  }
  const Whisper whisper(dir.path());
  const auto& [model, vocabulary, rules] = whisper;
  EXPECT_TRUE(rules.languages.empty());
  EXPECT_EQ(rules.latest_start, 50);
  EXPECT_EQ(rules.longest, model.longest());
  EXPECT_EQ(rules.alignment_heads, (Heads{{1, {0, 1}}}));
  EXPECT_EQ(rules.suppressed_at_start, spell(vocabulary, {" ", "<|endoftext|>"}));
  auto expected = spell(vocabulary, {"<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>",
                                     "<|startoflm|>", "<|nospeech|>", " (", " )", " -"});
  for (const auto letter : std::string_view("\"#()*+/:;<=>@[\\]^_`{|}~")) expected.push_back(vocabulary.at({letter}));
  EXPECT_EQ(std::set(rules.suppressed.begin(), rules.suppressed.end()), std::set(expected.begin(), expected.end()));
}

// ---- Sound files -----------------------------------------------------------------------------------------------------------

// frames float32 [n, channels]
void write_sound(const std::string& path, const Tensor& frames, int rate, int format) {
  SF_INFO info = {};
  info.samplerate = rate;
  info.channels = static_cast<int>(frames.size(1));
  info.format = format;
  auto* file = sf_open(path.c_str(), SFM_WRITE, &info);
  ASSERT_NE(file, nullptr) << sf_strerror(nullptr);
  sf_writef_float(file, frames.contiguous().const_data_ptr<float>(), frames.size(0));
  sf_close(file);
}

TEST(AudioTest, ReadsEveryContainerAlike) {
  const TempDir dir;
  const auto sound = read_sound(kSound).samples;
  EXPECT_EQ(sound.numel(), 36'800);
  for (const auto& [name, format] : {std::pair("a.flac", SF_FORMAT_FLAC | SF_FORMAT_PCM_16),
                                     {"a.aiff", SF_FORMAT_AIFF | SF_FORMAT_PCM_16},
                                     {"a.wav", SF_FORMAT_WAV | SF_FORMAT_FLOAT}}) {
    write_sound(dir.file(name), sound.unsqueeze(1), kSampleRate, format);
    EXPECT_TRUE(torch::allclose(read_sound(dir.file(name)).samples, sound, 0, 1.0 / 32'768)) << name;
  }
}

TEST(AudioTest, MixesChannelsToTheirMean) {
  const TempDir dir;
  const auto left = torch::rand({1000}) - 0.5, right = torch::rand({1000}) - 0.5;
  write_sound(dir.file("a.wav"), torch::stack({left, right}, 1), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_FLOAT);
  const auto audio = read_sound(dir.file("a.wav"));
  EXPECT_EQ(audio.channels, 2);
  EXPECT_TRUE(torch::allclose(audio.samples, (left + right) / 2));
}

TEST(AudioTest, ResamplesAToneToTheSameTone) {
  const TempDir dir;
  const auto tone = [](int64_t rate) { return torch::sin(2 * M_PI * 440 * torch::arange(rate) / rate).to(torch::kFloat32); };
  for (const int rate : {8000, 44'100, 48'000}) {
    write_sound(dir.file("a.wav"), tone(rate).unsqueeze(1), rate, SF_FORMAT_WAV | SF_FORMAT_FLOAT);
    const auto samples = read_sound(dir.file("a.wav")).samples;
    EXPECT_NEAR(static_cast<double>(samples.numel()), kSampleRate, 1) << rate;
    const auto middle = [](const Tensor& x) { return x.narrow(0, 2000, 12'000); };
    EXPECT_LT((middle(samples) - middle(tone(kSampleRate))).abs().max().item<double>(), 1e-3) << rate;
  }
}

TEST(AudioTest, WavOfThePageHoldsTheSamples) {
  const TempDir dir;
  const auto samples = read_sound(kSound).samples;
  write_bytes(dir.file("a.wav"), encode_wav(samples));
  EXPECT_TRUE(torch::allclose(read_sound(dir.file("a.wav")).samples, samples, 0, 1.0 / 16'384));
}

// ---- The program -----------------------------------------------------------------------------------------------------------

class TranscribeTest : public testing::Test {
 protected:
  // A copy of a model's folder, whose files may be changed.
  std::string copy(const std::string& name) {
    std::filesystem::copy(data_path("speech/" + name), dir.file(name),
                          std::filesystem::copy_options::overwrite_existing | std::filesystem::copy_options::recursive);
    return dir.file(name) + "/";
  }
  void change(const std::string& path, const std::function<void(json&)>& edit) {
    auto document = json::parse(read_bytes(path));
    edit(document);
    write_bytes(path, document.dump());
  }
  xattn::test::ProgramResult run(const std::string& line) {
    return xattn::test::run_here(transcribe::run, "transcribe " + line, dir.path());
  }
  std::string said(const std::string& model, const std::string& options = "") {
    const auto result = run(kSound + " --json --model " + model + options);
    EXPECT_EQ(result.status, 0) << result.err;
    return json::parse(result.out)["segments"].dump();
  }
  void expect_error(const std::string& line, const std::string& message) {
    const auto result = run(line);
    EXPECT_EQ(result.status, 1) << line;
    EXPECT_EQ(result.out, "") << line;
    EXPECT_NE(result.err.find(message), std::string::npos) << result.err;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
  }

  TempDir dir;
};

TEST_F(TranscribeTest, SaysTheSameFromEveryFileOfTheWeights) {
  const auto folder = copy("english");
  const auto expected = said(folder);
  EXPECT_NE(expected, "[]");
  const auto tensors = xattn::load_tensors(folder + "model.safetensors");
  std::filesystem::remove(folder + "model.safetensors");
  xattn::save_state_dict(folder + "pytorch_model.bin", tensors);
  EXPECT_EQ(said(folder), expected);
  std::filesystem::remove(folder + "pytorch_model.bin");
  xattn::NamedTensors encoder, decoder;
  json index;
  for (const auto& [name, tensor] : tensors) {
    const bool first = name.starts_with("model.encoder");
    (first ? encoder : decoder)[name] = tensor;
    index["weight_map"][name] = first ? "a.safetensors" : "b.safetensors";
  }
  xattn::save_safetensors(folder + "a.safetensors", encoder);
  xattn::save_safetensors(folder + "b.safetensors", decoder);
  write_bytes(folder + "model.safetensors.index.json", index.dump());
  EXPECT_EQ(said(folder), expected);
}

// The names that OpenAI's files have.
std::string openai_name(std::string name) {
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"model.", ""},
                                                        {".layers.", ".blocks."},
                                                        {"encoder_attn_layer_norm", "cross_attn_ln"},
                                                        {"self_attn_layer_norm", "attn_ln"},
                                                        {"final_layer_norm", "mlp_ln"},
                                                        {"encoder.layer_norm", "encoder.ln_post"},
                                                        {"decoder.layer_norm", "decoder.ln"},
                                                        {"encoder_attn.", "cross_attn."},
                                                        {"self_attn.", "attn."},
                                                        {"q_proj", "query"},
                                                        {"k_proj", "key"},
                                                        {"v_proj", "value"},
                                                        {"out_proj", "out"},
                                                        {"fc1", "mlp.0"},
                                                        {"fc2", "mlp.2"},
                                                        {"embed_tokens", "token_embedding"},
                                                        {"embed_positions.weight", "positional_embedding"}}) {
    if (const auto at = name.find(from); at != std::string::npos) name.replace(at, from.size(), to);
  }
  return name;
}

TEST_F(TranscribeTest, SaysTheSameFromAFileWithTheNamesOfOpenAi) {
  const auto folder = copy("english");
  const auto expected = said(folder);
  xattn::NamedTensors renamed;
  for (const auto& [name, tensor] : xattn::load_tensors(folder + "model.safetensors")) renamed[openai_name(name)] = tensor;
  std::filesystem::remove(folder + "model.safetensors");
  xattn::save_state_dict(folder + "tiny.pt", renamed);
  write_bytes(folder + "config.json", R"({"n_audio_head": 2, "n_text_head": 2})");  // 8 features each, and not 64
  EXPECT_EQ(said(folder + "tiny.pt"), expected);
}

TEST_F(TranscribeTest, RunsFloat16FilesInFloat32) {
  const auto folder = copy("english");
  auto tensors = xattn::load_tensors(folder + "model.safetensors");
  for (auto& [name, tensor] : tensors) tensor = tensor.to(torch::kHalf);
  xattn::save_safetensors(folder + "model.safetensors", tensors);
  const auto half = said(folder);
  for (auto& [name, tensor] : tensors) tensor = tensor.to(torch::kFloat32);
  xattn::save_safetensors(folder + "model.safetensors", tensors);
  EXPECT_EQ(said(folder), half);
}

TEST_F(TranscribeTest, WordsAreAskedFor) {
  const auto model = data_path("speech/english");
  EXPECT_EQ(json::parse(said(model))[0]["words"], json::array());
  const auto segments = json::parse(said(model, " --words"));
  std::string text, words;
  for (const auto& segment : segments) {
    text += segment["text"];
    for (const auto& word : segment["words"]) {
      words += word["word"];
      EXPECT_LE(word["start"], word["end"]);
    }
  }
  EXPECT_EQ(words, text);
  EXPECT_NE(words, "");
}

TEST_F(TranscribeTest, TakesALanguageAndATask) {
  const auto model = data_path("speech/multilingual");
  const auto language = [&](const std::string& options) {
    return json::parse(run(kSound + " --json --model " + model + options).out)["language"].get<std::string>();
  };
  EXPECT_EQ(language(""), "ja");
  EXPECT_EQ(language(" --language de"), "de");
  EXPECT_NE(said(model, " --language en"), said(model));
  EXPECT_NE(said(model, " --task translate"), said(model));
  expect_error(kSound + " --model " + model + " --language xx", "language must be one of de en ja, but is xx");
  expect_error(kSound + " --model " + data_path("speech/english") + " --task translate", "this model only transcribes English");
  EXPECT_THROW(Fixture("multilingual").transcribed({.task = "de"}), c10::ValueError);
}

TEST_F(TranscribeTest, ChecksTheLanguageOfASilentRecording) {
  write_sound(dir.file("silence.wav"), torch::zeros({40'000, 1}), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_PCM_16);
  const auto line = "silence.wav --json --model " + data_path("speech/multilingual");
  EXPECT_EQ(json::parse(run(line + " --language de").out)["language"], "de");
  EXPECT_EQ(json::parse(run(line).out)["language"], "en");
  expect_error(line + " --language xx", "language must be one of de en ja, but is xx");
}

TEST_F(TranscribeTest, MixesChannelsAndSaysSo) {
  const auto sound = read_sound(kSound).samples;
  const auto half = torch::stack({sound * 1.5, sound * 0.5}, 1) / 2;
  const auto mono = torch::stack({sound}, 1) / 2;
  write_sound(dir.file("two.wav"), half, kSampleRate, SF_FORMAT_WAV | SF_FORMAT_FLOAT);
  write_sound(dir.file("one.wav"), mono, kSampleRate, SF_FORMAT_WAV | SF_FORMAT_FLOAT);
  const auto model = " --model " + data_path("speech/english");
  const auto two = run("two.wav" + model), one = run("one.wav" + model);
  EXPECT_EQ(two.out, one.out);
  EXPECT_EQ(one.err, "");
  EXPECT_EQ(two.err, "two.wav: its 2 channels are mixed to one\n");
}

TEST_F(TranscribeTest, PassesOverWindowsWithoutSpeech) {
  const auto folder = copy("english");
  auto tensors = xattn::load_tensors(folder + "model.safetensors");
  auto row = tensors.at("model.decoder.embed_tokens.weight")[Fixture("english").whisper.rules.no_speech];
  // One of the two makes this mark nearly certain, and no text is probable with random weights.
  size_t silent = 0;
  for (const double factor : {100.0, -1.0}) {
    row *= factor;
    xattn::save_safetensors(folder + "model.safetensors", tensors);
    const auto result = run(kSound + " --model " + folder);
    EXPECT_EQ(result.status, 0) << result.err;
    silent += result.out.empty() ? 1 : 0;
  }
  EXPECT_EQ(silent, 1U);
}

TEST_F(TranscribeTest, HearsNothingInDigitalSilence) {
  write_sound(dir.file("silence.wav"), torch::zeros({40'000, 1}), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_PCM_16);
  const auto result = run("silence.wav --words --picture a.png --report a.html --model " + data_path("speech/english"));
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_GT(examples::read_png(dir.file("a.png")).size(1), 50);
}

TEST_F(TranscribeTest, DrawsSoundsShorterThanAToken) {
  for (const auto samples : {1, 100, 200}) {  // no frame, and one; a token is two
    write_sound(dir.file("short.wav"), torch::zeros({samples, 1}), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_PCM_16);
    const auto result = run("short.wav --picture a.png --report a.html --model " + data_path("speech/english"));
    EXPECT_EQ(result.status, 0) << samples << result.err;
    EXPECT_EQ(result.out, "");
  }
}

TEST_F(TranscribeTest, DrawsTheFirstWindowAndWritesAPage) {
  const auto result =
      run(kSound + " --model " + data_path("speech/english") + " --picture words.png --report page.html --storage float32");
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.out.find("  00:"), std::string::npos);  // words are drawn but not printed
  const auto picture = examples::read_png(dir.file("words.png"));
  EXPECT_GT(picture.size(1), 100);
  const auto page = read_bytes(dir.file("page.html"));
  const auto begin = page.find("id=\"data\">") + 10;
  const auto data = json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  EXPECT_EQ(data["pictures"].size(), 1U);
  EXPECT_EQ(data["title"], "sound.wav");
  EXPECT_GT(data["segments"][0]["words"].size(), 0U);
  EXPECT_EQ(page.find("{{"), std::string::npos);
}

TEST_F(TranscribeTest, RejectsSoundThatItCannotRead) {
  const auto model = " --model " + data_path("speech/english");
  const auto bytes = read_bytes(kSound);
  write_bytes(dir.file("cut.wav"), bytes.substr(0, bytes.size() / 2));
  write_bytes(dir.file("text.wav"), "no sound");
  write_bytes(dir.file("empty.wav"), "");
  write_sound(dir.file("none.wav"), torch::zeros({0, 1}), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_PCM_16);
  write_sound(dir.file("nan.wav"), torch::full({100, 1}, NAN), kSampleRate, SF_FORMAT_WAV | SF_FORMAT_FLOAT);
  write_sound(dir.file("whole.flac"), torch::rand({50'000, 1}), kSampleRate, SF_FORMAT_FLAC | SF_FORMAT_PCM_16);
  const auto flac = read_bytes(dir.file("whole.flac"));
  write_bytes(dir.file("cut.flac"), flac.substr(0, flac.size() / 2));
  expect_error("missing.wav" + model, "missing.wav: it cannot be read as sound");
  expect_error("cut.wav" + model, "cut.wav: it is truncated or damaged");
  expect_error("cut.flac" + model, "cut.flac: it is truncated or damaged");
  expect_error("text.wav" + model, "text.wav: it cannot be read as sound");
  expect_error("empty.wav" + model, "empty.wav: it cannot be read as sound");
  expect_error("none.wav" + model, "none.wav: it has no samples");
  expect_error("nan.wav" + model, "nan.wav: its samples must be finite");
}

TEST_F(TranscribeTest, RejectsModelsThatItCannotRun) {
  const auto folder = copy("english");
  const auto line = kSound + " --model " + folder;
  change(folder + "config.json", [](json& config) { config["model_type"] = "bart"; });
  expect_error(line, "model_type must be \"whisper\", but is \"bart\"");
  copy("english");
  change(folder + "generation_config.json", [](json& config) { config["alignment_heads"] = {{7, 0}}; });
  expect_error(line, "alignment_heads must be of 2 layers with 2 heads, but one is [7, 0]");
  change(folder + "generation_config.json", [](json& config) { config["alignment_heads"] = "none"; });
  expect_error(line, "generation_config.json: ");
  copy("english");
  change(folder + "generation_config.json", [](json& config) { config["suppress_tokens"] = {-1, 9999}; });
  expect_error(line, "tokens must be below");
  copy("english");
  change(folder + "generation_config.json", [](json& config) { config["max_initial_timestamp_index"] = -100'000; });
  expect_error(line, "generation_config.json: max_initial_timestamp_index must not be negative, but is -100000");
  copy("english");
  std::filesystem::remove(folder + "tokenizer.json");
  expect_error(line, "it must hold a tokenizer, tokenizer.json or vocab.json, but does not");
  std::filesystem::remove(folder + "model.safetensors");
  expect_error(line, "must hold one of model.safetensors");
  expect_error(kSound + " --model missing", "missing");
  expect_error(kSound + " --model " + data_path("stacks/bart.safetensors"), "it must hold a Whisper");
}

TEST_F(TranscribeTest, RejectsTokensThatTheModelDoesNotHave) {
  const auto expect_rejected = [this](const std::string& model, const std::string& mark, int64_t token) {
    const auto folder = copy(model);
    if (mark == "<|startofprev|>") std::filesystem::remove(folder + "generation_config.json");  // suppressed by default
    change(folder + "tokenizer.json", [&](json& tokenizer) {
      for (auto& each : tokenizer["added_tokens"]) {
        if (each["content"] == mark) each["id"] = token;
      }
    });
    expect_error(kSound + " --model " + folder,
                 fmt::format("tokens must be below {}, but one is {}", model == "english" ? 341 : 343, token));
  };
  for (const auto* mark : {"<|startoftranscript|>", "<|endoftext|>", "<|startofprev|>"}) {
    expect_rejected("english", mark, 999'999);
    expect_rejected("english", mark, -5);
  }
  for (const auto* mark : {"<|transcribe|>", "<|translate|>"}) expect_rejected("multilingual", mark, 999'999);
}

TEST_F(TranscribeTest, RejectsTokenizersWithoutTimestampsOrLanguages) {
  const auto folder = copy("english");
  const auto marks = [&](const std::function<void(json&)>& edit) {
    change(folder + "tokenizer.json", [&](json& tokenizer) { edit(tokenizer["added_tokens"]); });
  };
  marks([](json& all) { all.back()["id"] = 340; });
  expect_error(kSound + " --model " + folder, "it has no tokens of timestamps");
  copy("english");
  marks([](json& all) { all.erase(2); });  // <|en|>
  change(folder + "generation_config.json", [](json& config) { config["is_multilingual"] = true; });
  expect_error(kSound + " --model " + folder, "it has no tokens of languages");
}

}  // namespace
}  // namespace transcribe
