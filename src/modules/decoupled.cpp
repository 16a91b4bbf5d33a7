// SPDX-License-Identifier: Apache-2.0
#include <xattn/decoupled.h>

#include <cmath>
#include <optional>
#include <string>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/text.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
#include "modules/decoupled_parts.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"
#include "modules/queries.h"
#include "plan/order_traits.h"

namespace xattn {

using detail::check_value;
using torch::Tensor;

namespace {

constexpr auto kDecoupled = "decoupled_cross_attention";

// Checks the options in reading order and gives every default its value. `attention` checks its own options.
DecoupledCrossAttentionOptions resolved(DecoupledCrossAttentionOptions options) {
  for (size_t i = 0; i < options.added().size(); ++i) {
    auto& added = options.added()[i];
    check_value(added.dim_key() >= 1, kDecoupled, "added[{}].dim_key must be at least 1, but is {}.", i, added.dim_key());
    check_value(added.dim_value() >= 1, kDecoupled, "added[{}].dim_value must be at least 1, but is {}.", i, added.dim_value());
    check_value(std::isfinite(added.scale()), kDecoupled, "added[{}].scale must be finite, but is {}.", i, added.scale());
    if (!added.key_bias()) added.key_bias(options.attention().key_bias());
    if (!added.value_bias()) added.value_bias(options.attention().value_bias());
  }
  return options;
}

Context make_kept_context(const DecoupledCrossAttentionImpl& module,
                          size_t context,
                          const Tensor& key,
                          const Tensor& value,
                          const Mask& mask,
                          const ContextOptions& how) {
  auto weights = detail::weights_of(module, context);
  const auto caller = detail::caller_of(kDecoupled, context);
  const auto inputs = detail::context_inputs(caller, weights, key, value, mask);
  detail::check_mask(caller, weights, inputs, std::nullopt);
  const bool trains = key.requires_grad() || value.requires_grad();
  const auto returned = context == 0 ? module.attention->options.attention_weights() : AttentionWeights::none;
  const auto request = detail::request_of(*module.attention, weights, inputs.B(), 1, inputs.Lk(), mask, returned, trains);
  const auto orders = detail::orders_of_context(caller, request, how);
  return detail::keep_context(detail::Layer(orders, std::move(weights), {}), inputs, how);
}

}  // namespace

// ---- AddedProjection -------------------------------------------------------------------------------------------------------

AddedProjectionImpl::AddedProjectionImpl(const CrossAttentionOptions& options) : options_(options) {
  reset();
}

void AddedProjectionImpl::reset() {
  const auto G = *options_.kv_heads(), d = *options_.head_dim(), e = *options_.value_head_dim();
  const auto linear = [this](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias)));
  };
  key_linear = linear("key_linear", options_.dim_key(), G * d, options_.key_bias());
  value_linear = linear("value_linear", options_.dim_value(), G * e, options_.value_bias());
  if (options_.qk_norm() != NormKind::none) key_norm = register_module("key_norm", detail::make_qk_norm(options_, G));
}

void AddedProjectionImpl::reset_parameters() {
  key_linear->reset_parameters();
  value_linear->reset_parameters();
  if (key_norm) key_norm->reset_parameters();
}

void AddedProjectionImpl::pretty_print(std::ostream& stream) const {
  stream << detail::formatted("xattn::AddedProjection({})", detail::printed(options_));
}

// ---- DecoupledCrossAttention -----------------------------------------------------------------------------------------------

DecoupledCrossAttentionImpl::DecoupledCrossAttentionImpl(const DecoupledCrossAttentionOptions& options_)
    : options(resolved(options_)), attention_options_(options_.attention()) {
  reset();
  attention_options_ = attention->options;
  options.attention(attention_options_);
  check_options();
}

