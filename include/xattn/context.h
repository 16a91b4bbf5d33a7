// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace xattn {

/// The expected use of a context.
struct ContextOptions {
  static constexpr int64_t kMany = -1;
  /// Query rows of one batch entry that will attend to the context, over all calls and beams; kMany, the default, if unknown.
  /// For few rows it is cheapest to keep the context as given, for many to project or fold it first. If unknown, modules
  /// project it, and frozen layers plan for many; a pinned plan is obeyed.
  int64_t expected_queries = kMany;
  /// Keys that the context is expected to grow to by `append`: memory for so many is allocated, and the plan is made for them.
  /// 0, the default, if unknown. Where every append copies (see there), no memory is allocated.
  int64_t capacity = 0;
  /// Whether key and value are kept as the caller's tensors and not copied; they must not be written to afterwards. Many layers
  /// can then use one copy of an encoder's output. Only orders that read keys and values as given are then used; throws
  /// c10::ValueError if there are none (key norms, norm_context, bias_kv, autocast, another pinned plan).
  bool share = false;
};

/// Keys and values of cross attention, prepared once by `CrossAttention::context` for any number of calls to `attend`.
///
/// A context is valid only with the weights that made it: after an optimizer step, a load, or a move to another type or device,
/// `attend` throws. (Changes through `Tensor::data()`, or of parameters made under InferenceMode, cannot be detected; among
/// torch's optimizers, SGD makes the former. Make a new context for every step.) Gradients flow through it, and those of
/// several calls add up in the same key and value. Immutable; copies share storage; safe to share between threads.
///
/// Contexts are values: `join`, `append`, `truncate` and `select` return new ones, which equal a context made at once from all
/// of their keys, with the mask of those keys. A causal mask counts positions over all keys. The order of products stays as
/// first planned. Arguments that do not fit throw c10::ValueError or c10::TypeError; indices on another device than the CPU are
/// not checked.
///
///   auto context = attention->context(start, start, {}, {.capacity = 100});                            // start [B, L, E]
///   context = context.append(token, token);                                                            // token [B, 1, E]
///   auto [output, weights] = attention->attend(token, context);        // causal self-attention, one token after another
class XATTN_API Context {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  Context() = default;

  /// The orders of products for which it was made.
  const Orders& orders() const;
  /// Keys as the order of the logits reads them: standard, K [B, G, Lk, d], with bias_kv one row more;
  /// raw, [B, Lk, Ek]; folded, [B, H * Lk, Eq].
  const at::Tensor& key() const;
  /// Values as the order of the values reads them: standard, V [B, G, Lk, e], with bias_kv one row more;
  /// raw, [B, Lk, Ev]; folded, [B, H * Lk, Eo].
  const at::Tensor& value() const;
  const Mask& mask() const;
  /// False if it was made from unbatched [Lk, E] tensors; its queries are then unbatched too.
  bool is_batched() const;
  int64_t batch_size() const;
  int64_t length() const;

  /// Several contexts, one behind the other, as one: each passage, frame or document is encoded once. They may differ in length
  /// and mask, but must have the same batch, orders, weights and causal mask; orders are the same for equal expected_queries
  /// and a capacity for the longest. Costs one copy of all keys and values.
  [[nodiscard]] static Context join(const std::vector<Context>& contexts);

  /// This context followed by key [B, n, Ek] and value [B, n, Ev], with a mask for these n keys; a causal mask of the context
  /// goes on. This context stays as it is. Throws c10::ValueError if the weights have changed since it was made.
  ///
  /// Only the new keys are projected (and normalised by a block's norm of its context). Earlier keys are copied only if the
  /// buffer is full or another append has used the space behind them; the new buffer has space for half as many more. Each
  /// append copies everything if gradients are recorded (it is a concatenation), in folded orders, and with bias_kv.
  [[nodiscard]] Context append(const at::Tensor& key, const at::Tensor& value, const Mask& mask = {}) const;

  /// The first n keys, 0 <= n <= length(). Copies nothing but masks, except in folded orders and with bias_kv. The next append
  /// to it copies everything once.
  [[nodiscard]] Context truncate(int64_t n) const;

  /// The batch entries with these indices, an integer tensor [n]: the beams that a search keeps, in a new order. Copies the
  /// selected entries and keeps the room for more keys.
  [[nodiscard]] Context select(const at::Tensor& indices) const;

  struct State;  ///< defined inside the library
  explicit Context(std::shared_ptr<const State> state);
  const State& state() const;

 private:
  std::shared_ptr<const State> state_;
};

}  // namespace xattn
