// SPDX-License-Identifier: Apache-2.0
#include <xattn/decoupled.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>

#include "base/check.h"
#include "base/text.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"

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

// The caller in messages about an added context: "decoupled_cross_attention.added0".
std::string caller_of(size_t index) {
  return detail::formatted("{}.added{}", kDecoupled, index);
}

std::string batch_of(const Context& context) {
  return context.is_batched() ? detail::formatted("a batch of {}", context.batch_size()) : "unbatched";
}

void check_count(size_t given, size_t expected) {
  check_value(given == expected, kDecoupled, "added must have as many contexts as the options, {}, but has {}.", expected,
              given);
}

// The layer of an added context: its own projections, and everything else from the first context.
detail::LayerWeights weights_of_added(const DecoupledCrossAttentionImpl& module, size_t index) {
  auto weights = detail::weights_of(*module.attention);
  const auto& added = *module.added_projections[index];
  weights.key = added.key_linear->weight, weights.key_bias = added.key_linear->bias;
  weights.value = added.value_linear->weight, weights.value_bias = added.value_linear->bias;
  weights.key_norm = detail::norm_weights(added.key_norm);
  weights.bias_k = weights.bias_v = Tensor();
  return weights;
}

}  // namespace

// ---- AddedProjection -------------------------------------------------------------------------------------------------------

AddedProjectionImpl::AddedProjectionImpl(const CrossAttentionOptions& options_) : options(options_) {
  reset();
}

void AddedProjectionImpl::reset() {
  const auto G = *options.kv_heads(), d = *options.head_dim(), e = *options.value_head_dim();
  const auto linear = [this](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias)));
  };
  key_linear = linear("key_linear", options.dim_key(), G * d, options.key_bias());
  value_linear = linear("value_linear", options.dim_value(), G * e, options.value_bias());
  if (options.qk_norm() != NormKind::none) key_norm = register_module("key_norm", detail::make_qk_norm(options, G));
}

void AddedProjectionImpl::reset_parameters() {
  key_linear->reset_parameters();
  value_linear->reset_parameters();
  if (key_norm) key_norm->reset_parameters();
}

void AddedProjectionImpl::pretty_print(std::ostream& stream) const {
  stream << detail::formatted("xattn::AddedProjection({})", detail::printed(options));
}

// ---- DecoupledCrossAttention -----------------------------------------------------------------------------------------------

DecoupledCrossAttentionImpl::DecoupledCrossAttentionImpl(const DecoupledCrossAttentionOptions& options_)
    : options(resolved(options_)), attention_options_(options_.attention()) {
  reset();
}

// Checks options that may have been changed since the module was made.
void DecoupledCrossAttentionImpl::check_options() const {
  detail::check_unchanged(kDecoupled, options.attention(), attention_options_);
  detail::check_module(kDecoupled, *attention);
  const auto& o = attention->options;
  const auto& all = options.added();
  check_value(all.size() == added_projections.size(), kDecoupled,
              "options must fit the parameters, but name {} added contexts for {}.", all.size(), added_projections.size());
  const auto G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& added = all[i];
    const auto& side = added_projections[i];
    check_value(std::isfinite(added.scale()), kDecoupled, "added[{}].scale must be finite, but is {}.", i, added.scale());
    const auto caller = caller_of(i);
    detail::check_projection(caller, "key_linear", side->key_linear, added.dim_key(), G * d, added.key_bias() == true);
    detail::check_projection(caller, "value_linear", side->value_linear, added.dim_value(), G * e, added.value_bias() == true);
    const auto size = o.qk_norm_scope() == NormScope::per_head ? d : G * d;
    detail::check_norm(caller, "key_norm", side->key_norm, o.qk_norm(), size, o.qk_norm_eps());
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
  for (auto& side : added_projections) side->reset_parameters();
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
  check_count(added.size(), added_projections.size());
  const auto first = context(key, value, mask);
  std::vector<Context> others;
  for (size_t i = 0; i < added.size(); ++i) others.push_back(added_context(i, added[i].key, added[i].value, added[i].mask));
  return attend(query, first, others, call);
}

Context DecoupledCrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask) {
  check_options();
  return attention->context(key, value, mask);
}

Context DecoupledCrossAttentionImpl::added_context(size_t index, const Tensor& key, const Tensor& value, const Mask& mask) {
  check_value(index < added_projections.size(), kDecoupled, "index must be below the number of added contexts, {}, but is {}.",
              added_projections.size(), index);
  check_options();
  const detail::Layer layer({}, weights_of_added(*this, index));
  const auto caller = caller_of(index);
  const auto inputs = detail::context_inputs(caller, layer.weights, key, value, mask);
  detail::check_mask(caller, layer.weights, inputs, std::nullopt);
  return Context(std::make_shared<Context::State>(Context::State{detail::make_context(layer, inputs.key, inputs.value), mask,
                                                                 inputs.is_batched, detail::WeightsStamp(layer.weights)}));
}

std::tuple<Tensor, Tensor> DecoupledCrossAttentionImpl::attend(const Tensor& query,
                                                               const Context& context,
                                                               const std::vector<Context>& added,
                                                               const CallOptions& call) {
  check_options();
  const auto& heads = attention->options;
  const auto first = detail::weights_of(*attention);
  const auto Xq = detail::query_input(kDecoupled, first, query, context.is_batched(), context.batch_size());
  check_count(added.size(), added_projections.size());
  context.state().made_from.check(kDecoupled, first);
  for (size_t i = 0; i < added.size(); ++i) {
    check_value(added[i].is_batched() == context.is_batched() && added[i].batch_size() == context.batch_size(), kDecoupled,
                "added[{}] must be {}, as the first context, but is {}.", i, batch_of(context), batch_of(added[i]));
    added[i].state().made_from.check(caller_of(i), weights_of_added(*this, i));
  }
  const auto check_mask = [&](std::string_view caller, const Context& c) {
    c.mask().check(caller, Xq.size(0), heads.num_heads(), Xq.size(1), c.state().parts.Lk, Xq.device());
  };
  check_mask(kDecoupled, context);

  auto how = detail::attention_options(kDecoupled, heads, call, context.mask(), is_training());
  const auto q = detail::project_query(first, Xq);                               // [B, H, Lq, d]
  auto result = detail::attend_projected(first, q, context.state().parts, how);  // [B, H, Lq, e]
  how.weights = AttentionWeights::none;
  for (size_t i = 0; i < added.size(); ++i) {
    check_mask(caller_of(i), added[i]);
    const auto scale = options.added()[i].scale();
    if (scale == 0) continue;
    how.mask = added[i].mask();
    const auto other = detail::attend_projected(weights_of_added(*this, i), q, added[i].state().parts, how);
    result.output = result.output.add(other.output, scale);
  }
  result.output = detail::project(detail::merge_heads(result.output), first.output, first.output_bias);
  return detail::results(result, context.is_batched());
}

}  // namespace xattn
