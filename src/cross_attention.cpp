// SPDX-License-Identifier: Apache-2.0
#include <xattn/cross_attention.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/nn/init.h>

#include <cmath>
#include <string_view>

#include "check.h"
#include "orders.h"
#include "projection.h"

namespace xattn {

using detail::batched;
using detail::check_value;
using detail::split_heads;
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
  const auto request = detail::request_of(options, 1, 1, 1);
  const auto& [logits, values] = options.plan().orders;
  for (const auto reason : {illegal_for_logits(logits, request), illegal_for_values(values, request)}) {
    check_value(reason.empty(), kCaller, "plan must be of legal orders, but {}, {} is not: {}.", name_of(logits),
                name_of(values), reason);
  }
  return options;
}

// [B, G, Lk, size], [1, 1, G * size] -> [B, G, Lk + 1, size].
Tensor with_one_more(const Tensor& x, const Tensor& bias) {
  const auto row = bias.view({1, x.size(1), 1, x.size(3)}).expand({x.size(0), -1, -1, -1});
  return torch::cat({x, row.to(x.scalar_type())}, 2);
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
  if (options.bias_kv()) {
    bias_k = register_parameter("bias_k", torch::nn::init::xavier_normal_(torch::empty({1, 1, G * d})));
    bias_v = register_parameter("bias_v", torch::nn::init::xavier_normal_(torch::empty({1, 1, G * e})));
  }
  if (options.qk_norm() == NormKind::none) return;
  query_norm = register_module("query_norm", detail::make_qk_norm(options, H));
  key_norm = register_module("key_norm", detail::make_qk_norm(options, G));
}

void CrossAttentionImpl::reset_parameters() {
  for (auto* linear : {&query_linear, &key_linear, &value_linear, &output_linear}) (*linear)->reset_parameters();
  for (auto* norm : {&query_norm, &key_norm}) {
    if (*norm) (*norm)->reset_parameters();
  }
  for (auto* bias : {&bias_k, &bias_v}) {
    if (bias->defined()) torch::nn::init::xavier_normal_(*bias);
  }
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::forward(const Tensor& query,
                                                       const Tensor& key,
                                                       const Tensor& value,
                                                       const Mask& mask) {
  detail::check_key_value(kCaller, key, value, mask, key_linear, value_linear, options.num_heads());
  const bool is_batched = key.dim() == 3;
  detail::check_query(kCaller, query, is_batched, is_batched ? key.size(0) : 1, query_linear);
  const auto Xq = batched(query), Xk = batched(key), Xv = batched(value);
  const auto B = Xk.size(0), Lq = Xq.size(1), Lk = Xk.size(1);
  const auto request = this->request(B, Lq, Lk, mask, Xq.requires_grad() || Xk.requires_grad() || Xv.requires_grad());
  const auto orders = options.plan().pinned ? options.plan().orders : make_plan(request).orders;
  if (orders == Orders{} || at::autocast::is_autocast_enabled(query.device().type())) {
    return attend(query, context(key, value, mask));
  }

  mask.check(kCaller, B, options.num_heads(), Lq, Lk, query.device());
  const detail::LayerWeights parameters(*this);
  const auto products = detail::make_products(orders, parameters);
  const auto side = detail::make_side(orders, parameters, products, Xk, Xv);
  AttentionOptions how;
  how.mask = mask;
  how.dropout = is_training() ? options.dropout() : 0;
  how.weights = options.attention_weights();
  const auto [output, weights, log_sum_exp] = detail::attend(orders, parameters, products, Xq, side, how);
  if (is_batched) return {output, weights};
  return {output.squeeze(0), weights.defined() ? weights.squeeze(0) : weights};
}

PlanRequest CrossAttentionImpl::request(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, bool inputs_train) const {
  auto request = detail::request_of(options, B, Lq, Lk);
  const auto& weight = query_linear->weight;
  const auto bias = mask.additive();
  request.element = static_cast<int64_t>(weight.element_size());
  request.training = at::GradMode::is_enabled() && (inputs_train || weight.requires_grad());
  request.rates = weight.is_cuda() ? Rates::cuda() : Rates::cpu(at::get_num_threads());
  request.unfused = options.attention_weights() != AttentionWeights::none ? "attention weights are wanted"
                    : is_training() && options.dropout() > 0              ? "dropout is above 0"
                    : bias.defined() && bias.requires_grad()              ? "the mask's bias asks for its gradient"
                    : weight.is_cpu() && request.d != request.e ? "heads of values are not of the size of heads of keys"
                                                                : "";
  return request;
}

std::string CrossAttentionImpl::explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask) {
  return xattn::explain(request(B, Lq, Lk, mask, false));
}

Context CrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask) {
  detail::check_key_value(kCaller, key, value, mask, key_linear, value_linear, options.num_heads());
  const auto G = *options.kv_heads(), d = *options.head_dim(), e = *options.value_head_dim();
  auto k = split_heads(key_linear(batched(key)), G, d, options.qk_norm_scope(), key_norm);  // [B, G, Lk, d]
  auto v = split_heads(value_linear(batched(value)), G, e);                                 // [B, G, Lk, e]
  if (options.bias_kv()) {
    k = with_one_more(k, bias_k);
    v = with_one_more(v, bias_v);
  }
  return Context(k, v, mask, key.dim() == 3, context_weights());
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::attend(const Tensor& query, const Context& context) {
  detail::check_query(kCaller, query, context, query_linear);
  context.check_made_from(kCaller, context_weights());
  const auto H = options.num_heads(), d = *options.head_dim();
  const auto q = split_heads(query_linear(batched(query)), H, d, options.qk_norm_scope(), query_norm);  // [B, H, Lq, d]
  const auto [mixed, weights, log_sum_exp] =
      detail::attend_heads(kCaller, q, context, options, is_training());  // [B, H, Lq, e]
  const auto output = output_linear(detail::merge_heads(mixed));          // [B, Lq, Eo]
  if (context.is_batched()) return {output, weights};
  return {output.squeeze(0), weights.defined() ? weights.squeeze(0) : weights};
}

std::vector<Tensor> CrossAttentionImpl::context_weights() const {
  return detail::context_weights(key_linear, value_linear, key_norm, bias_k, bias_v);
}

void CrossAttentionImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  const auto sizes = fmt::format("{}, {}, {}, {}", o.dim_query(), o.dim_key(), o.dim_value(), o.dim_output());
  const auto text = detail::printed(options);
  stream << fmt::format("xattn::CrossAttention({})", text == fmt::format("CrossAttentionOptions({})", sizes) ? sizes : text);
}

}  // namespace xattn
