// SPDX-License-Identifier: Apache-2.0
#include "modules/weights_stamp.h"

#include "base/check.h"

namespace xattn::detail {

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

}  // namespace xattn::detail
