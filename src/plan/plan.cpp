// SPDX-License-Identifier: Apache-2.0
#include <xattn/plan.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "kernels/kernels.h"
#include "plan/order_traits.h"

namespace xattn {
namespace {

using detail::check_value;
using detail::uses_product;

constexpr std::string_view kNames[] = {"standard", "fold_into_query", "prefold", "fold_into_context", "prefold_into_context"};
constexpr std::string_view kKernelNames[] = {"tensor_operations",           "heads", "heads_in_parts", "chain", "fused_cpu",
                                             "scaled_dot_product_attention"};

// `count` products of [m, k] by [k, n], of which a call pays this share.
struct Product {
  double count, m, k, n;
  double share = 1;
};

struct Cost {
  double operations = 0, bytes = 0, seconds = 0;

  Cost& operator+=(const Cost& other) {
    operations += other.operations;
    bytes += other.bytes;
    seconds += other.seconds;
    return *this;
  }
};

// What an operation costs before its first element: more where it is recorded, as autograd makes a node of it and visits that.
double start_of_operation(const PlanRequest& request) {
  constexpr double kRecorded = 3;
  return (request.training ? kRecorded : 1) * request.rates.start_product;
}

// A product runs at full speed when it is large in every direction, and no faster than its operands arrive.
Cost cost_of_product(const Product& product, const PlanRequest& request) {
  const auto& [count, m, k, n, share] = product;
  if (share * count * m * k * n == 0) return {};
  const auto& rates = request.rates;
  const auto operations = 2 * count * m * k * n;
  const auto bytes = static_cast<double>(request.element) * count * (m * k + k * n + m * n);
  const bool on_unit =
      rates.unit_flops > 0 && m >= rates.unit_rows && n >= detail::kLeastManyColumns && k >= detail::kLeastManyDepth;
  const auto flops = on_unit ? rates.unit_flops : rates.flops, half_rows = on_unit ? rates.unit_half_rows : rates.half_rows;
  const auto speed = flops * m / (m + half_rows) * n / (n + rates.half_columns) * k / (k + rates.half_depth);
  const auto start = start_of_operation(request) + (count > 1 ? count * rates.start_small : 0);
  const auto bandwidth = rates.cache > 0 && bytes <= rates.cache_size ? rates.cache : rates.memory;
  return {share * operations, share * bytes, share * (start + std::max(operations / speed, bytes / bandwidth))};
}

Cost cost_of_products(std::span<const Product> products, const PlanRequest& request) {
  Cost sum;
  for (const auto& product : products) sum += cost_of_product(product, request);
  return sum;
}

// The sizes as numbers to multiply, and what part of the work that can be made ahead a call pays.
struct Sizes {
  explicit Sizes(const PlanRequest& r)
      : B(r.B), H(r.H), G(r.G), Lq(r.Lq), Lk(r.Lk), Eq(r.Eq), Ek(r.Ek), Ev(r.Ev), d(r.d), e(r.e), Eo(r.Eo) {
    of_weights = r.weights_are_frozen ? 0 : 1;
    of_query = r.weights_are_frozen && r.query_is_constant ? 0 : 1;
    if (r.context_rows != PlanRequest::kKept) of_context = r.context_rows > r.Lq ? Lq / double(r.context_rows) : 1;
  }

