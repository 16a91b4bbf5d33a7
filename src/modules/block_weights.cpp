// SPDX-License-Identifier: Apache-2.0
#include "modules/block_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

#include "base/check.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_product.h"
#include "cpu/on_kernels.h"
#include "cpu/packed.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"
#include "modules/inputs.h"

namespace xattn::detail {

using at::Tensor;

namespace {

Tensor activated(const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::relu(x);
    case Activation::gelu: return at::gelu(x);
    case Activation::gelu_tanh: return at::gelu(x, "tanh");
    case Activation::silu: return at::silu(x);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

Tensor applied(const LinearWeights& linear, const Tensor& x) {
  return project(x, linear.weight, linear.bias);
}

// What enters the second layer of the feed-forward network. Without gradients it is computed in place, in the new tensor that the
// first layer returned.
Tensor hidden_rows(const BlockWeights& w, const Tensor& x) {
  const auto hidden = applied(w.feed_forward_in, x);  // [B, Lq, hidden]
  const bool multiplies = w.feed_forward_multiplier.weight.defined();
  const auto multiplier = multiplies ? applied(w.feed_forward_multiplier, x) : Tensor();
  if (!run_on_kernels({hidden, multiplies ? multiplier : hidden}) || is_recorded({hidden, multiplier})) {
    return multiplies ? activated(hidden, w.activation) * multiplier : activated(hidden, w.activation);
  }
  engine::each_part(hidden.numel(), kOperationsOfAnActivation, [&](int64_t begin, int64_t end) {
    const auto* factors = multiplies ? engine::data(multiplier) + begin : nullptr;
    kernels().activate(pointwise(w.activation), engine::mutable_data(hidden) + begin, factors, end - begin);
  });
  return hidden;
}

LinearWeights linear_weights(const torch::nn::Linear& linear) {
  return linear ? LinearWeights{linear->weight, linear->bias} : LinearWeights{};
}

// Checks an input that a norm reads before the attention does. Type and batch are left to the attention.
void check_input(std::string_view caller, const BlockWeights& w, const char* name, const Tensor& x, const char* length) {
  check_shape(caller, name, x, length, w.features);
  check_device(caller, name, x, w.device);
}

}  // namespace

BlockWeights weights_of(const CrossAttentionBlockImpl& module) {
  const auto& o = module.options;
  return {.features = o.attention().dim_query(),
          .device = module.attention->query_linear->weight.device(),
          .norm_placement = o.norm_placement(),
          .norm_context = o.norm_context(),
          .activation = o.activation(),
          .attention_norm = norm_weights(module.attention_norm),
          .feed_forward_norm = norm_weights(module.feed_forward_norm),
          .attention_gate = module.attention_gate,
          .feed_forward_gate = module.feed_forward_gate,
          .feed_forward_in = linear_weights(module.feed_forward_in),
          .feed_forward_multiplier = linear_weights(module.feed_forward_multiplier),
          .feed_forward_out = linear_weights(module.feed_forward_out)};
}

Pointwise pointwise(Activation activation) {
  switch (activation) {
    case Activation::relu: return Pointwise::relu;
    case Activation::gelu: return Pointwise::gelu;
    case Activation::gelu_tanh: return Pointwise::gelu_tanh;
    case Activation::silu: break;
  }
  return Pointwise::silu;
}

std::vector<Tensor*> all_tensors(BlockWeights& w) {
  std::vector all = {&w.attention_gate, &w.feed_forward_gate};
  for (auto* norm : {&w.attention_norm, &w.feed_forward_norm}) all.insert(all.end(), {&norm->weight, &norm->bias});
  for (auto* linear : {&w.feed_forward_in, &w.feed_forward_multiplier, &w.feed_forward_out}) {
    all.insert(all.end(), {&linear->weight, &linear->bias});
  }
  return all;
}

BlockInputs block_inputs(
    std::string_view caller, const BlockWeights& w, const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto Xq = block_query(caller, w, query);
  const bool forgets_norm =
      query.is_same(key) && !w.norm_context && w.norms_before() && w.attention_norm.kind != NormKind::none;
  check_value(!forgets_norm, caller,
              "key must be another tensor than the query, unless norm_context is set, but is the same: a block of "
              "self-attention with norms before normalises keys and values, too.");
  if (w.norm_context && key.is_same(query) && value.is_same(query)) return {Xq, Xq, Xq};
  auto inputs = block_context(caller, w, key, value);
  inputs.query = Xq;
  return inputs;
}

Tensor block_query(std::string_view caller, const BlockWeights& w, const Tensor& query) {
  check_input(caller, w, "query", query, "Lq");
  return w.norms_before() ? normalised(query, w.attention_norm) : query;
}

BlockInputs block_context(std::string_view caller, const BlockWeights& w, const Tensor& key, const Tensor& value, bool shares) {
  const auto norm = w.context_norm();
  if (norm.kind == NormKind::none) return {{}, key, value};
  check_value(
      !shares, caller,
      "share must be left out if a layer cannot read keys and values as given, but is set: norm_context normalises them.");
  check_input(caller, w, "key", key, "Lk");
  check_input(caller, w, "value", value, "Lk");
  const auto Xk = normalised(key, norm);
  return {{}, Xk, value.is_same(key) ? Xk : normalised(value, norm)};
}

Tensor block_output(const BlockWeights& w, const Tensor& query, const Tensor& attended, double dropout) {
  const auto add = [&](const Tensor& x, const Tensor& branch, const Tensor& gate, const NormWeights& norm) {
    const auto sum = added(x, dropout > 0 ? at::dropout(branch, dropout, /*train=*/true) : branch, gate);
    return w.norms_before() ? sum : normalised(sum, norm);
  };
  const auto x = add(query, attended, w.attention_gate, w.attention_norm);
  if (!w.has_feed_forward()) return x;
  const auto entered = w.norms_before() ? normalised(x, w.feed_forward_norm) : x;
  return add(x, applied(w.feed_forward_out, hidden_rows(w, entered)), w.feed_forward_gate, w.feed_forward_norm);
}

}  // namespace xattn::detail
