// SPDX-License-Identifier: Apache-2.0
#include "bench/exact.h"

#include <fmt/format.h>
#include <torch/autograd.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace bench {

using shapes::NormOver;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

namespace {

std::vector<Tensor> gradients(const Outputs& outputs, const std::vector<Tensor>& leaves, const Tensor& grad) {
  return torch::autograd::grad({std::get<0>(outputs)}, leaves, {grad}, {}, false, /*allow_unused=*/true);
}

}  // namespace

Tensor linear(const torch::nn::Linear& module, const Tensor& x) {
  return at::linear(x, module->weight, module->bias);
}

Tensor split_heads(const Tensor& x, int64_t n, NormOver over, const xattn::Norm& norm) {
  const auto rms = [&](const Tensor& t) { return at::rms_norm(t, norm->weight.sizes(), norm->weight, norm->options.eps()); };
  auto y = over == NormOver::heads ? rms(x) : x;
  y = y.view({x.size(0), x.size(1), n, -1});
  if (over == NormOver::head) y = rms(y);
  return y.transpose(1, 2);
}

Eager::Context Eager::context() const {
  const auto& s = layer.shape;
  return {split_heads(linear(layer.module->key_linear, layer.key), s.G, s.norm, layer.module->key_norm),
          split_heads(linear(layer.module->value_linear, layer.value), s.G, NormOver::nothing, nullptr)};
}

Tensor Eager::project_query() const {
  return split_heads(linear(layer.module->query_linear, layer.query), layer.shape.H, layer.shape.norm,
                     layer.module->query_norm);
}

Tensor Eager::project_output(const Tensor& x) const {
  return linear(layer.module->output_linear, x.transpose(1, 2).flatten(2));
}

Tensor returned_weights(const BenchLayer& layer, const Tensor& weights) {
  switch (layer.module->options.attention_weights()) {
    case AttentionWeights::none: return {};
    case AttentionWeights::mean: return weights.mean(1);
    default: return weights;
  }
}

Outputs Eager::attend(const Context& context) const {
  const auto& s = layer.shape;
  auto [k, v] = context;
  if (s.G < s.H) {
    k = k.repeat_interleave(s.H / s.G, 1);
    v = v.repeat_interleave(s.H / s.G, 1);
  }
  auto logits = at::matmul(project_query(), k.transpose(-2, -1)) / std::sqrt(static_cast<double>(s.d));  // [B, H, Lq, Lk]
  if (layer.bias.defined()) logits = logits + layer.bias;
  const auto weights = at::softmax(logits, -1);
  return {project_output(at::matmul(weights, v)), returned_weights(layer, weights)};
}

double compare(const std::string& what, const Tensor& found, const Tensor& expected, bool rounds) {
  // Sums in float32 differ by about 1e-6; products in TF32 or bfloat16 by 1e-3.
  const auto allowed = rounds ? 5e-2 : 1e-4;
  const auto size = expected.abs().max().item<double>();
  const auto largest = (found.to(at::kDouble) - expected).abs().max().item<double>();
  const auto difference = size == 0 ? largest : largest / size;
  if (!(difference <= allowed)) throw std::runtime_error(fmt::format("{} differs from float64 by {:.1e}", what, difference));
  return difference;
}

Exact exact(const BenchLayer& layer) {
  constexpr int64_t kPlaces = 128;  // few enough to be quick in float64
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
  const auto outputs = definition.attend(definition.context());
  std::tie(result.output, result.weights) = outputs;
  if (layer.grad.defined()) result.grads = gradients(outputs, wide.leaves(), wide.grad);
  return result;
}

double check(const Candidate& candidate, const BenchLayer& layer, const Exact& exact) {
  const bool rounds = layer.key.scalar_type() != at::kFloat || candidate.rounds;
  double error = 0;
  const auto compare_one = [&](const char* what, const Tensor& found, const Tensor& expected) {
    const auto text = fmt::format("{}: {} of {}", layer.shape.name, what, candidate.name);
    error = std::max(error, compare(text, found.detach(), expected.detach(), rounds));
  };
  const torch::AutoGradMode grad_mode(layer.grad.defined());
  const auto outputs = candidate.call();
  const auto& [output, weights] = outputs;
  compare_one("output", output.index_select(1, exact.places), exact.output);
  if (exact.weights.defined()) compare_one("weights", weights.index_select(-2, exact.places), exact.weights);
  if (!layer.grad.defined()) return error;
  const auto grads = gradients(outputs, candidate.leaves, layer.grad);
  for (size_t i = 0; candidate.leaves_of_layer && i < grads.size(); ++i) {
    const auto& leaf = candidate.leaves[i];
    if (leaf.is_same(layer.module->key_linear->bias)) continue;  // it has no influence, so its gradient is only rounding
    compare_one("a gradient", grads[i].defined() ? grads[i] : torch::zeros_like(leaf), exact.grads[i]);
  }
  return error;
}

std::function<void()> timed(const Candidate& candidate, const BenchLayer& layer) {
  return [&candidate, &layer] {
    const auto outputs = candidate.call();
    if (layer.grad.defined()) gradients(outputs, candidate.leaves, layer.grad);
  };
}

}  // namespace bench
