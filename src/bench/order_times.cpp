// SPDX-License-Identifier: Apache-2.0
#include "bench/order_times.h"

#include <torch/utils.h>
#include <xattn/plan.h>

#include <algorithm>
#include <array>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/candidates.h"
#include "bench/measure.h"

namespace bench {
namespace {

using nlohmann::ordered_json;
using shapes::Shape;
using shapes::Timed;
using xattn::Order;
using xattn::Orders;

// Times of one layer: the first with the layer's own choice, the others with `orders` pinned.
struct OrderTimes {
  std::vector<Orders> orders;
  std::vector<double> us;
};

Orders chosen_by(const xattn::Frozen& frozen, const BenchLayer& layer) {
  const auto& s = layer.shape;
  if (s.timed == Timed::attend) return frozen.context(layer.key, layer.value, mask_of(layer)).orders();
  return frozen.orders(s.B, s.Lq, s.valid);
}

// is_tried: whether these orders are pinned and timed beside the chosen ones.
OrderTimes time_orders(const Shape& shape,
                       const std::function<bool(const Orders& orders, const Orders& chosen)>& is_tried,
                       double seconds) {
  const c10::InferenceMode inference;
  const auto layer = make_layer(shape, torch::dtype(at::kFloat), xattn::AttentionWeights::none);
  xattn::FreezeOptions options;
  if (shape.learned_query) options.query = layer.query[0];
  const auto frozen = layer.module->freeze(options);
  OrderTimes result = {.orders = {chosen_by(frozen, layer)}, .us = {}};
  std::vector<std::function<void()>> calls = {call_of(layer, frozen)};
  for (int i = 0; i < xattn::kOrders * xattn::kOrders; ++i) {
    const Orders orders = {static_cast<Order>(i / xattn::kOrders), static_cast<Order>(i % xattn::kOrders)};
    if (!is_tried(orders, result.orders.front())) continue;
    options.plan = xattn::PlanMode::pin(orders);
    result.orders.push_back(orders);
    calls.emplace_back(call_of(layer, layer.module->freeze(options)));
  }
  for (const auto& call : calls) call();
  for (const auto& times : measure(calls, seconds, [] {})) result.us.push_back(times.median);
  return result;
}

ordered_json names_of(const Orders& orders) {
  return {xattn::name_of(orders.logits), xattn::name_of(orders.values)};
}

}  // namespace

ordered_json measure_crossover(double seconds) {
  constexpr int64_t kLongest = 2048;
  Shape shape = {.name = "crossover", .H = 8, .G = 8, .Eq = 512, .Ek = 512, .Eo = 512, .d = 64, .e = 64};
  const auto is_tried = [](const Orders& orders, const Orders&) {
    constexpr std::array kTried = {Order::standard, Order::fold_into_query, Order::fold_into_context};
    return orders.logits == orders.values && std::ranges::count(kTried, orders.logits) > 0;
  };
  auto cells = ordered_json::array();
  for (shape.Lq = 1; shape.Lq <= kLongest; shape.Lq *= 2) {
    for (shape.Lk = 1; shape.Lk <= kLongest; shape.Lk *= 2) {
      shape.valid = shape.Lk;
      const auto times = time_orders(shape, is_tried, seconds);
      ordered_json us = {{"automatic", times.us.front()}};
      for (size_t i = 1; i < times.us.size(); ++i) us[std::string(name_of(times.orders[i].logits))] = times.us[i];
      cells.push_back({{"Lq", shape.Lq}, {"Lk", shape.Lk}, {"chosen", names_of(times.orders.front())}, {"us", us}});
    }
  }
  return cells;
}

ordered_json measure_regret(const Shape& shape, double seconds) {
  constexpr double kMost = 4;  // times the operations of the chosen orders
  if (shape.timed == Timed::backward) return nullptr;
  auto request = shapes::plan_request(shape);
  request.weights_are_frozen = true;
  request.rates = xattn::Rates::kernels(1);
  const auto operations = [&](const Orders& orders) { return cost_of(orders, request).operations; };
  const auto is_tried = [&](const Orders& orders, const Orders& chosen) {
    return orders != chosen && illegal_for_logits(orders.logits, request).empty() &&
           illegal_for_values(orders.values, request).empty() && operations(orders) <= kMost * operations(chosen);
  };
  const auto times = time_orders(shape, is_tried, seconds);
  const auto best = static_cast<size_t>(std::ranges::min_element(times.us) - times.us.begin());
  return {{"row", shape.name},         {"chosen", names_of(times.orders.front())},
          {"us", times.us.front()},    {"best", names_of(times.orders[best])},
          {"best_us", times.us[best]}, {"left_out", xattn::kOrders * xattn::kOrders - times.us.size()}};
}

}  // namespace bench
