// SPDX-License-Identifier: Apache-2.0
#include "modules/planning.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <xattn/context.h>

#include <algorithm>
#include <cstdint>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "cpu/on_kernels.h"
#include "plan/order_traits.h"

namespace xattn::detail {

RunsOn runs_on(const at::Tensor& weight) {
  return run_on_kernels({weight}) ? RunsOn::module_kernels : weight.is_cpu() ? RunsOn::libtorch_cpu : RunsOn::libtorch_cuda;
}

PlanRequest request_of(const LayerWeights& w, int64_t B, int64_t Lq, int64_t Lk) {
  PlanRequest request;
  request.B = B;
  request.H = w.H;
  request.G = w.G;
  request.Lq = Lq;
  request.Lk = Lk;
  request.Eq = w.query.size(1);
  request.Ek = w.key.size(1);
  request.Ev = w.value.size(1);
  request.d = w.d;
  request.e = w.e;
  request.Eo = w.output.size(0);
  request.element = static_cast<int64_t>(w.query.element_size());
  request.query_norm = w.query_norm.kind != NormKind::none;
  request.key_norm = w.key_norm.kind != NormKind::none;
  request.bias_kv = w.bias_k.defined();
  request.sums_heads = w.sums_heads;
  return request;
}

PlanRequest request_of(const CrossAttentionImpl& module,
                       const LayerWeights& weights,
                       int64_t B,
                       int64_t Lq,
                       int64_t Lk,
                       const Mask& mask,
                       AttentionWeights returned,
                       bool inputs_train) {
  const auto& o = module.options;
  auto request = request_of(weights, B, Lq, Lk);
  request.mask_is_learned = is_learned(mask);
  const auto trains = [](const at::Tensor* x) { return x->defined() && x->requires_grad(); };
  const bool weights_train =
      std::ranges::any_of(query_tensors(weights), trains) || std::ranges::any_of(context_tensors(weights), trains);
  request.training = at::GradMode::is_enabled() && (inputs_train || request.mask_is_learned || weights_train);
  request.returns_weights = returned != AttentionWeights::none;
  request.drops_weights = module.is_training() && o.dropout() > 0;
  request.runs_on = runs_on(weights.query);
  if (o.plan().pinned) request.pinned = o.plan().orders;
  if (at::autocast::is_autocast_enabled(weights.query.device().type())) request.pinned = Orders{};
  request.rates = o.plan().rates.value_or(weights.query.is_cuda() ? Rates::cuda() : Rates::cpu(at::get_num_threads()));
  return request;
}

Orders orders_of(const PlanRequest& request) {
  return request.pinned ? *request.pinned : make_plan(request).orders;
}

Orders orders_of_context(std::string_view caller, const PlanRequest& of_call, const ContextOptions& how) {
  const auto request = for_context(caller, of_call, how);
  const bool is_planned = how.expected_queries != ContextOptions::kMany || request.weights_are_frozen || request.pinned;
  if (!request.shares_context) return is_planned ? orders_of(request) : Orders{};
  const auto reads_as_given = [](const Orders& orders) { return is_raw(orders.logits) && is_raw(orders.values); };
  constexpr auto kRaw = Order::fold_into_query;  // legal wherever any order that reads keys and values as given is
  std::string_view reason;
  if (request.pinned) {
    if (!reads_as_given(*request.pinned)) reason = "the plan or autocast fixes another order";
  } else {
    reason = illegal_for_logits(kRaw, request);
    if (reason.empty()) reason = illegal_for_values(kRaw, request);
  }
  check_value(reason.empty(), caller, "share must be left out if a layer cannot read keys and values as given, but is set: {}.",
              reason);
  const auto orders = orders_of(request);
  return reads_as_given(orders) ? orders : Orders{kRaw, kRaw};  // if an axis is empty, the plan is the reference's
}

PlanRequest for_context(std::string_view caller, PlanRequest request, const ContextOptions& how) {
  constexpr int64_t kRowsOfACall = 64;          // assumed for each call while a context is planned
  constexpr auto kMostKeys = int64_t{1} << 40;  // more than memory can hold, with sizes that are far from overflow
  const auto expected = how.expected_queries;
  const bool many = expected == ContextOptions::kMany;
  check_value(expected >= 0 || many, caller, "expected_queries must not be negative, but is {}.", expected);
  check_value(how.capacity >= 0, caller, "capacity must not be negative, but is {}.", how.capacity);
  check_value(how.capacity <= kMostKeys, caller, "capacity must be at most {}, but is {}.", kMostKeys, how.capacity);
  check_value(how.capacity == 0 || !how.share, caller, "capacity must be 0 for a shared context, but is {}.", how.capacity);
  request.Lq = many ? kRowsOfACall : std::clamp<int64_t>(expected, 1, kRowsOfACall);
  request.Lk = std::max(request.Lk, how.capacity);
  request.context_rows = many ? PlanRequest::kKept : std::max<int64_t>(expected, 1);
  request.shares_context = how.share;
  request.context_grows = how.capacity > 0;
  return request;
}

void check_plan(std::string_view caller, const PlanMode& plan, const CrossAttentionOptions& options) {
  PlanRequest request;
  request.query_norm = request.key_norm = options.qk_norm() != NormKind::none;
  request.bias_kv = options.bias_kv();
  const auto& [logits, values] = plan.orders;
  for (const auto reason : {illegal_for_logits(logits, request), illegal_for_values(values, request)}) {
    check_value(reason.empty(), caller, "plan must be of legal orders, but {}, {} is not: {}.", name_of(logits),
                name_of(values), reason);
  }
  if (!plan.rates) return;
  request.rates = *plan.rates;
  make_plan(request);  // checks the rates
}

}  // namespace xattn::detail