// Checks options that may have been changed since the module was made.
void DecoupledCrossAttentionImpl::check_options() const {
  detail::check_unchanged(kDecoupled, options.attention(), attention_options_);
  detail::check_module(kDecoupled, *attention);
  detail::check_ends_in_heads(kDecoupled, attention->options.plan());
  const auto& o = attention->options;
  const auto& all = options.added();
  check_value(all.size() == added_projections.size(), kDecoupled,
              "options must fit the parameters, but name {} added contexts for {}.", all.size(), added_projections.size());
  const auto G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& added = all[i];
    const auto& projection = added_projections[i];
    check_value(std::isfinite(added.scale()), kDecoupled, "added[{}].scale must be finite, but is {}.", i, added.scale());
    const auto caller = detail::caller_of(kDecoupled, i + 1);
    detail::check_projection(caller, "key_linear", projection->key_linear, added.dim_key(), G * d, added.key_bias() == true);
    detail::check_projection(caller, "value_linear", projection->value_linear, added.dim_value(), G * e,
                             added.value_bias() == true);
    const auto size = o.qk_norm_scope() == NormScope::per_head ? d : G * d;
    detail::check_norm(caller, "key_norm", projection->key_norm, o.qk_norm(), size, o.qk_norm_eps());
  }
}

void DecoupledCrossAttentionImpl::reset() {
  attention = register_module("attention", CrossAttention(options.attention()));
  added_projections.clear();
  for (const auto& own : options.added()) {
    auto shared = attention->options;
    shared.dim_key(own.dim_key()).dim_value(own.dim_value()).key_bias(*own.key_bias()).value_bias(*own.value_bias());
    added_projections.push_back(
        register_module(detail::formatted("added{}", added_projections.size()), AddedProjection(shared)));
  }
}

void DecoupledCrossAttentionImpl::reset_parameters() {
  attention->reset_parameters();
  for (auto& projection : added_projections) projection->reset_parameters();
}

void DecoupledCrossAttentionImpl::pretty_print(std::ostream& stream) const {
  std::vector<std::string> texts;
  for (const auto& o : options.added()) {
    auto text = detail::formatted("AddedContextOptions({}, {})", o.dim_key(), o.dim_value());
    if (o.key_bias() != options.attention().key_bias()) text += detail::formatted(".key_bias({})", *o.key_bias());
    if (o.value_bias() != options.attention().value_bias()) text += detail::formatted(".value_bias({})", *o.value_bias());
    if (o.scale() != 1) text += detail::formatted(".scale({})", o.scale());
    texts.push_back(text);
  }
  const auto named = texts.empty() ? "" : detail::formatted(".added({{{}}})", detail::joined(texts));
  stream << detail::formatted("xattn::DecoupledCrossAttention(DecoupledCrossAttentionOptions({}){})",
                              detail::printed(attention->options), named);
}

std::tuple<Tensor, Tensor> DecoupledCrossAttentionImpl::forward(const Tensor& query,
                                                                const Tensor& key,
                                                                const Tensor& value,
                                                                const std::vector<KeyValue>& added,
                                                                const Mask& mask,
                                                                const CallOptions& call) {
  check_options();
  detail::check_count(kDecoupled, added.size(), added_projections.size());
  auto weights = detail::weights_of(*this, 0);
  auto inputs = detail::context_inputs(kDecoupled, weights, key, value, mask);
  const bool is_batched = inputs.is_batched;
  const auto B = inputs.B();
  const auto Xq = detail::query_input(kDecoupled, weights, query, is_batched, B);
  const auto Lq = Xq.size(1);
  std::vector<detail::Part> parts;
  const auto add_part = [&](size_t context, double scale) {
    detail::check_mask(detail::caller_of(kDecoupled, context), weights, inputs, Lq);
    if (scale == 0) return int64_t{0};
    const auto dropped = detail::drop_padding(weights, inputs);
    const bool trains = query.requires_grad() || inputs.key.requires_grad() || inputs.value.requires_grad();
    const auto returned = context == 0 ? detail::returned_weights(attention->options, call) : AttentionWeights::none;
    const auto request = detail::request_of(*attention, weights, B, Lq, inputs.Lk(), inputs.mask, returned, trains);
    detail::Layer layer(detail::orders_of(request), std::move(weights));
    auto tensors = detail::make_context(layer, inputs.key, inputs.value);
    parts.push_back({std::move(layer), std::move(tensors), inputs.mask, scale});
    return dropped;
  };
  const auto dropped_keys = add_part(0, 1);
  for (size_t i = 0; i < added.size(); ++i) {
    weights = detail::weights_of(*this, i + 1);
    inputs = detail::context_inputs(detail::caller_of(kDecoupled, i + 1), weights, added[i].key, added[i].value, added[i].mask);
    detail::check_batch(kDecoupled, i + 1, inputs.is_batched, inputs.B(), is_batched, B);
    add_part(i + 1, options.added()[i].scale());
  }
  const auto how = detail::attention_options(kDecoupled, attention->options, call, parts.front().mask, is_training());
  return detail::results(detail::attend_to(parts, Xq, how), is_batched, dropped_keys);
}

