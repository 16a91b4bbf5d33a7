// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/linear.h>
#include <xattn/attention.h>
#include <xattn/call_options.h>
#include <xattn/cross_attention.h>
#include <xattn/mask.h>
#include <xattn/norm.h>

#include <string>
#include <string_view>

// Options of modules: checked when a module is made and when it is called, and printed. `caller` begins a message.
namespace xattn::detail {

/// Throws unless the options fit each other. Options without a value have their defaults; plans are left to `check_plan`.
void check_options(std::string_view caller, const CrossAttentionOptions& options);

/// Throws if options that were changed since the module was made do not fit each other or its parameters.
void check_module(std::string_view caller, const CrossAttentionImpl& module);

/// Throws if the options of a module's attention, which are read from `attention->options`, were changed elsewhere.
void check_unchanged(std::string_view caller, const CrossAttentionOptions& now, const CrossAttentionOptions& given);

/// Throws unless a projection has the sizes and the bias that the options of its module give.
void check_projection(
    std::string_view caller, std::string_view name, const torch::nn::Linear& linear, int64_t in, int64_t out, bool has_bias);

/// The same for a norm, which may be empty.
void check_norm(std::string_view caller, std::string_view name, const Norm& norm, NormKind kind, int64_t size, double eps);

/// The norm of projected queries or keys with this many heads. REQUIRES: qk_norm.
Norm make_qk_norm(const CrossAttentionOptions& options, int64_t heads);

/// The options of the attention in a call. Throws if the call names heads that the layer does not have.
AttentionOptions attention_options(
    std::string_view caller, const CrossAttentionOptions& options, const CallOptions& call, const Mask& mask, bool is_training);

/// Which weights a call returns.
AttentionWeights returned_weights(const CrossAttentionOptions& options, const CallOptions& call);

/// Code that makes these options, as in "CrossAttentionOptions(8, 12, 10, 16).num_heads(2)".
std::string printed(const CrossAttentionOptions& resolved);

}  // namespace xattn::detail
