// SPDX-License-Identifier: Apache-2.0
#pragma once

#ifdef XATTN_NO_DISTRIBUTED
#error "This xattn was built without c10d: XATTN_DISTRIBUTED was off, or LibTorch has none."
#endif

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <xattn/call_options.h>
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

/// Whether the ranks that share a context also share their queries.
enum class Queries {
  same,  ///< all ranks pass the same queries, and get the same output
  own,   ///< each rank passes its own, any number of them, and gets their output
};

/// One rank's share of a context. It is valid only with the ContextParallel that made it and the weights at that time, like a
/// Context. A share that is not projected (see `orders`) holds the caller's own tensors, which must not be written to while it
/// is in use. Copies share storage; safe to share between threads.
class XATTN_API SharedContext {
 public:
  int64_t batch_size() const;
  int64_t length() const;        ///< number of keys of all ranks
  int64_t first() const;         ///< index of this rank's first key
  int64_t own_length() const;    ///< number of keys of this rank
  const Orders& orders() const;  ///< of this rank; other ranks may have other orders
  /// Size in memory of this rank's share, in bytes.
  int64_t bytes() const;

 private:
  friend class ContextParallel;
  struct State;
  explicit SharedContext(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// Cross attention to a context that is too large for one machine: its keys and values are divided over the ranks of a process
/// group along Lk, in the order of the ranks. Each rank attends to its own share, in the cheapest order of products for it, up
/// to the output projection; the outputs and the log-sum-exps of all ranks are merged, exactly, in float32 or wider:
///
///   output = sum_r s_r output_r,   s_r = exp(lse_r - lse),   lse = log sum_r exp(lse_r)
///
/// A call sends B x H x Lq x (e + 2) numbers, twice, and 16 bytes per rank, independent of Lk; with gradients, also B x Lq x Eq
/// numbers and the gradients of all weights. Compare Ring Attention, https://arxiv.org/abs/2310.01889, which sends keys and
/// values, and LV-XAttn, https://arxiv.org/abs/2502.02406, which sends queries and outputs around a ring.
///
///   xattn::ContextParallel parallel(attention, group);               // the same weights on every rank
///   auto [output, weights] = parallel.forward(query, own_key, own_value);
///
/// Gradients are those of the whole context: every rank gets the gradient of its own keys and values, and all ranks get the
/// same gradient of the weights and, with Queries::same, of the query, ready for the optimizer without averaging. Every rank
/// must call backward on its output; with Queries::same, the gradients passed must be equal. With Queries::own the weights get
/// the gradient of the sum of all ranks' losses. A bias that requires a gradient gets, on each rank, the gradient of the rank's
/// own keys, and zeros for all others. Weights that made a context without gradients get none from it. First derivatives only.
/// The attention weights carry no gradient.
///
/// All methods are collective: every rank must call them in the same order and require the same gradients. If a rank dies or
/// does not respond within the group's timeout, they throw c10::DistBackendError on the others, and the group can no longer be
/// used. (This holds for Gloo. NCCL throws only with TORCH_NCCL_BLOCKING_WAIT=1; otherwise its watchdog ends the process.) An
/// invalid key, value or query on one rank makes all ranks throw: that rank's message gives the reason, the others' name the
/// rank. So do queries of different lengths with Queries::same. (This does not hold on CUDA devices with Queries::same, where
/// no call waits for the device.) After other errors on one rank, the others wait until their timeout. With Gloo the program
/// must ignore SIGPIPE (`std::signal(SIGPIPE, SIG_IGN)`, as Python does): Gloo may write to a process that has just died, and
/// the signal would end this process too.
/// Dropout draws from each rank's default generator: with equal seeds, equal shares drop the same weights.
/// Tensors are on the CPU (Gloo) or on CUDA devices (NCCL), depending on the group. Not thread-safe, because its group is not.
class XATTN_API ContextParallel {
 public:
  /// Throws c10::ValueError for a module with bias_kv, whose key would belong to no rank, or with a plan pinned to orders other
  /// than standard and fold_into_query.
  ContextParallel(CrossAttention module, c10::intrusive_ptr<c10d::ProcessGroup> group, Queries queries = Queries::same);

  /// `attend` applied to `context`: query [B, Lq, Eq], this rank's key [B, n, Ek] and value [B, n, Ev].
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                             const at::Tensor& key,
                                             const at::Tensor& value,
                                             const Mask& mask = {},
                                             const CallOptions& call = {});

  /// Makes a share from this rank's key [B, n, Ek] and value [B, n, Ev]; n may differ between ranks and may be 0. The mask is
  /// that of the whole context, the same on all ranks: [..., Lk], where Lk is the sum of all n; causal masks are aligned to the
  /// whole context. Exchanges lengths, 16 bytes per rank. Throws if the options have capacity or share: a context of several
  /// ranks cannot grow, and keeps raw keys and values as the caller's tensors anyway.
  [[nodiscard]] SharedContext context(const at::Tensor& key,
                                      const at::Tensor& value,
                                      const Mask& mask = {},
                                      const ContextOptions& options = {});

  /// query [B, Lq, Eq] -> output [B, Lq, Eo], and the requested weights of this rank's keys, normalised over the whole
  /// context: [B, Lq, n] or [B, H, Lq, n]. With Queries::own the weights have the rows of all ranks, in the order of the ranks.
  std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query,
                                            const SharedContext& context,
                                            const CallOptions& call = {});

  /// Bytes that this rank has passed to collectives so far.
  int64_t bytes_exchanged() const;

 private:
  friend class SharedContext;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace xattn
