// SPDX-License-Identifier: Apache-2.0
#include <xattn/context.h>

#include <utility>

#include "base/check.h"

namespace xattn {

Context::Context(at::Tensor key, at::Tensor value, Mask mask, bool batched, const Weights& made_from)
    : key_(std::move(key)), value_(std::move(value)), mask_(std::move(mask)), batched_(batched) {
  made_from_.reserve(made_from.size());
  for (const auto& weight : made_from) made_from_.push_back(stamp(weight));
}

void Context::check_made_from(std::string_view caller, const Weights& weights) const {
  bool same = made_from_.size() == weights.size();
  for (size_t i = 0; same && i < weights.size(); ++i) {
    const auto now = stamp(weights[i]);
    const auto& then = made_from_[i];
    same = now.tensor.is_same(then.tensor) && now.data == then.data && now.version == then.version;
  }
  detail::check_value(same, caller,
                      "context must be made with the weights that attend to it, but they are another module's, or have changed "
                      "since. Make the context again.");
}

Context::Stamp Context::stamp(const at::Tensor& weight) {
  if (!weight.defined()) return {weight, nullptr, 0};
  return {weight, weight.const_data_ptr(), weight.is_inference() ? 0 : static_cast<uint32_t>(weight._version())};
}

}  // namespace xattn
