// SPDX-License-Identifier: Apache-2.0
#include "bench/folded.h"

#include <torch/utils.h>

#include <cmath>

#include "bench/exact.h"

namespace bench {

using shapes::NormOver;
using torch::Tensor;
using xattn::Order;

namespace {

// [G, ...] -> [H, ...]
Tensor for_all_heads(const Tensor& x, int64_t H) {
  return x.size(0) == H ? x : x.repeat_interleave(H / x.size(0), 0);
}

}  // namespace

Folded::Folded(const BenchLayer& layer, const xattn::Orders& orders) : layer_(layer), orders_(orders) {
  const auto& s = layer.shape;
  const auto& m = layer.module;
  const bool train = layer.grad.defined();
  const torch::AutoGradMode grad_mode(train);
  const auto transposed = [&](const Tensor& weight) { return train ? weight.t() : weight.t().contiguous(); };
  const auto scale = s.norm == NormOver::nothing ? 1 / std::sqrt(static_cast<double>(s.d)) : 1.0;
  q_ = transposed(m->query_linear->weight) * scale;
  q_bias_ = m->query_linear->bias * scale;
  k_ = transposed(m->key_linear->weight);
  if (s.norm != NormOver::nothing) k_bias_ = m->key_linear->bias;
  v_ = transposed(m->value_linear->weight);
  o_ = transposed(m->output_linear->weight);
  const auto v_bias = for_all_heads(m->value_linear->bias.view({s.G, s.e}), s.H).reshape({1, s.H * s.e});
  o_bias_ = (m->output_linear->bias + v_bias.matmul(o_)).view({s.Eo});
  k_heads_ = for_all_heads(m->key_linear->weight.view({s.G, s.d, s.Ek}), s.H);
  v_heads_ = for_all_heads(v_.view({s.Ek, s.G, s.e}).permute({1, 0, 2}), s.H);
  if (!train) v_heads_ = v_heads_.contiguous();
  if (orders_.logits == Order::prefold) {
    const auto by_head = q_.view({s.Eq, s.H, s.d}).transpose(0, 1).matmul(k_heads_);  // [H, Eq, Ek]
    qk_ = by_head.transpose(0, 1).reshape({s.Eq, s.H * s.Ek});
    qk_bias_ = q_bias_.view({s.H, 1, s.d}).matmul(k_heads_).view({s.H * s.Ek});
  }
  if (orders_.values == Order::prefold) vo_ = v_heads_.matmul(o_.view({s.H, s.e, s.Eo})).view({s.H * s.Ek, s.Eo});
  if (s.learned_query && !train) {
    const auto q = project_query();  // [1, H, Lq, d]
    learned_query_ = orders_.logits == Order::standard ? q.contiguous() : q.matmul(k_heads_).view({1, s.H * s.Lq, s.Ek});
  }
}

Tensor Folded::project_query() const {
  const auto& s = layer_.shape;
  const auto& x = layer_.query;
  const auto projected = at::addmm(q_bias_, x.flatten(0, 1), q_).view({x.size(0), s.Lq, s.H * s.d});
  const auto q = split_heads(projected, s.H, s.norm, layer_.module->query_norm);
  return s.norm != NormOver::nothing ? q / std::sqrt(static_cast<double>(s.d)) : q;
}

Folded::Context Folded::context() const {
  const auto& s = layer_.shape;
  Context context;
  context.keys = layer_.key;
  if (orders_.logits == Order::standard || orders_.logits == Order::fold_into_context) {
    const auto rows = layer_.key.flatten(0, 1);
    const auto k = k_bias_.defined() ? at::addmm(k_bias_, rows, k_) : at::mm(rows, k_);
    context.keys = split_heads(k.view({s.B, s.Lk, s.G * s.d}), s.G, s.norm, layer_.module->key_norm);
  }
  if (orders_.logits == Order::fold_into_context) {
    const auto& k = context.keys;                                    // [B, H, Lk, d]
    const auto q_heads = q_.view({s.Eq, s.H, s.d}).transpose(0, 1);  // [H, Eq, d]
    context.bias = k.matmul(q_bias_.view({1, s.H, s.d, 1})).view({s.B, 1, s.H * s.Lk});
    context.keys = q_heads.matmul(k.transpose(-2, -1)).transpose(1, 2).reshape({s.B, s.Eq, s.H * s.Lk});
  }
  context.values = layer_.value;
  if (orders_.values == Order::standard || orders_.values == Order::fold_into_context) {
    context.values = at::mm(layer_.value.flatten(0, 1), v_).view({s.B, s.Lk, s.G, s.e}).transpose(1, 2);
  }
  if (orders_.values == Order::fold_into_context) {
    context.values = context.values.matmul(o_.view({s.H, s.e, s.Eo})).view({s.B, s.H * s.Lk, s.Eo});
  }
  return context;
}

Tensor Folded::logits(const Context& context) const {
  const auto& s = layer_.shape;
  const auto& x = layer_.query;
  if (orders_.logits == Order::fold_into_context) {
    return at::baddbmm(context.bias, x, context.keys).view({s.B, s.Lq, s.H, s.Lk}).transpose(1, 2);
  }
  if (orders_.logits == Order::prefold) {
    const auto q = at::addmm(qk_bias_, x.flatten(0, 1), qk_).view({x.size(0), s.Lq * s.H, s.Ek});
    return q.matmul(context.keys.transpose(1, 2)).view({s.B, s.Lq, s.H, s.Lk}).transpose(1, 2);
  }
  if (orders_.logits == Order::fold_into_query) {
    auto q = learned_query_;  // [1, H * Lq, Ek]
    if (!q.defined()) {
      q = project_query().transpose(0, 1).reshape({s.H, -1, s.d}).bmm(k_heads_);  // [H, B * Lq, Ek]
      q = q.view({s.H, x.size(0), s.Lq, s.Ek}).transpose(0, 1).reshape({x.size(0), s.H * s.Lq, s.Ek});
    }
    return q.matmul(context.keys.transpose(1, 2)).view({s.B, s.H, s.Lq, s.Lk});
  }
  const auto q = learned_query_.defined() ? learned_query_ : project_query();
  if (s.G == s.H) return q.matmul(context.keys.transpose(-2, -1));
  return q.reshape({x.size(0), s.G, -1, s.d}).matmul(context.keys.transpose(-2, -1)).view({s.B, s.H, s.Lq, s.Lk});
}

Tensor Folded::weighted_values(const Tensor& weights, const Context& context) const {
  const auto& s = layer_.shape;
  if (orders_.values == Order::fold_into_context) {
    return at::baddbmm(o_bias_, weights.transpose(1, 2).reshape({s.B, s.Lq, s.H * s.Lk}), context.values);
  }
  Tensor values;  // [B * Lq, H * e] or, for P, [B * Lq, H * Ek]
  if (orders_.values == Order::prefold) {
    values = weights.transpose(1, 2).reshape({s.B, s.Lq * s.H, s.Lk}).bmm(context.values).view({s.B * s.Lq, s.H * s.Ek});
  } else if (orders_.values == Order::fold_into_query) {
    const auto heads = weights.reshape({s.B, s.H * s.Lq, s.Lk}).bmm(context.values).view({s.B, s.H, s.Lq, s.Ek});
    values = heads.transpose(0, 1).reshape({s.H, s.B * s.Lq, s.Ek}).bmm(v_heads_);  // [H, B * Lq, e]
    values = values.transpose(0, 1).reshape({s.B * s.Lq, s.H * s.e});
  } else {
    values = weights.reshape({s.B, s.G, -1, s.Lk}).matmul(context.values).view({s.B, s.H, s.Lq, s.e});
    values = values.transpose(1, 2).reshape({s.B * s.Lq, s.H * s.e});
  }
  return at::addmm(o_bias_, values, orders_.values == Order::prefold ? vo_ : o_).view({s.B, s.Lq, s.Eo});
}

Outputs Folded::attend(const Context& context) const {
  auto scores = logits(context);
  if (layer_.bias.defined()) scores = scores + layer_.bias;
  const auto weights = at::softmax(scores, -1);
  return {weighted_values(weights, context), returned_weights(layer_, weights)};
}

}  // namespace bench
