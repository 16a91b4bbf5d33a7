// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/cross_attention_options.h>
#include <xattn/plan.h>

#include <string_view>

// What the planner is asked, from what modules and frozen layers know.
namespace xattn::detail {

/// What a module with this weight runs on.
RunsOn runs_on(const at::Tensor& weight);

/// What the planner must know of a layer; its rates, types and purpose are the caller's to add.
PlanRequest request_of(const CrossAttentionOptions& resolved, int64_t B, int64_t Lq, int64_t Lk);

/// The same for a context that serves so many query rows in all (ContextOptions::expected_queries). Throws if they are negative.
PlanRequest for_context(std::string_view caller, PlanRequest request, int64_t expected_queries);

/// Refuses orders that are illegal for such a layer, and rates that cannot be.
void check_plan(std::string_view caller, const PlanMode& plan, PlanRequest request);

}  // namespace xattn::detail
