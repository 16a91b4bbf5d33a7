// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/linear.h>
#include <torch/types.h>
#include <xattn/attention.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>
#include <xattn/norm.h>
#include <xattn/plan.h>

#include <string>
#include <string_view>
#include <vector>

// The steps that CrossAttention and DecoupledCrossAttention share. `caller` begins a message: "[caller] key must have ...".
namespace xattn::detail {

/// Throws unless key and value fit their projections and each other, and the mask fits them.
void check_key_value(std::string_view caller,
                     const torch::Tensor& key,
                     const torch::Tensor& value,
                     const Mask& mask,
                     const torch::nn::Linear& key_linear,
                     const torch::nn::Linear& value_linear,
                     int64_t num_heads);

/// Throws unless the query fits its projection and its context.
void check_query(std::string_view caller,
                 const torch::Tensor& query,
                 const Context& context,
                 const torch::nn::Linear& query_linear);

/// The same with a context of this batch size.
void check_query(std::string_view caller,
                 const torch::Tensor& query,
                 bool is_batched,
                 int64_t batch_size,
                 const torch::nn::Linear& query_linear);

/// [L, E] -> [1, L, E]; anything else stays as it is.
torch::Tensor batched(const torch::Tensor& x);

/// As the module does it: [..., in] -> [..., out].
torch::Tensor project(const torch::nn::Linear& module, const torch::Tensor& x);

/// [B, L, n * size] -> [B, n, L, size], normalised on the way if there is a norm.
torch::Tensor split_heads(const torch::Tensor& x, int64_t n, int64_t size, NormScope scope, Norm& norm);
torch::Tensor split_heads(const torch::Tensor& x, int64_t n, int64_t size);

/// With n more columns of zeros; an undefined tensor stays so.
torch::Tensor with_zeros(const torch::Tensor& x, int64_t n);

/// [B, n, L, size] -> [B, L, n * size].
torch::Tensor merge_heads(const torch::Tensor& x);

/// `attention` with these options; throws unless the mask fits. q [B, H, Lq, d] -> output [B, H, Lq, e].
/// With bias_kv the last key of the context is the learned one.
AttentionResult attend_heads(std::string_view caller,
                             const torch::Tensor& q,
                             const Context& context,
                             const CrossAttentionOptions& options,
                             bool training);

/// The parameters that make a context; undefined where there is none.
std::vector<torch::Tensor> context_weights(const torch::nn::Linear& key_linear,
                                           const torch::nn::Linear& value_linear,
                                           const Norm& key_norm,
                                           const torch::Tensor& bias_k = {},
                                           const torch::Tensor& bias_v = {});

/// The norm of projected queries or keys of so many heads; empty without qk_norm.
Norm make_qk_norm(const CrossAttentionOptions& options, int64_t heads);

/// What the planner must know of a layer; its rates, types and purpose are the caller's to add.
PlanRequest request_of(const CrossAttentionOptions& resolved, int64_t B, int64_t Lq, int64_t Lk);

/// The same for a context that serves so many query rows in all (ContextOptions::expected_queries). Throws if they are negative.
PlanRequest for_context(std::string_view caller, PlanRequest request, int64_t expected_queries);

/// Refuses what cannot be, in reading order. Options without a value have their defaults; for a plan see `check_plan`.
void check_options(std::string_view caller, const CrossAttentionOptions& options);

/// Refuses options that have been changed, since the module was made, to what cannot be or does not fit its parameters.
void check_module(std::string_view caller, const CrossAttentionImpl& module);

/// The same for one projection, by its name, of sizes and a bias that options say.
void check_projection(
    std::string_view caller, std::string_view name, const torch::nn::Linear& linear, int64_t in, int64_t out, bool has_bias);

/// The same for a norm, which may be empty.
void check_norm(std::string_view caller, std::string_view name, const Norm& norm, NormKind kind, int64_t size, double eps);

/// Refuses orders that are illegal for such a layer, and rates that cannot be.
void check_plan(std::string_view caller, const PlanMode& plan, PlanRequest request);

/// What a user would type to have these options, as in "CrossAttentionOptions(8, 12, 10, 16).num_heads(2)".
std::string printed(const CrossAttentionOptions& resolved);

}  // namespace xattn::detail
