// SPDX-License-Identifier: Apache-2.0
#include <xattn/context.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
#include "modules/inputs.h"
#include "modules/layer_context.h"
#include "plan/order_traits.h"

namespace xattn {

using at::Tensor;
using detail::check_type;
using detail::check_value;

namespace {

constexpr auto kContext = "context";

}  // namespace

Context::Context(std::shared_ptr<const State> state) : state_(std::move(state)) {}

const Context::State& Context::state() const {
  check_value(state_ != nullptr, kContext, "context must be made by a module, but is empty.");
  return *state_;
}

const Orders& Context::orders() const {
  return state().layer.orders;
}
const at::Tensor& Context::key() const {
  return state().parts.keys;
}
const at::Tensor& Context::value() const {
  return state().parts.values;
}
const Mask& Context::mask() const {
  return state().mask;
}
bool Context::is_batched() const {
  return state().is_batched;
}
int64_t Context::batch_size() const {
  return key().size(0);
}
int64_t Context::length() const {
  return state().parts.Lk;
}

Context Context::join(const std::vector<Context>& contexts) {
  check_value(!contexts.empty(), kContext, "contexts must be at least one, but are none.");
  const auto& first = contexts.front().state();
  std::vector<detail::LayerContext> parts;
  std::vector<std::pair<Mask, int64_t>> masks;
  for (const auto& context : contexts) {
    const auto& s = context.state();
    check_value(s.layer.orders == first.layer.orders, kContext,
                "contexts must be in one order, but are in {}, {} and in {}, {}. Make them for the same "
                "expected_queries and capacity.",
                name_of(first.layer.orders.logits), name_of(first.layer.orders.values), name_of(s.layer.orders.logits),
                name_of(s.layer.orders.values));
    check_value(s.made_from == first.made_from && s.normalised_by == first.normalised_by, kContext,
                "contexts must be made by one layer with the same weights, but they differ.");
    check_value(s.is_batched == first.is_batched && s.parts.keys.size(0) == first.parts.keys.size(0), kContext,
                "contexts must have one batch, but have {} and {} entries.", first.parts.keys.size(0), s.parts.keys.size(0));
    check_type(s.parts.keys.scalar_type() == first.parts.keys.scalar_type(), kContext,
               "contexts must be of one type, but are {} and {}.", detail::type_of(first.parts.keys),
               detail::type_of(s.parts.keys));
    parts.push_back(s.parts);
    masks.emplace_back(s.mask, s.parts.Lk);
  }
  auto joined = std::make_shared<State>(first);
  joined->mask = detail::join_keys(masks);
  joined->parts = detail::join(first.layer, parts);
  return Context(std::move(joined));
}

Context Context::append(const Tensor& key, const Tensor& value, const Mask& mask) const {
  const auto& s = state();
  const auto& [orders, weights, products] = s.layer;
  s.made_from.check(kContext, detail::stamp_of(weights, orders));
  s.normalised_by.check(kContext, detail::stamp_of(s.norm));
  auto inputs = detail::context_inputs(kContext, weights, key, value, mask);
  detail::check_appended(kContext, inputs, s.is_batched, batch_size());
  detail::check_mask(kContext, weights, inputs, std::nullopt);
  detail::normalise(inputs, s.norm);
  const auto more = detail::make_context(s.layer, inputs.key, inputs.value);
  const auto check_same_type = [](const char* name, const Tensor& own, const Tensor& other) {
    check_type(own.scalar_type() == other.scalar_type(), kContext,
               "{} must become {}, the type of the context, but becomes {}. Make it and append to it under the same autocast.",
               name, detail::type_of(own), detail::type_of(other));
  };
  check_same_type("key", s.parts.keys, more.keys);
  check_same_type("value", s.parts.values, more.values);
  auto longer = std::make_shared<State>(s);
  longer->mask = detail::join_keys({{s.mask, s.parts.Lk}, {mask & detail::causal_part(s.mask), more.Lk}});
  longer->parts = detail::append(s.layer, s.parts, more);
  return Context(std::move(longer));
}

Context Context::truncate(int64_t n) const {
  const auto& s = state();
  detail::check_length(kContext, n, s.parts.Lk);
  auto first = std::make_shared<State>(s);
  first->mask = detail::first_keys(s.mask, n);
  first->parts = detail::truncate(s.layer, s.parts, n);
  return Context(std::move(first));
}

Context Context::select(const Tensor& indices) const {
  const auto& s = state();
  check_value(s.is_batched, kContext, "context must be batched to select entries, but is unbatched.");
  const auto entries = detail::checked_indices(kContext, indices, batch_size());
  auto selected = std::make_shared<State>(s);
  selected->mask = detail::select_entries(s.mask, entries);
  selected->parts = detail::select_entries(s.layer, s.parts, entries.to(s.parts.keys.device()));
  return Context(std::move(selected));
}

namespace detail {

WeightsStamp::WeightsStamp(const std::vector<at::Tensor>& tensors, std::vector<double> numbers) : numbers_(std::move(numbers)) {
  for (const auto& x : tensors) {
    auto& entry = entries_.emplace_back();
    entry.tensor = x;
    if (!x.defined()) continue;
    entry.data = x.const_data_ptr();
    if (x.has_storage()) entry.storage = x.storage();
    if (!x.is_inference()) entry.version = static_cast<uint32_t>(x._version());
  }
}

bool WeightsStamp::Entry::operator==(const Entry& other) const {
  return tensor.is_same(other.tensor) && data == other.data && version == other.version;
}

void WeightsStamp::check(std::string_view caller, const WeightsStamp& now) const {
  check_value(entries_ == now.entries_ && numbers_ == now.numbers_, caller,
              "context must be made with the weights that attend to it, but they are another module's, or have changed "
              "since. Make the context again.");
}

WeightsStamp stamp_of(const LayerWeights& w, const Orders& orders) {
  std::vector<at::Tensor> tensors;
  for (const auto* x : context_tensors(w)) tensors.push_back(*x);
  std::vector<double> numbers;
  const auto add = [&numbers](auto... more) { (numbers.push_back(static_cast<double>(more)), ...); };
  if (is_folded(orders.logits)) tensors.insert(tensors.end(), {w.query, w.query_bias}), add(w.scale);
  if (is_folded(orders.values)) tensors.push_back(w.output);
  if (!is_raw(orders.logits)) add(w.H, w.G, w.d, w.key_norm.eps);
  if (!is_raw(orders.values)) add(w.H, w.G, w.e);
  return {tensors, numbers};
}

WeightsStamp stamp_of(const NormWeights& norm) {
  return norm.kind == NormKind::none ? WeightsStamp() : WeightsStamp({norm.weight, norm.bias}, {norm.eps});
}

void check_context(std::string_view caller, const LayerWeights& w, const Context::State& context, const at::Tensor& query) {
  const auto& orders = context.layer.orders;
  const auto& parts = context.parts;
  context.made_from.check(caller, stamp_of(w, orders));
  check_mask(context.mask, caller, parts.keys.size(0), w.H, query.size(1), parts.Lk, query.device());
  const auto type = product_type(query);
  check_type(
      is_raw(orders.logits) || parts.keys.scalar_type() == type, caller,
      "context must be {}, the type of this call's products, but is {}. Make it and attend to it under the same autocast.",
      c10::getDtypeNames(type).first, type_of(parts.keys));
}

Context keep_context(const Layer& layer, const ContextInputs& inputs, const ContextOptions& how) {
  auto parts = make_context(layer, inputs.key, inputs.value);
  if (how.capacity > parts.Lk && can_grow(layer, {parts})) {
    parts = join(layer, {parts}, how.capacity);
  } else if (!how.share) {
    copy_shared(parts, inputs.key, inputs.value);
  }
  return Context(std::make_shared<Context::State>(
      Context::State{layer, std::move(parts), inputs.mask, inputs.is_batched, stamp_of(layer.weights, layer.orders)}));
}

}  // namespace detail

}  // namespace xattn
