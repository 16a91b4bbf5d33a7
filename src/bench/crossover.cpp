// SPDX-License-Identifier: Apache-2.0
#include "bench/crossover.h"

#include <torch/types.h>
#include <torch/utils.h>
#include <xattn/cross_attention.h>
#include <xattn/frozen.h>
#include <xattn/plan.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/measure.h"

namespace bench {

nlohmann::ordered_json measure_crossover(double seconds) {
  using xattn::Order;
  constexpr int64_t kFeatures = 512;
  constexpr int64_t kLongest = 2048;
  const c10::InferenceMode inference;
  torch::manual_seed(0);
  xattn::CrossAttention layer(xattn::CrossAttentionOptions(kFeatures, kFeatures, kFeatures, kFeatures)
                                  .num_heads(8)
                                  .attention_weights(xattn::AttentionWeights::none));
  layer->eval();
  std::vector<std::string> names = {"automatic"};
  std::vector<xattn::Frozen> frozen = {layer->freeze()};
  for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
    names.emplace_back(xattn::name_of(order));
    frozen.push_back(layer->freeze({.plan = xattn::PlanMode::pin({order, order})}));
  }
  auto cells = nlohmann::ordered_json::array();
  for (int64_t Lq = 1; Lq <= kLongest; Lq *= 2) {
    for (int64_t Lk = 1; Lk <= kLongest; Lk *= 2) {
      const auto query = torch::randn({1, Lq, kFeatures}), context = torch::randn({1, Lk, kFeatures});
      std::vector<std::function<void()>> calls;
      for (const auto& each : frozen) {
        calls.emplace_back([&] { each.forward(query, context, context); });
        calls.back()();
      }
      const auto chosen = frozen.front().orders(1, Lq, Lk);
      nlohmann::ordered_json us;
      const auto times = measure(calls, seconds, [] {});
      for (size_t i = 0; i < calls.size(); ++i) us[names[i]] = times[i].median;
      cells.push_back({{"Lq", Lq}, {"Lk", Lk}, {"chosen", {name_of(chosen.logits), name_of(chosen.values)}}, {"us", us}});
    }
  }
  return cells;
}

}  // namespace bench
