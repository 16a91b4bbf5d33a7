// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <xattn/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace xattn {

/// Where the diagonal of a causal mask lies when there are not as many keys as queries. With Lq = Lk both are the same.
enum class CausalAlignment {
  upper_left,   ///< query i sees keys 0..i: both sequences start together (torch's `is_causal`)
  lower_right,  ///< query i sees keys 0..i + Lk - Lq: both sequences end together (decoding with a cache)
};

/// Which keys each query may attend to. One meaning everywhere: true = may attend.
///
/// A mask broadcasts: axes of size 1 stand for every batch entry, head or query, and are never copied. Masks combine by `&`:
/// a key must be allowed by both, biases add up. A query row with no key left gives a zero row in the weights and before the
/// output projection, and no gradient, on every path.
///
/// A bias is read in the type of the logits, which is that of the projected queries (under autocast, autocast's): biases are
/// added up in float32, or in float64 for float64, and a sum that is -inf in the logits' type forbids its key. So float64's
/// lowest number forbids a key of a float32 layer, and -1e9 one of a float16 layer; a number that stays finite, as -1e9 in
/// float32, does not forbid: a row of nothing else is an average over its keys. A masked key of finite content has no influence; NaN or infinity under a mask may spread,
/// as in PyTorch, because zero times NaN is NaN.
/// For unbatched inputs give masks as for B = 1. A mask holds the tensors that it was made from and never changes after; safe to
/// share between threads.
///
///   auto mask = Mask::lengths(text_lengths, /*Lk=*/77) & Mask::causal(CausalAlignment::lower_right);
class XATTN_API Mask {
 public:
  /// No restriction.
  Mask() = default;

  /// Keys that are real, as opposed to padding.
  /// valid: bool [B|1, Lk]. Throws c10::TypeError unless bool, c10::ValueError unless two axes.
  static Mask key_padding(const at::Tensor& valid);

  /// The first `lengths[b]` keys of batch entry b are real; the others, up to Lk, are padding.
  /// lengths: an integer type, [B], each in [0, Lk] (checked on the CPU; on other devices, where a check would stall, lengths
  /// beyond the range act as its nearest end).
  static Mask lengths(const at::Tensor& lengths, int64_t Lk);

  /// keep: bool, one of [Lq, Lk], [B, Lq, Lk], [B|1, H|1, Lq|1, Lk].
  static Mask dense(const at::Tensor& keep);

  /// Added to the scaled logits; what is -inf in their type forbids a key (see above). Receives its gradient when it asks for one.
  /// bias: a floating point type, same shapes as `dense`.
  static Mask bias(const at::Tensor& bias);

  /// No key after the query's own place. Never applied by default.
  static Mask causal(CausalAlignment alignment);

  /// From the arguments of torch's MultiheadAttention, where a boolean true means IGNORED and a float is added to the logits.
  /// key_padding_mask: undefined or [B, Lk]. attn_mask: undefined, [Lq, Lk] or [B * num_heads, Lq, Lk].
  static Mask from_multihead_attention(const at::Tensor& key_padding_mask, const at::Tensor& attn_mask, int64_t num_heads);

  /// From the arguments of torch's scaled_dot_product_attention for four-axis inputs, where a boolean true means kept and
  /// a float is added to the logits. attn_mask: undefined or broadcastable from the right to [B, H, Lq, Lk] (so three axes are
  /// [H|1, Lq|1, Lk], unlike `dense`). is_causal aligns to the upper left, as there.
  static Mask from_scaled_dot_product_attention(const at::Tensor& attn_mask, bool is_causal = false);

  /// From an additive mask that marks forbidden keys by a large negative number in place of -inf (finfo.min, -10000): entries
  /// at or below -10000 forbid the key, so that a row of them gives zeros rather than a uniform average; the others are a bias.
  /// mask: a floating point type, same shapes as `dense`.
  static Mask from_additive(const at::Tensor& mask);

  /// Both restrictions at once. Nothing is copied; shapes are checked where the mask is used.
  XATTN_API friend Mask operator&(const Mask& a, const Mask& b);