  double B, H, G, Lq, Lk, Eq, Ek, Ev, d, e, Eo;
  double of_weights = 1, of_query = 1, of_context = 0;
};

// What a frozen layer takes to pack a context of so many features that stays as it came, for more rows than those of a task.
Cost cost_of_packing(double features, const PlanRequest& r) {
  const Sizes s(r);
  if (r.runs_on != RunsOn::engine ||
      detail::context_layout(std::max(r.Lq, r.context_rows), r.H) != detail::ContextLayout::packed)
    return {};
  const auto bytes = 2 * s.of_context * static_cast<double>(r.element) * s.B * s.Lk * features;
  return {0, bytes, bytes / r.rates.memory};
}

Cost cost_of_logits(Order order, const PlanRequest& request) {
  const Sizes s(request);
  const Product project_query{1, s.B * s.Lq, s.Eq, s.H * s.d, s.of_query};  // Xq Wq
  const Product project_key{1, s.B * s.Lk, s.Ek, s.G * s.d, s.of_context};  // Wk' Xk'
  const Product of_weights{s.H, s.Eq, s.d, s.Ek, s.of_weights};             // Wq Wk'
  const Product meet_raw{s.B, s.H * s.Lq, s.Ek, s.Lk};                      // (...) Xk'
  const Product meet_folded{s.B, s.Lq, s.Eq, s.H * s.Lk};                   // Xq (...)
  std::array<Product, 3> products = {};
  switch (order) {
    case Order::standard: products = {project_query, project_key, {s.B * s.G, s.H / s.G * s.Lq, s.d, s.Lk}}; break;
    case Order::fold_into_query: products = {project_query, {s.H, s.B * s.Lq, s.d, s.Ek, s.of_query}, meet_raw}; break;
    case Order::prefold: products = {of_weights, {1, s.B * s.Lq, s.Eq, s.H * s.Ek, s.of_query}, meet_raw}; break;
    case Order::fold_into_context: products = {project_key, {s.H, s.B * s.Lk, s.d, s.Eq, s.of_context}, meet_folded}; break;
    case Order::prefold_into_context:
      products = {of_weights, {1, s.B * s.Lk, s.Ek, s.H * s.Eq, s.of_context}, meet_folded};
      break;
  }
  auto cost = cost_of_products(products, request);
  if (detail::is_raw(order)) cost += cost_of_packing(s.Ek, request);
  return cost;
}

Cost cost_of_values(Order order, const PlanRequest& request) {
  const Sizes s(request);
  const Product project_value{1, s.B * s.Lk, s.Ev, s.G * s.e, s.of_context};  // Xv Wv
  const Product project_output{1, s.B * s.Lq, s.H * s.e, s.Eo};               // (...) Wo
  const Product of_weights{s.H, s.Ev, s.e, s.Eo, s.of_weights};               // Wv Wo
  const Product mix_raw{s.B, s.H * s.Lq, s.Lk, s.Ev};                         // P Xv
  const Product mix_folded{s.B, s.Lq, s.H * s.Lk, s.Eo};                      // P (...)
  std::array<Product, 3> products = {};
  switch (order) {
    case Order::standard: products = {project_value, {s.B * s.G, s.H / s.G * s.Lq, s.Lk, s.e}, project_output}; break;
    case Order::fold_into_query: products = {mix_raw, {s.H, s.B * s.Lq, s.Ev, s.e}, project_output}; break;
    case Order::prefold: products = {of_weights, mix_raw, {1, s.B * s.Lq, s.H * s.Ev, s.Eo}}; break;
    case Order::fold_into_context: products = {project_value, {s.H, s.B * s.Lk, s.e, s.Eo, s.of_context}, mix_folded}; break;
    case Order::prefold_into_context:
      products = {of_weights, {1, s.B * s.Lk, s.Ev, s.H * s.Eo, s.of_context}, mix_folded};
      break;
  }
  auto cost = cost_of_products(products, request);
  if (detail::is_raw(order)) cost += cost_of_packing(s.Ev, request);
  return cost;
}

// What lies between the chains: the softmax, on logits that go to memory and come back.
Cost cost_of_softmax(const PlanRequest& request) {
  const Sizes s(request);
  const auto elements = s.B * s.H * s.Lq * s.Lk;
  return {0, 2 * static_cast<double>(request.element) * elements,
          start_of_operation(request) + elements / request.rates.softmax};
}

// What standard orders save where the fused kernel does both of their inner products and the softmax.
double saved_by_fusion(const PlanRequest& request) {
  const Sizes s(request);
  const Product logits{s.B * s.G, s.H / s.G * s.Lq, s.d, s.Lk}, values{s.B * s.G, s.H / s.G * s.Lq, s.Lk, s.e};
  const std::array both = {logits, values};
  const auto parts = cost_of_products(both, request);
  const auto fused = start_of_operation(request) + parts.operations / request.rates.fused;
  return parts.seconds + cost_of_softmax(request).seconds - fused;
}

bool is_empty(const PlanRequest& r) {
  return r.B == 0 || r.Lq == 0 || r.Lk == 0;
}

// Kernels of this library for heads, by what engine/heads.cpp calls a long context.
AttentionKernel kernel_of_heads(const PlanRequest& r) {
  constexpr int64_t kLongContext = 4096;
  const auto keys = r.Lk + (r.free_key ? 1 : 0);
  return keys > kLongContext && !r.gives_weights ? AttentionKernel::heads_in_parts : AttentionKernel::heads;
}

// The kernel and the reason: what frozen.cpp and attention.cpp do, in the order in which they ask.
std::pair<AttentionKernel, std::string_view> kernel_of(const Orders& orders, const PlanRequest& r) {
  constexpr auto kPlain = AttentionKernel::tensor_operations;
  const bool is_standard = orders == Orders{}, own = r.runs_on == RunsOn::kernels;
  if (r.runs_on == RunsOn::engine) {
    return is_standard ? std::pair(kernel_of_heads(r), "the layer is frozen, in float32 on the CPU")
                       : std::pair(AttentionKernel::chain, "the layer is frozen, and the order is not the standard one");
  }
  if (!is_standard) return {kPlain, "the order is not the standard one"};
  if (r.drops_weights) return {kPlain, "dropout is above 0"};
  if (r.B == 0 || r.Lq == 0 || (r.Lk == 0 && !r.free_key)) return {kPlain, "an axis is empty"};
  if (own && !r.training) return {kernel_of_heads(r), "the type is float32, and no gradient is wanted"};
  if (r.gives_weights) return {kPlain, own ? "weights and gradients are wanted" : "weights are wanted"};
  if (r.mask_is_learned) return {kPlain, "the mask's bias asks for its gradient"};
  if (r.runs_on == RunsOn::cuda) return {AttentionKernel::scaled_dot_product_attention, "the layer is not on the CPU"};
  if (own) return {kernel_of_heads(r), "the type is float32, also of the gradients"};
  if (r.d != r.e) return {kPlain, "heads of values are not of the size of heads of keys"};
  return {AttentionKernel::fused_cpu, "this library's is for float32, AVX2 or AVX-512, and no autocast"};
}

// What a kernel does with the logits, and whose it is.
std::string_view description_of(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::tensor_operations: return "all logits in memory";
    case AttentionKernel::heads: return "this library's kernel, one head after the other, logits in the cache";
    case AttentionKernel::heads_in_parts: return "this library's kernel, one head after the other, the context in parts";
    case AttentionKernel::chain: return "this library's kernels, the whole chain for a few rows at a time";
    case AttentionKernel::fused_cpu: return "LibTorch's fused kernel for the CPU";
    case AttentionKernel::scaled_dot_product_attention: break;
  }
  return "LibTorch's choice of its kernels";
}

bool is_own(AttentionKernel kernel) {
  return kernel == AttentionKernel::heads || kernel == AttentionKernel::heads_in_parts || kernel == AttentionKernel::chain;
}

void check(const PlanRequest& r) {
  constexpr auto kCaller = "plan";
  for (const auto& [name, size] : {std::pair("B", r.B), {"Lq", r.Lq}, {"Lk", r.Lk}}) {
    check_value(size >= 0, kCaller, "{} must not be negative, but is {}.", name, size);
  }
  for (const auto& [name, size] : {std::pair("H", r.H),
                                   {"G", r.G},
                                   {"Eq", r.Eq},
                                   {"Ek", r.Ek},
                                   {"Ev", r.Ev},
                                   {"d", r.d},
                                   {"e", r.e},
                                   {"Eo", r.Eo},
                                   {"element", r.element}}) {
    check_value(size >= 1, kCaller, "{} must be at least 1, but is {}.", name, size);
  }
  check_value(r.context_rows >= 0 || r.context_rows == PlanRequest::kKept, kCaller,
              "context_rows must not be negative, or be kKept, but is {}.", r.context_rows);
  check_value(r.H % r.G == 0, kCaller, "H must be a multiple of G, but they are {} and {}.", r.H, r.G);
  check_value(r.rates.flops > 0 && r.rates.memory > 0 && r.rates.softmax > 0, kCaller,
              "rates must be above 0, but flops, memory and softmax are {}, {} and {}.", r.rates.flops, r.rates.memory,
              r.rates.softmax);
}

// The costs of each chain, and from them the plan of any orders.
class Planner {
 public:
  explicit Planner(const PlanRequest& request) : request_(request) {
    check(request);
    for (int i = 0; i < kOrders; ++i) {
      const auto order = static_cast<Order>(i);
      const auto logits = in_all_passes(cost_of_logits(order, request)), values = in_all_passes(cost_of_values(order, request));
      plan_.logits[static_cast<size_t>(i)] = {order, logits.operations, logits.bytes, logits.seconds,
                                              illegal_for_logits(order, request)};
      plan_.values[static_cast<size_t>(i)] = {order, values.operations, values.bytes, values.seconds,
                                              illegal_for_values(order, request)};
    }
  }

