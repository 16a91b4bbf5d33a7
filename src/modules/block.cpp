// SPDX-License-Identifier: Apache-2.0
#include <xattn/block.h>

#include <ATen/ops/dropout.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/nn/init.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/text.h"
#include "modules/context_state.h"
#include "modules/inputs.h"
#include "modules/norm_weights.h"
#include "modules/option_names.h"
#include "modules/options.h"

namespace xattn {

using detail::check_value;
using detail::name_of;
using torch::Tensor;

namespace {

constexpr auto kBlock = "cross_attention_block";

// Checks the options in reading order and gives every default its value. `attention` checks its own options.
CrossAttentionBlockOptions resolved(CrossAttentionBlockOptions options) {
  const auto dim_query = options.attention().dim_query(), dim_output = options.attention().dim_output();
  check_value(dim_output == dim_query, kBlock,
              "attention must have a dim_output of {}, its dim_query, for the output to be added to the query, but has {}.",
              dim_query, dim_output);
  check_value(
      !options.norm_context() || (options.attention().dim_key() == dim_query && options.attention().dim_value() == dim_query),
      kBlock, "attention must have a dim_key and dim_value of {}, its dim_query, for norm_context, but has {} and {}.",
      dim_query, options.attention().dim_key(), options.attention().dim_value());
  check_value(options.norm_eps() >= 0, kBlock, "norm_eps must not be negative, but is {}.", options.norm_eps());
  if (!options.feed_forward()) options.feed_forward(4 * dim_query);
  check_value(*options.feed_forward() >= 0, kBlock, "feed_forward must not be negative, but is {}.", *options.feed_forward());
  check_value(options.dropout() >= 0 && options.dropout() <= 1, kBlock, "dropout must lie in [0, 1], but is {}.",
              options.dropout());
  return options;
}

Tensor activate(const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::relu(x);
    case Activation::gelu: return at::gelu(x);
    case Activation::gelu_tanh: return at::gelu(x, "tanh");
    case Activation::silu: return at::silu(x);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

}  // namespace

CrossAttentionBlockImpl::CrossAttentionBlockImpl(const CrossAttentionBlockOptions& options_)
    : options(resolved(options_)), attention_options_(options_.attention()) {
  reset();
}

// Checks options that may have been changed since the module was made. `attention` checks its own options.
void CrossAttentionBlockImpl::check_options() const {
  const auto& o = options;
  const auto Eq = o.attention().dim_query();
  check_value(o.dropout() >= 0 && o.dropout() <= 1, kBlock, "dropout must lie in [0, 1], but is {}.", o.dropout());
  detail::check_unchanged(kBlock, o.attention(), attention_options_);
  check_value(o.feed_forward() && (*o.feed_forward() > 0) == !feed_forward_in.is_empty(), kBlock,
              "options must fit the parameters, but say {} feed_forward.", o.feed_forward().value_or(0) > 0 ? "a" : "no");
  const auto check_gate = [&](std::string_view name, const Tensor& gate) {
    const auto size = o.gate() == BlockGate::none ? 0 : o.gate() == BlockGate::scalar ? 1 : Eq;
    check_value(gate.defined() ? gate.numel() == size : size == 0, kBlock,
                "options must fit the parameters, but specify another gate for {}.", name);
  };
  const auto norm_of = [&](std::string_view name, const Norm& norm) {
    detail::check_norm(kBlock, name, norm, o.norm(), Eq, o.norm_eps());
    check_value(norm->bias.defined() == (o.norm() == NormKind::layer && o.norm_bias()), kBlock,
                "options must fit the parameters, but say another norm_bias for {}.", name);
  };
  norm_of("attention_norm", attention_norm);
  check_gate("attention_gate", attention_gate);
  if (!feed_forward_in) return;
  norm_of("feed_forward_norm", feed_forward_norm);
  check_gate("feed_forward_gate", feed_forward_gate);
  const auto hidden = *o.feed_forward();
  const bool bias = o.feed_forward_bias();
  check_value(o.feed_forward_glu() == !feed_forward_multiplier.is_empty(), kBlock,
              "options must fit the parameters, but say {} feed_forward_glu.", o.feed_forward_glu() ? "a" : "no");
  detail::check_projection(kBlock, "feed_forward_in", feed_forward_in, Eq, hidden, bias);
  if (feed_forward_multiplier) {
    detail::check_projection(kBlock, "feed_forward_multiplier", feed_forward_multiplier, Eq, hidden, bias);
  }
  detail::check_projection(kBlock, "feed_forward_out", feed_forward_out, hidden, Eq, bias);
}

void CrossAttentionBlockImpl::reset() {
  const auto Eq = options.attention().dim_query(), hidden = *options.feed_forward();
  const auto norm = [&](const char* name) {
    return register_module(name, Norm(NormOptions(options.norm(), Eq).eps(options.norm_eps()).bias(options.norm_bias())));
  };
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(options.feed_forward_bias())));
  };
  const auto gate = [&](const char* name) {
    return register_parameter(name, torch::zeros({options.gate() == BlockGate::scalar ? 1 : Eq}));
  };
  const bool gated = options.gate() != BlockGate::none;
  attention = register_module("attention", CrossAttention(options.attention()));
  attention_norm = norm("attention_norm");
  if (gated) attention_gate = gate("attention_gate");
  if (hidden == 0) return;
  feed_forward_norm = norm("feed_forward_norm");
  feed_forward_in = linear("feed_forward_in", Eq, hidden);
  if (options.feed_forward_glu()) feed_forward_multiplier = linear("feed_forward_multiplier", Eq, hidden);
  feed_forward_out = linear("feed_forward_out", hidden, Eq);
  if (gated) feed_forward_gate = gate("feed_forward_gate");
}

