// SPDX-License-Identifier: Apache-2.0
#include <xattn/context.h>

#include <memory>
#include <utility>

#include "base/check.h"
#include "modules/context_state.h"

namespace xattn {

Context::Context(std::shared_ptr<const State> state) : state_(std::move(state)) {}

const Orders& Context::orders() const {
  return state_->orders;
}
const at::Tensor& Context::key() const {
  return state_->parts.keys;
}
const at::Tensor& Context::value() const {
  return state_->parts.values;
}
const Mask& Context::mask() const {
  return state_->mask;
}
bool Context::is_batched() const {
  return state_->is_batched;
}
int64_t Context::batch_size() const {
  return key().size(0);
}
int64_t Context::length() const {
  return state_->orders.logits == Order::standard ? key().size(2) : state_->parts.Lk;
}

namespace detail {

WeightsStamp::WeightsStamp(const LayerWeights& weights) {
  auto copy = weights;
  for (const auto* x : context_tensors(copy)) {
    entries_.push_back(x->defined()
                           ? Entry{*x, x->const_data_ptr(), x->is_inference() ? 0 : static_cast<uint32_t>(x->_version())}
                           : Entry{*x, nullptr, 0});
  }
}

bool WeightsStamp::Entry::operator==(const Entry& other) const {
  return tensor.is_same(other.tensor) && data == other.data && version == other.version;
}

void WeightsStamp::check(std::string_view caller, const LayerWeights& weights) const {
  check_value(entries_ == WeightsStamp(weights).entries_, caller,
              "context must be made with the weights that attend to it, but they are another module's, or have changed "
              "since. Make the context again.");
}

Context keep_context(const Layer& layer, const ContextInputs& inputs) {
  auto parts = make_context(layer, inputs.key, inputs.value);
  copy_shared(parts, inputs.key, inputs.value);
  return Context(std::make_shared<Context::State>(
      Context::State{layer.orders, std::move(parts), inputs.mask, inputs.is_batched, WeightsStamp(layer.weights)}));
}

}  // namespace detail

}  // namespace xattn
