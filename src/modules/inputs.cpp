// SPDX-License-Identifier: Apache-2.0
#include "modules/inputs.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "cpu/matrix_product.h"

namespace xattn::detail {

using torch::Tensor;

namespace {

void check_input(
    std::string_view caller, const char* name, const Tensor& x, const char* length, const torch::nn::Linear& projection) {
  const auto features = projection->options.in_features();
  const auto& weight = projection->weight;
  check_value(x.defined() && (x.dim() == 2 || x.dim() == 3) && x.size(-1) == features, caller,
              "{} must have shape [B, {}, {}], but has {}.", name, length, features, shape_of(x));
  check_type(!x.is_meta() || x.device() != weight.device(), caller, "{} must hold numbers, but is on meta.", name);
  const bool is_casted = !x.is_meta() && at::autocast::is_autocast_enabled(x.device().type());
  if (is_casted) {
    check_type(x.is_floating_point(), caller, "{} must be of a floating point type, but is {}.", name, type_of(x));
  } else {
    check_type(x.scalar_type() == weight.scalar_type(), caller, "{} must be {}, the type of the parameters, but is {}.", name,
               type_of(weight), type_of(x));
  }
  check_type(x.device() == weight.device(), caller, "{} must be on {}, as the parameters, but is on {}.", name,
             weight.device().str(), x.device().str());
}

}  // namespace

void check_key_value(std::string_view caller,
                     const Tensor& key,
                     const Tensor& value,
                     const Mask& mask,
                     const torch::nn::Linear& key_linear,
                     const torch::nn::Linear& value_linear,
                     int64_t num_heads) {
  check_input(caller, "key", key, "Lk", key_linear);
  check_input(caller, "value", value, "Lk", value_linear);
  check_value(key.sizes().slice(0, key.dim() - 1) == value.sizes().slice(0, value.dim() - 1), caller,
              "value must have the batch and length of key, {}, but has {}.", shape_of(key), shape_of(value));
  const auto B = key.dim() == 3 ? key.size(0) : 1;
  mask.check(caller, B, num_heads, std::nullopt, key.size(-2), key.device());
}

void check_query(std::string_view caller, const Tensor& query, const Context& context, const torch::nn::Linear& query_linear) {
  check_query(caller, query, context.is_batched(), context.batch_size(), query_linear);
}

void check_query(
    std::string_view caller, const Tensor& query, bool is_batched, int64_t batch_size, const torch::nn::Linear& query_linear) {
  check_input(caller, "query", query, "Lq", query_linear);
  check_value((query.dim() == 3) == is_batched && (query.dim() == 2 || query.size(0) == batch_size), caller,
              "query must have shape {}Lq, {}] to match its context, but has {}.",
              is_batched ? formatted("[{}, ", batch_size) : "[", query.size(-1), shape_of(query));
}

// A unit batch axis also gets its natural stride back: `transpose().contiguous()` may leave a huge one there, with which
// products are ten times slower.
Tensor batched(const Tensor& x) {
  if (x.dim() == 2) return x.unsqueeze(0);
  return x.size(0) == 1 ? x.select(0, 0).unsqueeze(0) : x;
}

Tensor project(const torch::nn::Linear& module, const Tensor& x) {
  return project(x, module->weight, module->bias);
}

Tensor split_heads(const Tensor& x, int64_t n, int64_t size) {
  return x.view({x.size(0), x.size(1), n, size}).transpose(1, 2);
}

Tensor split_heads(const Tensor& x, int64_t n, int64_t size, NormScope scope, Norm& norm) {
  if (!norm) return split_heads(x, n, size);
  if (scope == NormScope::across_heads) return split_heads(norm(x), n, size);
  return norm(x.view({x.size(0), x.size(1), n, size})).transpose(1, 2);
}

Tensor with_zeros(const Tensor& x, int64_t n) {
  return x.defined() && n > 0 ? at::constant_pad_nd(x, {0, n}) : x;
}

Tensor merge_heads(const Tensor& x) {
  return x.transpose(1, 2).flatten(2);
}

AttentionResult attend_heads(
    std::string_view caller, const Tensor& q, const Context& context, const CrossAttentionOptions& options, bool training) {
  const auto Lq = q.size(2), Lk = context.length() - (options.bias_kv() ? 1 : 0);
  context.mask().check(caller, q.size(0), q.size(1), Lq, Lk, q.device());
  AttentionOptions how;
  how.mask = options.bias_kv() ? context.mask().with_free_key(Lq, Lk, q.device()) : context.mask();
  how.scale = options.scale();
  how.dropout = training ? options.dropout() : 0;
  how.weights = options.attention_weights();
  how.weight_heads = options.weight_heads();
  return attention(q, context.key(), context.value(), how);
}

std::vector<Tensor> context_weights(const torch::nn::Linear& key_linear,
                                    const torch::nn::Linear& value_linear,
                                    const Norm& key_norm,
                                    const Tensor& bias_k,
                                    const Tensor& bias_v) {
  std::vector<Tensor> weights = {key_linear->weight, key_linear->bias, value_linear->weight,
                                 value_linear->bias, bias_k,           bias_v};
  if (key_norm) weights.insert(weights.end(), {key_norm->weight, key_norm->bias});
  return weights;
}

Norm make_qk_norm(const CrossAttentionOptions& options, int64_t heads) {
  if (options.qk_norm() == NormKind::none) return nullptr;
  const auto size = *options.head_dim() * (options.qk_norm_scope() == NormScope::across_heads ? heads : 1);
  return Norm(NormOptions(options.qk_norm(), size).eps(options.qk_norm_eps()));
}

PlanRequest request_of(const CrossAttentionOptions& o, int64_t B, int64_t Lq, int64_t Lk) {
  PlanRequest request;
  request.B = B;
  request.H = o.num_heads();
  request.G = *o.kv_heads();
  request.Lq = Lq;
  request.Lk = Lk;
  request.Eq = o.dim_query();
  request.Ek = o.dim_key();
  request.Ev = o.dim_value();
  request.d = *o.head_dim();
  request.e = *o.value_head_dim();
  request.Eo = o.dim_output();
  request.query_norm = request.key_norm = o.qk_norm() != NormKind::none;
  request.free_key = o.bias_kv();
  return request;
}

PlanRequest for_context(std::string_view caller, PlanRequest request, int64_t expected_queries) {
  constexpr int64_t kRowsOfACall = 64;  // what a call is taken to have where a context is made
  const bool many = expected_queries == ContextOptions::kMany;
  check_value(expected_queries >= 0 || many, caller, "expected_queries must not be negative, but is {}.", expected_queries);
  request.Lq = many ? kRowsOfACall : std::clamp<int64_t>(expected_queries, 1, kRowsOfACall);
  request.context_rows = many ? PlanRequest::kKept : std::max<int64_t>(expected_queries, 1);
  return request;
}

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
  for (const auto head : options.weight_heads()) {
    check_value(head >= 0 && head < heads, caller, "weight_heads must be of the {} heads, but name {}.", heads, head);
  }
  check_value(options.qk_norm_eps() >= 0, caller, "qk_norm_eps must not be negative, but is {}.", options.qk_norm_eps());
  check_value(options.qk_norm() != NormKind::none || options.qk_norm_scope() == NormScope::per_head, caller,
              "qk_norm must be rms or layer for a qk_norm_scope of across_heads, but is none.");
}

