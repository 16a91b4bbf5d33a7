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
#include "modules/context_state.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"
#include "plan/order_traits.h"

namespace xattn {

using at::Tensor;
using detail::batched;
using detail::check_value;

namespace {

constexpr auto kContextParallel = "context_parallel";

// Checks the options for several ranks at each use, because they may have changed since the module was made.
void check_options(const CrossAttentionImpl& module) {
  detail::check_module(kContextParallel, module);
  check_value(!module.options.bias_kv(), kContextParallel,
              "module must have no bias_kv, whose free key belongs to no rank, but has one.");
  const auto& plan = module.options.plan();
  const bool ends_in_heads = detail::projects_query(plan.orders.logits) && detail::ends_in_heads(plan.orders.values);
  check_value(!plan.pinned || ends_in_heads, kContextParallel,
              "plan must be of orders that end in heads, standard and fold_into_query, but is {}, {}.",
              name_of(plan.orders.logits), name_of(plan.orders.values));
}

// Exchanges batch and length of x once `check` has passed on all ranks. An error that it throws on one rank is reported on
// every rank, because the others would otherwise wait.
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
  detail::Layer layer;  // with the weights that made the context, whose gradients are added up over the ranks
  detail::LayerContext parts;
  detail::WeightsStamp made_from;
  Mask mask;  // of the whole context
  bool is_batched;
  int64_t first, own, length;
};

int64_t SharedContext::batch_size() const {
  return state_->parts.keys.size(0);
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
  return state_->layer.orders;
}
int64_t SharedContext::bytes() const {
  const auto &keys = state_->parts.keys, &values = state_->parts.values;
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

std::tuple<Tensor, Tensor> ContextParallel::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask, const CallOptions& call) {
  const auto rows = query.defined() && query.dim() >= 2 ? query.size(-2) : 1;
  const auto all = state_->queries == Queries::own ? rows * state_->ranks->size() : rows;
  return attend(query, context(key, value, mask, {.expected_queries = all}), call);
}

SharedContext ContextParallel::context(const Tensor& key,
                                       const Tensor& value,
                                       const Mask& mask,
                                       const ContextOptions& options) {
  auto& module = *state_->module;
  const auto& o = module.options;
  auto weights = detail::weights_of(module);
  detail::ContextInputs inputs;
  const auto lengths = exchange_lengths(key, "key", weights.key.device(), *state_->ranks, [&] {
    check_options(module);
    check_value(options.capacity == 0 && !options.share, kContextParallel,
                "options must have neither capacity nor share, which are for contexts of one process, but have one.");
    inputs = detail::context_inputs(kContextParallel, weights, key, value, {});
  });
  const auto rank = state_->ranks->rank(), own = inputs.Lk();
  const auto first = std::accumulate(lengths.begin(), lengths.begin() + rank, int64_t{0});
  const auto length = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  detail::check_mask(mask, kContextParallel, inputs.B(), o.num_heads(), std::nullopt, length, inputs.key.device());

  const bool inputs_train = key.requires_grad() || value.requires_grad();
  auto request =
      detail::request_of(module, weights, inputs.B(), 1, std::max<int64_t>(1, own), {}, o.attention_weights(), inputs_train);
  request.sums_heads = request.sums_ranks = true;
  if (!o.plan().pinned) request.pinned.reset();  // autocast pins the standard order, which is not needed here
  const auto orders = detail::orders_of(detail::for_context(kContextParallel, request, options));

  // A share without keys becomes one key that no query may attend to, so that its rank takes the same steps as the others.
  if (own == 0) {
    const bool one = inputs.key.is_same(inputs.value);
    inputs.key = at::constant_pad_nd(inputs.key, {0, 0, 0, 1});
    inputs.value = one ? inputs.key : at::constant_pad_nd(inputs.value, {0, 0, 0, 1});
  }
  const auto stamp = detail::stamp_of(weights, orders);
  const auto of_context = detail::context_tensors(weights);
  for (auto* x : of_context) {  // gradients that are not summed would differ between ranks
    if (x->defined() && !(at::GradMode::is_enabled() && x->requires_grad())) *x = x->detach();
  }
  detail::sum_gradients(of_context, state_->ranks);
  detail::Layer layer(orders, std::move(weights));
  auto parts = detail::make_context(layer, inputs.key, inputs.value);
  return SharedContext(std::make_shared<SharedContext::State>(
      SharedContext::State{state_, std::move(layer), std::move(parts), stamp, mask, inputs.is_batched, first, own, length}));
}

std::tuple<Tensor, Tensor> ContextParallel::attend(const Tensor& query, const SharedContext& context, const CallOptions& call) {
  auto& module = *state_->module;
  const auto& o = module.options;
  const auto& c = *context.state_;
  const auto& ranks = state_->ranks;
  check_value(c.owner == state_, kContextParallel,
              "context must be made by the ContextParallel that attends to it, but is another's.");
  const bool apart = state_->queries == Queries::own;
  auto own_weights = detail::weights_of(module);
  Tensor own;  // [B, Lq, Eq]
  const auto check = [&] {
    check_options(module);
    own = detail::query_input(kContextParallel, own_weights, query, c.is_batched, context.batch_size());
    c.made_from.check(kContextParallel, detail::stamp_of(own_weights, c.layer.orders));
  };
  const auto device = own_weights.query.device();
  std::vector<int64_t> lengths;
  if (apart || device.is_cpu()) {
    lengths = exchange_lengths(query, "query", device, *ranks, check);
  } else {
    check();  // exchanging errors would wait for the device
  }
  for (size_t rank = 0; rank < lengths.size() && !apart; ++rank) {
    check_value(lengths[rank] == own.size(1), kContextParallel,
                "query must have one length on all ranks, but has {} on rank {} and {} on rank {}.", own.size(1), ranks->rank(),
                lengths[rank], rank);
  }
  auto Xq = apart ? detail::all_rows(own, lengths, ranks) : own;
  const auto Lq = Xq.size(1);
  const auto type = Xq.scalar_type();
  detail::check_mask(c.mask, kContextParallel, context.batch_size(), o.num_heads(), Lq, c.length, device);

  auto layer = c.layer;
  auto replicated = detail::query_tensors(own_weights);
  replicated.push_back(&Xq);
  detail::sum_gradients(replicated, ranks);
  layer.weights.query = own_weights.query;
  layer.weights.query_bias = own_weights.query_bias;
  layer.weights.query_norm = own_weights.query_norm;
  layer.weights.scale = own_weights.scale;

  auto mask = detail::shard_of_keys(c.mask, c.first, c.own, Lq, c.length, device);
  if (c.own == 0) {  // the key that stands for the share, and a learned bias, which gets a gradient of zeros
    const auto forbidden = at::zeros({1, 1}, at::dtype(at::kBool).device(device));
    mask = detail::with_bias_kv(mask, Lq, 0, device) & Mask::key_padding(forbidden);
  }
  auto how = detail::attention_options(kContextParallel, o, call, mask, module.is_training());
  const auto returned = how.weights;
  if (returned != AttentionWeights::per_head) how.weight_heads.clear();
  if (returned == AttentionWeights::mean) how.weights = AttentionWeights::per_head;  // the mean is taken after merging
  how.log_sum_exp = true;
  const auto query_of_all = detail::make_query(layer.weights, Xq, /*is_projected=*/true);
  const auto [part, largest] = detail::attend_heads(layer, query_of_all, c.parts, how);
  const auto merged = detail::merge(part.output, part.log_sum_exp, largest, ranks);

  auto heads = detail::merge_heads(merged.output.to(type));  // [B, Lq, H * e]
  if (apart) {
    heads = detail::own_rows(heads, lengths, ranks);
    detail::sum_gradients({&own_weights.output, &own_weights.output_bias}, ranks);
  }
  AttentionResult result{detail::project(heads, own_weights.output, own_weights.output_bias), {}, {}};
  if (part.weights.defined()) {
    const at::NoGradGuard no_grad;
    const auto share = detail::chosen_heads(merged.share, how.weight_heads);
    result.weights = (part.weights.detach() * share).narrow(-1, 0, c.own).to(part.weights.scalar_type());
    if (returned == AttentionWeights::mean) result.weights = result.weights.mean(1);
  }
  return detail::results(result, c.is_batched);
}

}  // namespace xattn
