// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen.h>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <variant>

#include "base/check.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"
#include "frozen/engine.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"
#include "plan/order_traits.h"

namespace xattn {

using at::Tensor;
using detail::batched;
using detail::check_value;
using detail::uses_product;

namespace {

constexpr auto kFrozen = "frozen";

detail::Folded in_type_of(const Tensor& weight, const detail::Folded& folded) {
  return {folded.weight.to(weight.scalar_type()), folded.bias.defined() ? folded.bias.to(weight.scalar_type()) : Tensor()};
}

detail::LayerWeights in_double(detail::LayerWeights w) {
  for (auto* x : {&w.query, &w.query_bias, &w.key, &w.key_bias, &w.value, &w.value_bias, &w.output, &w.output_bias}) {
    if (x->defined()) *x = x->to(at::kDouble);
  }
  return w;
}

// The keys of each batch entry that the mask leaves as far as the host knows, and what else it says.
std::pair<std::vector<int64_t>, Mask> split_lengths(const Mask& mask, int64_t B, int64_t Lk) {
  auto lengths = mask.host_lengths();
  if (lengths.empty()) return {std::vector<int64_t>(static_cast<size_t>(B), Lk), mask};
  if (lengths.size() == 1) lengths.resize(static_cast<size_t>(B), lengths.front());
  return {lengths, mask.without_lengths()};
}

// What a plan is made for: these keys are all that is looked at.
int64_t mean_length(const std::vector<int64_t>& lengths) {
  const auto count = static_cast<int64_t>(lengths.size()), sum = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  return count == 0 ? 1 : std::max<int64_t>(1, (sum + count - 1) / count);
}

// The mask of a context for n queries of Lq rows, one behind the other, for logits of this type.
Mask for_queries(const Mask& mask, int64_t n, int64_t Lq, int64_t Lk, at::Device device, at::ScalarType type) {
  if (n == 1) return mask;
  const auto repeated = [n](const Tensor& x) { return x.size(2) == 1 ? x : x.repeat({1, 1, n, 1}); };
  Mask result;
  if (const auto keep = mask.keep(Lq, Lk, device); keep.defined()) result = Mask::dense(repeated(keep));
  if (const auto bias = mask.additive(type); bias.defined()) result = result & Mask::bias(repeated(bias));
  return result;
}

std::tuple<Tensor, Tensor> as_given(const AttentionResult& result, bool is_batched) {
  if (is_batched) return {result.output, result.weights};
  return {result.output.squeeze(0), result.weights.defined() ? result.weights.squeeze(0) : result.weights};
}

// The same numbers in the same places.
bool are_one(const Tensor& x, const Tensor& y) {
  return x.is_same(y) || (x.is_alias_of(y) && x.is_neg() == y.is_neg() && x.storage_offset() == y.storage_offset() &&
                          x.sizes() == y.sizes() && x.strides() == y.strides());
}

// A call of a frozen layer: no gradients, and the type of its weights, whatever autocast says.
struct Inference {
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace

struct Frozen::State {
  CrossAttention module;  // a copy that nobody else has
  detail::LayerWeights weights;
  detail::Products products;
  std::optional<detail::EngineWeights> engine;
  Tensor query;                              // [Lq, Eq], or undefined
  std::array<Tensor, kOrders> folded_query;  // for each order of the logits
  PlanMode plan;

  PlanRequest request(int64_t B, int64_t Lq, int64_t Lk) const {
    auto request = detail::request_of(module->options, B, Lq, Lk);
    request.weights_are_frozen = true;
    request.query_is_constant = query.defined();
    request.element = static_cast<int64_t>(weights.query.element_size());
    const int threads = at::get_num_threads();
    request.rates = plan.rates                ? *plan.rates
                    : engine                  ? Rates::kernels(threads)
                    : weights.query.is_cuda() ? Rates::cuda()
                                              : Rates::cpu(threads);
    request.gives_weights = module->options.attention_weights() != AttentionWeights::none;
    request.runs_on = engine ? RunsOn::engine : detail::runs_on(weights.query);
    if (plan.pinned) request.pinned = plan.orders;
    return request;
  }

