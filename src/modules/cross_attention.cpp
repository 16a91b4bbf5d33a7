// SPDX-License-Identifier: Apache-2.0
#include <xattn/cross_attention.h>

#include <torch/nn/init.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/text.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"
#include "modules/queries.h"

namespace xattn {

using detail::check_value;
using torch::Tensor;

namespace {

constexpr auto kCrossAttention = "cross_attention";

// Checks the options in reading order and gives every default its value.
CrossAttentionOptions resolved(CrossAttentionOptions options) {
  detail::check_options(kCrossAttention, options);
  const auto heads = options.num_heads();
  if (!options.kv_heads()) options.kv_heads(heads);
  if (!options.head_dim()) options.head_dim(options.dim_output() / heads);
  check_value(*options.head_dim() >= 1, kCrossAttention, "head_dim must be at least 1, but is {}.", *options.head_dim());
  if (!options.value_head_dim()) options.value_head_dim(options.head_dim());
  if (!options.scale()) options.scale(1 / std::sqrt(static_cast<double>(*options.head_dim())));
  detail::check_plan(kCrossAttention, options.plan(), options);
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

std::tuple<Tensor, Tensor> CrossAttentionImpl::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask, const CallOptions& call) {
  detail::check_module(kCrossAttention, *this);
  auto weights = detail::weights_of(*this);
  auto inputs = detail::context_inputs(kCrossAttention, weights, key, value, mask);
  const auto Xq = detail::query_input(kCrossAttention, weights, query, inputs.is_batched, inputs.B());
  const auto Lq = Xq.size(1);
  detail::check_mask(kCrossAttention, weights, inputs, Lq);
  if (inputs.value.is_same(inputs.key)) std::tie(inputs.key, inputs.value) = detail::for_two_uses(inputs.key);
  const auto dropped_keys = detail::drop_padding(weights, inputs);
  const auto how = detail::attention_options(kCrossAttention, options, call, inputs.mask, is_training());

  const bool inputs_train = query.requires_grad() || key.requires_grad() || value.requires_grad();
  const auto request = detail::request_of(*this, weights, inputs.B(), Lq, inputs.Lk(), inputs.mask, how.weights, inputs_train);
  const detail::Layer layer(detail::orders_of(request), std::move(weights));
  const auto context = detail::make_context(layer, inputs.key, inputs.value);
  return detail::results(detail::attend(layer, Xq, context, how), inputs.is_batched, dropped_keys);
}

Context CrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) {
  detail::check_module(kCrossAttention, *this);
  auto weights = detail::weights_of(*this);
  const auto inputs = detail::context_inputs(kCrossAttention, weights, key, value, mask);
  detail::check_mask(kCrossAttention, weights, inputs, std::nullopt);
  const bool inputs_train = key.requires_grad() || value.requires_grad();
  const auto request =
      detail::request_of(*this, weights, inputs.B(), 1, inputs.Lk(), mask, options.attention_weights(), inputs_train);
  const auto orders = detail::orders_of_context(kCrossAttention, request, how);
  return detail::keep_context(detail::Layer(orders, std::move(weights), {}), inputs, how);
}

std::tuple<Tensor, Tensor> CrossAttentionImpl::attend(const Tensor& query, const Context& context, const CallOptions& call) {
  context.state().normalised_by.check(kCrossAttention, {});
  return detail::attend_to_kept(*this, query, context, call);
}

std::tuple<Tensor, Tensor> detail::attend_to_kept(CrossAttentionImpl& module,
                                                  const Tensor& query,
                                                  const Context& context,
                                                  const CallOptions& call) {
  detail::check_module(kCrossAttention, module);
  auto weights = detail::weights_of(module);
  const auto& state = context.state();
  const auto B = context.batch_size();
  const auto Xq = detail::several_queries(kCrossAttention, weights, query, state.is_batched, B);
  detail::check_context(kCrossAttention, weights, state, Xq);
  const detail::Queries queries(Xq, B);
  const auto mask = queries.mask(state.mask, context.length(), detail::product_type(Xq));
  const auto how = detail::attention_options(kCrossAttention, module.options, call, mask, module.is_training());
  const detail::Layer layer(state.layer.orders, std::move(weights));
  return detail::results(queries.results(detail::attend(layer, queries.rows, state.parts, how)), state.is_batched);
}

std::string CrossAttentionImpl::explain(int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, const CallOptions& call) const {
  detail::check_module(kCrossAttention, *this);
  const auto weights = detail::weights_of(*this);
  detail::check_mask(mask, kCrossAttention, B, weights.H, Lq, Lk, weights.query.device());
  const auto keys = options.bias_kv() ? Lk : detail::needed_keys(mask, Lk);
  return xattn::explain(detail::request_of(*this, weights, B, Lq, keys, mask, detail::returned_weights(options, call), false));
}

void CrossAttentionImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  const auto sizes = detail::formatted("{}, {}, {}, {}", o.dim_query(), o.dim_key(), o.dim_value(), o.dim_output());
  const auto text = detail::printed(options);
  stream << detail::formatted("xattn::CrossAttention({})",
                              text == detail::formatted("CrossAttentionOptions({})", sizes) ? sizes : text);
}

}  // namespace xattn
