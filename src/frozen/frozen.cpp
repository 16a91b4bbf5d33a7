// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen.h>

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "frozen/engine.h"
#include "frozen/state.h"
#include "modules/decoupled_parts.h"
#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/options.h"
#include "modules/planning.h"
#include "modules/queries.h"
#include "plan/order_traits.h"

namespace xattn {

using at::Tensor;
using detail::check_value;
using detail::kFrozen;

namespace {

detail::WeightProduct in_type_of(const Tensor& weight, const detail::WeightProduct& product) {
  const auto type = weight.scalar_type();
  return {product.weight.to(type), product.bias.defined() ? product.bias.to(type) : Tensor()};
}

// The weights with every tensor changed.
template <class Change>
detail::LayerWeights changed(detail::LayerWeights w, const Change& change) {
  for (auto* x : all_tensors(w)) {
    if (x->defined()) *x = change(*x);
  }
  return w;
}

// A copy of the weights. An added context of a decoupled layer shares those of the first that are the same.
detail::LayerWeights copied(const detail::LayerWeights& weights, const detail::LayerWeights* first) {
  auto copy = changed(weights, [](const Tensor& x) { return x.detach().clone(); });
  if (!first) return copy;
  copy.query = first->query, copy.query_bias = first->query_bias, copy.query_norm = first->query_norm;
  copy.output = first->output, copy.output_bias = first->output_bias;
  return copy;
}

// The context length that a plan is made for.
int64_t mean_length(const std::vector<int64_t>& lengths) {
  const auto count = static_cast<int64_t>(lengths.size()), sum = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  return count == 0 ? 1 : std::max<int64_t>(1, (sum + count - 1) / count);
}

// Whether both are views of the same memory with the same sizes and strides.
bool are_one(const Tensor& x, const Tensor& y) {
  return x.is_same(y) || (x.is_alias_of(y) && x.is_neg() == y.is_neg() && x.storage_offset() == y.storage_offset() &&
                          x.sizes() == y.sizes() && x.strides() == y.strides());
}

// A tensor of the same sizes, type and device that takes no memory.
Tensor without_numbers(const Tensor& x) {
  return at::zeros({1}, x.options()).expand(x.sizes());
}

}  // namespace

bool detail::runs_on_kernels(const Tensor& weight) {
  return weight.is_cpu() && weight.scalar_type() == at::kFloat;
}

void detail::check_storage(std::string_view caller, const std::optional<at::ScalarType>& storage, bool kernels) {
  if (!storage) return;
  check_value(*storage == at::kFloat || *storage == at::kBFloat16, caller, "storage must be float32 or bfloat16, but is {}.",
              c10::getDtypeNames(*storage).first);
  check_value(kernels, caller,
              "storage must be left out where the kernels do not run, but is given: they need float32 on the "
              "CPU and no bias_kv.");
}

PlanRequest Frozen::State::request(int64_t B, int64_t Lq, int64_t Lk, AttentionWeights returned) const {
  auto request = detail::request_of(weights, B, Lq, Lk);
  request.weights_are_frozen = true;
  if (engine) request.stored_element = static_cast<int64_t>(c10::elementSize(engine->storage));
  request.query_is_constant = query.defined();
  const int threads = at::get_num_threads();
  request.rates = plan.rates                ? *plan.rates
                  : engine                  ? Rates::kernels(threads)
                  : weights.query.is_cuda() ? Rates::cuda()
                                            : Rates::cpu(threads);
  request.returns_weights = returned != AttentionWeights::none;
  request.runs_on = engine ? RunsOn::frozen_kernels : detail::runs_on(weights.query);
  if (plan.pinned) request.pinned = plan.orders;
  return request;
}

detail::EngineCall Frozen::State::call(const Orders& orders, const Tensor& given, const AttentionOptions& how) const {
  return {.query = given, .folded_query = folded_query[static_cast<size_t>(orders.logits)], .how = how};
}

AttentionOptions Frozen::State::attention_options(const Mask& mask, const CallOptions& call) const {
  return detail::attention_options(kFrozen, options, call, mask, /*is_training=*/false);
}

const Frozen::State& Frozen::state() const {
  check_value(state_ != nullptr, kFrozen, "layer must be made by CrossAttention::freeze, but is empty.");
  return *state_;
}

// ---- Frozen ----------------------------------------------------------------------------------------------------------------

Frozen::Frozen(const CrossAttentionImpl& module, const FreezeOptions& freeze) {
  const detail::Inference inference;
  detail::check_module(kFrozen, module);
  const auto& o = module.options;
  const auto weights = detail::weights_of(module);
  auto query = freeze.query;
  if (query.defined()) {
    check_value(query.dim() == 2 && query.size(1) == o.dim_query(), kFrozen, "query must have shape [Lq, {}], but has {}.",
                o.dim_query(), detail::shape_of(query));
    detail::query_input(kFrozen, weights, query, /*is_batched=*/false, 1);
    query = query.detach().clone();
  }
  state_ = State::make(o, weights, freeze, query, nullptr);
}

std::shared_ptr<const Frozen::State> Frozen::State::make(const CrossAttentionOptions& options,
                                                         detail::LayerWeights weights,
                                                         const FreezeOptions& freeze,
                                                         const Tensor& query,
                                                         const State* first) {
  auto plan = freeze.plan.value_or(options.plan());
  detail::check_plan(kFrozen, plan, options);
  const auto &own = weights.key, &attention = first ? first->weights.key : own;
  detail::check_type(own.scalar_type() == attention.scalar_type() && own.device() == attention.device(), kFrozen,
                     "added projections must be {} on {}, as the attention, but one is {} on {}.", detail::type_of(attention),
                     detail::name_of(attention.device()), detail::type_of(own), detail::name_of(own.device()));
  const bool kernels = !options.bias_kv() && detail::runs_on_kernels(weights.key);
  detail::check_storage(kFrozen, freeze.storage, kernels);
  if (kernels && !freeze.plan) plan.rates.reset();  // the module's rates are those of other kernels
  const auto exact = [&weights, kernels] {          // a copy that lives as long as a product is made from it
    auto copy = changed(weights, [](const Tensor& x) { return x.detach().to(at::kDouble); });
    if (kernels) copy.scale = 1;  // the kernels scale in the softmax
    return copy;
  };
  // An automatic plan may take a product of weights wherever it is legal and saves time.
  const auto is_requested = [&plan](Order pinned, std::string_view illegal) {
    return plan.pinned ? detail::uses_product(pinned) : illegal.empty();
  };
  auto request = detail::request_of(weights, 1, 1, 1);
  request.weights_are_frozen = true;
  detail::WeightProducts products;
  if (is_requested(plan.orders.logits, illegal_for_logits(Order::prefold, request))) {
    products.logits = in_type_of(weights.query, detail::product_for_logits(exact()));
  }
  if (is_requested(plan.orders.values, illegal_for_values(Order::prefold, request))) {
    products.values = in_type_of(weights.query, detail::product_for_values(exact()));
  }

  auto state = std::make_shared<State>(State{options, std::move(weights), plan});
  state->query = query;
  if (!kernels) {
    state->weights = copied(state->weights, first ? &first->weights : nullptr);
    state->products = std::move(products);
    return state;
  }
  const auto pinned = plan.pinned ? std::optional(plan.orders) : std::nullopt;
  const auto storage = freeze.storage.value_or(at::kFloat);
  if (first) {
    state->engine.emplace(*first->engine, state->weights, products, pinned);
  } else {
    state->engine.emplace(state->weights, products, storage, pinned);
  }
  state->weights = changed(state->weights, without_numbers);
  for (size_t i = 0; query.defined() && i < kOrders; ++i) {
    const auto order = static_cast<Order>(i);
    const bool has_weights = !detail::uses_product(order) || state->engine->logits_product.data.defined();
    if (pinned ? order == pinned->logits : has_weights) state->folded_query[i] = fold_query({order, {}}, *state->engine, query);
  }
  return state;
}

std::tuple<Tensor, Tensor> Frozen::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask, const CallOptions& call) const {
  return forward_with(query, key, value, mask, call);
}

