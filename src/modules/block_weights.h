// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/block.h>
#include <xattn/context.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"
#include "modules/norm_weights.h"

// What a block does before and after its attention, as plain data and functions, for the module and for its frozen form.
namespace xattn::detail {

/// A linear layer; both are undefined where there is none.
struct LinearWeights {
  at::Tensor weight, bias;  ///< [out, in], [out]
};

/// The parameters of a block but those of its attention, named as in CrossAttentionBlockImpl.
struct BlockWeights {
  int64_t features;  ///< Eq
  at::Device device;
  NormPlacement norm_placement;
  bool norm_context;
  Activation activation;
  NormWeights attention_norm, feed_forward_norm;
  at::Tensor attention_gate, feed_forward_gate;  ///< before tanh; undefined where there is none
  LinearWeights feed_forward_in, feed_forward_multiplier, feed_forward_out;

  bool norms_before() const { return norm_placement == NormPlacement::before; }
  bool has_feed_forward() const { return feed_forward_in.weight.defined(); }
  /// The norm that keys and values pass.
  NormWeights context_norm() const { return norm_context && norms_before() ? attention_norm : NormWeights(); }
};
BlockWeights weights_of(const CrossAttentionBlockImpl& module);

/// All of these tensors; some may be undefined.
std::vector<at::Tensor*> all_tensors(BlockWeights& weights);

/// The kernels' function of this activation.
Pointwise pointwise(Activation activation);

/// The query, the key and the value that the attention of a block reads.
struct BlockInputs {
  at::Tensor query, key, value;
};

/// query [B, Lq, Eq], key [B, Lk, Ek], value [B, Lk, Ev], or without B. Throws for inputs that a norm cannot read, and if the
/// query is its own key but only the query would be normalised; other checks are left to the attention.
BlockInputs block_inputs(std::string_view caller,
                         const BlockWeights& weights,
                         const at::Tensor& query,
                         const at::Tensor& key,
                         const at::Tensor& value);
/// The parts of it that need no context, and no query. A context's query is undefined. Throws if keys and values are to be shared
/// that a norm changes first.
at::Tensor block_query(std::string_view caller, const BlockWeights& weights, const at::Tensor& query);
BlockInputs block_context(
    std::string_view caller, const BlockWeights& weights, const at::Tensor& key, const at::Tensor& value, bool shares = false);

/// From query [..., Eq], as the caller gave it, and the output of the attention to the output of the block: without gradients on
/// the kernels where they run, else in plain tensor operations. dropout: 0 outside training.
at::Tensor block_output(const BlockWeights& weights, const at::Tensor& query, const at::Tensor& attended, double dropout);

}  // namespace xattn::detail