Context DecoupledCrossAttentionImpl::context(const Tensor& key,
                                             const Tensor& value,
                                             const Mask& mask,
                                             const ContextOptions& how) {
  check_options();
  return make_kept_context(*this, 0, key, value, mask, how);
}

Context DecoupledCrossAttentionImpl::added_context(
    size_t index, const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) {
  check_value(index < added_projections.size(), kDecoupled, "index must be below the number of added contexts, {}, but is {}.",
              added_projections.size(), index);
  check_options();
  return make_kept_context(*this, index + 1, key, value, mask, how);
}

std::tuple<Tensor, Tensor> DecoupledCrossAttentionImpl::attend(const Tensor& query,
                                                               const Context& context,
                                                               const std::vector<Context>& added,
                                                               const CallOptions& call) {
  check_options();
  const auto B = context.batch_size();
  const auto Xq = detail::several_queries(kDecoupled, detail::weights_of(*this, 0), query, context.is_batched(), B);
  const detail::Queries queries(Xq, B);
  detail::check_count(kDecoupled, added.size(), added_projections.size());
  std::vector<detail::Part> parts;
  for (size_t i = 0; i <= added.size(); ++i) {
    const auto& state = (i == 0 ? context : added[i - 1]).state();
    const auto caller = detail::caller_of(kDecoupled, i);
    if (i > 0) detail::check_batch(kDecoupled, i, state.is_batched, state.parts.keys.size(0), context.is_batched(), B);
    auto weights = detail::weights_of(*this, i);
    state.normalised_by.check(caller, {});
    detail::check_context(caller, weights, state, Xq);
    const auto& orders = state.layer.orders;
    check_value(detail::ends_in_heads(orders.values), caller,
                "context must be made by this layer, for values that end in heads, but is in the order {}.",
                name_of(orders.values));
    const auto scale = i == 0 ? 1 : options.added()[i - 1].scale();
    if (scale == 0) continue;
    const auto mask = queries.mask(state.mask, state.parts.Lk, detail::product_type(Xq));
    parts.push_back({detail::Layer(orders, std::move(weights)), state.parts, mask, scale});
  }
  const auto how = detail::attention_options(kDecoupled, attention->options, call, parts.front().mask, is_training());
  return detail::results(queries.results(detail::attend_to(parts, queries.rows, how)), context.is_batched());
}

std::string DecoupledCrossAttentionImpl::explain(int64_t B,
                                                 int64_t Lq,
                                                 const std::vector<int64_t>& lengths,
                                                 const Mask& mask) const {
  check_options();
  check_value(lengths.size() == added_projections.size() + 1, kDecoupled, "lengths must be those of {} contexts, but are {}.",
              added_projections.size() + 1, lengths.size());
  detail::check_mask(mask, kDecoupled, B, attention->options.num_heads(), Lq, lengths[0],
                     attention->query_linear->weight.device());
  std::string text;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto keys = i == 0 && !attention->options.bias_kv() ? detail::needed_keys(mask, lengths[i]) : lengths[i];
    text += i == 0 ? "first context: " : detail::formatted("added context {}: ", i - 1);
    const auto returned = i == 0 ? attention->options.attention_weights() : AttentionWeights::none;
    const auto weights = detail::weights_of(*this, i);
    text += xattn::explain(detail::request_of(*attention, weights, B, Lq, keys, i == 0 ? mask : Mask(), returned, false));
  }
  return text;
}

}  // namespace xattn
