// SPDX-License-Identifier: Apache-2.0
#include <xattn/cross_attention.h>

#include <ATen/autocast_mode.h>

#include <cmath>
#include <utility>

#include "check.h"

namespace xattn {

using detail::check_type;
using detail::check_value;
using detail::shape_of;
using detail::type_of;
using torch::Tensor;

namespace {

constexpr auto kCaller = "cross_attention";

// Refuses what cannot be, in reading order, and gives every default its value.
CrossAttentionOptions resolved(CrossAttentionOptions options) {
  const auto check_positive = [](const char* name, int64_t size) {
    check_value(size >= 1, kCaller, "{} must be at least 1, but is {}.", name, size);
  };
  check_positive("dim_query", options.dim_query());
  check_positive("dim_key", options.dim_key());
  check_positive("dim_value", options.dim_value());
  check_positive("dim_output", options.dim_output());
  check_positive("num_heads", options.num_heads());
  const auto heads = options.num_heads();
  if (!options.kv_heads()) options.kv_heads(heads);
  check_positive("kv_heads", *options.kv_heads());
  check_value(heads % *options.kv_heads() == 0, kCaller, "num_heads must be a multiple of kv_heads, but they are {} and {}.",
              heads, *options.kv_heads());
  if (!options.head_dim()) {
    check_value(options.dim_output() % heads == 0, kCaller,
                "dim_output must be a multiple of num_heads, but they are {} and {}. Otherwise give head_dim.",
                options.dim_output(), heads);
    options.head_dim(options.dim_output() / heads);
  }
  check_positive("head_dim", *options.head_dim());
  if (!options.value_head_dim()) options.value_head_dim(options.head_dim());
  check_positive("value_head_dim", *options.value_head_dim());
  if (!options.scale()) options.scale(1 / std::sqrt(static_cast<double>(*options.head_dim())));
  check_value(std::isfinite(*options.scale()), kCaller, "scale must be finite, but is {}.", *options.scale());
  check_value(options.dropout() >= 0 && options.dropout() <= 1, kCaller, "dropout must lie in [0, 1], but is {}.",
              options.dropout());
  check_value(options.qk_norm_eps() >= 0, kCaller, "qk_norm_eps must not be negative, but is {}.", options.qk_norm_eps());
  check_value(options.qk_norm() != NormKind::none || options.qk_norm_scope() == NormScope::per_head, kCaller,
              "qk_norm must be rms or layer for a qk_norm_scope of across_heads, but is none.");
  return options;
}

// [L, E] -> [1, L, E]. A unit batch axis also gets its natural stride back: `transpose().contiguous()` may leave a huge one there,
// with which products are ten times slower.
Tensor batched(const Tensor& x) {
  if (x.dim() == 2) return x.unsqueeze(0);
  return x.size(0) == 1 ? x.select(0, 0).unsqueeze(0) : x;
}

void check_input(const char* name, const Tensor& x, const char* length, int64_t features, const torch::nn::Linear& projection) {
  check_value(x.defined() && (x.dim() == 2 || x.dim() == 3) && x.size(-1) == features, kCaller,
              "{} must have shape [B, {}, {}], but has {}.", name, length, features, shape_of(x));
  const auto& weight = projection->weight;
  if (at::autocast::is_autocast_enabled(x.device().type())) {
    check_type(x.is_floating_point(), kCaller, "{} must be of a floating point type, but is {}.", name, type_of(x));
  } else {
    check_type(x.scalar_type() == weight.scalar_type(), kCaller, "{} must be {}, the type of the parameters, but is {}.", name,
               type_of(weight), type_of(x));
  }
  check_type(x.device() == weight.device(), kCaller, "{} must be on {}, as the parameters, but is on {}.", name,
             weight.device().str(), x.device().str());
}

// [B, L, n * size] -> [B, n, L, size], normalised on the way if there is a norm.
Tensor split_heads(const Tensor& x, int64_t n, int64_t size, const CrossAttentionOptions& options, Norm& norm) {
  const bool across = norm && options.qk_norm_scope() == NormScope::across_heads;
  const auto split = (across ? norm(x) : x).view({x.size(0), x.size(1), n, size});
  return (norm && !across ? norm(split) : split).transpose(1, 2);
}

}  // namespace

CrossAttentionImpl::CrossAttentionImpl(const CrossAttentionOptions& options_) : options(resolved(options_)) {
  reset();
}

void CrossAttentionImpl::reset() {
  const auto H = options.num_heads(), G = *options.kv_heads(), d = *options.head_dim(), e = *options.value_head_dim();
  const auto linear = [this](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias)));
  };
  query_linear = linear("query_linear", options.dim_query(), H * d, options.query_bias());
  key_linear = linear("key_linear", options.dim_key(), G * d, options.key_bias());
  value_linear = linear("value_linear", options.dim_value(), G * e, options.value_bias());
  output_linear = linear("output_linear", H * e, options.dim_output(), options.output_bias());
  if (options.qk_norm() == NormKind::none) return;
  const bool across = options.qk_norm_scope() == NormScope::across_heads;
  const auto norm = [&](const char* name, int64_t heads) {
    return register_module(name, Norm(NormOptions(options.qk_norm(), across ? heads * d : d).eps(options.qk_norm_eps())));
  };
  query_norm = norm("query_norm", H);
  key_norm = norm("key_norm", G);
}

