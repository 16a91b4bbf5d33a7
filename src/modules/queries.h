// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>

#include <cstdint>
#include <string_view>

#include "modules/layer.h"

namespace xattn::detail {

/// Several queries for each entry of a context, such as the beams of a search. They attend as one query of n * Lq rows.
struct Queries {
  /// query [B * n, Lq, Eq] for a context of B entries.
  Queries(const at::Tensor& query, int64_t B);

  /// The mask of a context of Lk keys for all rows, for logits of this type.
  Mask mask(const Mask& of_context, int64_t Lk, at::ScalarType logits) const;

  /// The results of all rows as those of each query, [B * n, ...].
  AttentionResult results(AttentionResult of_rows) const;

  at::Tensor rows;  ///< [B, n * Lq, Eq]
  int64_t n, Lq;
};

/// `query_input` for several queries for each of B entries: [B * n, Lq, Eq].
at::Tensor several_queries(
    std::string_view caller, const LayerWeights& layer, const at::Tensor& query, bool is_batched, int64_t B);

}  // namespace xattn::detail
