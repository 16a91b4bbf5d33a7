// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/activation.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>

namespace xattn {

/// A CrossAttention with copies of the weights of a torch::nn::MultiheadAttention, on its device, in its type and its mode
/// (training or evaluation). kdim, vdim, bias, add_bias_kv and dropout carry over; add_zero_attn has no counterpart here and
/// throws c10::ValueError. (Files of Python's torch.nn.MultiheadAttention are read by `load_weights`.)
///
/// Calls translate as follows:
///
///   there   module->forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
///   here    module->forward(query, key, value, Mask::from_multihead_attention(key_padding_mask, attn_mask, num_heads))
///
///                      torch::nn::MultiheadAttention                 xattn::CrossAttention
///   axes of inputs     [L, B, E], the sequence first                 [B, L, E], or [L, E]: pass `x.transpose(0, 1)`
///   boolean masks      true = ignored; `attn_mask` added as 0 or 1   true = may attend, in every mask
///   float attn_mask    added to the logits, [Lq, Lk] only            the same, Mask::bias, also per batch entry and head
///   row without keys   NaN                                           zeros, and so the output's bias
///   weights            of every call: none, mean or per head         of the module: options.attention_weights, here `mean`
///   dropout            weights are returned after it                 weights are returned before it: rows sum to one
///
/// Weights have the same axes there and here: [B, Lq, Lk] or [B, H, Lq, Lk], one column more with add_bias_kv.
XATTN_API CrossAttention from_multihead_attention(const torch::nn::MultiheadAttention& module);

}  // namespace xattn
