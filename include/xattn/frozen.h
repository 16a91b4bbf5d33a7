// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace xattn {

/// Keys and values for a `Frozen`: projected, folded or as given, whichever is cheapest for the expected queries. A context is
/// valid only with the Frozen that made it. Immutable; copies share storage; safe to share between threads.
class XATTN_API FrozenContext {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  FrozenContext() = default;

  const Orders& orders() const;
  Mask mask() const;  ///< of its keys, lengths included
  int64_t batch_size() const;
  int64_t length() const;
  bool is_batched() const;
  /// Size of keys and values in memory, in bytes, with the room behind them; 0 if they are the caller's tensors
  /// (ContextOptions::share). Contexts that share memory each count it.
  int64_t bytes() const;

  /// Batch entries [begin, end), without a copy.
  [[nodiscard]] FrozenContext slice(int64_t begin, int64_t end) const;

  /// A copy on another device, for storage between uses: `attend` requires contexts on the device of the weights.
  [[nodiscard]] FrozenContext to(at::Device device) const;

  /// Concatenates the batches of several contexts of one Frozen, which must have the same length and orders, and masks that
  /// `Mask::cat` can concatenate.
  [[nodiscard]] static FrozenContext cat(const std::vector<FrozenContext>& contexts);

  /// As `Context::join`. Lengths of the parts become a mask: joining padded passages multiplies their padding, too.
  [[nodiscard]] static FrozenContext join(const std::vector<FrozenContext>& contexts);

  /// As `Context::append`, in every storage. If batch entries have lengths, the first append copies everything once.
  [[nodiscard]] FrozenContext append(const at::Tensor& key, const at::Tensor& value, const Mask& mask = {}) const;

  /// As `Context::truncate`.
  [[nodiscard]] FrozenContext truncate(int64_t n) const;

  /// As `Context::select`.
  [[nodiscard]] FrozenContext select(const at::Tensor& indices) const;

 private:
  friend class Frozen;
  friend class FrozenBlock;
  friend class FrozenDecoupled;
  struct State;
  explicit FrozenContext(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  const State& state() const;
  std::shared_ptr<const State> state_;
};

/// `freeze` throws c10::ValueError for a `query` of a block or a decoupled layer, and for a `storage` that has no effect.
struct FreezeOptions {
  /// A learned query [Lq, Eq], as in attention pooling. Its products with the weights are computed once; calls omit it.
  at::Tensor query = {};
  /// Replaces the module's own plan. Its rates are ignored when the library's own kernels run.
  std::optional<PlanMode> plan = {};
  /// float32 (the default), or bfloat16 for packed weights and for projected or folded contexts: half the memory, and about
  /// twice the speed where reading memory takes most of the time, as with one query row per call. Inputs, sums and results stay
  /// float32; each weight is rounded to 8 significant bits. Only for layers that run on the library's own kernels.
  std::optional<at::ScalarType> storage = {};
};

/// A CrossAttention for inference, made by `CrossAttention::freeze`: packed copies of the weights, products of weights
/// (computed in float64) where they save time, and a plan for every call.
///
///   auto frozen = attention->freeze();
///   auto prepared = frozen.context(text, text, {}, {.expected_queries = 50 * 4096});   // once
///   auto [output, weights] = frozen.attend(latent, prepared);                          // for every step
///
/// In float32 on the CPU it runs on this library's own kernels, unless the layer has bias_kv; elsewhere on LibTorch's
/// operators. Calls record no gradients; results are ordinary tensors. Types, shapes, masks and errors are those of
/// CrossAttention without autocast, which has no effect here. With a pinned plan, bits do not depend on the number of threads;
/// with an automatic plan they may.
///
/// Immutable: any number of threads may share one without locks. Copies share storage.
class XATTN_API Frozen {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  Frozen() = default;

  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eo] and the requested weights. Keys that
  /// Mask::lengths excludes, with lengths on the host, are dropped before any product.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {},
                                             const CallOptions& call = {}) const;

  /// The same with the constant query. Throws c10::ValueError if `freeze` was given none.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {},
                                             const CallOptions& call = {}) const;

  /// Makes a context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev].
  [[nodiscard]] FrozenContext context(const at::Tensor& key,
                                      const at::Tensor& value,
                                      const Mask& mask = {},
                                      const ContextOptions& options = {}) const;

  /// query [B * n, Lq, Eq] for a context of B entries: n consecutive queries, such as the beams of a search, share one entry.
  /// Returns the output [B * n, Lq, Eo] and the requested weights.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query,
                                            const FrozenContext& context,
                                            const CallOptions& call = {}) const;

  /// The same with the constant query, once for each entry.
  std::tuple<at::Tensor, at::Tensor> attend(const FrozenContext& context, const CallOptions& call = {}) const;

  /// Describes what `forward` would do now with B x Lq queries and B x Lk keys; with `expected_queries`, what `context` and
  /// `attend` would do.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries = {}) const;

  /// The orders that `forward` would use.
  Orders orders(int64_t B, int64_t Lq, int64_t Lk) const;

  /// The module's options, with all defaults resolved.
  const CrossAttentionOptions& options() const;

  /// Size in memory, in bytes: the weights once, as they are stored, and the products of weights that its plan may use. Each is
  /// at most as large as its two factors, and is there only if it can save time (`logits_product_pays`). The first call that
  /// folds packs another copy of a projection: of the keys' and the values' weights to fold into the query, of the query's to
  /// fold into the context. A pinned plan holds only what it reads.
  int64_t bytes() const;

  /// Whether calls run on this library's own kernels.
  bool uses_kernels() const;

 private:
  friend class CrossAttentionImpl;
  friend class FrozenContext;
  friend class FrozenDecoupled;
  struct State;
  explicit Frozen(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  Frozen(const CrossAttentionImpl& module, const FreezeOptions& options);
  const State& state() const;
  at::Tensor query_for(std::string_view caller, const at::Tensor& query, const FrozenContext& context) const;
  void check_owner(const FrozenContext& context) const;
  void check_context(std::string_view caller, const FrozenContext& context, int64_t Lq) const;
  struct Part;
  static AttentionResult attend_to(const at::Tensor& query, const std::vector<Part>& parts, const CallOptions& call);
  std::tuple<at::Tensor, at::Tensor> forward_with(const std::optional<at::Tensor>& query,
                                                  const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const Mask& mask,
                                                  const CallOptions& call) const;
  FrozenContext context_for(std::string_view caller,
                            const at::Tensor& key,
                            const at::Tensor& value,
                            const Mask& mask,
                            const ContextOptions& options) const;

  std::shared_ptr<const State> state_;
};

}  // namespace xattn
