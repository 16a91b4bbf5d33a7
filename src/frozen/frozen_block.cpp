// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen_block.h>

#include <xattn/block.h>

#include <optional>
#include <utility>

#include "base/check.h"
#include "cpu/elementwise.h"
#include "frozen/packed_layers.h"
#include "frozen/state.h"
#include "modules/block_weights.h"

namespace xattn {

using at::Tensor;
using detail::check_value;

namespace {

constexpr auto kFrozenBlock = "frozen_block";

}  // namespace

struct FrozenBlock::State {
  CrossAttentionBlockOptions options;
  Frozen attention;
  detail::BlockWeights weights;           // on the kernels, without the feed-forward network and with open gates
  detail::PackedFeedForward packed = {};  // on the kernels
};

FrozenBlock::FrozenBlock(const CrossAttentionBlockImpl& module, const FreezeOptions& how) {
  const detail::Inference inference;
  module.check_options();
  check_value(!how.query.defined(), kFrozenBlock, "query must be left out, because it is added to the output, but is given.");
  auto options = module.options;
  options.attention(module.attention->options);
  State state{options, module.attention->freeze(how), detail::weights_of(module)};
  auto& weights = state.weights;
  if (state.attention.uses_kernels()) {
    const auto storage = how.storage.value_or(at::kFloat);
    state.packed = {pack_linear(weights.feed_forward_in, storage), pack_linear(weights.feed_forward_multiplier, storage),
                    pack_linear(weights.feed_forward_out, storage)};
    for (auto* gate : {&weights.attention_gate, &weights.feed_forward_gate}) {
      *gate = detail::engine::open_gate(*gate, weights.features);
    }
    weights.feed_forward_in = weights.feed_forward_multiplier = weights.feed_forward_out = {};
  }
  for (auto* x : all_tensors(weights)) {
    if (x->defined()) *x = x->detach().resolve_neg().clone(at::MemoryFormat::Contiguous);
  }
  state_ = std::make_shared<const State>(std::move(state));
}

const FrozenBlock::State& FrozenBlock::state() const {
  check_value(state_ != nullptr, kFrozenBlock, "block must be made by CrossAttentionBlock::freeze, but is empty.");
  return *state_;
}

std::tuple<Tensor, Tensor> FrozenBlock::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask, const CallOptions& call) const {
  const detail::Inference inference;
  const auto& s = state();
  const auto [Xq, Xk, Xv] = detail::block_inputs(kFrozenBlock, s.weights, query, key, value);
  const auto [attended, weights] = s.attention.forward(Xq, Xk, Xv, mask, call);
  return {finish(query, attended), weights};
}

FrozenContext FrozenBlock::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) const {
  const detail::Inference inference;
  const auto& s = state();
  const auto [none, Xk, Xv] = detail::block_context(kFrozenBlock, s.weights, key, value, how.share);
  const auto context = s.attention.context(Xk, Xv, mask, how);
  auto state = std::make_shared<FrozenContext::State>(context.state());
  state->norm = s.weights.context_norm();
  return FrozenContext(std::move(state));
}

std::tuple<Tensor, Tensor> FrozenBlock::attend(const Tensor& query,
                                               const FrozenContext& context,
                                               const CallOptions& call) const {
  const detail::Inference inference;
  const auto& s = state();
  const auto Xq = detail::block_query(kFrozenBlock, s.weights, query);
  const auto [attended, weights] = s.attention.attend(Xq, context, call);
  return {finish(query, attended), weights};
}

// The output of the block from that of its attention, which nobody else holds.
Tensor FrozenBlock::finish(const Tensor& query, const Tensor& attended) const {
  if (!uses_kernels()) return detail::block_output(state().weights, query, attended, /*dropout=*/0);
  detail::finish_block(state().weights, state().packed, query, attended);
  return attended;
}

std::string FrozenBlock::explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries) const {
  return state().attention.explain(B, Lq, Lk, expected_queries);
}

const CrossAttentionBlockOptions& FrozenBlock::options() const {
  return state().options;
}

int64_t FrozenBlock::bytes() const {
  auto weights = state().weights;
  auto bytes = state().attention.bytes() + state().packed.bytes();
  for (const auto* x : all_tensors(weights)) bytes += detail::bytes_of(*x);
  return bytes;
}

bool FrozenBlock::uses_kernels() const {
  return state().attention.uses_kernels();
}

FrozenBlock CrossAttentionBlockImpl::freeze() const {
  return freeze({});
}

FrozenBlock CrossAttentionBlockImpl::freeze(const FreezeOptions& how) const {
  return FrozenBlock(*this, how);
}

}  // namespace xattn
