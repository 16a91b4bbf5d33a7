// SPDX-License-Identifier: Apache-2.0
#include <xattn/frozen_linear.h>

#include <ATen/TensorIndexing.h>
#include <ATen/ops/linear.h>

#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "frozen/packed_layers.h"
#include "frozen/state.h"
#include "modules/inputs.h"

namespace xattn {

using at::Tensor;
using detail::check_type;
using detail::check_value;

namespace {

constexpr auto kLinear = "frozen_linear";

}  // namespace

struct FrozenLinear::State {
  int64_t in, out;
  at::ScalarType type;
  at::Device device;
  detail::PackedLinear packed = {};    // on the kernels
  detail::LinearWeights weights = {};  // elsewhere
};

FrozenLinear::FrozenLinear(const torch::nn::LinearImpl& linear, std::optional<at::ScalarType> storage) {
  const detail::Inference inference;
  const auto& weight = linear.weight;
  check_value(weight.defined() && weight.dim() == 2 && weight.numel() > 0, kLinear,
              "linear must have a weight [out, in], but has {}.", detail::shape_of(weight));
  check_value(!linear.bias.defined() || (linear.bias.dim() == 1 && linear.bias.size(0) == weight.size(0)), kLinear,
              "linear must have a bias [{}] or none, but has {}.", weight.size(0), detail::shape_of(linear.bias));
  const bool kernels = detail::runs_on_kernels(weight);
  detail::check_storage(kLinear, storage, kernels);
  State state{weight.size(1), weight.size(0), weight.scalar_type(), weight.device()};
  if (kernels) {
    state.packed = detail::pack_linear({weight, linear.bias}, storage.value_or(at::kFloat));
  } else {
    state.weights = {weight.detach().clone(), linear.bias.defined() ? linear.bias.detach().clone() : Tensor()};
  }
  state_ = std::make_shared<const State>(std::move(state));
}

const FrozenLinear::State& FrozenLinear::state() const {
  check_value(state_ != nullptr, kLinear, "layer must be made from a torch::nn::Linear, but is empty.");
  return *state_;
}

Tensor FrozenLinear::forward(const Tensor& x) const {
  const detail::Inference inference;
  const auto& s = state();
  detail::check_dense(kLinear, "x", x);
  check_value(x.defined() && x.dim() >= 1 && x.size(-1) == s.in, kLinear, "x must have shape [..., {}], but has {}.", s.in,
              detail::shape_of(x));
  check_type(x.scalar_type() == s.type, kLinear, "x must be {}, the type of the weight, but is {}.",
             c10::getDtypeNames(s.type).first, detail::type_of(x));
  check_type(x.device() == s.device, kLinear, "x must be on {}, as the weight, but is on {}.", detail::name_of(s.device),
             detail::name_of(x.device()));
  return uses_kernels() ? detail::apply(s.packed, x) : at::linear(x, s.weights.weight, s.weights.bias);
}

Tensor FrozenLinear::embedding(const Tensor& indices) const {
  const detail::Inference inference;
  const auto& s = state();
  detail::check_dense(kLinear, "indices", indices);
  const auto rows = detail::checked_indices(kLinear, indices.defined() ? indices.flatten() : indices, s.out).to(s.device);
  auto sizes = indices.sizes().vec();
  sizes.push_back(s.in);
  if (!uses_kernels()) return s.weights.weight.index_select(0, rows).view(sizes);
  const auto width = detail::kernels().panel;
  const auto panels = s.packed.weight.data.view({-1, s.in, width});
  return panels.index({rows.div(width, "floor"), at::indexing::Slice(), rows % width}).to(at::kFloat).view(sizes);
}

int64_t FrozenLinear::in_features() const {
  return state().in;
}
int64_t FrozenLinear::out_features() const {
  return state().out;
}
int64_t FrozenLinear::bytes() const {
  return state().packed.bytes() + detail::bytes_of(state().weights.weight) + detail::bytes_of(state().weights.bias);
}
bool FrozenLinear::uses_kernels() const {
  return state().packed.weight.data.defined();
}

}  // namespace xattn
