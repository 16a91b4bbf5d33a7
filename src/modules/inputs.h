// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/linear.h>
#include <torch/types.h>
#include <xattn/context.h>
#include <xattn/mask.h>

#include <string_view>

// What the callers of modules hand in: checked once, and brought to one form. `caller` begins a message: "[caller] key must have ...".
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

}  // namespace xattn::detail
