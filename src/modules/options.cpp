// SPDX-License-Identifier: Apache-2.0
#include "modules/options.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "base/text.h"
#include "modules/option_names.h"
#include "modules/planning.h"

namespace xattn::detail {

namespace {

void check_weight_heads(std::string_view caller, const std::vector<int64_t>& chosen, int64_t heads) {
  for (const auto head : chosen) {
    check_value(head >= 0 && head < heads, caller, "weight_heads must be of the {} heads, but name {}.", heads, head);
  }
}

}  // namespace

void check_options(std::string_view caller, const CrossAttentionOptions& options) {
  const auto check_positive = [caller](const char* name, int64_t size) {
    check_value(size >= 1, caller, "{} must be at least 1, but is {}.", name, size);
  };
  check_positive("dim_query", options.dim_query());
  check_positive("dim_key", options.dim_key());
  check_positive("dim_value", options.dim_value());
  check_positive("dim_output", options.dim_output());
  check_positive("num_heads", options.num_heads());
  const auto heads = options.num_heads(), kv_heads = options.kv_heads().value_or(heads);
  check_positive("kv_heads", kv_heads);
  check_value(heads % kv_heads == 0, caller, "num_heads must be a multiple of kv_heads, but they are {} and {}.", heads,
              kv_heads);
  check_value(options.head_dim() || options.dim_output() % heads == 0, caller,
              "dim_output must be a multiple of num_heads, but they are {} and {}. Otherwise give head_dim.",
              options.dim_output(), heads);
  check_positive("head_dim", options.head_dim().value_or(1));
  check_positive("value_head_dim", options.value_head_dim().value_or(1));
  check_value(std::isfinite(options.scale().value_or(1)), caller, "scale must be finite, but is {}.",
              options.scale().value_or(1));
  check_value(options.dropout() >= 0 && options.dropout() <= 1, caller, "dropout must lie in [0, 1], but is {}.",
              options.dropout());
  check_weight_heads(caller, options.weight_heads(), heads);
  check_value(options.qk_norm_eps() >= 0, caller, "qk_norm_eps must not be negative, but is {}.", options.qk_norm_eps());
  check_value(options.qk_norm() != NormKind::none || options.qk_norm_scope() == NormScope::per_head, caller,
              "qk_norm must be rms or layer for a qk_norm_scope of across_heads, but is none.");
}

void check_unchanged(std::string_view caller, const CrossAttentionOptions& now, const CrossAttentionOptions& given) {
  check_value(now == given, caller,
              "options.attention must be as the module was made, but has changed. Change attention->options.");
}

void check_projection(
    std::string_view caller, std::string_view name, const torch::nn::Linear& linear, int64_t in, int64_t out, bool has_bias) {
  const auto& weight = linear->weight;
  const bool fits = weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in;
  check_value(fits, caller, "options must fit the parameters, but say [{}, {}] for {}.weight, which has {}.", out, in, name,
              shape_of(weight));
  const auto& bias = linear->bias;
  check_value(bias.defined() == has_bias, caller, "options must fit the parameters, but say {} bias for {}, which has {}.",
              has_bias ? "a" : "no", name, has_bias ? "none" : "one");
  check_value(!has_bias || (bias.dim() == 1 && bias.size(0) == out), caller,
              "options must fit the parameters, but say [{}] for {}.bias, which has {}.", out, name, shape_of(bias));
}

void check_norm(std::string_view caller, std::string_view name, const Norm& norm, NormKind kind, int64_t size, double eps) {
  const auto has_size = [size](const torch::Tensor& x) { return !x.defined() || (x.dim() == 1 && x.size(0) == size); };
  const bool fits = norm ? norm->options.kind() == kind && norm->options.size() == size && norm->options.eps() == eps &&
                               has_size(norm->weight) && has_size(norm->bias)
                         : kind == NormKind::none;
  check_value(fits, caller, "options must fit the parameters, but say another kind, size or eps for {}.", name);
}

void check_module(std::string_view caller, const CrossAttentionImpl& module) {
  const auto& o = module.options;
  check_value(o.kv_heads() && o.head_dim() && o.value_head_dim() && o.scale(), caller,
              "kv_heads, head_dim, value_head_dim and scale must keep a value, but one of them has none.");
  check_options(caller, o);
  check_plan(caller, {o.plan().pinned, o.plan().orders, {}}, o);
  const auto H = o.num_heads(), G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  for (const auto* linear : {&module.query_linear, &module.key_linear, &module.value_linear, &module.output_linear}) {
    check_computed_type(caller, "parameters", (*linear)->weight);
  }
  check_projection(caller, "query_linear", module.query_linear, o.dim_query(), H * d, o.query_bias());
  check_projection(caller, "key_linear", module.key_linear, o.dim_key(), G * d, o.key_bias());
  check_projection(caller, "value_linear", module.value_linear, o.dim_value(), G * e, o.value_bias());
  check_projection(caller, "output_linear", module.output_linear, H * e, o.dim_output(), o.output_bias());
  check_value(module.bias_k.defined() == o.bias_kv() && module.bias_v.defined() == o.bias_kv(), caller,
              "options must fit the parameters, but say {} bias_kv.", o.bias_kv() ? "a" : "no");
  const bool per_head = o.qk_norm_scope() == NormScope::per_head;
  check_norm(caller, "query_norm", module.query_norm, o.qk_norm(), per_head ? d : H * d, o.qk_norm_eps());
  check_norm(caller, "key_norm", module.key_norm, o.qk_norm(), per_head ? d : G * d, o.qk_norm_eps());
}

Norm make_qk_norm(const CrossAttentionOptions& options, int64_t heads) {
  const auto size = *options.head_dim() * (options.qk_norm_scope() == NormScope::across_heads ? heads : 1);
  return Norm(NormOptions(options.qk_norm(), size).eps(options.qk_norm_eps()));
}

AttentionWeights returned_weights(const CrossAttentionOptions& options, const CallOptions& call) {
  return call.weights.value_or(options.attention_weights());
}

AttentionOptions attention_options(std::string_view caller,
                                   const CrossAttentionOptions& options,
                                   const CallOptions& call,
                                   const Mask& mask,
                                   bool is_training) {
  if (call.weight_heads) {
    const auto returned = returned_weights(options, call);
    check_value(returned == AttentionWeights::per_head, caller,
                "weight_heads must come with weights per_head, but come with {}.", name_of(returned));
    check_weight_heads(caller, *call.weight_heads, options.num_heads());
  }
  return {.mask = mask,
          .scale = options.scale(),
          .dropout = is_training ? options.dropout() : 0,
          .weights = returned_weights(options, call),
          .weight_heads = call.weight_heads.value_or(options.weight_heads())};
}

std::string printed(const CrossAttentionOptions& o) {
  const auto heads = o.num_heads(), d = *o.head_dim();
  auto text = formatted("CrossAttentionOptions({}, {}, {}, {})", o.dim_query(), o.dim_key(), o.dim_value(), o.dim_output());
  const auto add = [&text](bool differs, std::string_view call, const auto&... argument) {
    if (differs) text += formatted(fmt::runtime(call), argument...);
  };
  add(heads != 1, ".num_heads({})", heads);
  add(o.kv_heads() != heads, ".kv_heads({})", *o.kv_heads());
  add(d * heads != o.dim_output(), ".head_dim({})", d);
  add(o.value_head_dim() != d, ".value_head_dim({})", *o.value_head_dim());
  add(!o.query_bias(), ".query_bias(false)");
  add(!o.key_bias(), ".key_bias(false)");
  add(!o.value_bias(), ".value_bias(false)");
  add(!o.output_bias(), ".output_bias(false)");
  add(o.bias_kv(), ".bias_kv(true)");
  add(o.scale() != 1 / std::sqrt(static_cast<double>(d)), ".scale({})", *o.scale());
  add(o.dropout() != 0, ".dropout({})", o.dropout());
  if (o.qk_norm() != NormKind::none) {
    add(true, ".qk_norm(NormKind::{})", name_of(o.qk_norm()));
    add(o.qk_norm_scope() == NormScope::across_heads, ".qk_norm_scope(NormScope::across_heads)");
    add(o.qk_norm_eps() != CrossAttentionOptions(1, 1, 1, 1).qk_norm_eps(), ".qk_norm_eps({})", o.qk_norm_eps());
  }
  add(o.attention_weights() != AttentionWeights::mean, ".attention_weights(AttentionWeights::{})",
      name_of(o.attention_weights()));
  add(!o.weight_heads().empty(), ".weight_heads({{{}}})", joined(o.weight_heads()));
  if (o.plan() == PlanMode::standard) {
    text += ".plan(PlanMode::standard)";
  } else if (o.plan().pinned) {
    const auto& [logits, values] = o.plan().orders;
    text += formatted(".plan(PlanMode::pin({{Order::{}, Order::{}}}))", name_of(logits), name_of(values));
  } else {
    add(o.plan().rates.has_value(), ".plan(PlanMode::by(rates))");
  }
  return text;
}

}  // namespace xattn::detail
