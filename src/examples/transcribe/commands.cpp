// SPDX-License-Identifier: Apache-2.0
#include "transcribe/commands.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <optional>
#include <string>

#include "common/png.h"
#include "common/sound.h"
#include "common/write_file.h"
#include "programs/program.h"
#include "transcribe/show.h"
#include "transcribe/transcript.h"

namespace transcribe {
namespace {

struct Arguments {
  std::string sound, model, picture, report, storage = "float32";
  bool words = false, json = false;
  std::optional<int> threads;
  Options options;
};

// A bar on standard error, if that is a terminal, for sounds of more than a minute.
void show_progress(int64_t done, int64_t all) {
  if (static_cast<double>(all) * kFrameSeconds < 60 || isatty(STDERR_FILENO) == 0) return;
  const auto share = static_cast<double>(done) / static_cast<double>(all);
  std::cerr << fmt::format("\r[{:-<40}] {:.0f} %", std::string(static_cast<size_t>(40 * share), '#'), 100 * share)
            << (done == all ? "\r\x1b[K" : "") << std::flush;
}

void job(const Arguments& arguments) {
  program::set_threads(arguments.threads);
  examples::check_output(arguments.picture);
  examples::check_output(arguments.report);
  auto options = arguments.options;
  options.words = arguments.words || !arguments.picture.empty() || !arguments.report.empty();
  const auto sound = examples::read_sound(arguments.sound);
  if (sound.channels > 1) std::cerr << fmt::format("{}: its {} channels are mixed to one\n", arguments.sound, sound.channels);
  const Whisper whisper(arguments.model, arguments.storage == "bfloat16" ? std::optional(torch::kBFloat16) : std::nullopt);
  auto transcript = transcribe(whisper, sound.samples, options, show_progress);
  if (!arguments.picture.empty()) examples::write_png(arguments.picture, draw(transcript));
  if (!arguments.report.empty()) write_page(arguments.report, arguments.sound, transcript, sound);
  if (!arguments.words) std::ranges::for_each(transcript.segments, [](auto& segment) { segment.words.clear(); });
  std::cout << (arguments.json ? json_of(transcript, sound) : text_of(transcript));
}

}  // namespace

int run(int argc, char** argv) {
  program::Program app("transcribe", "Writes down what is said in a recording, with a Whisper model.");
  Arguments arguments;
  app.option("SOUND", arguments.sound, "a sound file: WAV, FLAC, Ogg and others", {.required = true});
  app.option("--model", arguments.model, "a folder of Hugging Face, or OpenAI's .pt beside a tokenizer", {.required = true});
  app.flag("--words", arguments.words, "print each word with its times");
  app.option("--picture", arguments.picture, "draw the attention of the first window's words over its spectrogram, as PNG");
  app.option("--report", arguments.report, "write an HTML page with the sound, its spectrogram and the words");
  app.flag("--json", arguments.json, "print one JSON object");
  app.option("--language", arguments.options.language, "the language of the speech, such as en; detected if not given");
  app.option("--task", arguments.options.task, "transcribe, or translate to English", {.one_of = {"transcribe", "translate"}});
  app.option("--beams", arguments.options.beams, "beginnings that the search keeps; 1 is greedy", {.range = {{1, 1000}}});
  app.option("--storage", arguments.storage, "of the packed weights", {.one_of = {"float32", "bfloat16"}});
  program::add_threads_option(app, arguments.threads);
  app.footer("Example: transcribe speech.wav --model build/whisper/tiny.en --words --picture words.png");
  return app.run(argc, argv, [&arguments] { job(arguments); });
}

}  // namespace transcribe
