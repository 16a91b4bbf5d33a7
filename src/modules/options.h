// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/linear.h>
#include <xattn/cross_attention.h>
#include <xattn/norm.h>

#include <string>
#include <string_view>

// Options of modules: checked when a module is made and when it is called, and printed. `caller` begins a message.
namespace xattn::detail {

/// Refuses what cannot be, in reading order. Options without a value have their defaults; for a plan see `check_plan`.
void check_options(std::string_view caller, const CrossAttentionOptions& options);

/// Refuses options that have been changed, since the module was made, to what cannot be or does not fit its parameters.
void check_module(std::string_view caller, const CrossAttentionImpl& module);

/// The same for one projection, by its name, of sizes and a bias that options say.
void check_projection(
    std::string_view caller, std::string_view name, const torch::nn::Linear& linear, int64_t in, int64_t out, bool has_bias);

/// The same for a norm, which may be empty.
void check_norm(std::string_view caller, std::string_view name, const Norm& norm, NormKind kind, int64_t size, double eps);

/// The norm of projected queries or keys of so many heads; empty without qk_norm.
Norm make_qk_norm(const CrossAttentionOptions& options, int64_t heads);

/// What a user would type to have these options, as in "CrossAttentionOptions(8, 12, 10, 16).num_heads(2)".
std::string printed(const CrossAttentionOptions& resolved);

}  // namespace xattn::detail