std::tuple<Tensor, Tensor> Frozen::forward(const Tensor& key,
                                           const Tensor& value,
                                           const Mask& mask,
                                           const CallOptions& call) const {
  check_value(state().query.defined(), kFrozen, "query must be given to freeze or to forward, but is given to neither.");
  return forward_with(std::nullopt, key, value, mask, call);
}

// Without a query, the constant one attends.
std::tuple<Tensor, Tensor> Frozen::forward_with(const std::optional<Tensor>& query,
                                                const Tensor& key,
                                                const Tensor& value,
                                                const Mask& mask,
                                                const CallOptions& call) const {
  const detail::Inference inference;
  auto inputs = detail::context_inputs(kFrozen, state().weights, key, value, mask);
  const auto B = inputs.B();
  const auto Xq = query ? detail::query_input(kFrozen, state().weights, *query, inputs.is_batched, B) : Tensor();
  const auto Lq = query ? Xq.size(1) : state().query.size(0);
  detail::check_mask(kFrozen, state().weights, inputs, Lq);
  const auto returned = detail::returned_weights(options(), call);
  if (!state().engine) {
    const auto dropped_keys = detail::drop_padding(state().weights, inputs);
    const auto orders = detail::orders_of(state().request(B, Lq, inputs.Lk(), returned));
    const FrozenContext context(FrozenContext::State::make(state_, orders, inputs, {}));
    return detail::results(attend_to(Xq, {{context}}, call), inputs.is_batched, dropped_keys);
  }
  const auto [lengths, rest] = detail::split_lengths(mask, B, inputs.Lk());
  const auto orders = detail::orders_of(state().request(B, Lq, mean_length(lengths), returned));
  const auto engine_call = state().call(orders, Xq, state().attention_options(rest, call));
  return detail::results(detail::forward(orders, *state().engine, inputs.key, inputs.value, lengths, engine_call),
                         inputs.is_batched);
}

