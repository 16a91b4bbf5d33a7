// SPDX-License-Identifier: Apache-2.0
#include <xattn/multihead_attention.h>

#include <ATen/core/grad_mode.h>

#include <vector>

#include "base/check.h"

namespace xattn {

CrossAttention from_multihead_attention(const torch::nn::MultiheadAttention& module) {
  constexpr auto kCaller = "from_multihead_attention";
  detail::check_value(!module.is_empty(), kCaller, "module must hold a MultiheadAttention, but is empty.");
  const auto& theirs = *module;
  const auto& options = theirs.options;
  detail::check_value(!options.add_zero_attn(), kCaller,
                      "module must have add_zero_attn(false), but has true: CrossAttention has no key of zeros.");

  const auto E = options.embed_dim();
  const bool bias = theirs.in_proj_bias.defined();
  CrossAttention ours(CrossAttentionOptions(E, options.kdim(), options.vdim(), E)
                          .num_heads(options.num_heads())
                          .qkv_bias(bias)
                          .output_bias(theirs.out_proj->bias.defined())
                          .bias_kv(theirs.bias_k.defined())
                          .dropout(options.dropout()));
  ours->to(theirs.out_proj->weight.device(), theirs.out_proj->weight.scalar_type());
  ours->train(theirs.is_training());

  const torch::NoGradGuard no_grad;
  const auto weights = theirs._qkv_same_embed_dim
                           ? theirs.in_proj_weight.chunk(3)  // rows of the query, the key, the value: three times [E, E]
                           : std::vector<torch::Tensor>{theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight};
  const auto biases = bias ? theirs.in_proj_bias.chunk(3) : std::vector<torch::Tensor>(3);  // packed in either case
  const auto copy = [](torch::Tensor& to, const torch::Tensor& from) {
    if (to.defined()) to.copy_(from);
  };
  size_t i = 0;
  for (auto* linear : {&ours->query_linear, &ours->key_linear, &ours->value_linear}) {
    copy((*linear)->weight, weights[i]);
    copy((*linear)->bias, biases[i]);
    ++i;
  }
  copy(ours->output_linear->weight, theirs.out_proj->weight);
  copy(ours->output_linear->bias, theirs.out_proj->bias);
  copy(ours->bias_k, theirs.bias_k);
  copy(ours->bias_v, theirs.bias_v);
  return ours;
}

}  // namespace xattn
