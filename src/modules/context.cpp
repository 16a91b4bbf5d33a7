// SPDX-License-Identifier: Apache-2.0
#include <xattn/context.h>

#include <memory>
#include <utility>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"
#include "modules/context_state.h"
#include "plan/order_traits.h"

namespace xattn {

Context::Context(std::shared_ptr<const State> state) : state_(std::move(state)) {}

const Context::State& Context::state() const {
  detail::check_value(state_ != nullptr, "context", "context must be made by a module, but is empty.");
  return *state_;
}

const Orders& Context::orders() const {
  return state().orders;
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

namespace detail {

WeightsStamp::WeightsStamp(const std::vector<at::Tensor>& tensors, double scale) : scale_(scale) {
  for (const auto& x : tensors) {
    const bool has_counter = x.defined() && !x.is_inference();
    entries_.push_back({x, x.defined() ? x.const_data_ptr() : nullptr, has_counter ? static_cast<uint32_t>(x._version()) : 0});
  }
}

bool WeightsStamp::Entry::operator==(const Entry& other) const {
  return tensor.is_same(other.tensor) && data == other.data && version == other.version;
}

void WeightsStamp::check(std::string_view caller, const WeightsStamp& now) const {
  check_value(entries_ == now.entries_ && scale_ == now.scale_, caller,
              "context must be made with the weights that attend to it, but they are another module's, or have changed "
              "since. Make the context again.");
}

WeightsStamp stamp_of(const LayerWeights& w, const Orders& orders) {
  std::vector<at::Tensor> tensors;
  for (const auto* x : context_tensors(w)) tensors.push_back(*x);
  if (is_folded(orders.logits)) tensors.insert(tensors.end(), {w.query, w.query_bias});
  if (is_folded(orders.values)) tensors.push_back(w.output);
  return WeightsStamp(tensors, is_folded(orders.logits) ? w.scale : 0);
}

WeightsStamp stamp_of(const NormWeights& norm) {
  return norm.kind == NormKind::none ? WeightsStamp() : WeightsStamp({norm.weight, norm.bias});
}

void check_context(std::string_view caller, const LayerWeights& w, const Context::State& context, const at::Tensor& query) {
  const auto& [orders, parts, mask, is_batched, made_from, normalised_by] = context;
  made_from.check(caller, stamp_of(w, orders));
  check_mask(mask, caller, query.size(0), w.H, query.size(1), parts.Lk, query.device());
  const auto type = product_type(query);
  check_type(
      is_raw(orders.logits) || parts.keys.scalar_type() == type, caller,
      "context must be {}, the type of this call's products, but is {}. Make it and attend to it under the same autocast.",
      c10::getDtypeNames(type).first, type_of(parts.keys));
}

Context keep_context(const Layer& layer, const ContextInputs& inputs) {
  auto parts = make_context(layer, inputs.key, inputs.value);
  copy_shared(parts, inputs.key, inputs.value);
  return Context(std::make_shared<Context::State>(
      Context::State{layer.orders, std::move(parts), inputs.mask, inputs.is_batched, stamp_of(layer.weights, layer.orders)}));
}

}  // namespace detail

}  // namespace xattn