void CrossAttentionImpl::reset_parameters() {
  for (auto* linear : {&query_linear, &key_linear, &value_linear, &output_linear}) (*linear)->reset_parameters();
  for (auto* norm : {&query_norm, &key_norm}) {
    if (*norm) (*norm)->reset_parameters();
  }
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::forward(const Tensor& query,
                                                       const Tensor& key,
                                                       const Tensor& value,
                                                       const Mask& mask) {
  return attend(query, context(key, value, mask));
}

Context CrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask) {
  check_input("key", key, "Lk", options.dim_key(), key_linear);
  check_input("value", value, "Lk", options.dim_value(), value_linear);
  check_value(key.sizes().slice(0, key.dim() - 1) == value.sizes().slice(0, value.dim() - 1), kCaller,
              "value must have the batch and length of key, {}, but has {}.", shape_of(key), shape_of(value));
  const auto xk = batched(key), xv = batched(value);
  mask.check(kCaller, xk.size(0), options.num_heads(), std::nullopt, xk.size(1), xk.device());

  const auto G = *options.kv_heads();
  Norm no_norm = nullptr;
  const auto k = split_heads(key_linear(xk), G, *options.head_dim(), options, key_norm);         // [B, G, Lk, d]
  const auto v = split_heads(value_linear(xv), G, *options.value_head_dim(), options, no_norm);  // [B, G, Lk, e]
  return Context(k, v, mask, key.dim() == 3, context_weights());
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::attend(const Tensor& query, const Context& context) {
  check_input("query", query, "Lq", options.dim_query(), query_linear);
  check_value((query.dim() == 3) == context.is_batched() && (query.dim() == 2 || query.size(0) == context.batch_size()),
              kCaller, "query must have shape {}Lq, {}] to match its context, but has {}.",
              context.is_batched() ? fmt::format("[{}, ", context.batch_size()) : "[", options.dim_query(), shape_of(query));
  context.check_made_from(kCaller, context_weights());
  const auto x = batched(query);
  context.mask().check(kCaller, x.size(0), options.num_heads(), x.size(1), context.length(), x.device());

  AttentionOptions how;
  how.mask = context.mask();
  how.scale = options.scale();
  how.dropout = is_training() ? options.dropout() : 0;
  how.weights = options.attention_weights();
  const auto q = split_heads(query_linear(x), options.num_heads(), *options.head_dim(), options, query_norm);  // [B, H, Lq, d]
  const auto [mixed, weights, log_sum_exp] = attention(q, context.key(), context.value(), how);                // [B, H, Lq, e]
  const auto output = output_linear(mixed.transpose(1, 2).flatten(2));                                         // [B, Lq, Eo]
  if (context.is_batched()) return {output, weights};
  return {output.squeeze(0), weights.defined() ? weights.squeeze(0) : weights};
}

std::vector<Tensor> CrossAttentionImpl::context_weights() const {
  std::vector<Tensor> weights = {key_linear->weight, key_linear->bias, value_linear->weight, value_linear->bias};
  if (key_norm) weights.insert(weights.end(), {key_norm->weight, key_norm->bias});
  return weights;
}

void CrossAttentionImpl::pretty_print(std::ostream& stream) const {
  constexpr const char* kNorms[] = {"none", "rms", "layer"};
  constexpr const char* kWeights[] = {"none", "mean", "per_head"};
  const auto& o = options;
  const auto heads = o.num_heads(), d = *o.head_dim();
  std::string named;
  const auto add = [&named](bool differs, std::string_view call, const auto&... argument) {
    if (differs) named += fmt::format(fmt::runtime(call), argument...);
  };
  add(heads != 1, ".num_heads({})", heads);
  add(o.kv_heads() != heads, ".kv_heads({})", *o.kv_heads());
  add(d * heads != o.dim_output(), ".head_dim({})", d);
  add(o.value_head_dim() != d, ".value_head_dim({})", *o.value_head_dim());
  add(!o.query_bias(), ".query_bias(false)");
  add(!o.key_bias(), ".key_bias(false)");
  add(!o.value_bias(), ".value_bias(false)");
  add(!o.output_bias(), ".output_bias(false)");
  add(o.scale() != 1 / std::sqrt(static_cast<double>(d)), ".scale({})", *o.scale());
  add(o.dropout() != 0, ".dropout({})", o.dropout());
  if (o.qk_norm() != NormKind::none) {
    add(true, ".qk_norm(NormKind::{})", kNorms[static_cast<int>(o.qk_norm())]);
    add(o.qk_norm_scope() == NormScope::across_heads, ".qk_norm_scope(NormScope::across_heads)");
    add(o.qk_norm_eps() != 1e-6, ".qk_norm_eps({})", o.qk_norm_eps());
  }
  add(o.attention_weights() != AttentionWeights::mean, ".attention_weights(AttentionWeights::{})",
      kWeights[static_cast<int>(o.attention_weights())]);
  const auto sizes = fmt::format("{}, {}, {}, {}", o.dim_query(), o.dim_key(), o.dim_value(), o.dim_output());
  stream << (named.empty() ? fmt::format("xattn::CrossAttention({})", sizes)
                           : fmt::format("xattn::CrossAttention(CrossAttentionOptions({}){})", sizes, named));
}

}  // namespace xattn
