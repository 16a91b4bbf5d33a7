// SPDX-License-Identifier: Apache-2.0
#include <xattn/stacks.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/where.h>
#include <torch/nn/init.h>
#include <xattn/attention.h>

#include <cmath>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/text.h"
#include "modules/inputs.h"

namespace xattn {

using detail::check_value;
using torch::Tensor;

namespace {

constexpr auto kEncoder = "encoder", kDecoder = "decoder", kBias = "relative_position_bias";

// Buckets of distances j - i [Lq, Lk]; the steps and their rounding are those of T5 (modeling_t5.py of transformers,
// _relative_position_bucket), so that no distance at a border falls into another bucket.
Tensor buckets_of(const Tensor& distances, const RelativePositionBiasOptions& options) {
  const auto buckets = options.bidirectional() ? options.num_buckets() / 2 : options.num_buckets();
  const auto exact = buckets / 2;  // buckets of one distance
  const auto distance = options.bidirectional() ? distances.abs() : distances.clamp_max(0).neg();
  const auto growth = (distance.to(at::kFloat) / exact).log() /
                      std::log(static_cast<double>(options.max_distance()) / static_cast<double>(exact));
  const auto range = (growth.clamp_min(0) * (buckets - exact)).to(at::kLong) + exact;
  const auto bucket = at::where(distance < exact, distance, range.clamp_max(buckets - 1));
  return options.bidirectional() ? bucket + (distances > 0).to(at::kLong) * buckets : bucket;
}

// Throws unless the layer is self-attention over E features, with these heads if a bias is added for each.
void check_layer(std::string_view caller, const CrossAttentionBlockOptions& layer, int64_t E, int64_t heads) {
  const auto& attention = layer.attention();
  const bool fits = attention.dim_query() == E && attention.dim_key() == E && attention.dim_value() == E;
  check_value(fits, caller, "attention must have a dim_query, dim_key and dim_value of {}, but has {}, {} and {}.", E,
              attention.dim_query(), attention.dim_key(), attention.dim_value());
  const bool needs_norm = layer.norm_placement() == NormPlacement::before && layer.norm() != NormKind::none;
  check_value(!needs_norm || layer.norm_context(), caller,
              "norm_context must be true, for self-attention with norms before, but is false.");
  check_value(heads == 0 || attention.num_heads() == heads, caller,
              "attention must have a num_heads of {}, as relative_position_bias, but has {}.", heads, attention.num_heads());
}

template <class Options>
int64_t heads_of_bias(const Options& options) {
  return options.relative_position_bias() ? options.relative_position_bias()->num_heads() : 0;
}

// Registers what encoders and decoders have behind and beside their layers.
template <class Stack>
void reset_norm_and_bias(Stack& stack) {
  const auto& norm = stack.options.norm();
  const auto& bias = stack.options.relative_position_bias();
  if (norm) stack.norm = stack.register_module("norm", Norm(*norm));
  if (bias) stack.relative_position_bias = stack.register_module(kBias, RelativePositionBias(*bias));
}

void check_norm(std::string_view caller, const std::optional<NormOptions>& norm, int64_t E) {
  check_value(!norm || norm->size() == E, caller, "norm must have a size of {}, the features of the layers, but has {}.", E,
              norm ? norm->size() : 0);
}

// The mask of self-attention over L positions.
Mask with_bias(const Mask& mask, RelativePositionBias& bias, int64_t L) {
  return bias ? mask & Mask::bias(bias->forward(L, L)) : mask;
}

// Calls a block of a stack. Errors of the library, "[another] message", become "[caller] message", which tells the layer.
Tensor attended(
    const std::string& caller, CrossAttentionBlockImpl& block, const Tensor& x, const Tensor& context, const Mask& mask) {
  const auto told = [&](const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    const auto end = message.starts_with('[') ? message.find(']') : std::string::npos;
    return end == std::string::npos ? message : detail::formatted("[{}{}", caller, message.substr(end));
  };
  try {
    return std::get<0>(block.forward(x, context, context, mask, {.weights = AttentionWeights::none}));
  } catch (const c10::ValueError& error) {
    throw c10::ValueError(told(error));
  } catch (const c10::TypeError& error) {
    throw c10::TypeError(told(error));
  }
}

Tensor decoded(const std::string& caller,
               DecoderLayerImpl& layer,
               const Tensor& x,
               const Tensor& memory,
               const Mask& self_mask,
               const Mask& memory_mask) {
  const auto y = attended(caller + ".self", *layer.self, x, x, self_mask);
  return attended(caller + ".cross", *layer.cross, y, memory, memory_mask);
}

}  // namespace

// ---- RelativePositionBias --------------------------------------------------------------------------------------------------

RelativePositionBiasImpl::RelativePositionBiasImpl(const RelativePositionBiasOptions& options_) : options(options_) {
  const int64_t directions = options.bidirectional() ? 2 : 1;
  check_value(options.num_heads() >= 1, kBias, "num_heads must be at least 1, but is {}.", options.num_heads());
  check_value(options.num_buckets() >= 2 * directions && options.num_buckets() % directions == 0, kBias,
              "num_buckets must be {}, but is {}.", options.bidirectional() ? "even and at least 4" : "at least 2",
              options.num_buckets());
  const auto exact = options.num_buckets() / directions / 2;
  check_value(options.max_distance() > exact, kBias,
              "max_distance must be more than {}, the distances that have buckets of their own, but is {}.", exact,
              options.max_distance());
  reset();
}

void RelativePositionBiasImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.num_buckets(), options.num_heads()}));
  reset_parameters();
}

void RelativePositionBiasImpl::reset_parameters() {
  torch::nn::init::zeros_(weight);
}

