// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/mask.h>
#include <xattn/norm.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace xattn {

class FrozenDecoupled;

/// Options of one added context: `AddedContextOptions(768, 768).scale(0.6)`.
struct XATTN_API AddedContextOptions {
  AddedContextOptions(int64_t dim_key, int64_t dim_value) : dim_key_(dim_key), dim_value_(dim_value) {}

  /// Features of its key.
  TORCH_ARG(int64_t, dim_key);
  /// Features of its value.
  TORCH_ARG(int64_t, dim_value);
  /// Whether its projections have a bias. Default: as in the attention.
  TORCH_ARG(std::optional<bool>, key_bias);
  TORCH_ARG(std::optional<bool>, value_bias);
  /// Multiplies the attention to this context (not its logits) before it is added; with 0 the context is skipped. Each call
  /// reads the current value: `module->options.added()[0].scale(0.6)` changes it. Default: 1.
  TORCH_ARG(double, scale) = 1;
};

/// Options of `DecoupledCrossAttention`: those of its attention and of the added contexts.
///
///   DecoupledCrossAttentionOptions(CrossAttentionOptions(320, 768, 768, 320).num_heads(8)).added({{768, 768}})
struct XATTN_API DecoupledCrossAttentionOptions {
  explicit DecoupledCrossAttentionOptions(CrossAttentionOptions attention) : attention_(std::move(attention)) {}

  /// The attention to the first context. Added contexts share its heads and norms, but not its bias_kv.
  TORCH_ARG(CrossAttentionOptions, attention);
  /// The added contexts, in the order in which calls pass them. Default: none.
  TORCH_ARG(std::vector<AddedContextOptions>, added);
};

/// Key [B, Lk, Ek] and value [B, Lk, Ev] of one context, with any Lk, and their mask.
struct KeyValue {
  torch::Tensor key;
  torch::Tensor value;
  Mask mask = {};
};

/// The projections of one added context.
class XATTN_API AddedProjectionImpl : public torch::nn::Cloneable<AddedProjectionImpl> {
 public:
  /// The attention's options, with the widths and biases of this context.
  explicit AddedProjectionImpl(const CrossAttentionOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// Those given when it was made. Calls read the options of DecoupledCrossAttention and of its attention.
  const CrossAttentionOptions& options() const { return options_; }

  torch::nn::Linear key_linear{nullptr};    ///< Ek -> G * d
  torch::nn::Linear value_linear{nullptr};  ///< Ev -> G * e
  Norm key_norm{nullptr};                   ///< empty without qk_norm

 private:
  CrossAttentionOptions options_;
};
TORCH_MODULE(AddedProjection);

/// Decoupled cross attention: one query attends to several contexts, such as a text and an image, and the results are added.
///
///   Q, K, V  = query_linear(query), key_linear(key), value_linear(value), as in CrossAttention
///   K_i, V_i = key_linear_i(key_i), value_linear_i(value_i), for each added context
///   output   = output_linear(attention(Q, K, V) + scale_0 * attention(Q, K_0, V_0) + ...)               [B, Lq, Eo]
///
/// Ye et al., IP-Adapter, 2023, https://arxiv.org/abs/2308.06721; image-to-video models of Wan, 2025,
/// https://arxiv.org/abs/2503.20314. Each context has its own softmax, so the weights of one do not depend on another, and a
/// mask hides only keys of its own context.
///
///   using namespace xattn;
///   DecoupledCrossAttention attention(
///       DecoupledCrossAttentionOptions(CrossAttentionOptions(320, 768, 768, 320).num_heads(8)).added({{768, 768}}));
///   auto [output, weights] = attention->forward(latent, text, text, {{image, image}});
///
/// To adapt a trained CrossAttention, load its weights into the submodule `attention`, stop training it with
/// requires_grad_(false) on its parameters, and train the rest. Shapes, types, errors and thread safety are those of
/// `CrossAttention`; inputs are all batched or all unbatched.
class XATTN_API DecoupledCrossAttentionImpl : public torch::nn::Cloneable<DecoupledCrossAttentionImpl> {
 public:
  /// Throws c10::ValueError, with the reason, for options that are incompatible with each other, and for a plan pinned to an
  /// order of the values other than standard and fold_into_query, because outputs are added before the output projection.
  explicit DecoupledCrossAttentionImpl(const DecoupledCrossAttentionOptions& options_);

  void reset() override;

  /// Initialises all parts as CrossAttention does.
  void reset_parameters();

  /// Prints what a user would type to build the module again.
  void pretty_print(std::ostream& stream) const override;

  /// `attend` applied to `context` and `added_context`.
  /// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev], every added context as in the options -> output [B, Lq, Eo] and the
  /// requested weights of the first context: [B, Lq, Lk], [B, H, Lq, Lk], [B, n, Lq, Lk] of n weight_heads, or undefined.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query,
                                                   const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const std::vector<KeyValue>& added,
                                                   const Mask& mask = {},
                                                   const CallOptions& call = {});

  /// Makes the first context for later calls from key [B, Lk, Ek] and value [B, Lk, Ev].
  [[nodiscard]] Context context(const torch::Tensor& key,
                                const torch::Tensor& value,
                                const Mask& mask = {},
                                const ContextOptions& options = {});

  /// Makes the added context with this index.
  [[nodiscard]] Context added_context(size_t index,
                                      const torch::Tensor& key,
                                      const torch::Tensor& value,
                                      const Mask& mask = {},
                                      const ContextOptions& options = {});

  /// Attends with query [B * n, Lq, Eq] to contexts that this module made with its current weights. Each of the B entries of
  /// the context serves n consecutive queries, such as the beams of a search. Returns the output [B * n, Lq, Eo] and the
  /// weights.
  std::tuple<torch::Tensor, torch::Tensor> attend(const torch::Tensor& query,
                                                  const Context& context,
                                                  const std::vector<Context>& added,
                                                  const CallOptions& call = {});

  /// Returns a copy for inference, as CrossAttention::freeze does: see frozen_decoupled.h.
  [[nodiscard]] FrozenDecoupled freeze() const;
  [[nodiscard]] FrozenDecoupled freeze(const FreezeOptions& options) const;

  /// Describes what `forward` would do now with B x Lq queries and contexts of these lengths, in order; the mask is the first
  /// context's.
  std::string explain(int64_t B, int64_t Lq, const std::vector<int64_t>& lengths, const Mask& mask = {}) const;

  /// The options, with every default resolved: the biases of added contexts have values. Options of the attention are read from
  /// `attention->options`; a call throws if `options.attention()` has been changed.
  DecoupledCrossAttentionOptions options;

  CrossAttention attention{nullptr};               ///< Eq, Ek, Ev -> Eo; all contexts share its query and output projections
  std::vector<AddedProjection> added_projections;  ///< submodules "added0", "added1" ...

 private:
  friend class FrozenDecoupled;
  void check_options() const;
  CrossAttentionOptions attention_options_;  // as the module was made

 protected:
  FORWARD_HAS_DEFAULT_ARGS({4, torch::nn::AnyValue(Mask())}, {5, torch::nn::AnyValue(CallOptions())})
};

/// Holder of a DecoupledCrossAttentionImpl with the semantics of a shared pointer.
TORCH_MODULE(DecoupledCrossAttention);

}  // namespace xattn
