// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace xattn {

namespace detail {
struct MaskAccess;
}

/// Where the diagonal of a causal mask lies when there are not as many keys as queries. With Lq = Lk both are the same.
enum class CausalAlignment {
  upper_left,   ///< query i attends to keys 0..i: both sequences start together (torch's `is_causal`)
  lower_right,  ///< query i attends to keys 0..i + Lk - Lq: both sequences end together (decoding with a cache)
};

/// Which keys each query may attend to. One meaning everywhere: true = may attend.
///
/// A mask broadcasts: axes of size 1 stand for every batch entry, head or query, and are never copied. Masks combine by `&`:
/// a key must be allowed by both, and biases add up. A query row without any key has zeros in the weights and before the output
/// projection, and no gradient, on every path.
///
/// A bias is read in the type of the logits, which is the type of the projected queries (or autocast's). Biases are added up in
/// float32, or in float64 for float64, and a sum that is -inf in the type of the logits forbids its key. So the lowest float64
/// forbids a key of a float32 layer, and -1e9 forbids one of a float16 layer. A bias that stays finite, such as -1e9 in
/// float32, does not forbid its key: a row with only such biases is an average over its keys.
///
/// A masked key with finite values has no influence. NaN or infinity under a mask may spread, as in PyTorch, because zero times
/// NaN is NaN. For unbatched inputs, build masks as for B = 1. A mask keeps the tensors that it was built from, which must
/// not be written to afterwards; it may be shared between threads.
///
///   auto mask = Mask::lengths(text_lengths, /*Lk=*/77) & Mask::causal(CausalAlignment::lower_right);
class XATTN_API Mask {
 public:
  /// No restriction.
  Mask() = default;

  /// Keys that are real, as opposed to padding.
  /// valid: bool [B|1, Lk]. Throws c10::TypeError unless it is bool, and c10::ValueError unless it has two axes.
  static Mask key_padding(const at::Tensor& valid);

  /// The first `lengths[b]` keys of batch entry b are real; the others, up to Lk, are padding.
  /// lengths: an integer type, [B], each in [0, Lk]. This is checked only on the CPU, because a check on another device would
  /// wait for it; there, a length outside the range acts as the nearest end of the range.
  static Mask lengths(const at::Tensor& lengths, int64_t Lk);

  /// keep: bool, one of [Lq, Lk], [B, Lq, Lk], [B|1, H|1, Lq|1, Lk].
  static Mask dense(const at::Tensor& keep);

  /// Added to the scaled logits; -inf in their type forbids a key (see above). Receives a gradient if it requires one.
  /// bias: a floating point type, same shapes as `dense`.
  static Mask bias(const at::Tensor& bias);

  /// No key after the query's own position. Never applied by default. It stays a rule: in float32 on the CPU, inference in the
  /// standard orders skips the logits of keys that no row of a small group may attend to: about half of them in long sequences.
  static Mask causal(CausalAlignment alignment);

  /// From the arguments of torch's MultiheadAttention, where a boolean true means IGNORED and a float is added to the logits.
  /// key_padding_mask: undefined or [B, Lk]. attn_mask: undefined, [Lq, Lk] or [B * num_heads, Lq, Lk].
  static Mask from_multihead_attention(const at::Tensor& key_padding_mask, const at::Tensor& attn_mask, int64_t num_heads);

  /// From the arguments of torch's scaled_dot_product_attention for four-axis inputs, where a boolean true means kept and
  /// a float is added to the logits. attn_mask: undefined or broadcastable from the right to [B, H, Lq, Lk], the keys included
  /// (so three axes are [H|1, Lq|1, Lk|1], unlike `dense`, and a last axis of size 1 stands for all keys). is_causal aligns to
  /// the upper left, as there.
  static Mask from_scaled_dot_product_attention(const at::Tensor& attn_mask, bool is_causal = false);

  /// From an additive mask that marks forbidden keys by a large negative number instead of -inf (finfo.min, -10000): an entry
  /// at or below -10000 forbids its key, so that a row of them gives zeros and not a uniform average; others are a bias.
  /// mask: a floating point type, same shapes as `dense`.
  static Mask from_additive(const at::Tensor& mask);

  /// Both restrictions at once. No tensor is copied; shapes are checked where the mask is used.
  XATTN_API friend Mask operator&(const Mask& a, const Mask& b);

  /// True if nothing is restricted and nothing is added.
  bool is_none() const;

  /// The mask of batch entries [begin, end) alone. Throws c10::ValueError if the mask has no such entries.
  Mask slice(int64_t begin, int64_t end) const;

  /// The mask of several batches concatenated; each mask is given with the size of its batch. Throws c10::ValueError unless
  /// there is at least one mask, all were built in the same way for the same number of keys, and each fits its batch.
  static Mask cat(const std::vector<std::pair<Mask, int64_t>>& masks);

  /// The same mask with its tensors on another device.
  Mask to(at::Device device) const;

 private:
  friend struct detail::MaskAccess;  // for the functions of src/attention/mask_parts.h

  enum class Kind {
    keep,                // a bool tensor; a key must be allowed by all of these
    bias,                // a floating point tensor; these are added up
    causal_upper_left,   // no tensor
    causal_lower_right,  // no tensor
  };
  struct Part {
    Kind kind;
    const char* name;                   // name of its builder, for messages
    at::Tensor tensor = {};             // [B|1, H|1, Lq|1, Lk]
    bool all_keys = false;              // whether the last axis, then of size 1, stands for all keys
    std::vector<int64_t> lengths = {};  // the same restriction as lengths in host memory, if it was built from these: [B|1]
  };
  explicit Mask(Part part);

  std::vector<Part> parts_;  // sorted by kind, then in the order in which they were combined; `causal` at most once
};

}  // namespace xattn
