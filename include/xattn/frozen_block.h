// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/block_options.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/export.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

namespace xattn {

class CrossAttentionBlockImpl;

/// A CrossAttentionBlock for inference, made by `CrossAttentionBlock::freeze`: its attention as a `Frozen` plans and runs it,
/// and its norms, gates, residual sums and feed-forward network on the same kernels, with packed weights.
///
///   auto frozen = block->freeze({.storage = at::kBFloat16});
///   auto context = frozen.context(memory, memory);                // once
///   auto [output, weights] = frozen.attend(token, context);       // for every token
///
/// Where a `Frozen` does not run on the kernels, the block does not either. Types, shapes, masks and errors are those of
/// CrossAttentionBlock; there is no dropout. Calls record no gradients. Bits are as those of `Frozen`. Immutable: any number of
/// threads may share one without locks. Copies share storage.
class XATTN_API FrozenBlock {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  FrozenBlock() = default;

  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev] -> output [B, Lq, Eq] and the requested weights.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {},
                                             const CallOptions& call = {}) const;

  /// Makes a context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev]. It is valid only with this block.
  [[nodiscard]] FrozenContext context(const at::Tensor& key,
                                      const at::Tensor& value,
                                      const Mask& mask = {},
                                      const ContextOptions& options = {}) const;

  /// query [B * n, Lq, Eq] for a context of B entries, as in `Frozen::attend`.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query,
                                            const FrozenContext& context,
                                            const CallOptions& call = {}) const;

  /// `Frozen::explain` for the attention.
  std::string explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries = {}) const;

  /// The block's options, with all defaults resolved.
  const CrossAttentionBlockOptions& options() const;

  /// Size in memory, in bytes, as `Frozen::bytes`.
  int64_t bytes() const;

  /// Whether calls run on this library's own kernels.
  bool uses_kernels() const;

 private:
  friend class CrossAttentionBlockImpl;
  struct State;
  FrozenBlock(const CrossAttentionBlockImpl& module, const FreezeOptions& options);
  const State& state() const;
  at::Tensor finish(const at::Tensor& query, const at::Tensor& attended) const;

  std::shared_ptr<const State> state_;
};

}  // namespace xattn
