// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/context.h>
#include <xattn/plan.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "modules/inputs.h"
#include "modules/layer.h"

namespace xattn {
namespace detail {

/// The state of the weights that a context was made with.
class WeightsStamp {
 public:
  explicit WeightsStamp(const LayerWeights& weights);

  /// Throws c10::ValueError unless these are the same weights, unchanged.
  void check(std::string_view caller, const LayerWeights& weights) const;

 private:
  // The tensor is held so that no other one can get its address.
  struct Entry {
    at::Tensor tensor;
    const void* data;
    uint32_t version;  // counts in-place changes; 0 for inference tensors, which have no counter
    bool operator==(const Entry& other) const;
  };
  std::vector<Entry> entries_;
};

/// Makes a context of checked inputs. Tensors that it would share with the caller are copied.
Context keep_context(const Layer& layer, const ContextInputs& inputs);

}  // namespace detail

struct Context::State {
  Orders orders;
  detail::LayerContext parts;
  Mask mask;
  bool is_batched;
  detail::WeightsStamp made_from;
};

}  // namespace xattn
