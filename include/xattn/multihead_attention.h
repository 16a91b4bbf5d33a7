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
///   here    module->forward(query, key, value, Mask::from_multihead_attention(key_padding_mask, attn_mask, num_heads), call)
///
///                      torch::nn::MultiheadAttention                 xattn::CrossAttention
///   axes of inputs     [L, B, E], the sequence first                 [B, L, E], or [L, E]: pass `x.transpose(0, 1)`
///   key_padding_mask   true = ignored                                true = may attend, as in every mask
///   bool attn_mask     added to the logits as 0 or 1                 converted: true hides a key, as in Python
///   float attn_mask    added to the logits, [Lq, Lk] only            the same, Mask::bias, also per batch entry and head
///   row without keys   NaN                                           zeros, and so the output's bias
///   weights            of every call: none, mean or per head         of a call's CallOptions; default: `mean`
///   dropout            weights are returned after it                 weights are returned before it: rows sum to one
///
/// Weights have the same axes there and here: [B, Lq, Lk] or [B, H, Lq, Lk], one column more with add_bias_kv. Parameters have
/// other names here, so files written before the conversion are read by `load_weights`, and optimizers start anew.
XATTN_API CrossAttention from_multihead_attention(const torch::nn::MultiheadAttention& module);

}  // namespace xattn
