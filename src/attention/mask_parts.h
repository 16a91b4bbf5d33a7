// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <xattn/mask.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

// Functions on masks for the rest of the library. Each loops over the parts of the mask, so a new kind of mask changes only
// mask.h and mask.cpp.
namespace xattn::detail {

/// Throws, with `caller` in the message, c10::ValueError unless the mask fits these sizes (any Lq, if it is not known yet), and
/// c10::TypeError unless it is on this device.
void check_mask(
    const Mask& mask, std::string_view caller, int64_t B, int64_t H, std::optional<int64_t> Lq, int64_t Lk, at::Device device);

/// All restrictions combined: bool, broadcastable to [B, H, Lq, Lk] with a full last axis; undefined if there is none.
at::Tensor allowed_keys(const Mask& mask, int64_t Lq, int64_t Lk, at::Device device);

/// The sum of all biases, broadcastable to [B, H, Lq, Lk] with a full last axis; undefined if there is none. With the type of the logits, it is
/// float32 (float64 for float64) and -inf wherever that type has -inf; without one, a single bias is returned unchanged.
at::Tensor total_bias(const Mask& mask, int64_t Lk, std::optional<at::ScalarType> logits = {});

bool has_bias(const Mask& mask);

/// Whether a bias requires a gradient.
bool is_learned(const Mask& mask);

/// The last key that `causal` allows query i is i + diagonal; no value if no part is causal.
std::optional<int64_t> causal_diagonal(const Mask& mask, int64_t Lq, int64_t Lk);

/// The mask without the parts that `causal_diagonal` describes.
Mask without_causal(const Mask& mask);

/// Whether the mask is `causal` alone and, at these sizes, query i sees keys 0..i: fused kernels have a flag for this.
bool is_causal_only(const Mask& mask, int64_t Lq, int64_t Lk);

/// Whether a query row may have no key, judged by the kinds of the parts and never by their values.
bool may_have_empty_rows(const Mask& mask, int64_t Lq, int64_t Lk);

/// The query rows that have no key for logits of this type: bool, broadcastable to [B, H, Lq, 1]; undefined unless
/// `may_have_empty_rows`.
at::Tensor rows_without_keys(
    const Mask& mask, int64_t Lq, int64_t Lk, at::Device device, std::optional<at::ScalarType> logits = {});

/// The mask for a context with the key of bias_kv appended: every query may attend to that key.
Mask with_bias_kv(const Mask& mask, int64_t Lq, int64_t Lk, at::Device device);

/// The lengths of all batch entries, or one length for all, if the mask was built from lengths in host memory; else empty.
/// If an entry has several lengths, the least counts. Throws c10::ValueError if they are for several batch sizes.
std::vector<int64_t> host_lengths(const Mask& mask);

/// The mask without the parts that `host_lengths` returns.
Mask without_lengths(const Mask& mask);

/// How many of the first Lk keys any batch entry may need: the largest of `host_lengths`, but at least one if Lk is; Lk if
/// there are no such lengths, or if `causal` counts from the last key.
int64_t needed_keys(const Mask& mask, int64_t Lk);

/// The mask for a context that is cut after its first Lk keys. Throws c10::ValueError if the mask has fewer.
Mask first_keys(const Mask& mask, int64_t Lk);

/// The mask for contexts that are joined along their keys; each mask comes with the number of its keys. `causal` counts over all
/// keys. Throws c10::ValueError unless all masks have the same causal part and their other axes fit each other.
Mask join_keys(const std::vector<std::pair<Mask, int64_t>>& masks);

/// The causal part of a mask alone.
Mask causal_part(const Mask& mask);

/// The mask of the batch entries with these indices, int64 [n]. Lengths stay in host memory if the indices are there.
Mask select_entries(const Mask& mask, const at::Tensor& indices);

/// The mask for keys [first, first + n) of Lk alone, with `causal` counted over all Lk. Throws c10::ValueError if there are no
/// such keys.
Mask shard_of_keys(const Mask& mask, int64_t first, int64_t n, int64_t Lq, int64_t Lk, at::Device device);

}  // namespace xattn::detail
