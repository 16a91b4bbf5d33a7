// SPDX-License-Identifier: Apache-2.0
#include "layer.h"

#include <torch/autograd.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <cmath>
#include <limits>
#include <memory>

namespace bench {

using shapes::NormOver;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

std::vector<Tensor> Layer::leaves() const {
  std::vector<Tensor> result = {query, key};
  if (!shape.one_context) result.push_back(value);
  for (const auto& parameter : module->parameters()) result.push_back(parameter);
  return result;
}

Layer Layer::in_double() const {
  const auto convert = [](const Tensor& x) {
    return x.defined() ? x.detach().to(at::kDouble).requires_grad_(x.requires_grad()) : x;
  };
  Layer result = *this;
  result.module = std::dynamic_pointer_cast<xattn::CrossAttentionImpl>(module->clone());
  result.module->to(at::kDouble);
  for (auto* x : {&result.query, &result.key, &result.bias, &result.grad}) *x = convert(*x);
  result.value = shape.one_context ? result.key : convert(value);
  return result;
}

Layer make_layer(const shapes::Shape& shape, const torch::TensorOptions& options, AttentionWeights weights) {
  torch::manual_seed(0);
  const auto& s = shape;
  Layer layer;
  layer.shape = shape;
  layer.module = xattn::CrossAttention(
      xattn::CrossAttentionOptions(s.Eq, s.Ek, s.Ek, s.Eo)
          .num_heads(s.H)
          .kv_heads(s.G)
          .head_dim(s.d)
          .value_head_dim(s.e)
          .qk_norm(s.norm == NormOver::nothing ? xattn::NormKind::none : xattn::NormKind::rms)
          .qk_norm_scope(s.norm == NormOver::heads ? xattn::NormScope::across_heads : xattn::NormScope::per_head)
          .attention_weights(weights));
  layer.module->to(options.device(), c10::typeMetaToScalarType(options.dtype()));
  const bool train = s.timed == Timed::backward;
  layer.module->train(train);
  for (auto& parameter : layer.module->parameters()) parameter.requires_grad_(train);
  layer.query = torch::randn({s.learned_query ? 1 : s.B, s.Lq, s.Eq}, options).requires_grad_(train);
  layer.key = torch::randn({s.B, s.Lk, s.Ek}, options).requires_grad_(train);
  layer.value = s.one_context ? layer.key : torch::randn({s.B, s.Lk, s.Ek}, options).requires_grad_(train);
  if (s.valid < s.Lk) {
    layer.keep = (torch::arange(s.Lk, options.dtype(at::kLong)) < s.valid).expand({s.B, s.Lk}).contiguous();
    layer.bias = torch::zeros({s.B, 1, 1, s.Lk}, options)
                     .masked_fill_(layer.keep.view({s.B, 1, 1, s.Lk}).logical_not(), -std::numeric_limits<float>::infinity());
  }
  if (train) layer.grad = torch::randn({s.B, s.Lq, s.Eo}, options);
  return layer;
}

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

Exact exact(const Layer& layer) {
  constexpr int64_t kPlaces = 128;  // as many as do not take long in float64
  auto wide = layer.in_double();
  Exact result;
  const auto Lq = layer.shape.Lq;
  const bool all = Lq <= kPlaces || layer.shape.timed == Timed::backward;
  result.places = torch::arange(all ? Lq : kPlaces, torch::dtype(at::kLong).device(layer.query.device()));
  if (!all) {
    result.places = result.places * (Lq - 1) / (kPlaces - 1);
    result.places = result.places.to(at::kLong);
    wide.query = wide.query.index_select(1, result.places);
  }
  const Eager definition{wide};
  const torch::AutoGradMode grad_mode(layer.grad.defined());
  std::tie(result.output, result.weights) = definition.attend(definition.context());
  if (layer.grad.defined()) result.grads = torch::autograd::grad({result.output}, wide.leaves(), {wide.grad});
  return result;
}

}  // namespace bench
