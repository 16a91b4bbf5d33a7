// SPDX-License-Identifier: Apache-2.0
#include "bench/candidates.h"

#include <ATen/Context.h>
#include <torch/nn/modules/activation.h>
#include <torch/utils.h>

#include <memory>
#include <optional>
#include <utility>

#include "bench/exact.h"
#include "bench/folded.h"

namespace bench {

using shapes::NormOver;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

namespace {

Candidate without(std::string name, std::string reason) {
  return {.name = std::move(name), .call = {}, .absent = std::move(reason)};
}

AttentionWeights weights_of(const BenchLayer& layer) {
  return layer.module->options.attention_weights();
}

// `computation`: an Eager, Sdpa or Folded. If the row keeps the context, it is made now.
template <class Computation>
std::function<Outputs()> call_with_context(const BenchLayer& layer, const Computation& computation) {
  if (layer.shape.timed != Timed::attend) return [computation] { return computation.attend(computation.context()); };
  return [computation, context = computation.context()] { return computation.attend(context); };
}

struct Sdpa : Eager {
  Outputs attend(const Context& context) const {
    const auto& [k, v] = context;
    const auto& s = layer.shape;
    const auto q = project_query().expand({s.B, -1, -1, -1});
    const auto mask = layer.bias.defined() ? std::optional(layer.bias) : std::nullopt;
    return {project_output(at::scaled_dot_product_attention(q, k, v, mask, 0, false, {}, s.G != s.H)), {}};
  }
};

Candidate eager(const BenchLayer& layer) {
  return {.name = "eager", .call = call_with_context(layer, Eager{layer}), .leaves = layer.leaves(), .holds_logits = true};
}

Candidate sdpa(const BenchLayer& layer) {
  if (weights_of(layer) != AttentionWeights::none) return without("sdpa", "it returns no weights");
  return {.name = "sdpa", .call = call_with_context(layer, Sdpa{{layer}}), .leaves = layer.leaves()};
}

Candidate mha(const BenchLayer& layer) {
  const auto& s = layer.shape;
  const auto absent = [](const char* reason) { return without("mha", reason); };
  if (s.timed == Timed::attend) return absent("it keeps no context");
  if (s.Eo != s.Eq || s.H * s.d != s.Eq || s.e != s.d) return absent("its heads have the features of the query");
  if (s.G != s.H) return absent("it has as many key heads as query heads");
  if (s.norm != NormOver::nothing) return absent("it has no norms");
  const torch::AutoGradMode grad_mode(false);
  torch::nn::MultiheadAttention module(torch::nn::MultiheadAttentionOptions(s.Eq, s.H).kdim(s.Ek).vdim(s.Ek));
  module->to(layer.key.device(), layer.key.scalar_type());
  const bool train = layer.grad.defined();
  module->train(train);
  const auto& from = layer.module;
  if (module->_qkv_same_embed_dim) {
    module->in_proj_weight.copy_(
        torch::cat({from->query_linear->weight, from->key_linear->weight, from->value_linear->weight}));
  } else {
    module->q_proj_weight.copy_(from->query_linear->weight);
    module->k_proj_weight.copy_(from->key_linear->weight);
    module->v_proj_weight.copy_(from->value_linear->weight);
  }
  module->in_proj_bias.copy_(torch::cat({from->query_linear->bias, from->key_linear->bias, from->value_linear->bias}));
  module->out_proj->weight.copy_(from->output_linear->weight);
  module->out_proj->bias.copy_(from->output_linear->bias);
  for (auto& parameter : module->parameters()) parameter.requires_grad_(train);

  // The module expects the sequence first; the transposition is not timed.
  const auto first = [train](const Tensor& x) {
    return x.detach().transpose(0, 1).clone(at::MemoryFormat::Contiguous).requires_grad_(train);
  };
  const auto query = first(layer.query);
  const auto key = first(layer.key);
  const auto value = s.one_context ? key : first(layer.value);
  const auto ignored = layer.keep.defined() ? layer.keep.logical_not() : Tensor();
  const auto weights = weights_of(layer);
  std::vector<Tensor> leaves = {query, key};
  if (!s.one_context) leaves.push_back(value);
  for (const auto& parameter : module->parameters()) leaves.push_back(parameter);
  const auto call = [=, module = module.ptr()]() -> Outputs {
    const auto queries = query.expand({-1, s.B, -1});
    const auto [output, returned] =
        module->forward(queries, key, value, ignored, weights != AttentionWeights::none, {}, weights == AttentionWeights::mean);
    return {output.transpose(0, 1), weights == AttentionWeights::none ? Tensor() : returned};
  };
  return {.name = "mha",
          .call = call,
          .leaves = leaves,
          .leaves_of_layer = false,
          .holds_logits = weights != AttentionWeights::none};
}

std::function<Outputs()> call_of(const BenchLayer& layer, const xattn::CrossAttention& of) {
  const auto& module = of.ptr();
  const auto query = layer.query.expand({layer.shape.B, -1, -1});
  const auto mask = mask_of(layer);
  if (layer.shape.timed != Timed::attend) {
    return [=, &layer] { return module->forward(query, layer.key, layer.value, mask); };
  }
  return [=, context = module->context(layer.key, layer.value, mask)] { return module->attend(query, context); };
}

Candidate folded(const BenchLayer& layer) {
  const auto orders = shapes::count_operations(layer.shape).orders;
  if (orders == xattn::Orders{}) return without("folded", "the standard order is the cheapest");
  Candidate candidate{.name = "folded", .call = {}, .leaves = layer.leaves(), .holds_logits = true};
  if (layer.shape.timed == Timed::backward) {  // each call makes the products of weights
    candidate.call = [&layer, orders] {
      const Folded folded(layer, orders);
      return folded.attend(folded.context());
    };
  } else {
    candidate.call = call_with_context(layer, Folded(layer, orders));
  }
  return candidate;
}

Candidate module(const BenchLayer& layer) {
  return {.name = "module", .call = call_of(layer, layer.module), .leaves = layer.leaves()};
}

Candidate frozen(const BenchLayer& layer, const char* name, std::optional<at::ScalarType> storage = {}) {
  if (layer.shape.timed == Timed::backward) return without(name, "it has no gradients");
  xattn::FreezeOptions options{.storage = storage};
  if (layer.shape.learned_query) options.query = layer.query[0];  // part of the frozen layer
  return {.name = name, .call = call_of(layer, layer.module->freeze(options)), .rounds = storage.has_value()};
}

// Runs one backend of scaled_dot_product_attention, with the others switched off.
Candidate with_backend(Candidate candidate, const char* name, void (at::Context::*use)(bool)) {
  candidate.name = std::string("sdpa, ") + name;
  candidate.call = [call = std::move(candidate.call), use] {
    auto& context = at::globalContext();
    const auto all = {&at::Context::setSDPUseFlash, &at::Context::setSDPUseMemEfficient, &at::Context::setSDPUseCuDNN,
                      &at::Context::setSDPUseMath};
    for (const auto set : all) (context.*set)(false);
    (context.*use)(true);
    const auto restore = [&](const void*) {
      for (const auto set : all) (context.*set)(true);
    };
    const std::unique_ptr<const void, decltype(restore)> guard(&context, restore);
    return call();
  };
  return candidate;
}

}  // namespace

std::function<Outputs()> call_of(const BenchLayer& layer, const xattn::Frozen& frozen) {
  const bool learned = layer.shape.learned_query;
  const auto mask = mask_of(layer);
  if (layer.shape.timed != Timed::attend) {
    return [=, &layer] {
      return learned ? frozen.forward(layer.key, layer.value, mask) : frozen.forward(layer.query, layer.key, layer.value, mask);
    };
  }
  return [=, &layer, context = frozen.context(layer.key, layer.value, mask)] {
    return learned ? frozen.attend(context) : frozen.attend(layer.query, context);
  };
}

std::vector<Candidate> candidates(const BenchLayer& layer) {
  std::vector<Candidate> result = {eager(layer),  sdpa(layer),   mha(layer),
                                   folded(layer), module(layer), frozen(layer, "frozen")};
  // With a kept context nearly all of a call is reading memory, so halving the memory shows.
  if (layer.key.is_cpu() && layer.shape.timed == Timed::attend) {
    result.push_back(frozen(layer, "frozen, bfloat16", at::kBFloat16));
  }
  if (layer.key.is_cuda() && weights_of(layer) == AttentionWeights::none) {
    result.push_back(with_backend(sdpa(layer), "flash", &at::Context::setSDPUseFlash));
    result.push_back(with_backend(sdpa(layer), "efficient", &at::Context::setSDPUseMemEfficient));
    result.push_back(with_backend(sdpa(layer), "cudnn", &at::Context::setSDPUseCuDNN));
    result.push_back(with_backend(sdpa(layer), "math", &at::Context::setSDPUseMath));
  }
  return result;
}

}  // namespace bench
