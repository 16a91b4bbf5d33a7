// SPDX-License-Identifier: Apache-2.0
#include <xattn/plan.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <stdexcept>
#include <utility>

#include "attention/choose_kernel.h"
#include "base/check.h"
#include "base/text.h"
#include "kernels/kernels.h"
#include "plan/order_traits.h"
#include "plan/runs_on.h"

namespace xattn {
namespace {

using detail::check_value;
using detail::uses_product;

// Why a context cannot be kept as this order reads it; empty if it can.
std::string_view illegal_for_context(Order order, const PlanRequest& request) {
  if (request.shares_context && !detail::is_raw(order)) return "the context stays as given, because it is shared";
  if (request.context_grows && detail::is_folded(order)) return "a folded context is copied for each append";
  return {};
}

constexpr std::string_view kNoProduct = "the product of weights is larger than both and was not made";

// `count` products of [m, k] by [k, n]. A call is charged `share` of their cost.
struct Product {
  double count, m, k, n;
  double share = 1;
  bool right_is_raw = false;  // whether the right side is a context as it came, which is not stored in another type
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

// Seconds that an operation takes before its first element. Autograd adds the time to create and visit a node.
double start_of_operation(const PlanRequest& request) {
  constexpr double kRecorded = 3;
  return (request.training ? kRecorded : 1) * request.rates.start_product;
}

// A product runs at full speed if all its sizes are large, and no faster than memory delivers its operands.
Cost cost_of_product(const Product& product, const PlanRequest& request) {
  const auto& [count, m, k, n, share, right_is_raw] = product;
  if (share * count * m * k * n == 0) return {};
  const auto& rates = request.rates;
  const auto operations = 2 * count * m * k * n;
  const auto right = right_is_raw || request.stored_element == 0 ? request.element : request.stored_element;
  const auto bytes = count * (static_cast<double>(request.element) * (m * k + m * n) + static_cast<double>(right) * k * n);
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

// The sizes as doubles, and the shares of products with weights, query and context that a call is charged.
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

// The cost of packing a raw context of this many features in a frozen layer.
Cost cost_of_packing(double features, const PlanRequest& r) {
  const Sizes s(r);
  if (r.runs_on != RunsOn::frozen_kernels ||
      detail::context_layout(std::max(r.Lq, r.context_rows), r.H) != detail::ContextLayout::packed)
    return {};
  const auto bytes = 2 * s.of_context * static_cast<double>(r.element) * s.B * s.Lk * features;
  return {0, bytes, bytes / r.rates.memory};
}

// The features along one chain: of the query or the output at its outer end, of a head, and of the context.
struct Chain {
  double outer, head, context;
  bool is_logits;

  // A product of m rows with k terms and n columns in the chain of the logits; the chain of the values swaps k and n.
  Product product(double count, double m, double k, double n, double share = 1) const {
    return is_logits ? Product{count, m, k, n, share} : Product{count, m, n, k, share};
  }
};

Chain chain_of_logits(const Sizes& s) {
  return {s.Eq, s.d, s.Ek, true};
}
Chain chain_of_values(const Sizes& s) {
  return {s.Eo, s.e, s.Ev, false};
}

// The product of heads between the two projections of a standard order.
Product product_of_heads(const Chain& c, const Sizes& s) {
  return c.product(s.B * s.G, s.H / s.G * s.Lq, c.head, s.Lk);
}

Cost cost_of_chain(Order order, const Chain& c, const PlanRequest& request) {
  const Sizes s(request);
  const auto of_query = c.is_logits ? s.of_query : 1;  // products after the softmax are charged to every call
  const auto outer_projection = c.product(1, s.B * s.Lq, c.outer, s.H * c.head, of_query);
  const Product context_projection{1, s.B * s.Lk, c.context, s.G * c.head, s.of_context};
  auto with_raw_context = c.product(s.B, s.H * s.Lq, c.context, s.Lk);
  with_raw_context.right_is_raw = true;
  std::array<Product, 3> products = {};
  switch (order) {
    case Order::standard: products = {outer_projection, context_projection, product_of_heads(c, s)}; break;
    case Order::fold_into_query:
      products = {outer_projection, c.product(s.H, s.B * s.Lq, c.head, c.context, of_query), with_raw_context};
      break;
    case Order::prefold: {
      const auto of_weights =
          c.is_logits ? Product{s.H, s.Eq, s.d, s.Ek, s.of_weights} : Product{s.H, s.Ev, s.e, s.Eo, s.of_weights};
      products = {of_weights, c.product(1, s.B * s.Lq, c.outer, s.H * c.context, of_query), with_raw_context};
      break;
    }
    case Order::fold_into_context:
      products = {
          context_projection, {s.H, s.B * s.Lk, c.head, c.outer, s.of_context}, c.product(s.B, s.Lq, c.outer, s.H * s.Lk)};
      break;
  }
  auto cost = cost_of_products(products, request);
  if (detail::is_raw(order)) cost += cost_of_packing(c.context, request);
  return cost;
}

// The softmax between the chains, which writes the logits to memory and reads them again.
Cost cost_of_softmax(const PlanRequest& request) {
  const Sizes s(request);
  const auto elements = s.B * s.H * s.Lq * s.Lk;
  return {0, 2 * static_cast<double>(request.element) * elements,
          start_of_operation(request) + elements / request.rates.softmax};
}

// The time that a fused kernel saves: it computes both inner products of the standard orders and the softmax in one.
double saved_by_fusion(const PlanRequest& request) {
  const Sizes s(request);
  const std::array both = {product_of_heads(chain_of_logits(s), s), product_of_heads(chain_of_values(s), s)};
  const auto parts = cost_of_products(both, request);
  const auto fused = start_of_operation(request) + parts.operations / request.rates.fused;
  return parts.seconds + cost_of_softmax(request).seconds - fused;
}

bool is_empty(const PlanRequest& r) {
  return r.B == 0 || r.Lq == 0 || r.Lk == 0;
}

// The kernel that runs in these orders, and the reason.
detail::KernelChoice kernel_of(const Orders& orders, const PlanRequest& r) {
  const bool is_standard = orders == Orders{};
  const auto Lk = r.Lk + (r.bias_kv ? 1 : 0);
  if (r.runs_on == RunsOn::frozen_kernels) {
    if (!is_standard) return {AttentionKernel::chain, "the layer is frozen, and the order is not the standard one"};
    return {detail::own_kernel(Lk, r.returns_weights), "the layer is frozen, in float32 on the CPU"};
  }
  if (!is_standard) return {AttentionKernel::tensor_operations, "the order is not the standard one"};
  return detail::choose_kernel({.own_kernels = r.runs_on == RunsOn::module_kernels,
                                .on_cpu = r.runs_on != RunsOn::libtorch_cuda,
                                .is_empty = r.B == 0 || r.Lq == 0 || Lk == 0,
                                .Lk = Lk,
                                .equal_head_sizes = r.d == r.e,
                                .shares_keys = r.G < r.H,
                                .drops_weights = r.drops_weights,
                                .returns_weights = r.returns_weights,
                                .is_differentiated = r.training,
                                .mask_is_learned = r.mask_is_learned});
}

// The owner of the kernel, and where it keeps the logits.
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
  check_value(r.stored_element >= 0, kCaller, "stored_element must not be negative, but is {}.", r.stored_element);
  check_value(r.context_rows >= 0 || r.context_rows == PlanRequest::kKept, kCaller,
              "context_rows must not be negative, or be kKept, but is {}.", r.context_rows);
  check_value(r.H % r.G == 0, kCaller, "H must be a multiple of G, but they are {} and {}.", r.H, r.G);
  check_value(r.rates.flops > 0 && r.rates.memory > 0 && r.rates.softmax > 0, kCaller,
              "rates must be above 0, but flops, memory and softmax are {}, {} and {}.", r.rates.flops, r.rates.memory,
              r.rates.softmax);
}

// The costs of all orders of both chains, and the plans made from them.
class Planner {
 public:
  explicit Planner(const PlanRequest& request) : request_(request) {
    check(request);
    const Sizes sizes(request);
    const auto cost_of_order = [&](Order order, const Chain& chain, std::string_view illegal) {
      const auto cost = in_all_passes(cost_of_chain(order, chain, request));
      return OrderCost{order, cost.operations, cost.bytes, cost.seconds, illegal};
    };
    for (size_t i = 0; i < kOrders; ++i) {
      const auto order = static_cast<Order>(i);
      plan_.logits[i] = cost_of_order(order, chain_of_logits(sizes), illegal_for_logits(order, request));
      plan_.values[i] = cost_of_order(order, chain_of_values(sizes), illegal_for_values(order, request));
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
    const auto [kernel, reason] = kernel_of(orders, request_);
    plan.kernel = kernel;
    plan.kernel_reason = reason;
    if (detail::is_fused(plan.kernel) && request_.rates.fused > 0) plan.seconds -= passes_ * saved_by_fusion(request_);
    return plan;
  }

  // Only the fused kernel couples the chains: the cheapest pair is the cheapest order of each, or the standard one for both.
  Orders cheapest() const {
    const auto of_chain = [](const std::array<OrderCost, kOrders>& costs) {
      const auto rank = [](const OrderCost& cost) { return std::pair(!cost.illegal.empty(), cost.seconds); };
      const auto& best = *std::ranges::min_element(costs, {}, rank);
      check_value(best.illegal.empty(), "plan", "request must allow an order of each chain, but allows none: {}.",
                  best.illegal);
      return best.order;
    };
    const Orders apart{of_chain(plan_.logits), of_chain(plan_.values)};
    const bool standard_is_legal = plan_.logits.front().illegal.empty() && plan_.values.front().illegal.empty();
    return standard_is_legal && plan({}).seconds <= plan(apart).seconds ? Orders{} : apart;
  }

 private:
  Cost in_all_passes(const Cost& cost) const {
    return {passes_ * cost.operations, passes_ * cost.bytes, passes_ * cost.seconds};
  }

  const PlanRequest& request_;
  const double passes_ = request_.training ? 3 : 1;  // backward has two products for each of forward
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
  return detail::traits(order).name;
}

bool detail::use_kernels_named(std::string_view name) {
  const auto* found = std::ranges::find(kInstructionSets, name);
  if (found == kInstructionSets.end()) {
    throw std::invalid_argument(formatted("XATTN_KERNELS must be one of {}, but is {}", joined(kInstructionSets), name));
  }
  const auto set = static_cast<InstructionSet>(found - kInstructionSets.begin());
  const auto all = all_kernels();
  const auto runs = std::ranges::find(all, set, &Kernels::instruction_set);
  if (runs != all.end()) use_kernels(**runs);
  return runs != all.end();
}

RunsOn detail::modules_run_on() {
  return detail::kernels().is_vectorised ? RunsOn::module_kernels : RunsOn::libtorch_cpu;
}

std::string_view illegal_for_logits(Order order, const PlanRequest& request) {
  if (const auto reason = illegal_for_context(order, request); !reason.empty()) return reason;
  if (order == Order::standard) return {};
  if (request.bias_kv) return "bias_kv adds a key that no projection made";
  const bool keeps_query_projection = order == Order::fold_into_query, keeps_key_projection = order == Order::fold_into_context;
  if (request.query_norm && !keeps_query_projection) return "a norm of the query follows Wq";
  if (request.key_norm && !keeps_key_projection) return "a norm of the key follows Wk";
  if (request.sums_ranks && !detail::projects_query(order)) return "its log-sum-exp is not that of other orders";
  if (request.weights_are_frozen && uses_product(order) && !logits_product_pays(request)) return kNoProduct;
  return {};
}

std::string_view illegal_for_values(Order order, const PlanRequest& request) {
  if (const auto reason = illegal_for_context(order, request); !reason.empty()) return reason;
  if (order != Order::standard && request.bias_kv) return "bias_kv adds a value that no projection made";
  if (request.sums_heads && !detail::ends_in_heads(order)) return "the output projection follows the sum of heads";
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
      const auto remark = cost.order == chosen                 ? std::string(r.pinned ? "<- pinned" : "<- chosen")
                          : !cost.illegal.empty()              ? detail::formatted("illegal: {}", cost.illegal)
                          : cost.seconds <= least && !r.pinned ? std::string("as fast, but not with the other chain")
                          : least == 0                         ? std::string("the other costs nothing")
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
  text += detail::formatted("attention by {}: {}, because {}{}\n", name_of(plan.kernel), description_of(plan.kernel),
                            plan.kernel_reason,
                            r.returns_weights && detail::is_own(plan.kernel) ? "; weights come from the same pass" : "");
  return text;
}

}  // namespace xattn