  PlanRequest request_for_context(int64_t B, int64_t Lk, int64_t expected) const {
    return detail::for_context(kFrozen, request(B, 1, Lk), expected);
  }

  // query [B, Lq, Eq], or undefined for the constant one.
  detail::EngineCall call(const Orders& orders, const Tensor& given, const Mask& mask) const {
    const auto& folded = folded_query[static_cast<size_t>(orders.logits)];
    const auto& o = module->options;
    return {.query = given,
            .folded_query = folded,
            .mask = mask,
            .weights = o.attention_weights(),
            .weight_heads = o.weight_heads()};
  }

  static Orders choose(const PlanRequest& request) { return request.pinned ? *request.pinned : make_plan(request).orders; }
};

// The caller's tensors, where they stayed as they came, become copies: what he does with them later changes no context.
template <class Side>
void copy_what_came(Side& side, const Tensor& key, const Tensor& value) {
  const bool one = side.values.is_same(side.keys);
  if (side.keys.is_alias_of(key)) side.keys = side.keys.clone();
  if (one) {
    side.values = side.keys;
  } else if (side.values.is_alias_of(value)) {
    side.values = side.values.clone();
  }
}

struct FrozenContext::State {
  std::shared_ptr<const Frozen::State> owner;
  std::variant<detail::Side, detail::EngineSide> side;
  Orders orders;
  Mask mask;  // without the lengths that the side knows
  int64_t B, Lk;
  bool batched;

