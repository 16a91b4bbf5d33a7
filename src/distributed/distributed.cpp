// SPDX-License-Identifier: Apache-2.0
#include <xattn/distributed.h>

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "attention/mask_parts.h"
#include "attention/softmax.h"
#include "base/check.h"
#include "cpu/matrix_product.h"
#include "distributed/collectives.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"

namespace xattn {

using at::Tensor;
using detail::batched;
using detail::check_value;
using detail::LayerWeights;

namespace {

constexpr auto kContextParallel = "context_parallel";

// The tensors of one side of a layer, for the ranks to add up their gradients.
std::vector<Tensor> of_query(const LayerWeights& w) {
  return {w.query, w.query_bias, w.query_norm ? w.query_norm->weight : Tensor(), w.query_norm ? w.query_norm->bias : Tensor()};
}
std::vector<Tensor> of_context(const LayerWeights& w) {
  return {w.key,
          w.key_bias,
          w.value,
          w.value_bias,
          w.key_norm ? w.key_norm->weight : Tensor(),
          w.key_norm ? w.key_norm->bias : Tensor()};
}

Norm with_parameters(const Norm& norm, const Tensor& weight, const Tensor& bias) {
  if (!norm) return norm;
  Norm other(norm->options);
  other->weight = weight;
  other->bias = bias;
  return other;
}

void set_query(LayerWeights& w, const std::vector<Tensor>& x) {
  w.query = x[0], w.query_bias = x[1];
  w.query_norm = with_parameters(w.query_norm, x[2], x[3]);
}
void set_context(LayerWeights& w, const std::vector<Tensor>& x) {
  w.key = x[0], w.key_bias = x[1], w.value = x[2], w.value_bias = x[3];
  w.key_norm = with_parameters(w.key_norm, x[4], x[5]);
}

// What the options must be for several ranks; they may have been changed since the module was made.
void check_options(const CrossAttentionImpl& module) {
  detail::check_module(kContextParallel, module);
  check_value(!module.options.bias_kv(), kContextParallel,
              "module must have no bias_kv, whose free key belongs to no rank, but has one.");
  const auto& plan = module.options.plan();
  const auto ends_in_heads = [](Order order) { return order == Order::standard || order == Order::fold_into_query; };
  check_value(!plan.pinned || (ends_in_heads(plan.orders.logits) && ends_in_heads(plan.orders.values)), kContextParallel,
              "plan must be of orders that end in heads, standard and fold_into_query, but is {}, {}.",
              name_of(plan.orders.logits), name_of(plan.orders.values));
}

// The cheapest for one rank: the output projection comes after the ranks have met, and folds with nothing.
Orders cheapest(const PlanRequest& request) {
  std::optional<Orders> best;
  for (const auto logits : {Order::standard, Order::fold_into_query}) {
    for (const auto values : {Order::standard, Order::fold_into_query}) {
      const Orders orders{logits, values};
      if (!illegal_for_logits(logits, request).empty() || !illegal_for_values(values, request).empty()) continue;
      if (!best || cost_of(orders, request).seconds < cost_of(*best, request).seconds) best = orders;
    }
  }
  return best.value_or(Orders{});
}

// What every rank knows of every other: batch and length of x, once `check` has passed on all. Where it throws on one rank alone,
// the others, which would wait for that rank, hear of it.
std::vector<int64_t> exchange_lengths(
    const Tensor& x, const char* name, at::Device device, detail::Ranks& ranks, const std::function<void()>& check) {
  int64_t B = -1, length = -1;
  std::exception_ptr refusal;
  try {
    check();
    const auto whole = batched(x);
    B = whole.size(0), length = whole.size(1);
  } catch (const std::exception&) {
    refusal = std::current_exception();
  }
  const auto all = ranks.gather(at::tensor({B, length}, at::dtype(at::kLong)).to(device));
  if (refusal) std::rethrow_exception(refusal);
  std::vector<int64_t> lengths;
  for (const auto& each : all) {
    const auto sizes = each.cpu();
    const auto other = sizes.const_data_ptr<int64_t>()[0];
    const auto rank = lengths.size();
    check_value(other >= 0, kContextParallel, "{} must be right on all ranks, but rank {} refused its own.", name, rank);
    check_value(other == B, kContextParallel,
                "{} must have one batch size on all ranks, but has {} on rank {} and {} on rank {}.", name, B, ranks.rank(),
                other, rank);
    lengths.push_back(sizes.const_data_ptr<int64_t>()[1]);
  }
  return lengths;
}

}  // namespace

struct ContextParallel::State {
  CrossAttention module;
  detail::RanksPtr ranks;
  Queries queries;
};

struct SharedContext::State {
  std::shared_ptr<const ContextParallel::State> owner;
  Orders orders;
  detail::Side side;
  std::vector<Tensor> weights;  // of_context, as the side was made with them
  Context stamp;                // of the parameters
  Mask mask;                    // of the whole context
  int64_t first, own, length;
};

int64_t SharedContext::batch_size() const {
  return state_->side.keys.size(0);
}
int64_t SharedContext::length() const {
  return state_->length;
}
int64_t SharedContext::first() const {
  return state_->first;
}
int64_t SharedContext::own_length() const {
  return state_->own;
}
const Orders& SharedContext::orders() const {
  return state_->orders;
}
int64_t SharedContext::bytes() const {
  const auto& [keys, key_bias, values, Lk] = state_->side;
  const bool one = keys.const_data_ptr() == values.const_data_ptr();  // neither is projected
  return static_cast<int64_t>(keys.nbytes() + (one ? 0 : values.nbytes()));
}

ContextParallel::ContextParallel(CrossAttention module, c10::intrusive_ptr<c10d::ProcessGroup> group, Queries queries) {
  check_value(!module.is_empty(), kContextParallel, "module must be a CrossAttention, but is empty.");
  check_value(group.defined(), kContextParallel, "group must be a process group, but is null.");
  check_options(*module);
  state_ = std::make_shared<State>(State{std::move(module), c10::make_intrusive<detail::Ranks>(std::move(group)), queries});
}

int64_t ContextParallel::bytes_exchanged() const {
  return state_->ranks->bytes();
}

std::tuple<Tensor, Tensor> ContextParallel::forward(const Tensor& query,
                                                    const Tensor& key,
                                                    const Tensor& value,
                                                    const Mask& mask) {
  const auto rows = query.defined() && query.dim() >= 2 ? query.size(-2) : 1;
  const auto all = state_->queries == Queries::own ? rows * state_->ranks->size() : rows;
  return attend(query, context(key, value, mask, {.expected_queries = all}));
}

SharedContext ContextParallel::context(const Tensor& key,
                                       const Tensor& value,
                                       const Mask& mask,
                                       const ContextOptions& options) {
  auto& module = *state_->module;
  const auto& o = module.options;
  const auto expected = options.expected_queries;
  const auto lengths = exchange_lengths(key, "key", module.key_linear->weight.device(), *state_->ranks, [&] {
    check_options(module);
    detail::check_key_value(kContextParallel, key, value, {}, module.key_linear, module.value_linear, o.num_heads());
  });
  auto Xk = batched(key), Xv = batched(value);
  const auto rank = state_->ranks->rank(), own = Xk.size(1);
  const auto first = std::accumulate(lengths.begin(), lengths.begin() + rank, int64_t{0});
  const auto length = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  detail::check_mask(mask, kContextParallel, Xk.size(0), o.num_heads(), std::nullopt, length, Xk.device());

  const auto request = detail::for_context(
      kContextParallel, module.request(Xk.size(0), 1, std::max<int64_t>(1, own), {}, Xk.requires_grad() || Xv.requires_grad()),
      expected);
  const auto orders = o.plan().pinned ? o.plan().orders : cheapest(request);

  // A share without keys is one key that nobody sees: its rank takes all steps of the others.
  if (own == 0) {
    const bool one = Xk.is_same(Xv);
    Xk = at::constant_pad_nd(Xk, {0, 0, 0, 1});
    Xv = one ? Xk : at::constant_pad_nd(Xv, {0, 0, 0, 1});
  }
  LayerWeights weights(module);
  const auto summed = detail::with_summed_gradients(of_context(weights), state_->ranks);
  set_context(weights, summed);
  auto side = detail::make_side(orders, weights, {}, Xk, Xv);
  Context stamp(side.keys, side.values, {}, key.dim() == 3, module.context_weights());
  return SharedContext(std::make_shared<SharedContext::State>(
      SharedContext::State{state_, orders, std::move(side), summed, std::move(stamp), mask, first, own, length}));
}

std::tuple<Tensor, Tensor> ContextParallel::attend(const Tensor& query, const SharedContext& context) {
  auto& module = *state_->module;
  const auto& o = module.options;
  const auto& c = *context.state_;
  const auto& ranks = state_->ranks;
  check_value(c.owner == state_, kContextParallel,
              "context must be made by the ContextParallel that attends to it, but is another's.");
  const bool apart = state_->queries == Queries::own;
  const auto check = [&] {
    check_options(module);
    detail::check_query(kContextParallel, query, c.stamp.is_batched(), context.batch_size(), module.query_linear);
    c.stamp.check_made_from(kContextParallel, module.context_weights());
  };
  const auto device = module.query_linear->weight.device();
  std::vector<int64_t> lengths;
  if (apart || device.is_cpu()) {
    lengths = exchange_lengths(query, "query", device, *ranks, check);
  } else {
    check();  // to hear of the others would be to wait for the device
  }
  const auto own = batched(query);
  for (size_t rank = 0; rank < lengths.size() && !apart; ++rank) {
    check_value(lengths[rank] == own.size(1), kContextParallel,
                "query must have one length on all ranks, but has {} on rank {} and {} on rank {}.", own.size(1), ranks->rank(),
                lengths[rank], rank);
  }
  const auto all = apart ? detail::all_rows(own, lengths, ranks) : own;
  const auto Lq = all.size(1);
  detail::check_mask(c.mask, kContextParallel, context.batch_size(), o.num_heads(), Lq, c.length, all.device());

  LayerWeights weights(module);
  auto replicated = of_query(weights);
  replicated.push_back(all);
  auto summed = detail::with_summed_gradients(replicated, ranks);
  const auto Xq = summed.back();
  set_query(weights, summed);
  set_context(weights, c.weights);

  AttentionOptions how;
  how.mask = c.own > 0 ? detail::shard_of_keys(c.mask, c.first, c.own, Lq, c.length, all.device())
                       : Mask::key_padding(at::zeros({1, 1}, at::dtype(at::kBool).device(all.device())));
  how.scale = o.scale();
  how.dropout = module.is_training() ? o.dropout() : 0;
  how.weights = o.attention_weights() == AttentionWeights::none ? AttentionWeights::none : AttentionWeights::per_head;
  if (o.attention_weights() == AttentionWeights::per_head) how.weight_heads = o.weight_heads();
  how.log_sum_exp = true;
  Tensor largest;
  const auto part = detail::attend_heads(c.orders, weights, {}, Xq, c.side, how, &largest);
  const auto merged = detail::merge(part.output, part.log_sum_exp, largest, ranks);

  auto mixed = detail::merge_heads(merged.output.to(all.scalar_type()));  // [B, Lq, H * e]
  std::vector<Tensor> last = {weights.output, weights.output_bias};
  if (apart) {
    mixed = detail::own_rows(mixed, lengths, ranks);
    last = detail::with_summed_gradients(last, ranks);
  }
  const auto output = detail::project(mixed, last[0], last[1]);

  Tensor map;
  if (part.weights.defined()) {
    const at::NoGradGuard no_grad;
    const auto share = detail::chosen_heads(merged.share, how.weight_heads);
    map = (part.weights.detach() * share).narrow(-1, 0, c.own).to(part.weights.scalar_type());
    if (o.attention_weights() == AttentionWeights::mean) map = map.mean(1);
  }
  if (c.stamp.is_batched()) return {output, map};
  return {output.squeeze(0), map.defined() ? map.squeeze(0) : map};
}

}  // namespace xattn
