// SPDX-License-Identifier: Apache-2.0
#include <xattn/context.h>

#include <utility>

#include "modules/context_state.h"

namespace xattn {

Context::Context(std::shared_ptr<const State> state) : state_(std::move(state)) {}

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
  return key().size(2);
}

}  // namespace xattn