void RelativePositionBiasImpl::pretty_print(std::ostream& stream) const {
  stream << detail::formatted(
      "xattn::RelativePositionBias(RelativePositionBiasOptions({}).num_buckets({}).max_distance({}).bidirectional({}))",
      options.num_heads(), options.num_buckets(), options.max_distance(), options.bidirectional());
}

Tensor RelativePositionBiasImpl::forward(int64_t Lq, int64_t Lk) {
  check_value(Lq >= 0 && Lk >= 0, kBias, "Lq and Lk must not be negative, but are {} and {}.", Lq, Lk);
  const auto positions = [&](int64_t length) { return at::arange(length, weight.options().dtype(at::kLong)); };
  const auto distances = positions(Lk).unsqueeze(0) - positions(Lq).unsqueeze(1);  // [Lq, Lk]
  const auto biases = at::embedding(weight, buckets_of(distances, options));       // [Lq, Lk, H]
  return biases.permute({2, 0, 1}).unsqueeze(0).contiguous();
}

// ---- Encoder ---------------------------------------------------------------------------------------------------------------

EncoderImpl::EncoderImpl(const EncoderOptions& options_) : options(options_) {
  check_value(!options.layers().empty(), kEncoder, "layers must not be empty, but are.");
  const auto E = options.layers().front().attention().dim_query();
  for (size_t i = 0; i < options.layers().size(); ++i) {
    check_layer(detail::formatted("{}.layers[{}]", kEncoder, i), options.layers()[i], E, heads_of_bias(options));
  }
  check_norm(kEncoder, options.norm(), E);
  reset();
}

void EncoderImpl::reset() {
  layers = register_module("layers", torch::nn::ModuleList());
  for (const auto& layer : options.layers()) layers->push_back(CrossAttentionBlock(layer));
  reset_norm_and_bias(*this);
}

void EncoderImpl::pretty_print(std::ostream& stream) const {
  stream << "xattn::Encoder";
}

Tensor EncoderImpl::forward(const Tensor& x, const Mask& mask) {
  detail::check_shape(kEncoder, "x", x, "L", layers->at<CrossAttentionBlockImpl>(0).options.attention().dim_query());
  const auto restricted = with_bias(mask, relative_position_bias, x.size(-2));
  auto y = x;
  for (size_t i = 0; i < layers->size(); ++i) {
    y = attended(detail::formatted("{}.layers[{}]", kEncoder, i), layers->at<CrossAttentionBlockImpl>(i), y, y, restricted);
  }
  return norm ? norm(y) : y;
}

// ---- Decoder ---------------------------------------------------------------------------------------------------------------

DecoderLayerImpl::DecoderLayerImpl(const DecoderLayerOptions& options_) : options(options_) {
  const auto E = options.cross().attention().dim_query();
  check_layer("decoder_layer.self", options.self(), E, /*heads=*/0);
  reset();
}

void DecoderLayerImpl::reset() {
  self = register_module("self", CrossAttentionBlock(options.self()));
  cross = register_module("cross", CrossAttentionBlock(options.cross()));
}

void DecoderLayerImpl::pretty_print(std::ostream& stream) const {
  stream << "xattn::DecoderLayer";
}

Tensor DecoderLayerImpl::forward(const Tensor& x, const Tensor& memory, const Mask& self_mask, const Mask& memory_mask) {
  return decoded("decoder_layer", *this, x, memory, self_mask, memory_mask);
}

DecoderImpl::DecoderImpl(const DecoderOptions& options_) : options(options_) {
  check_value(!options.layers().empty(), kDecoder, "layers must not be empty, but are.");
  const auto& first = options.layers().front().cross().attention();
  for (size_t i = 0; i < options.layers().size(); ++i) {
    const auto caller = detail::formatted("{}.layers[{}]", kDecoder, i);
    const auto& cross = options.layers()[i].cross().attention();
    check_layer(caller + ".self", options.layers()[i].self(), first.dim_query(), heads_of_bias(options));
    const bool fits =
        cross.dim_query() == first.dim_query() && cross.dim_key() == first.dim_key() && cross.dim_value() == first.dim_key();
    check_value(fits, caller + ".cross",
                "attention must have a dim_query of {}, and a dim_key and dim_value of {}, but has {}, {} and {}.",
                first.dim_query(), first.dim_key(), cross.dim_query(), cross.dim_key(), cross.dim_value());
  }
  check_norm(kDecoder, options.norm(), first.dim_query());
  reset();
}

void DecoderImpl::reset() {
  layers = register_module("layers", torch::nn::ModuleList());
  for (const auto& layer : options.layers()) layers->push_back(DecoderLayer(layer));
  reset_norm_and_bias(*this);
}

void DecoderImpl::pretty_print(std::ostream& stream) const {
  stream << "xattn::Decoder" << (options.causal() ? "" : " without a causal mask");
}

Tensor DecoderImpl::forward(const Tensor& x, const Tensor& memory, const Mask& self_mask, const Mask& memory_mask) {
  detail::check_shape(kDecoder, "x", x, "L", layers->at<DecoderLayerImpl>(0).self->options.attention().dim_query());
  const auto causal = options.causal() ? self_mask & Mask::causal(CausalAlignment::upper_left) : self_mask;
  const auto restricted = with_bias(causal, relative_position_bias, x.size(-2));
  auto y = x;
  for (size_t i = 0; i < layers->size(); ++i) {
    const auto caller = detail::formatted("{}.layers[{}]", kDecoder, i);
    y = decoded(caller, layers->at<DecoderLayerImpl>(i), y, memory, restricted, memory_mask);
  }
  return norm ? norm(y) : y;
}

}  // namespace xattn
