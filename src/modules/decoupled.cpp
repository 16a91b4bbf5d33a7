// SPDX-License-Identifier: Apache-2.0
#include <xattn/decoupled.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/text.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
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

// The caller named in messages about a context; that of an added one is "decoupled_cross_attention.added0".
std::string caller_of(size_t context) {
  return context == 0 ? kDecoupled : detail::formatted("{}.added{}", kDecoupled, context - 1);
}

// Context 0 is the first one; context i > 0 is added[i - 1].
void check_batch(size_t context, bool is_batched, int64_t B, bool first_is_batched, int64_t first_B) {
  check_value(is_batched == first_is_batched && B == first_B, kDecoupled,
              "added[{}] must be {}, as the first context, but is {}.", context - 1,
              detail::batch_of(first_is_batched, first_B), detail::batch_of(is_batched, B));
}

void check_count(size_t given, size_t expected) {
  check_value(given == expected, kDecoupled, "added must have as many contexts as the options, {}, but has {}.", expected,
              given);
}

// The layer of a context: an added one has its own projections, and everything else from the first context.
detail::LayerWeights weights_of(const DecoupledCrossAttentionImpl& module, size_t context) {
  auto weights = detail::weights_of(*module.attention);
  if (context == 0) return weights;
  const auto& added = *module.added_projections[context - 1];
  weights.key = added.key_linear->weight, weights.key_bias = added.key_linear->bias;
  weights.value = added.value_linear->weight, weights.value_bias = added.value_linear->bias;
  weights.key_norm = detail::norm_weights(added.key_norm);
  weights.bias_k = weights.bias_v = Tensor();
  return weights;
}

// The request for one context. Its heads are added to those of the others, so its values end in heads.
PlanRequest request(const DecoupledCrossAttentionImpl& module,
                    const detail::LayerWeights& weights,
                    size_t context,
                    int64_t B,
                    int64_t Lq,
                    int64_t Lk,
                    const Mask& mask,
                    const CallOptions& call,
                    bool inputs_train) {
  const auto returned = context == 0 ? detail::returned_weights(module.attention->options, call) : AttentionWeights::none;
  auto request = detail::request_of(*module.attention, weights, B, Lq, Lk, mask, returned, inputs_train);
  request.sums_heads = true;
  return request;
}

Context make_kept_context(const DecoupledCrossAttentionImpl& module,
                          size_t context,
                          const Tensor& key,
                          const Tensor& value,
                          const Mask& mask,
                          const ContextOptions& how) {
  auto weights = weights_of(module, context);
  const auto caller = caller_of(context);
  const auto inputs = detail::context_inputs(caller, weights, key, value, mask);
  detail::check_mask(caller, weights, inputs, std::nullopt);
  const bool trains = key.requires_grad() || value.requires_grad();
  const auto request = xattn::request(module, weights, context, inputs.B(), 1, inputs.Lk(), mask, {}, trains);
  const auto orders = detail::orders_of_context(caller, request, how);
  return detail::keep_context(detail::Layer(orders, std::move(weights), {}), inputs, how);
}

// One context of a call, as its orders read it.
struct Part {
  detail::Layer layer;
  detail::LayerContext context;
  Mask mask;
  double scale;
};

// query [B, Lq, Eq] -> output [B, Lq, Eo], and the weights of the first context
AttentionResult attend_to(const DecoupledCrossAttentionImpl& module,
                          const Tensor& x,
                          const std::vector<Part>& parts,
                          const CallOptions& call) {
  const auto& first = parts.front().layer.weights;
  const bool is_projected =
      std::ranges::any_of(parts, [](const Part& part) { return detail::projects_query(part.layer.orders.logits); });
  auto query = detail::make_query(first, x, is_projected);
  auto how = detail::attention_options(kDecoupled, module.attention->options, call, parts.front().mask, module.is_training());
  auto result = detail::attend_heads(parts.front().layer, query, parts.front().context, how).result;  // [B, H, Lq, e]
  how.weights = AttentionWeights::none;
  for (size_t i = 1; i < parts.size(); ++i) {
    how.mask = parts[i].mask;
    const auto added = detail::attend_heads(parts[i].layer, query, parts[i].context, how).result;
    result.output = result.output.add(added.output, parts[i].scale);
  }
  query = {};  // its memory serves the next product
  result.output = detail::project(detail::merge_heads(result.output), first.output, first.output_bias);
  return result;
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
  check_options();
}

