// SPDX-License-Identifier: Apache-2.0
#include <xattn/decoupled.h>

#include <cmath>
#include <string>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/text.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"

namespace xattn {

using detail::batched;
using detail::check_value;
using detail::project;
using detail::split_heads;
using torch::Tensor;

namespace {

constexpr auto kDecoupled = "decoupled_cross_attention";

// Refuses what cannot be, in reading order, and gives every default its value. `attention` checks its own options.
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

// "decoupled_cross_attention.added0": messages about its key, value and mask begin so.
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

// Options that were changed since the module was made.
void check_options(const DecoupledCrossAttentionImpl& module) {
  detail::check_module(kDecoupled, *module.attention);
  const auto& o = module.attention->options;
  const auto& all = module.options.added();
  check_value(all.size() == module.added_projections.size(), kDecoupled,
              "options must fit the parameters, but name {} added contexts for {}.", all.size(),
              module.added_projections.size());
  const auto G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& added = all[i];
    const auto& side = module.added_projections[i];
    check_value(std::isfinite(added.scale()), kDecoupled, "added[{}].scale must be finite, but is {}.", i, added.scale());
    const auto caller = caller_of(i);
    detail::check_projection(caller, "key_linear", side->key_linear, added.dim_key(), G * d, side->options.key_bias());
    detail::check_projection(caller, "value_linear", side->value_linear, added.dim_value(), G * e, side->options.value_bias());
    const auto size = o.qk_norm_scope() == NormScope::per_head ? d : G * d;
    detail::check_norm(caller, "key_norm", side->key_norm, o.qk_norm(), size, o.qk_norm_eps());
  }
}

AttentionResult attend_heads(
    std::string_view caller, const Tensor& q, const Context& context, const CrossAttentionOptions& options, bool training) {
  const auto Lq = q.size(2), Lk = context.length() - (options.bias_kv() ? 1 : 0);
  detail::check_mask(context.mask(), caller, q.size(0), q.size(1), Lq, Lk, q.device());
  AttentionOptions how;
  how.mask = options.bias_kv() ? detail::with_bias_kv(context.mask(), Lq, Lk, q.device()) : context.mask();
  how.scale = options.scale();
  how.dropout = training ? options.dropout() : 0;
  how.weights = options.attention_weights();
  how.weight_heads = options.weight_heads();
  return attention(q, context.key(), context.value(), how);
}

std::vector<Tensor> weights_of(const AddedProjection& side) {
  return detail::context_weights(side->key_linear, side->value_linear, side->key_norm);
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
    : options(resolved(options_)) {
  reset();
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

std::tuple<Tensor, Tensor> DecoupledCrossAttentionImpl::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<KeyValue>& added, const Mask& mask) {
  check_count(added.size(), added_projections.size());
  const auto first = context(key, value, mask);
  std::vector<Context> others;
  for (size_t i = 0; i < added.size(); ++i) others.push_back(added_context(i, added[i].key, added[i].value, added[i].mask));
  return attend(query, first, others);
}

Context DecoupledCrossAttentionImpl::context(const Tensor& key, const Tensor& value, const Mask& mask) {
  check_options(*this);
  return attention->context(key, value, mask);
}

Context DecoupledCrossAttentionImpl::added_context(size_t index, const Tensor& key, const Tensor& value, const Mask& mask) {
  check_value(index < added_projections.size(), kDecoupled, "index must be below the number of added contexts, {}, but is {}.",
              added_projections.size(), index);
  check_options(*this);
  auto& side = added_projections[index];
  const auto& heads = attention->options;
  detail::check_key_value(caller_of(index), key, value, mask, side->key_linear, side->value_linear, heads.num_heads());
  const auto G = *heads.kv_heads(), d = *heads.head_dim(), e = *heads.value_head_dim();
  const auto k =
      split_heads(project(side->key_linear, batched(key)), G, d, heads.qk_norm_scope(), side->key_norm);  // [B, G, Lk, d]
  const auto v = split_heads(project(side->value_linear, batched(value)), G, e);                          // [B, G, Lk, e]
  return Context(k, v, mask, key.dim() == 3, weights_of(side));
}

std::tuple<Tensor, Tensor> DecoupledCrossAttentionImpl::attend(const Tensor& query,
                                                               const Context& context,
                                                               const std::vector<Context>& added) {
  check_options(*this);
  auto& first = *attention;
  detail::check_query(kDecoupled, query, context, first.query_linear);
  check_count(added.size(), added_projections.size());
  context.check_made_from(
      kDecoupled, detail::context_weights(first.key_linear, first.value_linear, first.key_norm, first.bias_k, first.bias_v));
  for (size_t i = 0; i < added.size(); ++i) {
    check_value(added[i].is_batched() == context.is_batched() && added[i].batch_size() == context.batch_size(), kDecoupled,
                "added[{}] must be {}, as the first context, but is {}.", i, batch_of(context), batch_of(added[i]));
    added[i].check_made_from(caller_of(i), weights_of(added_projections[i]));
  }

  const auto& heads = first.options;
  const auto q =
      split_heads(project(first.query_linear, batched(query)), heads.num_heads(), *heads.head_dim(), heads.qk_norm_scope(),
                  first.query_norm);                                                                // [B, H, Lq, d]
  auto [mixed, weights, log_sum_exp] = attend_heads(kDecoupled, q, context, heads, is_training());  // [B, H, Lq, e]
  auto quiet = heads;
  quiet.bias_kv(false).attention_weights(AttentionWeights::none);
  for (size_t i = 0; i < added.size(); ++i) {
    const auto scale = options.added()[i].scale();
    if (scale == 0) continue;
    mixed = mixed.add(attend_heads(caller_of(i), q, added[i], quiet, is_training()).output, scale);
  }
  const auto output = project(first.output_linear, detail::merge_heads(mixed));  // [B, Lq, Eo]
  if (context.is_batched()) return {output, weights};
  return {output.squeeze(0), weights.defined() ? weights.squeeze(0) : weights};
}

}  // namespace xattn