void check_projection(
    std::string_view caller, std::string_view name, const torch::nn::Linear& linear, int64_t in, int64_t out, bool has_bias) {
  const auto& weight = linear->weight;
  const bool fits = weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in;
  check_value(fits, caller, "options must fit the parameters, but say [{}, {}] for {}.weight, which has {}.", out, in, name,
              shape_of(weight));
  check_value(linear->bias.defined() == has_bias, caller,
              "options must fit the parameters, but say {} bias for {}, which has {}.", has_bias ? "a" : "no", name,
              has_bias ? "none" : "one");
}

void check_norm(std::string_view caller, std::string_view name, const Norm& norm, NormKind kind, int64_t size, double eps) {
  const bool fits = norm ? norm->options.kind() == kind && norm->options.size() == size && norm->options.eps() == eps
                         : kind == NormKind::none;
  check_value(fits, caller, "options must fit the parameters, but say another kind, size or eps for {}.", name);
}

void check_module(std::string_view caller, const CrossAttentionImpl& module) {
  const auto& o = module.options;
  check_value(o.kv_heads() && o.head_dim() && o.value_head_dim() && o.scale(), caller,
              "kv_heads, head_dim, value_head_dim and scale must keep a value, but one of them has none.");
  check_options(caller, o);
  check_plan(caller, {o.plan().pinned, o.plan().orders, {}}, request_of(o, 1, 1, 1));
  const auto H = o.num_heads(), G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
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

void check_plan(std::string_view caller, const PlanMode& plan, PlanRequest request) {
  const auto& [logits, values] = plan.orders;
  for (const auto reason : {illegal_for_logits(logits, request), illegal_for_values(values, request)}) {
    check_value(reason.empty(), caller, "plan must be of legal orders, but {}, {} is not: {}.", name_of(logits),
                name_of(values), reason);
  }
  if (!plan.rates) return;
  request.rates = *plan.rates;
  make_plan(request);  // names the rates that are wrong
}

std::string printed(const CrossAttentionOptions& resolved) {
  constexpr const char* kNorms[] = {"none", "rms", "layer"};
  constexpr const char* kWeights[] = {"none", "mean", "per_head"};
  const auto& o = resolved;
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
    add(true, ".qk_norm(NormKind::{})", kNorms[static_cast<int>(o.qk_norm())]);
    add(o.qk_norm_scope() == NormScope::across_heads, ".qk_norm_scope(NormScope::across_heads)");
    add(o.qk_norm_eps() != 1e-6, ".qk_norm_eps({})", o.qk_norm_eps());
  }
  add(o.attention_weights() != AttentionWeights::mean, ".attention_weights(AttentionWeights::{})",
      kWeights[static_cast<int>(o.attention_weights())]);
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
