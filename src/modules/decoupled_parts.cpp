// SPDX-License-Identifier: Apache-2.0
#include "modules/decoupled_parts.h"

#include <algorithm>

#include "base/check.h"
#include "base/text.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_product.h"
#include "modules/inputs.h"
#include "plan/order_traits.h"

namespace xattn::detail {

using at::Tensor;

LayerWeights weights_of(const DecoupledCrossAttentionImpl& module, size_t context) {
  auto weights = weights_of(*module.attention);
  weights.sums_heads = true;
  if (context == 0) return weights;
  const auto& added = *module.added_projections[context - 1];
  weights.key = added.key_linear->weight, weights.key_bias = added.key_linear->bias;
  weights.value = added.value_linear->weight, weights.value_bias = added.value_linear->bias;
  weights.key_norm = norm_weights(added.key_norm);
  weights.bias_k = weights.bias_v = Tensor();
  return weights;
}

std::string caller_of(std::string_view layer, size_t context) {
  return context == 0 ? std::string(layer) : formatted("{}.added{}", layer, context - 1);
}

void check_count(std::string_view layer, size_t given, size_t expected) {
  check_value(given == expected, layer, "added must have as many contexts as the options, {}, but has {}.", expected, given);
}

void check_batch(std::string_view layer, size_t context, bool is_batched, int64_t B, bool first_is_batched, int64_t first_B) {
  check_value(is_batched == first_is_batched && B == first_B, layer, "added[{}] must be {}, as the first context, but is {}.",
              context - 1, batch_of(first_is_batched, first_B), batch_of(is_batched, B));
}

void check_ends_in_heads(std::string_view layer, const PlanMode& plan) {
  check_value(!plan.pinned || ends_in_heads(plan.orders.values), layer,
              "plan must have an order of the values that ends in heads, standard or fold_into_query, but has {}.",
              name_of(plan.orders.values));
}

AttentionResult attend_to(const std::vector<Part>& parts, const Tensor& x, AttentionOptions how) {
  if (parts.size() == 1) return attend(parts.front().layer, x, parts.front().context, how);
  const auto& first = parts.front().layer.weights;
  const bool is_projected =
      std::ranges::any_of(parts, [](const Part& part) { return projects_query(part.layer.orders.logits); });
  auto query = make_query(first, x, is_projected);
  auto result = attend_heads(parts.front().layer, query, parts.front().context, how).result;  // [B, H, Lq, e]
  result.output = merge_heads(result.output);                                                 // [B, Lq, H * e]
  how.weights = AttentionWeights::none;
  for (size_t i = 1; i < parts.size(); ++i) {
    how.mask = parts[i].mask;
    const auto more = attend_heads(parts[i].layer, query, parts[i].context, how).result;
    result.output = added(result.output, merge_heads(more.output), parts[i].scale);
  }
  query = {};  // its memory serves the next product
  result.output = project(result.output, first.output, first.output_bias);
  return result;
}

}  // namespace xattn::detail
