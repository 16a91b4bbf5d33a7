// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/plan.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace xattn {

/// The key/value side for a `Frozen`: projected, folded or as it came, chosen when it was made. Belongs to the Frozen that made it.
/// Never changes after it is made; copies share storage; safe to share between threads.
class XATTN_API FrozenContext {
 public:
  const Orders& orders() const;
  const Mask& mask() const;
  int64_t batch_size() const;
  int64_t length() const;
  bool is_batched() const;
  /// What it holds.
  int64_t bytes() const;

  /// Batch entries [begin, end), without a copy. The mask must not differ between batch entries unless they are lengths.
  FrozenContext slice(int64_t begin, int64_t end) const;

  /// The same on another device, as one that waits there for its next use. Attending takes one on the device of the weights.
  FrozenContext to(at::Device device) const;

  /// One batch of several: contexts of one Frozen, of one length and made in the same orders.
  static FrozenContext cat(const std::vector<FrozenContext>& contexts);

 private:
  friend class Frozen;
  struct State;
  explicit FrozenContext(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

struct FreezeOptions {
  /// A learned query that never changes, [Lq, Eq], as of attention pooling: what is made of it and of the weights alone is made now,
  /// and calls leave the query out.
  at::Tensor query = {};
  /// In place of the module's own. What that says of rates holds for LibTorch's operators alone.
  std::optional<PlanMode> plan = {};
  /// float32 (the default), or bfloat16 for weights and for contexts that are kept projected or folded: half the memory, and up to
  /// twice the speed where reading it is what takes the time, as with one query row a call. Inputs, sums and results stay float32;
  /// each weight is rounded to 8 bits. For what runs on the library's own kernels.
  std::optional<at::ScalarType> storage = {};
};

/// A CrossAttention for inference, made by `CrossAttention::freeze`: its weights, copied and laid out for the products that will
/// run, the products of weights that pay, made in float64, and a plan for every call.
///
///   auto frozen = attention->freeze();
///   auto prepared = frozen.context(text, text, {}, {.expected_queries = 50 * 4096});   // once
///   auto [output, weights] = frozen.attend(latent, prepared);                          // for every step
///
/// In float32 on the CPU it runs on this library's own kernels, unless the layer has bias_kv; elsewhere on LibTorch's
/// operators. Nothing takes part in autograd; results are ordinary tensors. Types, shapes, masks and errors are those of
/// CrossAttention. Equal bits for any number of threads with a pinned plan; an automatic plan may depend on their number.
///
/// Immutable: any number of threads may share one, without locks. Copies share everything.
class XATTN_API Frozen {
 public:
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eo] and the weights that the options ask for. Keys that
  /// Mask::lengths leaves out, with lengths on the host, are dropped before any product.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {}) const;

  /// The same with the constant query.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& key, const at::Tensor& value, const Mask& mask = {}) const;

  FrozenContext context(const at::Tensor& key,
                        const at::Tensor& value,
                        const Mask& mask = {},
                        const ContextOptions& options = {}) const;

  /// query [B * n, Lq, Eq] for a context of B entries: n queries in a row, as the beams of a search, share one without a copy.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query, const FrozenContext& context) const;

  /// The same with the constant query.
  std::tuple<at::Tensor, at::Tensor> attend(const FrozenContext& context) const;

  /// What `forward` would do with B x Lq queries and B x Lk keys, now; or, with a number of query rows that a context serves in all,
  /// what `context` and `attend` would. As text.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries = {}) const;

  /// The orders that `forward` would take.
  Orders orders(int64_t B, int64_t Lq, int64_t Lk) const;

  /// Of the module, resolved.
  const CrossAttentionOptions& options() const;

  /// Whether calls run on this library's own kernels.
  bool uses_kernels() const;

 private:
  friend class CrossAttentionImpl;
  friend class FrozenContext;
  struct State;
  Frozen(const CrossAttentionImpl& module, const FreezeOptions& options);
  std::tuple<at::Tensor, at::Tensor> attend_with(const at::Tensor& query, const FrozenContext& context) const;
  std::tuple<at::Tensor, at::Tensor> forward_with(const at::Tensor& query,
                                                  const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const Mask& mask) const;
  std::shared_ptr<FrozenContext::State> make_context(
      const Orders& orders, const at::Tensor& key, const at::Tensor& value, const Mask& mask, bool batched, int64_t rows) const;

  std::shared_ptr<const State> state_;
};

}  // namespace xattn
