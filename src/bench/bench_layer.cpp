// SPDX-License-Identifier: Apache-2.0
#include "bench/bench_layer.h"

#include <torch/utils.h>

#include <algorithm>
#include <limits>
#include <memory>

namespace bench {

using shapes::NormOver;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

std::vector<Tensor> BenchLayer::leaves() const {
  std::vector<Tensor> result = {query, key};
  if (!shape.one_context) result.push_back(value);
  for (const auto& parameter : module->parameters()) result.push_back(parameter);
  return result;
}

BenchLayer BenchLayer::in_double() const {
  const auto convert = [](const Tensor& x) {
    return x.defined() ? x.detach().to(at::kDouble).requires_grad_(x.requires_grad()) : x;
  };
  BenchLayer result = *this;
  result.module = std::dynamic_pointer_cast<xattn::CrossAttentionImpl>(module->clone());
  result.module->to(at::kDouble);
  for (auto* x : {&result.query, &result.key, &result.bias, &result.grad}) *x = convert(*x);
  result.value = shape.one_context ? result.key : convert(value);
  return result;
}

BenchLayer make_layer(const shapes::Shape& shape, const torch::TensorOptions& options, AttentionWeights weights) {
  torch::manual_seed(0);
  const auto& s = shape;
  BenchLayer layer;
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

double gigabytes_needed(const shapes::Shape& s, bool logits, double element) {
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const auto inner = number(s.H * std::max(s.d, s.e));
  const auto rows = number(s.B * s.Lq) * (number(s.Eq + s.Eo) + 3 * inner) + number(s.B * s.Lk) * (number(s.Ek) + 3 * inner);
  const auto weights = 2 * inner * number(s.Eq + 2 * s.Ek + s.Eo);
  const auto maps = logits ? 2.5 * number(s.B * s.H) * number(s.Lq * s.Lk) : 0;
  return 1e-9 * element * (rows + weights + maps) * (s.timed == Timed::backward ? 2.5 : 1);
}

xattn::Mask mask_of(const BenchLayer& layer) {
  const auto& s = layer.shape;
  if (!layer.keep.defined()) return {};
  return xattn::Mask::lengths(torch::full({s.B}, s.valid, torch::dtype(at::kLong).device(layer.key.device())), s.Lk);
}

}  // namespace bench
