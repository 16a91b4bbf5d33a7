// SPDX-License-Identifier: Apache-2.0
#include "bench/exact.h"

#include <fmt/format.h>
#include <torch/autograd.h>
#include <torch/utils.h>

#include <algorithm>
#include <stdexcept>

#include "bench/eager.h"

namespace bench {

using shapes::Timed;
using torch::Tensor;

Exact exact(const Layer& layer) {
  constexpr int64_t kPlaces = 128;  // as many as do not take long in float64
  Exact result;
  const auto Lq = layer.shape.Lq;
  const bool all = Lq <= kPlaces || layer.shape.timed == Timed::backward;
  result.places = torch::arange(all ? Lq : kPlaces, torch::dtype(at::kLong).device(layer.query.device()));
  auto part = layer;
  if (!all) {
    result.places = result.places.mul(Lq - 1).div(kPlaces - 1, "floor");
    part.query = layer.query.index_select(1, result.places);
  }
  const auto wide = part.in_double();
  const Eager definition{wide};
  const torch::AutoGradMode grad_mode(layer.grad.defined());
  std::tie(result.output, result.weights) = definition.attend(definition.context());
  if (layer.grad.defined()) result.grads = torch::autograd::grad({result.output}, wide.leaves(), {wide.grad});
  return result;
}

namespace {

double relative_error(const Tensor& found, const Tensor& expected) {
  const auto size = expected.abs().max().item<double>();
  const auto largest = (found.to(at::kDouble) - expected).abs().max().item<double>();
  return size == 0 ? largest : largest / size;
}

}  // namespace

double check(const Candidate& candidate, const Layer& layer, const Exact& exact) {
  const bool train = layer.grad.defined();
  double error = 0;
  {
    const torch::AutoGradMode grad_mode(train);
    const auto [output, weights] = candidate.call();
    const auto compare = [&](const char* what, const Tensor& found, const Tensor& expected) {
      const auto difference = relative_error(found.detach(), expected.detach());
      // Sums of float32 differ by some 1e-6; a product in TF32 or bfloat16 by 1e-3.
      const auto allowed = layer.key.scalar_type() == at::kFloat && !candidate.rounds ? 1e-4 : 5e-2;
      if (!(difference <= allowed)) {
        throw std::runtime_error(
            fmt::format("{}: {} of {} differs from float64 by {:.1e}", layer.shape.name, what, candidate.name, difference));
      }
      error = std::max(error, difference);
    };
    compare("output", output.index_select(1, exact.places), exact.output);
    if (exact.weights.defined()) compare("weights", weights.index_select(-2, exact.places), exact.weights);
    if (train) {
      const auto grads = torch::autograd::grad({output}, candidate.leaves, {layer.grad}, {}, false, /*allow_unused=*/true);
      for (size_t i = 0; i < candidate.compared; ++i) {
        // The key's bias has no influence, and so rounding errors for a gradient.
        if (candidate.leaves[i].is_same(layer.module->key_linear->bias)) continue;
        compare("a gradient", grads[i].defined() ? grads[i] : torch::zeros_like(candidate.leaves[i]), exact.grads[i]);
      }
    }
  }
  return error;
}

std::function<void()> timed(const Candidate& candidate, const Layer& layer) {
  if (!layer.grad.defined()) return [&candidate] { candidate.call(); };
  return [&candidate, &layer] {
    const auto output = std::get<0>(candidate.call());
    torch::autograd::grad({output}, candidate.leaves, {layer.grad}, {}, false, /*allow_unused=*/true);
  };
}

}  // namespace bench
