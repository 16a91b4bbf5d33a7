// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/decoupled.h>
#include <xattn/mask.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "modules/layer.h"

// A decoupled layer as one `Layer` for each context. Context 0 is the first one; context i > 0 is added[i - 1].
namespace xattn::detail {

/// The layer of a context: an added one has its own projections, and everything else from the first context.
LayerWeights weights_of(const DecoupledCrossAttentionImpl& module, size_t context);

/// The caller named in messages about a context: "layer", or "layer.added0".
std::string caller_of(std::string_view layer, size_t context);

/// Throws unless there are as many added contexts as in the options.
void check_count(std::string_view layer, size_t given, size_t expected);
/// Throws unless an added context has the batch of the first one.
void check_batch(std::string_view layer, size_t context, bool is_batched, int64_t B, bool first_is_batched, int64_t first_B);
/// Throws unless values of the plan end in heads, if it is pinned.
void check_ends_in_heads(std::string_view layer, const PlanMode& plan);

/// One context of a call, as its orders read it.
struct Part {
  Layer layer;
  LayerContext context;
  Mask mask;
  double scale;
};

/// query [B, Lq, Eq] -> output [B, Lq, Eo], and the weights of the first context, whose mask is that of `how`.
AttentionResult attend_to(const std::vector<Part>& parts, const at::Tensor& query, AttentionOptions how);

}  // namespace xattn::detail
