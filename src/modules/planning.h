// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <cstdint>
#include <string_view>

#include "modules/layer.h"

// Requests to the planner, made from modules and frozen layers.
namespace xattn::detail {

/// The code that a module with this weight runs on.
RunsOn runs_on(const at::Tensor& weight);

/// The request for a call of a module in its current state. inputs_train: whether query, key or value require a gradient.
PlanRequest request_of(const CrossAttentionImpl& module,
                       const LayerWeights& weights,
                       int64_t B,
                       int64_t Lq,
                       int64_t Lk,
                       const Mask& mask,
                       AttentionWeights returned,
                       bool inputs_train);

/// The pinned orders of a request, or the cheapest.
Orders orders_of(const PlanRequest& request);

/// The sizes and norms of a layer; the caller adds rates, type and purpose.
PlanRequest request_of(const LayerWeights& weights, int64_t B, int64_t Lq, int64_t Lk);

/// The orders of a context that is kept: the cheapest, but standard in a module for an unknown number of query rows. Throws if
/// the context cannot be kept as the options require.
Orders orders_of_context(std::string_view caller, const PlanRequest& request, const ContextOptions& how);

/// The request for a context that serves the expected query rows over all calls. Throws for invalid options.
PlanRequest for_context(std::string_view caller, PlanRequest request, const ContextOptions& how);

/// Throws for orders that are illegal for such a layer, and for invalid rates.
void check_plan(std::string_view caller, const PlanMode& plan, const CrossAttentionOptions& options);

}  // namespace xattn::detail
