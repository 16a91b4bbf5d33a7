// SPDX-License-Identifier: Apache-2.0
#include <xattn/cross_attention.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/nn/init.h>

#include <cmath>
#include <string_view>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/text.h"
#include "cpu/matrix_product.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"

namespace xattn {

using detail::batched;
using detail::check_value;
using torch::Tensor;

namespace {

constexpr auto kCrossAttention = "cross_attention";

// Refuses what cannot be, in reading order, and gives every default its value.
CrossAttentionOptions resolved(CrossAttentionOptions options) {
  detail::check_options(kCrossAttention, options);
  const auto heads = options.num_heads();
  if (!options.kv_heads()) options.kv_heads(heads);
  if (!options.head_dim()) options.head_dim(options.dim_output() / heads);
  check_value(*options.head_dim() >= 1, kCrossAttention, "head_dim must be at least 1, but is {}.", *options.head_dim());
  if (!options.value_head_dim()) options.value_head_dim(options.head_dim());
  if (!options.scale()) options.scale(1 / std::sqrt(static_cast<double>(*options.head_dim())));
  detail::check_plan(kCrossAttention, options.plan(), detail::request_of(options, 1, 1, 1));
  return options;
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
  detail::check_module(kCrossAttention, *this);
  detail::check_key_value(kCrossAttention, key, value, mask, key_linear, value_linear, options.num_heads());
  const bool is_batched = key.dim() == 3;
  detail::check_query(kCrossAttention, query, is_batched, is_batched ? key.size(0) : 1, query_linear);
  detail::check_mask(mask, kCrossAttention, is_batched ? key.size(0) : 1, options.num_heads(), query.size(-2), key.size(-2),
                     key.device());
  const auto Lk = key.size(-2), keys = options.bias_kv() ? Lk : detail::needed_keys(mask, Lk);
  if (keys < Lk) {
    const auto [output, weights] =
        forward(query, key.narrow(-2, 0, keys), value.narrow(-2, 0, keys), detail::first_keys(mask, keys));
    return {output, detail::with_zeros(weights, Lk - keys)};
  }
  const auto Xq = batched(query), Xk = batched(key), Xv = batched(value);
  const auto orders = orders_for(Xq, Xk, Xv, mask);
  const detail::LayerWeights weights(*this);
  const auto products = detail::make_products(orders, weights);
  return attend(orders, weights, products, Xq, detail::make_side(orders, weights, products, Xk, Xv), mask, is_batched);
}

Context CrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask) {
  detail::check_module(kCrossAttention, *this);
  detail::check_key_value(kCrossAttention, key, value, mask, key_linear, value_linear, options.num_heads());
  const auto side = detail::make_side({}, detail::LayerWeights(*this), {}, batched(key), batched(value));
  return Context(side.keys, side.values, mask, key.dim() == 3, context_weights());
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::attend(const Tensor& query, const Context& context) {
  detail::check_module(kCrossAttention, *this);
  detail::check_query(kCrossAttention, query, context, query_linear);
  context.check_made_from(kCrossAttention, context_weights());
  const detail::Side side{context.key(), {}, context.value(), context.length() - (options.bias_kv() ? 1 : 0)};
  return attend({}, detail::LayerWeights(*this), {}, batched(query), side, context.mask(), context.is_batched());
}

// query [B, Lq, Eq]
std::tuple<Tensor, Tensor> CrossAttentionImpl::attend(const Orders& orders,
                                                      const detail::LayerWeights& weights,
                                                      const detail::Products& products,
                                                      const Tensor& query,
                                                      const detail::Side& side,
                                                      const Mask& mask,
                                                      bool is_batched) const {
  detail::check_mask(mask, kCrossAttention, query.size(0), options.num_heads(), query.size(1), side.Lk, query.device());
  AttentionOptions how;
  how.mask = mask;
  how.scale = options.scale();
  how.dropout = is_training() ? options.dropout() : 0;
  how.weights = options.attention_weights();
  how.weight_heads = options.weight_heads();
  const auto [output, map, log_sum_exp] = detail::attend(orders, weights, products, query, side, how);
  if (is_batched) return {output, map};
  return {output.squeeze(0), map.defined() ? map.squeeze(0) : map};
}

// Of `forward`, for batched inputs.
Orders CrossAttentionImpl::orders_for(const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask) const {
  const bool inputs_train = query.requires_grad() || key.requires_grad() || value.requires_grad();
  const auto request = this->request(key.size(0), query.size(1), key.size(1), mask, inputs_train);
  return request.pinned ? *request.pinned : make_plan(request).orders;
}

PlanRequest CrossAttentionImpl::request(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, bool inputs_train) const {
  auto request = detail::request_of(options, B, Lq, Lk);
  const auto& weight = query_linear->weight;
  request.element = static_cast<int64_t>(weight.element_size());
  request.mask_is_learned = detail::is_learned(mask);
  request.training = at::GradMode::is_enabled() && (inputs_train || request.mask_is_learned || weight.requires_grad() ||
                                                    key_linear->weight.requires_grad() || value_linear->weight.requires_grad());
  request.gives_weights = options.attention_weights() != AttentionWeights::none;
  request.drops_weights = is_training() && options.dropout() > 0;
  request.runs_on = detail::runs_on(weight);
  if (options.plan().pinned) request.pinned = options.plan().orders;
  if (at::autocast::is_autocast_enabled(weight.device().type())) request.pinned = Orders{};
  request.rates = options.plan().rates.value_or(weight.is_cuda() ? Rates::cuda() : Rates::cpu(at::get_num_threads()));
  return request;
}

std::string CrossAttentionImpl::explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask) {
  detail::check_module(kCrossAttention, *this);
  return xattn::explain(request(B, Lq, options.bias_kv() ? Lk : detail::needed_keys(mask, Lk), mask, false));
}

std::vector<Tensor> CrossAttentionImpl::context_weights() const {
  return detail::context_weights(key_linear, value_linear, key_norm, bias_k, bias_v);
}

void CrossAttentionImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  const auto sizes = detail::formatted("{}, {}, {}, {}", o.dim_query(), o.dim_key(), o.dim_value(), o.dim_output());
  const auto text = detail::printed(options);
  stream << detail::formatted("xattn::CrossAttention({})",
                              text == detail::formatted("CrossAttentionOptions({})", sizes) ? sizes : text);
}

}  // namespace xattn