  Plan plan(const Orders& orders) const {
    auto plan = plan_;
    const auto& logits = plan.logits[static_cast<size_t>(orders.logits)];
    const auto& values = plan.values[static_cast<size_t>(orders.values)];
    const auto softmax = in_all_passes(cost_of_softmax(request_));
    plan.orders = orders;
    plan.operations = logits.operations + values.operations;
    plan.bytes = logits.bytes + values.bytes + softmax.bytes;
    plan.seconds = logits.seconds + values.seconds + softmax.seconds;
    std::tie(plan.kernel, plan.kernel_reason) = kernel_of(orders, request_);
    if (is_fused(plan.kernel) && request_.rates.fused > 0) plan.seconds -= passes_ * saved_by_fusion(request_);
    return plan;
  }

  // The chains meet in the fused kernel alone: the cheapest pair is that of the cheapest of each, or the standard one.
  Orders cheapest() const {
    const auto of_chain = [](const std::array<OrderCost, kOrders>& costs) {
      const auto rank = [](const OrderCost& cost) { return std::pair(!cost.illegal.empty(), cost.seconds); };
      return std::ranges::min_element(costs, {}, rank)->order;
    };
    const Orders apart{of_chain(plan_.logits), of_chain(plan_.values)};
    return plan({}).seconds <= plan(apart).seconds ? Orders{} : apart;
  }

