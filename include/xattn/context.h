// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/mask.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace xattn {

/// What a context will be used for.
struct ContextOptions {
  static constexpr int64_t kMany = -1;
  /// Query rows of one batch entry that the context will serve in all, over every call. Few rows are served best by a context
  /// as it is, many by one that is projected or folded first.
  int64_t expected_queries = kMany;
};

/// The key/value side of cross attention, made once by `CrossAttention::context` and attended to as often as one likes.
///
/// It belongs to the weights that made it: after an optimizer step, a load, or a move to another type or device, `attend` refuses
/// it. (Changes through `Tensor::data()` cannot be seen; of torch's optimizers, SGD makes such. Make a new context for every step.)
/// It takes part in autograd, so gradients of several `attend` calls meet in the same key and value.
/// Never changes after it is made; copies share storage; safe to share between threads.
class XATTN_API Context {
 public:
  /// Projected keys, [B, G, Lk, d].
  const at::Tensor& key() const { return key_; }
  /// Projected values, [B, G, Lk, e].
  const at::Tensor& value() const { return value_; }
  const Mask& mask() const { return mask_; }
  /// False if it was made from unbatched [Lk, E] tensors, and so takes an unbatched query.
  bool is_batched() const { return batched_; }
  int64_t batch_size() const { return key_.size(0); }
  int64_t length() const { return key_.size(2); }

 private:
  friend class CrossAttentionImpl;
  friend class DecoupledCrossAttentionImpl;
  friend class ContextParallel;

  // One weight as it was when the context was made. Holding the tensor keeps its address from being used again.
  struct Stamp {
    at::Tensor tensor;
    const void* data;
    uint32_t version;  // counts in-place changes; 0 for inference tensors, which have no counter
  };
  using Weights = std::vector<at::Tensor>;

  Context(at::Tensor key, at::Tensor value, Mask mask, bool batched, const Weights& made_from);
  void check_made_from(std::string_view caller, const Weights& weights) const;
  static Stamp stamp(const at::Tensor& weight);

  at::Tensor key_;
  at::Tensor value_;
  Mask mask_;
  bool batched_;
  std::vector<Stamp> made_from_;
};

}  // namespace xattn