FrozenContext Frozen::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) const {
  return context_for(kFrozen, key, value, mask, how);
}

FrozenContext Frozen::context_for(
    std::string_view caller, const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) const {
  const detail::Inference inference;
  auto inputs = detail::context_inputs(caller, state().weights, key, value, mask);
  detail::check_mask(caller, state().weights, inputs, std::nullopt);
  if (are_one(key, value)) inputs.value = inputs.key;
  const bool kernels = uses_kernels();
  const auto keys = kernels ? mean_length(detail::split_lengths(mask, inputs.B(), inputs.Lk()).first) : inputs.Lk();
  const auto request = state().request(inputs.B(), 1, keys, options().attention_weights());
  const auto orders = detail::orders_of_context(caller, request, how);
  const bool many = how.expected_queries == ContextOptions::kMany;
  const auto rows = many ? std::numeric_limits<int64_t>::max() : how.expected_queries;
  auto layout = detail::context_layout(rows, options().num_heads());
  if (how.share && layout == detail::ContextLayout::packed) layout = detail::ContextLayout::pack_on_read;
  const auto check_shared = [&](const char* name, const Tensor& x) {
    check_value(!how.share || !kernels || (x.is_contiguous() && !x.is_neg()), caller,
                "{} must be contiguous to be shared, but has strides [{}].", name, detail::joined(x.strides()));
  };
  check_shared("key", inputs.key);
  check_shared("value", inputs.value);
  auto context = FrozenContext::State::make(state_, orders, inputs, layout, how.capacity);
  if (!how.share) detail::copy_shared(context->parts, inputs.key, inputs.value);
  context->shared = how.share;
  return FrozenContext(std::move(context));
}

std::tuple<Tensor, Tensor> Frozen::attend(const Tensor& query, const FrozenContext& context, const CallOptions& call) const {
  const detail::Inference inference;
  check_owner(context);
  const auto Xq = query_for(kFrozen, query, context);
  check_context(kFrozen, context, Xq.size(1));
  return detail::results(attend_to(Xq, {{context}}, call), context.is_batched());
}

// query [B * n, Lq, Eq] for a context of B entries, with a batch axis.
Tensor Frozen::query_for(std::string_view caller, const Tensor& query, const FrozenContext& context) const {
  return detail::several_queries(caller, state().weights, query, context.is_batched(), context.batch_size());
}