 private:
  Cost in_all_passes(const Cost& cost) const {
    return {passes_ * cost.operations, passes_ * cost.bytes, passes_ * cost.seconds};
  }

  const PlanRequest& request_;
  const double passes_ = request_.training ? 3 : 1;  // backward is two products for each of forward
  Plan plan_;
};

std::string engineering(double value, std::string_view unit) {
  constexpr std::pair<double, std::string_view> kScales[] = {{1e9, "G"}, {1e6, "M"},  {1e3, "k"},
                                                             {1, ""},    {1e-3, "m"}, {1e-6, "u"}};
  const auto* scale = std::ranges::find_if(kScales, [value](const auto& s) { return value >= s.first; });
  if (scale == std::end(kScales)) scale = value == 0 ? scale - 3 : scale - 1;
  return detail::formatted("{:.3g} {}{}", value / scale->first, scale->second, unit);
}

}  // namespace

std::string_view name_of(Order order) {
  return kNames[static_cast<size_t>(order)];
}

std::string_view name_of(AttentionKernel kernel) {
  return kKernelNames[static_cast<size_t>(kernel)];
}

bool is_fused(AttentionKernel kernel) {
  return kernel != AttentionKernel::tensor_operations && kernel != AttentionKernel::chain;
}

RunsOn modules_run_on() {
  return detail::kernels().is_vectorised ? RunsOn::kernels : RunsOn::cpu;
}

