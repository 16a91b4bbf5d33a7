// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <xattn/call_options.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/plan.h>

#include <cstdint>
#include <string_view>
#include <tuple>
#include <vector>

#include "modules/inputs.h"
#include "modules/layer.h"
#include "modules/norm_weights.h"

namespace xattn {
namespace detail {

/// The state of tensors that a context was made with.
class WeightsStamp {
 public:
  WeightsStamp() = default;
  /// numbers: options that the context depends on.
  WeightsStamp(const std::vector<at::Tensor>& tensors, std::vector<double> numbers);

  /// Throws c10::ValueError unless `now` is of the same tensors and numbers, unchanged.
  void check(std::string_view caller, const WeightsStamp& now) const;
  bool operator==(const WeightsStamp& other) const = default;

 private:
  // Tensor and storage are held so that no other ones can get their addresses.
  struct Entry {
    at::Tensor tensor;
    c10::Storage storage;
    const void* data = nullptr;
    uint32_t version = 0;  // counts in-place changes; 0 for inference tensors, which have no counter
    bool operator==(const Entry& other) const;
  };
  std::vector<Entry> entries_;
  std::vector<double> numbers_;
};

/// Of all weights that a context in these orders holds.
WeightsStamp stamp_of(const LayerWeights& weights, const Orders& orders);
/// Of a norm that keys and values pass before their projections; empty for NormKind::none.
WeightsStamp stamp_of(const NormWeights& norm);

/// Makes a context of checked inputs. Tensors that it would share with the caller are copied unless they are to be shared.
Context keep_context(const Layer& layer, const ContextInputs& inputs, const ContextOptions& how);

/// Throws unless a module with these weights can attend to the context now, with query [B, Lq, Eq].
void check_context(std::string_view caller,
                   const LayerWeights& weights,
                   const Context::State& context,
                   const at::Tensor& query);

/// `CrossAttention::attend` to a context whose keys and values have passed any norm.
std::tuple<at::Tensor, at::Tensor> attend_to_kept(CrossAttentionImpl& module,
                                                  const at::Tensor& query,
                                                  const Context& context,
                                                  const CallOptions& call);

}  // namespace detail

struct Context::State {
  detail::Layer layer;  // that made it, without products of weights
  detail::LayerContext parts;
  Mask mask;
  bool is_batched;
  detail::WeightsStamp made_from;
  detail::NormWeights norm = {};            // of a block, which keys and values pass first
  detail::WeightsStamp normalised_by = {};  // that norm; empty if there is none
};

}  // namespace xattn
