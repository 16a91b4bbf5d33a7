// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/decoupled.h>
#include <xattn/export.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace xattn {

/// A DecoupledCrossAttention for inference, made by `DecoupledCrossAttention::freeze`. Each context has a plan of its own, as
/// in a `Frozen`; a few query rows at a time are projected once, attend to all contexts, and are projected to the output once.
///
///   auto frozen = attention->freeze();
///   auto text_context = frozen.context(text, text);                      // once
///   auto image_context = frozen.added_context(0, image, image);
///   auto [output, weights] = frozen.attend(latent, text_context, {image_context});   // for every step
///
/// It runs on this library's own kernels where a `Frozen` does. Types, shapes, masks and errors are those of
/// DecoupledCrossAttention. Calls record no gradients. Immutable: any number of threads may share one without locks. Copies
/// share storage.
class XATTN_API FrozenDecoupled {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  FrozenDecoupled() = default;

  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev], every added context as in the options -> output [B, Lq, Eo] and the
  /// requested weights of the first context.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const std::vector<KeyValue>& added,
                                             const Mask& mask = {},
                                             const CallOptions& call = {}) const;

  /// Makes the first context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev]. It is valid only with this layer.
  [[nodiscard]] FrozenContext context(const at::Tensor& key,
                                      const at::Tensor& value,
                                      const Mask& mask = {},
                                      const ContextOptions& options = {}) const;

  /// Makes the added context with this index.
  [[nodiscard]] FrozenContext added_context(size_t index,
                                            const at::Tensor& key,
                                            const at::Tensor& value,
                                            const Mask& mask = {},
                                            const ContextOptions& options = {}) const;

  /// query [B * n, Lq, Eq] for contexts of B entries, as in `Frozen::attend`.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query,
                                            const FrozenContext& context,
                                            const std::vector<FrozenContext>& added,
                                            const CallOptions& call = {}) const;

  /// The same layer with other scales of the added contexts, one each. It shares storage, and contexts are valid with both.
  [[nodiscard]] FrozenDecoupled with_scales(const std::vector<double>& scales) const;

  /// Describes what `forward` would do now with B x Lq queries and contexts of these lengths, in order.
  std::string explain(int64_t B, int64_t Lq, const std::vector<int64_t>& lengths) const;

  /// The layer's options, with all defaults resolved.
  const DecoupledCrossAttentionOptions& options() const;

  /// Size in memory, in bytes, as `Frozen::bytes`.
  int64_t bytes() const;

  /// Whether calls run on this library's own kernels.
  bool uses_kernels() const;

 private:
  friend class DecoupledCrossAttentionImpl;
  struct State;
  FrozenDecoupled(const DecoupledCrossAttentionImpl& module, const FreezeOptions& options);
  const State& state() const;
  const Frozen& layer(size_t context) const;

  std::shared_ptr<const State> state_;
};

}  // namespace xattn
