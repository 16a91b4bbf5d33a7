// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "base/text.h"
#include "modules/layer.h"
#include "modules/norm_weights.h"

// The arguments of a call, checked and brought to one form, and its results as the caller expects them. `caller` begins a
// message: "[caller] key must have ...".
namespace xattn::detail {

/// Keys and values with a batch axis, [B, Lk, Ek] and [B, Lk, Ev].
struct ContextInputs {
  at::Tensor key, value;
  Mask mask;
  bool is_batched;  ///< as the caller gave them

  int64_t B() const { return key.size(0); }
  int64_t Lk() const { return key.size(1); }
};

/// Throws unless x is [B, length, features] or [length, features].
void check_shape(std::string_view caller, const char* name, const at::Tensor& x, const char* length, int64_t features);
/// Throws unless x is on the device of the parameters.
void check_device(std::string_view caller, const char* name, const at::Tensor& x, at::Device device);

/// Indices, a tensor of one axis, as int64. Throws unless they are of an integer type and, on the CPU, in [0, n).
at::Tensor checked_indices(std::string_view caller, const at::Tensor& indices, int64_t n);

/// Throws unless key and value fit the layer and each other. The mask is left to `check_mask`.
ContextInputs context_inputs(
    std::string_view caller, const LayerWeights& layer, const at::Tensor& key, const at::Tensor& value, const Mask& mask);

/// Throws unless the mask fits these keys and, if their number is known, the query rows.
void check_mask(std::string_view caller, const LayerWeights& layer, const ContextInputs& context, std::optional<int64_t> Lq);

/// Throws unless keys and values that are appended to a context have its batch.
void check_appended(std::string_view caller, const ContextInputs& more, bool is_batched, int64_t B);

/// Applies a norm to keys and values, once if they are one tensor.
void normalise(ContextInputs& context, const NormWeights& norm);

/// query [B, Lq, Eq] or, unless `is_batched`, [Lq, Eq] -> [B, Lq, Eq]. Throws unless it fits the layer and its context.
at::Tensor query_input(std::string_view caller, const LayerWeights& layer, const at::Tensor& query, bool is_batched, int64_t B);

/// Drops the keys after the last that any batch entry needs, by lengths in host memory; none if bias_kv appends a key. Returns
/// the number of dropped keys: returned weights get as many columns of zeros.
int64_t drop_padding(const LayerWeights& layer, ContextInputs& context);

/// "a batch of 2", or "unbatched".
inline auto batch_of(bool is_batched, int64_t B) {
  return [is_batched, B] { return is_batched ? formatted("a batch of {}", B) : "unbatched"; };
}

/// [L, E] -> [1, L, E]; three axes stay.
at::Tensor batched(const at::Tensor& x);

/// The results of a call, with a batch axis if the inputs had one, and with columns of zeros for dropped keys.
std::tuple<at::Tensor, at::Tensor> results(const AttentionResult& result, bool is_batched, int64_t dropped_keys = 0);

}  // namespace xattn::detail
