// SPDX-License-Identifier: Apache-2.0
#include "modules/queries.h"

#include "attention/mask_parts.h"
#include "modules/inputs.h"

namespace xattn::detail {

using at::Tensor;

Queries::Queries(const Tensor& query, int64_t B) : n(B > 0 ? query.size(0) / B : 1), Lq(query.size(1)) {
  rows = n == 1 ? query : query.reshape({B, n * Lq, query.size(2)});
}

Mask Queries::mask(const Mask& of_context, int64_t Lk, at::ScalarType logits) const {
  if (n == 1) return of_context;
  const auto repeated = [this](const Tensor& x) { return x.size(2) == 1 ? x : x.repeat({1, 1, n, 1}); };
  Mask result;
  if (const auto keep = allowed_keys(of_context, Lq, Lk, rows.device()); keep.defined()) result = Mask::dense(repeated(keep));
  if (const auto bias = total_bias(of_context, Lk, logits); bias.defined()) result = result & Mask::bias(repeated(bias));
  return result;
}

AttentionResult Queries::results(AttentionResult of_rows) const {
  if (n == 1) return of_rows;
  auto& [output, weights, log_sum_exp] = of_rows;
  const auto all = output.size(0) * n;
  output = output.reshape({all, Lq, output.size(2)});
  if (weights.defined() && weights.dim() == 3) weights = weights.reshape({all, Lq, weights.size(2)});
  if (weights.defined() && weights.dim() == 4) weights = weights.unflatten(2, {n, Lq}).transpose(1, 2).flatten(0, 1);
  return of_rows;
}

Tensor several_queries(std::string_view caller, const LayerWeights& layer, const Tensor& query, bool is_batched, int64_t B) {
  const auto given = query.defined() && query.dim() == 3 ? query.size(0) : 1;
  return query_input(caller, layer, query, is_batched, B > 0 && given > 0 && given % B == 0 ? given : B);
}

}  // namespace xattn::detail