void CrossAttentionBlockImpl::reset_parameters() {
  attention->reset_parameters();
  for (auto* norm : {&attention_norm, &feed_forward_norm}) {
    if (*norm) (*norm)->reset_parameters();
  }
  for (auto* linear : {&feed_forward_in, &feed_forward_multiplier, &feed_forward_out}) {
    if (*linear) (*linear)->reset_parameters();
  }
  for (auto* gate : {&attention_gate, &feed_forward_gate}) {
    if (gate->defined()) torch::nn::init::zeros_(*gate);
  }
}

void CrossAttentionBlockImpl::pretty_print(std::ostream& stream) const {
  const auto& o = options;
  std::string named;
  const auto add = [&named](bool differs, std::string_view call, const auto&... argument) {
    if (differs) named += detail::formatted(fmt::runtime(call), argument...);
  };
  add(o.norm() != NormKind::layer, ".norm(NormKind::{})", name_of(o.norm()));
  add(o.norm_placement() == NormPlacement::after, ".norm_placement(NormPlacement::after)");
  add(o.norm_context(), ".norm_context(true)");
  add(o.norm_eps() != 1e-5, ".norm_eps({})", o.norm_eps());
  add(!o.norm_bias(), ".norm_bias(false)");
  add(o.gate() != BlockGate::none, ".gate(BlockGate::{})", name_of(o.gate()));
  add(o.feed_forward() != 4 * o.attention().dim_query(), ".feed_forward({})", *o.feed_forward());
  add(o.activation() != Activation::gelu, ".activation(Activation::{})", name_of(o.activation()));
  add(o.feed_forward_glu(), ".feed_forward_glu(true)");
  add(!o.feed_forward_bias(), ".feed_forward_bias(false)");
  add(o.dropout() != 0, ".dropout({})", o.dropout());

  const auto arguments = detail::printed(attention->options);
  stream << (named.empty()
                 ? detail::formatted("xattn::CrossAttentionBlock({})", arguments)
                 : detail::formatted("xattn::CrossAttentionBlock(CrossAttentionBlockOptions({}){})", arguments, named));
}