namespace {

constexpr std::string_view kNoProduct = "the product of weights is larger than both and was not made";

}  // namespace

std::string_view illegal_for_logits(Order order, const PlanRequest& request) {
  if (order == Order::standard) return {};
  if (request.free_key) return "bias_kv adds a key that no projection made";
  const bool projects_query = order == Order::fold_into_query;
  const bool projects_key = order == Order::fold_into_context;
  if (request.query_norm && !projects_query) return "a norm of the query stands behind Wq";
  if (request.key_norm && !projects_key) return "a norm of the key stands behind Wk";
  if (request.weights_are_frozen && uses_product(order) && !logits_product_pays(request)) return kNoProduct;
  return {};
}

std::string_view illegal_for_values(Order order, const PlanRequest& request) {
  if (order != Order::standard && request.free_key) return "bias_kv adds a value that no projection made";
  if (request.weights_are_frozen && uses_product(order) && !values_product_pays(request)) return kNoProduct;
  return {};
}

bool logits_product_pays(const PlanRequest& r) {
  return r.H * r.Eq * r.Ek <= r.d * (r.H * r.Eq + r.G * r.Ek);
}

bool values_product_pays(const PlanRequest& r) {
  return r.H * r.Eo * r.Ev <= r.e * (r.H * r.Eo + r.G * r.Ev);
}

Plan make_plan(const PlanRequest& request) {
  const Planner planner(request);
  if (request.pinned) return planner.plan(*request.pinned);
  return planner.plan(is_empty(request) ? Orders{} : planner.cheapest());
}

Plan cost_of(const Orders& orders, const PlanRequest& request) {
  return Planner(request).plan(orders);
}

std::string explain(const PlanRequest& request) {
  const auto plan = make_plan(request);
  const auto& r = request;
  auto text =
      detail::formatted("B {}, heads {}{}, Lq {}, Lk {}; features: query {}, key {}, value {}, heads {} and {}, output {}{}\n",
                        r.B, r.H, r.G == r.H ? "" : detail::formatted(" (of keys {})", r.G), r.Lq, r.Lk, r.Eq, r.Ek, r.Ev, r.d,
                        r.e, r.Eo, r.training ? "; forward and backward" : "");
  const auto add_chain = [&text, &r](std::string_view name, const std::array<OrderCost, kOrders>& costs, Order chosen) {
    text += detail::formatted("{:24}{:>14}{:>12}{:>12}\n", name, "operations", "memory", "time");
    const auto least = costs[static_cast<size_t>(chosen)].seconds;
    for (const auto& cost : costs) {
      const auto remark = cost.order == chosen    ? std::string(r.pinned ? "<- pinned" : "<- chosen")
                          : !cost.illegal.empty() ? detail::formatted("illegal: {}", cost.illegal)
                          : cost.seconds <= least && !r.pinned
                              ? std::string("as fast, but not with the other chain")
                              : detail::formatted("{:.2f} times its time", cost.seconds / least);
      text += detail::formatted("  {:22}{:>14}{:>12}{:>12}  {}\n", name_of(cost.order), engineering(cost.operations, ""),
                                engineering(cost.bytes, "B"), engineering(cost.seconds, "s"), remark);
    }
  };
  add_chain("logits", plan.logits, plan.orders.logits);
  add_chain("values", plan.values, plan.orders.values);
  const auto standard = cost_of(Orders{}, request);
  text += detail::formatted("in all: {} operations, {}; in the standard order {}, {}\n", engineering(plan.operations, ""),
                            engineering(plan.seconds, "s"), engineering(standard.operations, ""),
                            engineering(standard.seconds, "s"));
  text +=
      detail::formatted("attention by {}: {}, because {}{}\n", name_of(plan.kernel), description_of(plan.kernel),
                        plan.kernel_reason, r.gives_weights && is_own(plan.kernel) ? "; weights come from the same pass" : "");
  return text;
}

}  // namespace xattn