  /// True if nothing is restricted and nothing is added.
  bool is_none() const;

  /// True if the mask is `causal` alone and, at these sizes, means query i sees keys 0..i: what fused kernels know by a flag.
  bool is_causal_only(int64_t Lq, int64_t Lk) const;

  /// All restrictions in one: bool, broadcastable to [B, H, Lq, Lk] with a full last axis; undefined if there is none.
  at::Tensor keep(int64_t Lq, int64_t Lk, at::Device device) const;

  /// The sum of all biases, broadcastable to [B, H, Lq, Lk]; undefined if there is none. For logits of a type: in float32, or
  /// float64 for float64, with -inf where that type has it. Without one, a single bias is returned as it is.
  at::Tensor additive(std::optional<at::ScalarType> logits = {}) const;

  /// Whether anything is added.
  bool has_bias() const { return !bias_.empty(); }

  /// Whether a bias asks for its gradient.
  bool is_learned() const;

  /// The query rows that have no key for logits of this type: bool, broadcastable to [B, H, Lq, 1]; undefined if the kind of the
  /// mask (not its values, which are never looked at) shows that there are none.
  at::Tensor empty_rows(int64_t Lq, int64_t Lk, at::Device device, std::optional<at::ScalarType> logits = {}) const;

  /// Whether the kind of the mask leaves it open that a query row has no key.
  bool may_have_empty_rows(int64_t Lq, int64_t Lk) const;

  /// Throws, in the name of `caller`, c10::ValueError unless the mask fits these sizes (any number of queries where Lq is not
  /// known yet), c10::TypeError unless it is on this device.
  void check(std::string_view caller, int64_t B, int64_t H, std::optional<int64_t> Lq, int64_t Lk, at::Device device) const;

  /// The mask for contexts with one more key behind the last, to which every query may attend.
  Mask with_free_key(int64_t Lq, int64_t Lk, at::Device device) const;

  /// The lengths of all batch entries, or of one for all, if the mask has been built from lengths in host memory; else nothing.
  /// Where there were several, the least; c10::ValueError if they are of several batch sizes.
  std::vector<int64_t> host_lengths() const;

  /// What the mask says besides these lengths.
  Mask without_lengths() const;

  /// How many of Lk keys any batch entry may need, as far as the host knows: the greatest of `host_lengths`, at least one if
  /// there is one; all, where there are none or where `causal` counts from the last key.
  int64_t needed_keys(int64_t Lk) const;

  /// For contexts that are cut behind their first Lk keys. Throws c10::ValueError unless the mask has so many.
  Mask first_keys(int64_t Lk) const;

  /// For keys [first, first + n) of Lk alone, with `causal` counted over all of them. Throws c10::ValueError unless they are.
  Mask shard(int64_t first, int64_t n, int64_t Lq, int64_t Lk, at::Device device) const;

  /// For batch entries [begin, end) alone. Throws c10::ValueError for entries that the mask does not have.
  Mask slice(int64_t begin, int64_t end) const;

  /// For the batches of several masks, one behind the other; each with the size of its batch. Throws c10::ValueError
  /// unless there is one, all have been built alike and for as many keys, and each fits its batch.
  static Mask cat(const std::vector<std::pair<Mask, int64_t>>& masks);

  /// The same mask with its tensors on another device.
  Mask to(at::Device device) const;

 private:
  struct Part {
    const char* name;                   // the builder's, for messages
    at::Tensor tensor;                  // [B|1, H|1, Lq|1, Lk]
    std::vector<int64_t> lengths = {};  // it says, and nothing else; empty if it does not, or if they are not in host memory
  };
  // The last key that query i sees is i + diagonal; nothing without a causal part.
  std::optional<int64_t> diagonal(int64_t Lq, int64_t Lk) const;

  std::vector<Part> keep_;  // bool; a key must be allowed by all
  std::vector<Part> bias_;  // floating point; added up
  bool upper_left_ = false;
  bool lower_right_ = false;
};

}  // namespace xattn
