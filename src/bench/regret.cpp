// SPDX-License-Identifier: Apache-2.0
#include "bench/regret.h"

#include <torch/utils.h>
#include <xattn/frozen.h>
#include <xattn/plan.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "bench/bench_layer.h"
#include "bench/measure.h"

namespace bench {

using nlohmann::ordered_json;
using xattn::Orders;

namespace {

constexpr double kTooMany = 4;  // times the operations of what was chosen

std::vector<Orders> all_orders() {
  std::vector<Orders> all;
  for (int logits = 0; logits < xattn::kOrders; ++logits) {
    for (int values = 0; values < xattn::kOrders; ++values) {
      all.push_back({static_cast<xattn::Order>(logits), static_cast<xattn::Order>(values)});
    }
  }
  return all;
}

// What is timed of a row, by one frozen layer. Its context, where the row keeps one, is made now.
std::function<void()> call_of(const Layer& layer, const xattn::Frozen& frozen) {
  const bool learned = layer.shape.learned_query;
  const auto mask = mask_of(layer);
  if (layer.shape.timed == shapes::Timed::attend) {
    return [&layer, frozen, context = frozen.context(layer.key, layer.value, mask)] { frozen.attend(layer.query, context); };
  }
  return [&layer, frozen, learned, mask] {
    learned ? frozen.forward(layer.key, layer.value, mask) : frozen.forward(layer.query, layer.key, layer.value, mask);
  };
}

Orders chosen_by(const Layer& layer, const xattn::Frozen& frozen) {
  const auto& s = layer.shape;
  if (s.timed == shapes::Timed::attend) return frozen.context(layer.key, layer.value, mask_of(layer)).orders();
  return frozen.orders(s.B, s.Lq, s.valid);
}

ordered_json names_of(const Orders& orders) {
  return {xattn::name_of(orders.logits), xattn::name_of(orders.values)};
}

}  // namespace

ordered_json measure_regret(const shapes::Shape& shape, double seconds) {
  if (shape.timed == shapes::Timed::backward) return nullptr;
  const c10::InferenceMode inference;
  const auto layer = make_layer(shape, torch::dtype(at::kFloat), xattn::AttentionWeights::none);
  xattn::FreezeOptions options;
  if (shape.learned_query) options.query = layer.query[0];
  const auto frozen = layer.module->freeze(options);
  const auto chosen = chosen_by(layer, frozen);

  auto request = shapes::plan_request(shape);
  request.weights_are_frozen = true;
  request.rates = xattn::Rates::kernels(1);
  const auto most = kTooMany * cost_of(chosen, request).operations;
  std::vector<Orders> tried = {chosen};
  std::vector<std::function<void()>> calls = {call_of(layer, frozen)};
  for (const auto& orders : all_orders()) {
    const bool illegal =
        !illegal_for_logits(orders.logits, request).empty() || !illegal_for_values(orders.values, request).empty();
    if (orders == chosen || illegal || cost_of(orders, request).operations > most) continue;
    options.plan = xattn::PlanMode::pin(orders);
    tried.push_back(orders);
    calls.push_back(call_of(layer, layer.module->freeze(options)));
  }
  for (const auto& call : calls) call();
  const auto times = measure(calls, seconds, [] {});
  const auto best = std::ranges::min_element(times, {}, &Times::median) - times.begin();
  return {{"row", shape.name},
          {"chosen", names_of(chosen)},
          {"us", times.front().median},
          {"best", names_of(tried[static_cast<size_t>(best)])},
          {"best_us", times[static_cast<size_t>(best)].median},
          {"left_out", all_orders().size() - tried.size()}};
}

}  // namespace bench
