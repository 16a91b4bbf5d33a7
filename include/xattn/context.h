// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <cstdint>
#include <memory>

namespace xattn {

/// The expected use of a context.
struct ContextOptions {
  static constexpr int64_t kMany = -1;
  /// Query rows of one batch entry that will attend to the context over all calls; kMany, the default, if unknown. For few rows
  /// it is cheapest to keep the context as given, for many to project or fold it first.
  int64_t expected_queries = kMany;
};

/// Keys and values of cross attention, prepared once by `CrossAttention::context` for any number of calls to `attend`.
///
/// A context is valid only with the weights that made it: after an optimizer step, a load, or a move to another type or device,
/// `attend` throws. (Changes through `Tensor::data()` cannot be detected; among torch's optimizers, SGD makes them. Make a new
/// context for every step.) Gradients flow through it, and those of several calls add up in the same key and value. Immutable;
/// copies share storage; safe to share between threads.
class XATTN_API Context {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  Context() = default;

  /// The orders of products for which it was made.
  const Orders& orders() const;
  /// Keys as the order of the logits reads them: standard, K [B, G, Lk, d]; raw, [B, Lk, Ek]; folded, [B, H * Lk, Eq].
  const at::Tensor& key() const;
  /// Values as the order of the values reads them: standard, V [B, G, Lk, e]; raw, [B, Lk, Ev]; folded, [B, H * Lk, Eo].
  const at::Tensor& value() const;
  const Mask& mask() const;
  /// False if it was made from unbatched [Lk, E] tensors; its queries are then unbatched too.
  bool is_batched() const;
  int64_t batch_size() const;
  int64_t length() const;

  struct State;  ///< defined inside the library
  explicit Context(std::shared_ptr<const State> state);
  const State& state() const;

 private:
  std::shared_ptr<const State> state_;
};

}  // namespace xattn
