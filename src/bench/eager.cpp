// SPDX-License-Identifier: Apache-2.0
#include "bench/eager.h"

#include <cmath>

namespace bench {

using shapes::NormOver;
using torch::Tensor;
using xattn::AttentionWeights;

namespace {

// [B, L, n * size] -> [B, n, L, size], with the norm.
Tensor heads(const Tensor& x, int64_t n, NormOver over, const xattn::Norm& norm) {
  const auto rms = [&](const Tensor& t) { return at::rms_norm(t, norm->weight.sizes(), norm->weight, norm->options.eps()); };
  auto y = over == NormOver::heads ? rms(x) : x;
  y = y.view({x.size(0), x.size(1), n, -1});
  if (over == NormOver::head) y = rms(y);
  return y.transpose(1, 2);
}

}  // namespace

Eager::Context Eager::context() const {
  const auto& m = layer.module;
  const auto& s = layer.shape;
  return {heads(at::linear(layer.key, m->key_linear->weight, m->key_linear->bias), s.G, s.norm, m->key_norm),
          heads(at::linear(layer.value, m->value_linear->weight, m->value_linear->bias), s.G, NormOver::nothing, nullptr)};
}

Tensor Eager::project_query() const {
  const auto& m = layer.module;
  const auto& s = layer.shape;
  return heads(at::linear(layer.query, m->query_linear->weight, m->query_linear->bias), s.H, s.norm, m->query_norm);
}

Tensor Eager::project_output(const Tensor& mixed) const {
  const auto& linear = layer.module->output_linear;
  return at::linear(mixed.transpose(1, 2).flatten(2), linear->weight, linear->bias);
}

Results Eager::attend(const Context& context) const {
  const auto& s = layer.shape;
  auto [k, v] = context;
  if (s.G < s.H) {
    k = k.repeat_interleave(s.H / s.G, 1);
    v = v.repeat_interleave(s.H / s.G, 1);
  }
  auto logits = at::matmul(project_query(), k.transpose(-2, -1)) / std::sqrt(static_cast<double>(s.d));  // [B, H, Lq, Lk]
  if (layer.bias.defined()) logits = logits + layer.bias;
  const auto weights = at::softmax(logits, -1);
  return {project_output(at::matmul(weights, v)), wanted_weights(layer, weights)};
}

Tensor wanted_weights(const Layer& layer, const Tensor& weights) {
  switch (layer.module->options.attention_weights()) {
    case AttentionWeights::none: return {};
    case AttentionWeights::mean: return weights.mean(1);
    default: return weights;
  }
}

}  // namespace bench
