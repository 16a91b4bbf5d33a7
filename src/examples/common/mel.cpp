// SPDX-License-Identifier: Apache-2.0
#include "common/mel.h"

#include <torch/nn/functional/padding.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/sound.h"

namespace examples {
namespace {

using torch::Tensor;

constexpr int64_t kWindow = 400;  // samples of a Fourier transform: 25 ms
constexpr int64_t kFrequencies = kWindow / 2 + 1;

// Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, logarithmic above.
constexpr double kBorder = 1000, kMelOfBorder = 15, kMelsPerFactor = 27;
const double kFactor = std::log(6.4);

double mel_of(double hertz) {
  if (hertz < kBorder) return hertz * kMelOfBorder / kBorder;
  return kMelOfBorder + std::log(hertz / kBorder) / kFactor * kMelsPerFactor;
}

double hertz_of(double mel) {
  if (mel < kMelOfBorder) return mel * kBorder / kMelOfBorder;
  return kBorder * std::exp((mel - kMelOfBorder) * kFactor / kMelsPerFactor);
}

// Overlapping triangles of equal area, evenly spaced on the mel scale up to half the sample rate, [bins, kFrequencies].
Tensor mel_filters(int64_t bins) {
  const auto most = mel_of(kSampleRate / 2.0);
  const auto corner = [&](int64_t i) { return hertz_of(most * static_cast<double>(i) / static_cast<double>(bins + 1)); };
  const auto filters = torch::zeros({bins, kFrequencies}, torch::kFloat64);
  auto values = filters.accessor<double, 2>();
  for (int64_t bin = 0; bin < bins; ++bin) {
    const auto left = corner(bin), centre = corner(bin + 1), right = corner(bin + 2);
    for (int64_t i = 0; i < kFrequencies; ++i) {
      const auto hertz = static_cast<double>(i * kSampleRate) / kWindow;
      const auto height = std::min((hertz - left) / (centre - left), (right - hertz) / (right - centre));
      values[bin][i] = std::max(0.0, height) * 2 / (right - left);
    }
  }
  return filters.to(torch::kFloat32);
}

}  // namespace

Tensor log_mel(const Tensor& samples, int64_t bins) {
  const torch::NoGradGuard no_grad;
  const auto frames = samples.numel() / kHop;
  constexpr int64_t kMargin = kWindow / 2;
  namespace F = torch::nn::functional;
  // A frame is centred on its sample; in front of the first and behind the last the sound is mirrored.
  const auto enough = F::pad(samples, F::PadFuncOptions({0, std::max<int64_t>(0, kMargin + 1 - samples.numel())}));
  const auto padded = F::pad(enough.unsqueeze(0), F::PadFuncOptions({kMargin, kMargin}).mode(torch::kReflect)).squeeze(0);
  const auto filters = mel_filters(bins);
  const auto window = torch::hann_window(kWindow);
  constexpr int64_t kAtOnce = 3000;  // frames: the spectra of a long sound take more memory than the model
  std::vector<Tensor> parts = {torch::empty({bins, 0})};
  for (int64_t frame = 0; frame < frames; frame += kAtOnce) {
    const auto count = std::min(kAtOnce, frames - frame);
    const auto part = padded.narrow(0, frame * kHop, (count - 1) * kHop + kWindow);
    const auto spectrum = torch::stft(part, kWindow, kHop, kWindow, window, /*center=*/false, "reflect", /*normalized=*/false,
                                      /*onesided=*/true, /*return_complex=*/true);
    parts.push_back(filters.matmul(spectrum.abs().square()).clamp_min_(1e-10).log10_());
  }
  const auto mel = torch::cat(parts, 1);
  if (frames == 0) return mel;
  return (torch::maximum(mel, mel.max() - 8) + 4) / 4;
}

}  // namespace examples
