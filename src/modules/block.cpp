// SPDX-License-Identifier: Apache-2.0
#include <xattn/block.h>

#include <torch/nn/init.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "modules/block_weights.h"
#include "modules/context_state.h"
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

}  // namespace

CrossAttentionBlockImpl::CrossAttentionBlockImpl(const CrossAttentionBlockOptions& options_)
    : options(resolved(options_)), attention_options_(options_.attention()) {
  reset();
  attention_options_ = attention->options;
  options.attention(attention_options_);
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
  add(o.norm_eps() != CrossAttentionBlockOptions(o.attention()).norm_eps(), ".norm_eps({})", o.norm_eps());
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
  check_options();
  const auto weights = detail::weights_of(*this);
  const auto [Xq, Xk, Xv] = detail::block_inputs(kBlock, weights, query, key, value);
  const auto [attended, attention_weights] = attention->forward(Xq, Xk, Xv, mask, call);
  return {detail::block_output(weights, query, attended, is_training() ? options.dropout() : 0), attention_weights};
}

Context CrossAttentionBlockImpl::context(const Tensor& key, const Tensor& value, const Mask& mask, const ContextOptions& how) {
  check_options();
  const auto weights = detail::weights_of(*this);
  const auto [none, Xk, Xv] = detail::block_context(kBlock, weights, key, value, how.share);
  auto state = std::make_shared<Context::State>(attention->context(Xk, Xv, mask, how).state());
  state->norm = weights.context_norm();
  state->normalised_by = detail::stamp_of(state->norm);
  return Context(std::move(state));
}

std::tuple<Tensor, Tensor> CrossAttentionBlockImpl::attend(const Tensor& query,
                                                           const Context& context,
                                                           const CallOptions& call) {
  check_options();
  const auto weights = detail::weights_of(*this);
  const auto Xq = detail::block_query(kBlock, weights, query);
  context.state().normalised_by.check(kBlock, detail::stamp_of(weights.context_norm()));
  const auto [attended, attention_weights] = detail::attend_to_kept(*attention, Xq, context, call);
  return {detail::block_output(weights, query, attended, is_training() ? options.dropout() : 0), attention_weights};
}

std::string CrossAttentionBlockImpl::explain(
    int64_t B, int64_t Lq, int64_t Lk, const Mask& mask, const CallOptions& call) const {
  check_options();
  return attention->explain(B, Lq, Lk, mask, call);
}

}  // namespace xattn
