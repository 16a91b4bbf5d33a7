// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>

#include <cstdint>
#include <memory>
#include <tuple>

namespace c10d {
class ProcessGroup;  // <torch/csrc/distributed/c10d/ProcessGroup.hpp>
}

namespace xattn {

/// Which queries a rank brings to a context that is shared out.
enum class Queries {
  same,  ///< all ranks have the same, and get the same output
  own,   ///< each rank has its own, of any number, and gets their output
};

/// One rank's share of a context. Belongs to the ContextParallel that made it, and to the weights of that moment, as a Context does.
/// A share that is not projected (see `orders`) is the caller's own tensors, which he must not write to while it is in use. Copies
/// share storage.
class XATTN_API SharedContext {
 public:
  int64_t batch_size() const;
  int64_t length() const;        ///< keys of all ranks
  int64_t first() const;         ///< the first key of this rank
  int64_t own_length() const;    ///< keys of this rank
  const Orders& orders() const;  ///< in which this rank attends to them; others may choose others
  /// What this rank holds of it.
  int64_t bytes() const;

 private:
  friend class ContextParallel;
  struct State;
  explicit SharedContext(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// Cross attention to a context that is larger than one machine: its keys and values are shared out over the ranks of a process
/// group along Lk, in the order of the ranks. Each rank attends to its own share, in the order of products that is cheapest for
/// it, up to the output projection; the outputs and the log-sum-exps of all ranks are merged, exactly, in float32 or wider:
///
///   output = sum_r s_r output_r,   s_r = exp(lse_r - lse),   lse = log sum_r exp(lse_r)
///
/// What travels for that is B x H x Lq x (e + 2) numbers a call, twice, and 16 bytes a rank, whatever Lk is; with gradients B x Lq x Eq numbers and the
/// size of the weights besides. Compare Ring Attention, https://arxiv.org/abs/2310.01889, where keys and values travel, and
/// LV-XAttn, https://arxiv.org/abs/2502.02406, where queries and outputs go around.
///
///   xattn::ContextParallel parallel(attention, group);               // the same weights on every rank
///   auto [output, weights] = parallel.forward(query, own_key, own_value);
///
/// Gradients are those of the whole: every rank gets the gradient of its own keys and values, and all ranks get the same gradient
/// of the weights, and with Queries::same of the query, ready for the optimizer: nothing is left to average. Every rank must call backward on
/// its output, with Queries::same with the same gradient; with Queries::own the weights get the gradient of the sum of all
/// ranks' losses. A bias that asks for its gradient gets, on each rank, that of the rank's own keys, and zeros for all others. First
/// derivatives only. The attention weights carry no gradient.
///
/// All methods are collective: each rank calls them in the same order, with gradients asked for alike. Where a rank dies or does
/// not answer within the group's timeout, they throw c10::DistBackendError on the others, and the group is of no more use. (So Gloo
/// does. NCCL waits on the host, and can throw, with TORCH_NCCL_BLOCKING_WAIT=1 alone; else its watchdog ends the process.) A
/// key, value or query that one rank refuses makes all of them throw: that rank says why, the others which rank it was; so do
/// queries that should be the same and have not one length. (Not on CUDA devices with Queries::same, where a call waits for
/// nothing.) Other errors on one rank alone leave the others to their timeout. With Gloo the program must ignore SIGPIPE
/// (`std::signal(SIGPIPE, SIG_IGN)`, as Python does): Gloo may write to a process that has just died, and the signal would end this
/// one too.
/// Dropout draws from each rank's default generator: give ranks seeds of their own, or equal shares lose the same places.
/// Tensors are on the CPU (Gloo) or on CUDA devices (NCCL), as the group is made. Not thread-safe, as its group is not.
class XATTN_API ContextParallel {
 public:
  /// Throws c10::ValueError for a module with bias_kv, whose free key would have no rank, or with a plan pinned to orders other than
  /// standard and fold_into_query, which do not end in heads.
  ContextParallel(CrossAttention module, c10::intrusive_ptr<c10d::ProcessGroup> group, Queries queries = Queries::same);

  /// `attend` applied to `context`.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {});

  /// This rank's key [B, n, Ek] and value [B, n, Ev]; n may differ from rank to rank, and be 0. The mask is that of the whole
  /// context, the same on all ranks: [..., Lk] for the sum of all n, and causal masks count from its ends. Lengths are exchanged:
  /// 16 bytes a rank.
  SharedContext context(const at::Tensor& key,
                        const at::Tensor& value,
                        const Mask& mask = {},
                        const ContextOptions& options = {});

  /// query [B, Lq, Eq] -> output [B, Lq, Eo], and the weights that the module's options ask for, of this rank's keys only,
  /// normalised over all: [B, Lq, n] or [B, H, Lq, n]. With Queries::own they are those of the queries of all ranks, one behind the
  /// other.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query, const SharedContext& context);

  /// Bytes that this rank has given to collectives so far.
  int64_t bytes_exchanged() const;

 private:
  friend class SharedContext;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace xattn