std::tuple<Tensor, Tensor> CrossAttentionBlockImpl::forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Mask& mask, const CallOptions& call) {
  return add_branches(query, [&](const Tensor& x) {
    const bool forgets_norm =
        query.is_same(key) && !options.norm_context() && norms_before() && options.norm() != NormKind::none;
    check_value(!forgets_norm, kBlock,
                "key must be another tensor than the query, unless norm_context is set, but is the same: a block of "
                "self-attention with norms before normalises keys and values, too.");
    if (!options.norm_context()) return attention->forward(x, key, value, mask, call);
    const auto Xk = key.is_same(query) ? x : normalised_context("key", key);
    return attention->forward(x, Xk, value.is_same(key) ? Xk : normalised_context("value", value), mask, call);
  });
}

Context CrossAttentionBlockImpl::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) {
  check_options();
  if (!options.norm_context()) return attention->context(key, value, mask, how);
  const auto Xk = normalised_context("key", key);
  const auto context = attention->context(Xk, value.is_same(key) ? Xk : normalised_context("value", value), mask, how);
  auto state = std::make_shared<Context::State>(context.state());
  if (norms_before()) state->norm = detail::norm_weights(attention_norm);
  state->normalised_by = detail::WeightsStamp(norm_tensors());
  return Context(std::move(state));
}

std::tuple<Tensor, Tensor> CrossAttentionBlockImpl::attend(const Tensor& query,
                                                           const Context& context,
                                                           const CallOptions& call) {
  return add_branches(query, [&](const Tensor& x) {
    context.state().normalised_by.check(kBlock, detail::WeightsStamp(norm_tensors()));
    return attention->attend(x, context, call);
  });
}

std::string CrossAttentionBlockImpl::explain(
    int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, const CallOptions& call) const {
  check_options();
  return attention->explain(B, Lq, Lk, mask, call);
}

// The parameters of the norm that keys and values pass; none if they pass none.
std::vector<Tensor> CrossAttentionBlockImpl::norm_tensors() const {
  if (!options.norm_context() || !norms_before()) return {};
  return {attention_norm->weight, attention_norm->bias};
}

bool CrossAttentionBlockImpl::norms_before() const {
  return options.norm_placement() == NormPlacement::before;
}

// Checks an input that a norm reads before the attention does. Type and batch are left to the attention.
void CrossAttentionBlockImpl::check_input(const char* name, const Tensor& x, const char* length) const {
  detail::check_shape(kBlock, name, x, length, options.attention().dim_query());
  detail::check_device(kBlock, name, x, attention->query_linear->weight.device());
}

Tensor CrossAttentionBlockImpl::normalised_context(const char* name, const Tensor& x) {
  check_input(name, x, "Lk");
  return norms_before() ? attention_norm(x) : x;
}

// query [B, Lq, Eq]; attend: from the query, normalised if norms are applied before, to the output [B, Lq, Eq] and weights.
std::tuple<Tensor, Tensor> CrossAttentionBlockImpl::add_branches(
    const Tensor& query, const std::function<std::tuple<Tensor, Tensor>(const Tensor&)>& attend) {
  check_options();
  check_input("query", query, "Lq");
  const bool before = norms_before();
  const auto entrance = [&](const Tensor& x, Norm& norm) { return before ? norm(x) : x; };
  const auto sum = [&](const Tensor& x, const Tensor& branch, const Tensor& gate, Norm& norm) {
    const auto dropped = at::dropout(branch, options.dropout(), is_training());
    const auto y = x + (gate.defined() ? (gate.tanh() * dropped).to(dropped.scalar_type()) : dropped);
    return before ? y : norm(y);
  };
  const auto [attended, weights] = attend(entrance(query, attention_norm));
  const auto x = sum(query, attended, attention_gate, attention_norm);
  if (!feed_forward_in) return {x, weights};

  const auto entered = entrance(x, feed_forward_norm);
  auto hidden = activate(feed_forward_in(entered), options.activation());  // [B, Lq, hidden]
  if (feed_forward_multiplier) hidden = hidden * feed_forward_multiplier(entered);
  return {sum(x, feed_forward_out(hidden), feed_forward_gate, feed_forward_norm), weights};
}

}  // namespace xattn
