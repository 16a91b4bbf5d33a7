// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/linear.h>
#include <torch/types.h>
#include <xattn/block.h>
#include <xattn/decoupled.h>

#include <vector>

#include "bench/block_rows.h"
#include "bench/candidates.h"

namespace bench {

/// One row with random numbers: its modules and inputs. Only the modules of the row's kind are there.
struct BenchBlock {
  BlockRow row;
  std::vector<xattn::CrossAttentionBlock> blocks;
  xattn::DecoupledCrossAttention decoupled = nullptr;
  torch::nn::Linear linear = nullptr;
  torch::Tensor query;  ///< [B, Lq, Eq]
  torch::Tensor key;    ///< [B, Lk, Ek]
  torch::Tensor image;  ///< [B, image, Ek]
};
BenchBlock make_block(const BlockRow& row);

/// The output that every candidate must reproduce, in float64.
torch::Tensor exact(const BenchBlock& block);

/// All candidates, for a block that outlives them:
///   eager   linear, norms, matmul, softmax: the definition on LibTorch's operators; linear rows have it and frozen ones only
///   sdpa    the same with at::scaled_dot_product_attention
///   module  CrossAttentionBlock, DecoupledCrossAttention
///   frozen  the module frozen; also with weights and contexts in bfloat16 and, if several blocks keep their contexts, with
///           contexts that share the key (ContextOptions::share)
std::vector<Candidate> candidates(const BenchBlock& block);

}  // namespace bench
