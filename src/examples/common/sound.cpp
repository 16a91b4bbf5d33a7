// SPDX-License-Identifier: Apache-2.0
#include "common/sound.h"

#include <fmt/format.h>
#include <samplerate.h>
#include <sndfile.h>

#include <array>
#include <cmath>
#include <memory>
#include <regex>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace examples {
namespace {

using File = std::unique_ptr<SNDFILE, decltype(&sf_close)>;

void check(bool ok, const std::string& path, std::string_view defect) {
  if (!ok) throw std::runtime_error(fmt::format("{}: {}", path, defect));
}

// Whether the header of a WAV or AIFF file announces more data than there is, which libsndfile only logs. Programs that write to
// a pipe announce as much as fits in 32 bits.
bool lacks_data(SNDFILE* file) {
  std::array<char, 16'384> log = {};
  sf_command(file, SFC_GET_LOG_INFO, log.data(), static_cast<int>(log.size()));
  static const std::regex announced(R"((?:data|SSND) *: (\d+) \(should be (\d+)\))");
  constexpr uint64_t kUnknown = 0x7fff'0000;
  std::cmatch sizes;
  if (!std::regex_search(log.data(), sizes, announced)) return false;
  const auto size = std::stoull(sizes[1]);
  return size < kUnknown && size > std::stoull(sizes[2]);
}

// The mean of the channels of all frames.
std::vector<float> read_mono(const std::string& path, const File& file, const SF_INFO& info) {
  constexpr int64_t kFrames = 65'536;  // read at once
  const auto channels = static_cast<size_t>(info.channels);
  std::vector<float> mono, block(kFrames * channels);
  while (const auto read = sf_readf_float(file.get(), block.data(), kFrames)) {
    for (size_t frame = 0; frame < static_cast<size_t>(read); ++frame) {
      float sum = 0;
      for (size_t channel = 0; channel < channels; ++channel) sum += block[frame * channels + channel];
      mono.push_back(sum / static_cast<float>(channels));
    }
  }
  const bool complete = static_cast<sf_count_t>(mono.size()) == info.frames && !lacks_data(file.get());
  check(complete && sf_error(file.get()) == SF_ERR_NO_ERROR, path,
        fmt::format("it is truncated or damaged: it ends after {} samples", mono.size()));
  return mono;
}

std::vector<float> resample(const std::string& path, const std::vector<float>& samples, int rate) {
  SRC_DATA job = {};
  job.src_ratio = static_cast<double>(kSampleRate) / rate;
  check(src_is_valid_ratio(job.src_ratio) != 0, path, fmt::format("its rate of {} Hz is out of range", rate));
  std::vector<float> resampled(static_cast<size_t>(std::ceil(static_cast<double>(samples.size()) * job.src_ratio)));
  job.data_in = samples.data();
  job.input_frames = static_cast<long>(samples.size());
  job.data_out = resampled.data();
  job.output_frames = static_cast<long>(resampled.size());
  const auto error = src_simple(&job, SRC_SINC_MEDIUM_QUALITY, /*channels=*/1);
  check(error == 0, path, fmt::format("it cannot be resampled: {}", src_strerror(error)));
  resampled.resize(static_cast<size_t>(job.output_frames_gen));
  return resampled;
}

}  // namespace

Sound read_sound(const std::string& path) {
  SF_INFO info = {};
  const File file(sf_open(path.c_str(), SFM_READ, &info), sf_close);
  check(file != nullptr, path, fmt::format("it cannot be read as sound: {}", sf_strerror(nullptr)));
  auto samples = read_mono(path, file, info);
  if (info.samplerate != kSampleRate && !samples.empty()) samples = resample(path, samples, info.samplerate);
  check(!samples.empty(), path, "it has no samples");
  const auto tensor = torch::tensor(samples);
  check(tensor.isfinite().all().item<bool>(), path, "its samples must be finite, but some are not");
  return {tensor, info.channels};
}

std::string encode_wav(const torch::Tensor& samples) {
  constexpr uint32_t kBytes = 2;  // of a sample
  const auto plain = (samples.clamp(-1, 1) * 32'767).round().to(torch::kInt16).contiguous();
  const auto size = static_cast<uint32_t>(plain.numel()) * kBytes;
  std::string file;
  const auto put = [&file](uint32_t number, int bytes) {
    for (int i = 0; i < bytes; ++i) file += static_cast<char>(number >> 8 * i & 0xffU);
  };
  file += "RIFF";
  put(36 + size, 4);
  file += "WAVEfmt ";
  put(16, 4);
  put(1, 2);  // PCM
  put(1, 2);  // channel
  put(kSampleRate, 4);
  put(kSampleRate * kBytes, 4);
  put(kBytes, 2);
  put(8 * kBytes, 2);
  file += "data";
  put(size, 4);
  return file.append(reinterpret_cast<const char*>(plain.const_data_ptr<int16_t>()), size);
}

}  // namespace examples