void Frozen::check_context(std::string_view caller, const FrozenContext& context, int64_t Lq) const {
  const auto& parts = context.state().parts;
  const auto device = parts.keys.device(), own = state().weights.query.device();
  detail::check_type(device == own, caller, "context must be on {}, as the weights, but is on {}.", detail::name_of(own),
                     detail::name_of(device));
  detail::check_mask(context.state().mask, caller, parts.B, options().num_heads(), Lq, parts.Lk, device);
}

std::tuple<Tensor, Tensor> Frozen::attend(const FrozenContext& context, const CallOptions& call) const {
  const detail::Inference inference;
  check_value(state().query.defined(), kFrozen, "query must be given to freeze or to attend, but is given to neither.");
  check_owner(context);
  check_context(kFrozen, context, state().query.size(0));
  return detail::results(attend_to({}, {{context}}, call), context.is_batched());
}

void Frozen::check_owner(const FrozenContext& context) const {
  const auto& own = state();
  check_value(context.state().owner.get() == &own, kFrozen,
              "context must be made by the Frozen that attends to it, but is another's.");
}

// query [B * n, Lq, Eq], or undefined for the constant one. If there are several contexts, their heads are added.
AttentionResult Frozen::attend_to(const Tensor& query, const std::vector<Part>& parts, const CallOptions& call) {
  const auto& first = parts.front().context.state();
  const auto& layer = *first.owner;
  auto how = layer.attention_options(first.mask, call);
  if (layer.engine) {
    auto engine_call = layer.call(first.parts.orders, query, how);
    for (size_t i = 1; i < parts.size(); ++i) {
      const auto& s = parts[i].context.state();
      engine_call.added.push_back({&*s.owner->engine, &s.parts, s.mask, static_cast<float>(parts[i].scale)});
    }
    return detail::attend(*layer.engine, first.parts, engine_call);
  }
  const detail::Queries queries(query.defined() ? query : layer.query.expand({first.parts.B, -1, -1}), first.parts.B);
  std::vector<detail::Part> of_modules;
  for (const auto& [context, scale] : parts) {
    const auto& s = context.state();
    const auto mask = queries.mask(s.mask, s.parts.Lk, queries.rows.scalar_type());
    of_modules.push_back({detail::Layer(s.parts.orders, s.owner->weights, s.owner->products), s.parts, mask, scale});
  }
  how.mask = of_modules.front().mask;
  return queries.results(detail::attend_to(of_modules, queries.rows, how));
}

std::string Frozen::explain(int64_t B, int64_t Lq, int64_t Lk, std::optional<int64_t> expected_queries) const {
  const auto request = state().request(B, expected_queries ? 1 : Lq, Lk, options().attention_weights());
  if (!expected_queries) return xattn::explain(request);
  return xattn::explain(detail::for_context(kFrozen, request, {.expected_queries = *expected_queries}));
}

Orders Frozen::orders(int64_t B, int64_t Lq, int64_t Lk) const {
  return detail::orders_of(state().request(B, Lq, Lk, options().attention_weights()));
}

const CrossAttentionOptions& Frozen::options() const {
  return state().options;
}

int64_t Frozen::bytes() const {
  const auto& s = state();
  int64_t bytes = detail::bytes_of(s.query);
  for (const auto& x : s.folded_query) bytes += x.is_same(s.query) ? 0 : detail::bytes_of(x);
  if (s.engine) return bytes + s.engine->bytes();
  for (const auto* x : all_tensors(s.weights)) bytes += detail::bytes_of(*x);
  for (const auto* product : {&s.products.logits, &s.products.values})
    bytes += detail::bytes_of(product->weight) + detail::bytes_of(product->bias);
  return bytes;
}

bool Frozen::uses_kernels() const {
  return state().engine.has_value();
}

Frozen CrossAttentionImpl::freeze() const {
  return freeze({});
}

Frozen CrossAttentionImpl::freeze(const FreezeOptions& how) const {
  return Frozen(*this, how);
}

}  // namespace xattn