  detail::ContextLayout layout() const {
    const auto* of_engine = std::get_if<detail::EngineSide>(&side);
    return of_engine ? of_engine->layout : detail::ContextLayout::packed;
  }
};

// ---- FrozenContext ---------------------------------------------------------------------------------------------------------

const Orders& FrozenContext::orders() const {
  return state_->orders;
}
const Mask& FrozenContext::mask() const {
  return state_->mask;
}
int64_t FrozenContext::batch_size() const {
  return state_->B;
}
int64_t FrozenContext::length() const {
  return state_->Lk;
}
bool FrozenContext::is_batched() const {
  return state_->batched;
}

int64_t FrozenContext::bytes() const {
  return std::visit(
      [](const auto& side) {
        int64_t bytes = 0;
        for (const auto* x : {&side.keys, &side.key_bias, &side.values})
          bytes += x->defined() ? static_cast<int64_t>(x->nbytes()) : 0;
        return side.values.is_alias_of(side.keys) ? bytes / 2 : bytes;
      },
      state_->side);
}

FrozenContext FrozenContext::slice(int64_t begin, int64_t end) const {
  check_value(0 <= begin && begin < end && end <= state_->B, kFrozen, "slice must lie in [0, {}], but is [{}, {}).", state_->B,
              begin, end);
  auto sliced = std::make_shared<State>(*state_);
  sliced->B = end - begin;
  sliced->mask = state_->mask.slice(begin, end);
  const auto cut = [&](auto& side) {
    for (auto* x : {&side.keys, &side.key_bias, &side.values}) {
      if (x->defined()) *x = x->narrow(0, begin, end - begin);
    }
  };
  if (auto* side = std::get_if<detail::EngineSide>(&sliced->side)) {
    cut(*side);
    side->B = end - begin;
    side->lengths = {side->lengths.begin() + begin, side->lengths.begin() + end};
  } else {
    cut(std::get<detail::Side>(sliced->side));
  }
  return FrozenContext(std::move(sliced));
}

FrozenContext FrozenContext::to(at::Device device) const {
  auto moved = std::make_shared<State>(*state_);
  moved->mask = state_->mask.to(device);
  std::visit(
      [device](auto& side) {
        for (auto* x : {&side.keys, &side.key_bias, &side.values}) {
          if (x->defined()) *x = x->to(device);
        }
      },
      moved->side);
  return FrozenContext(std::move(moved));
}

FrozenContext FrozenContext::cat(const std::vector<FrozenContext>& contexts) {
  check_value(!contexts.empty(), kFrozen, "contexts must be at least one, but are none.");
  const auto& first = *contexts.front().state_;
  auto joined = std::make_shared<State>(first);
  std::vector<std::pair<Mask, int64_t>> masks;
  joined->B = 0;
  for (const auto& context : contexts) {
    const auto& state = *context.state_;
    check_value(state.owner == first.owner && state.orders == first.orders && state.Lk == first.Lk && state.batched &&
                    state.layout() == first.layout(),
                kFrozen, "contexts must be batches of one Frozen, of one length and orders, but they differ.");
    masks.emplace_back(state.mask, state.B);
    joined->B += state.B;
  }
  joined->mask = Mask::cat(masks);
  std::visit(
      [&](auto& side) {
        using Side = std::decay_t<decltype(side)>;
        for (const auto part : {&Side::keys, &Side::key_bias, &Side::values}) {
          std::vector<Tensor> parts;
          for (const auto& context : contexts) parts.push_back(std::get<Side>(context.state_->side).*part);
          if (parts.front().defined()) side.*part = at::cat(parts);
        }
        if constexpr (std::is_same_v<Side, detail::EngineSide>) {
          side.B = joined->B;
          side.lengths.clear();
          for (const auto& context : contexts) {
            const auto& lengths = std::get<Side>(context.state_->side).lengths;
            side.lengths.insert(side.lengths.end(), lengths.begin(), lengths.end());
          }
        }
      },
      joined->side);
  return FrozenContext(std::move(joined));
}

// ---- Frozen ----------------------------------------------------------------------------------------------------------------

Frozen::Frozen(const CrossAttentionImpl& module, const FreezeOptions& options) {
  const at::NoGradGuard no_grad;
  detail::check_module(kFrozen, module);
  CrossAttention copy(std::dynamic_pointer_cast<CrossAttentionImpl>(module.clone()));
  copy->eval();
  for (auto& parameter : copy->parameters()) parameter.requires_grad_(false);
  const detail::LayerWeights weights(*copy);
  auto state =
      std::make_shared<State>(State{copy, weights, {}, {}, options.query, {}, options.plan.value_or(copy->options.plan())});
  const auto& o = copy->options;

  const auto request = detail::request_of(o, 1, 1, 1);
  const auto& [logits, values] = state->plan.orders;
  detail::check_plan(kFrozen, state->plan, request);
  if (options.query.defined()) {
    check_value(options.query.dim() == 2 && options.query.size(1) == o.dim_query(), kFrozen,
                "query must have shape [Lq, {}], but has {}.", o.dim_query(), detail::shape_of(options.query));
    detail::check_query(kFrozen, options.query, /*is_batched=*/false, 1, copy->query_linear);
    state->query = options.query.detach().clone();
  }

  const bool no_norm = o.qk_norm() == NormKind::none && !o.bias_kv();
  const bool kernels = !o.bias_kv() && weights.query.is_cpu() && weights.query.scalar_type() == at::kFloat;
  if (options.storage) {
    check_value(*options.storage == at::kFloat || *options.storage == at::kBFloat16, kFrozen,
                "storage must be float32 or bfloat16, but is {}.", c10::getDtypeNames(*options.storage).first);
    check_value(kernels, kFrozen,
                "storage must be left out where the kernels do not run, but is given: they need float32 on the "
                "CPU and no bias_kv.");
  }
  auto exact = in_double(weights);
  if (kernels) exact.scale = 1;  // the kernels scale in the softmax
  const auto is_wanted = [&state](Order order, bool pays) { return state->plan.pinned ? uses_product(order) : pays; };
  if (is_wanted(logits, no_norm && logits_product_pays(request))) {
    state->products.logits = in_type_of(weights.query, fold_logits(exact));
  }
  if (is_wanted(values, !o.bias_kv() && values_product_pays(request))) {
    state->products.values = in_type_of(weights.query, fold_values(exact));
  }
  if (kernels && !options.plan) state->plan.rates.reset();  // those of the module are not of its engine
  if (kernels) state->engine.emplace(weights, state->products, options.storage.value_or(at::kFloat));
  for (int i = 0; kernels && state->query.defined() && i < kOrders; ++i) {
    state->folded_query[static_cast<size_t>(i)] = fold_query({static_cast<Order>(i), {}}, *state->engine, state->query);
  }
  state_ = std::move(state);
}

std::tuple<Tensor, Tensor> Frozen::forward(const Tensor& query,
                                           const Tensor& key,
                                           const Tensor& value,
                                           const Mask& mask) const {
  const Inference inference;
  const bool is_batched = key.defined() && key.dim() == 3;
  detail::check_query(kFrozen, query, is_batched, is_batched ? key.size(0) : 1, state_->module->query_linear);
  return forward_with(batched(query), key, value, mask);
}

std::tuple<Tensor, Tensor> Frozen::forward(const Tensor& key, const Tensor& value, const Mask& mask) const {
  const Inference inference;
  check_value(state_->query.defined(), kFrozen, "query must be given to freeze or to forward, but is given to neither.");
  return forward_with({}, key, value, mask);
}

// query [B, Lq, Eq], or undefined for the constant one.
std::tuple<Tensor, Tensor> Frozen::forward_with(const Tensor& query,
                                                const Tensor& key,
                                                const Tensor& value,
                                                const Mask& mask) const {
  const auto& module = *state_->module;
  detail::check_key_value(kFrozen, key, value, mask, module.key_linear, module.value_linear, module.options.num_heads());
  const auto Xk = batched(key), Xv = batched(value);
  const auto B = Xk.size(0), Lq = query.defined() ? query.size(1) : state_->query.size(0), Lk = Xk.size(1);
  mask.check(kFrozen, B, options().num_heads(), Lq, Lk, key.device());
  if (!state_->engine) {
    const auto keys = options().bias_kv() ? Lk : mask.needed_keys(Lk);
    const auto cut_mask = mask.first_keys(keys);
    const FrozenContext context(
        make_context(orders(B, Lq, keys), Xk.narrow(1, 0, keys), Xv.narrow(1, 0, keys), cut_mask, key.dim() == 3, Lq));
    const auto [output, weights] = attend_with(query, context);
    return {output, detail::with_zeros(weights, Lk - keys)};
  }
  const auto [lengths, rest] = split_lengths(mask, B, Lk);
  const auto orders = this->orders(B, Lq, mean_length(lengths));
  return as_given(detail::forward(orders, *state_->engine, Xk, Xv, lengths, state_->call(orders, query, rest)), key.dim() == 3);
}

FrozenContext Frozen::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& options) const {
  const auto& module = *state_->module;
  const Inference inference;
  const auto expected = options.expected_queries;
  detail::check_key_value(kFrozen, key, value, mask, module.key_linear, module.value_linear, module.options.num_heads());
  const auto Xk = batched(key);
  const auto keys = mean_length(split_lengths(mask, Xk.size(0), Xk.size(1)).first);
  const auto orders = state_->choose(state_->request_for_context(Xk.size(0), keys, expected));
  const auto rows = expected == ContextOptions::kMany ? std::numeric_limits<int64_t>::max() : expected;
  const auto Xv = are_one(key, value) ? Xk : batched(value);
  auto context = make_context(orders, Xk, Xv, mask, key.dim() == 3, rows);
  std::visit([&](auto& side) { copy_what_came(side, Xk, Xv); }, context->side);
  return FrozenContext(std::move(context));
}

std::shared_ptr<FrozenContext::State> Frozen::make_context(
    const Orders& orders, const Tensor& key, const Tensor& value, const Mask& mask, bool is_batched, int64_t rows) const {
  auto context = std::make_shared<FrozenContext::State>();
  context->owner = state_;
  context->orders = orders;
  context->B = key.size(0);
  context->Lk = key.size(1);
  context->batched = is_batched;
  context->mask = mask;
  if (state_->engine) {
    auto [lengths, rest] = split_lengths(mask, context->B, context->Lk);
    context->mask = rest;
    context->side = detail::make_side(orders, *state_->engine, key, value, std::move(lengths), rows);
  } else {
    context->side = detail::make_side(orders, state_->weights, state_->products, key, value);
  }
  return context;
}

std::tuple<Tensor, Tensor> Frozen::attend(const Tensor& query, const FrozenContext& context) const {
  const Inference inference;
  const auto& c = *context.state_;
  const auto& module = *state_->module;
  check_value(c.owner == state_, kFrozen, "context must be made by the Frozen that attends to it, but is another's.");
  const auto given = query.defined() && query.dim() == 3 ? query.size(0) : 1;
  detail::check_query(kFrozen, query, c.batched, c.B > 0 && given % c.B == 0 ? given : c.B, module.query_linear);
  return attend_with(query, context);
}

std::tuple<Tensor, Tensor> Frozen::attend(const FrozenContext& context) const {
  const Inference inference;
  check_value(context.state_->owner == state_, kFrozen,
              "context must be made by the Frozen that attends to it, but is another's.");
  check_value(state_->query.defined(), kFrozen, "query must be given to freeze or to attend, but is given to neither.");
  return attend_with({}, context);
}

// The query has been checked; undefined stands for the constant one.
std::tuple<Tensor, Tensor> Frozen::attend_with(const Tensor& query, const FrozenContext& context) const {
  const auto& c = *context.state_;
  const auto device = std::visit([](const auto& side) { return side.keys.device(); }, c.side);
  detail::check_type(device == state_->weights.query.device(), kFrozen, "context must be on {}, as the weights, but is on {}.",
                     state_->weights.query.device().str(), device.str());
  const auto wanted = options().attention_weights();
  const auto Xq = query.defined() ? batched(query) : Tensor();
  const auto Lq = query.defined() ? Xq.size(1) : state_->query.size(0);
  c.mask.check(kFrozen, c.B, options().num_heads(), Lq, c.Lk, state_->weights.query.device());
  if (const auto* side = std::get_if<detail::EngineSide>(&c.side)) {
    return as_given(detail::attend(*state_->engine, *side, state_->call(c.orders, Xq, c.mask)), c.batched);
  }
  const auto rows = query.defined() ? Xq : state_->query.expand({c.B, -1, -1});
  const auto n = c.B > 0 ? rows.size(0) / c.B : 1;
  AttentionOptions how;
  how.mask = for_queries(c.mask, n, Lq, c.Lk, rows.device(), rows.scalar_type());
  how.scale = options().scale();
  how.weights = wanted;
  how.weight_heads = options().weight_heads();
  auto result = detail::attend(c.orders, state_->weights, state_->products, rows.reshape({c.B, n * Lq, rows.size(2)}),
                               std::get<detail::Side>(c.side), how);
  result.output = result.output.view({c.B * n, Lq, result.output.size(2)});
  if (wanted == AttentionWeights::mean) result.weights = result.weights.reshape({c.B * n, Lq, result.weights.size(2)});
  if (wanted == AttentionWeights::per_head) {
    result.weights = result.weights.unflatten(2, {n, Lq}).transpose(1, 2).flatten(0, 1);
  }
  return as_given(result, c.batched);
}

std::string Frozen::explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries) const {
  return xattn::explain(expected_queries ? state_->request_for_context(B, Lk, *expected_queries) : state_->request(B, Lq, Lk));
}

Orders Frozen::orders(int64_t B, int64_t Lq, int64_t Lk) const {
  return state_->choose(state_->request(B, Lq, Lk));
}

const CrossAttentionOptions& Frozen::options() const {
  return state_->module->options;
}

bool Frozen::uses_kernels() const {
  return state_->engine.has_value();
}

Frozen CrossAttentionImpl::freeze() const {
  return freeze({});
}

Frozen CrossAttentionImpl::freeze(const FreezeOptions& how) const {
  return Frozen(*this, how);
}

}  // namespace xattn