// Checks options that may have been changed since the module was made.
void DecoupledCrossAttentionImpl::check_options() const {
  detail::check_unchanged(kDecoupled, options.attention(), attention_options_);
  detail::check_module(kDecoupled, *attention);
  const auto& plan = attention->options.plan();
  check_value(!plan.pinned || detail::ends_in_heads(plan.orders.values), kDecoupled,
              "plan must have an order of the values that ends in heads, standard or fold_into_query, but has {}.",
              name_of(plan.orders.values));
  const auto& o = attention->options;
  const auto& all = options.added();
  check_value(all.size() == added_projections.size(), kDecoupled,
              "options must fit the parameters, but name {} added contexts for {}.", all.size(), added_projections.size());
  const auto G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& added = all[i];
    const auto& projection = added_projections[i];
    check_value(std::isfinite(added.scale()), kDecoupled, "added[{}].scale must be finite, but is {}.", i, added.scale());
    const auto caller = caller_of(i + 1);
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
  check_count(added.size(), added_projections.size());
  auto weights = weights_of(*this, 0);
  auto inputs = detail::context_inputs(kDecoupled, weights, key, value, mask);
  const bool is_batched = inputs.is_batched;
  const auto B = inputs.B();
  const auto Xq = detail::query_input(kDecoupled, weights, query, is_batched, B);
  const auto Lq = Xq.size(1);
  std::vector<Part> parts;
  const auto add_part = [&](size_t context, double scale) {
    detail::check_mask(caller_of(context), weights, inputs, Lq);
    const auto dropped = detail::drop_padding(weights, inputs);
    const bool trains = query.requires_grad() || inputs.key.requires_grad() || inputs.value.requires_grad();
    const auto request = xattn::request(*this, weights, context, B, Lq, inputs.Lk(), inputs.mask, call, trains);
    detail::Layer layer(detail::orders_of(request), std::move(weights));
    auto tensors = detail::make_context(layer, inputs.key, inputs.value);
    parts.push_back({std::move(layer), std::move(tensors), inputs.mask, scale});
    return dropped;
  };
  const auto dropped_keys = add_part(0, 1);
  for (size_t i = 0; i < added.size(); ++i) {
    weights = weights_of(*this, i + 1);
    inputs = detail::context_inputs(caller_of(i + 1), weights, added[i].key, added[i].value, added[i].mask);
    check_batch(i + 1, inputs.is_batched, inputs.B(), is_batched, B);
    if (const auto scale = options.added()[i].scale(); scale != 0) add_part(i + 1, scale);
  }
  return detail::results(attend_to(*this, Xq, parts, call), is_batched, dropped_keys);
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
  const auto Xq = detail::several_queries(kDecoupled, weights_of(*this, 0), query, context.is_batched(), B);
  const detail::Queries queries(Xq, B);
  check_count(added.size(), added_projections.size());
  std::vector<Part> parts;
  for (size_t i = 0; i <= added.size(); ++i) {
    const auto& state = (i == 0 ? context : added[i - 1]).state();
    const auto caller = caller_of(i);
    if (i > 0) check_batch(i, state.is_batched, state.parts.keys.size(0), context.is_batched(), B);
    auto weights = weights_of(*this, i);
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
  return detail::results(queries.results(attend_to(*this, queries.rows, parts, call)), context.is_batched());
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
    text += xattn::explain(request(*this, weights_of(*this, i), i, B, Lq, keys, i == 0 ? mask : Mask(), {}, false));
  }
  return text;
}

}  // namespace xattn
