// SPDX-License-Identifier: Apache-2.0
#include "bench/candidates.h"

#include <ATen/Context.h>
#include <torch/nn/modules/activation.h>
#include <torch/utils.h>
#include <xattn/frozen.h>
#include <xattn/mask.h>

#include <memory>
#include <optional>
#include <utility>

#include "bench/eager.h"
#include "bench/folded.h"

namespace bench {

using shapes::NormOver;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

namespace {

// A candidate from its two halves: `context` is outside of what is timed where the row says so.
template <class MakeContext, class Attend>
Candidate make(std::string name, const Layer& layer, MakeContext context, Attend attend) {
  Candidate candidate;
  candidate.name = std::move(name);
  if (layer.shape.timed == Timed::attend) {
    const c10::InferenceMode inference;
    candidate.call = [kept = context(), attend] { return attend(kept); };
  } else {
    candidate.call = [context, attend] { return attend(context()); };
  }
  candidate.leaves = layer.leaves();
  candidate.compared = candidate.leaves.size();
  candidate.holds_logits = candidate.name == "eager" || candidate.name == "folded";
  return candidate;
}

Candidate without(std::string name, std::string reason) {
  Candidate candidate;
  candidate.name = std::move(name);
  candidate.absent = std::move(reason);
  return candidate;
}

AttentionWeights weights_of(const Layer& layer) {
  return layer.module->options.attention_weights();
}

Candidate eager(const Layer& layer) {
  const Eager eager{layer};
  return make("eager", layer, [eager] { return eager.context(); }, [eager](const auto& c) { return eager.attend(c); });
}

Candidate sdpa(const Layer& layer) {
  if (weights_of(layer) != AttentionWeights::none) return without("sdpa", "it returns no weights");
  const Eager eager{layer};
  return make(
      "sdpa", layer, [eager] { return eager.context(); },
      [eager](const Eager::Context& context) -> Results {
        const auto& [k, v] = context;
        const auto& s = eager.layer.shape;
        const auto q = eager.project_query().expand({s.B, -1, -1, -1});
        const auto mask = eager.layer.bias.defined() ? std::optional(eager.layer.bias) : std::nullopt;
        const auto mixed = at::scaled_dot_product_attention(q, k, v, mask, 0, false, {}, s.G != s.H);
        return {eager.project_output(mixed), {}};
      });
}

Candidate mha(const Layer& layer) {
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

  // The sequence first, as it wants it: made so ahead.
  const auto first = [train](const Tensor& x) {
    return x.detach().transpose(0, 1).clone(at::MemoryFormat::Contiguous).requires_grad_(train);
  };
  const auto query = first(layer.query), key = first(layer.key);
  const auto value = s.one_context ? key : first(layer.value);
  const auto ignored = layer.keep.defined() ? layer.keep.logical_not() : Tensor();
  const auto weights = weights_of(layer);
  Candidate candidate;
  candidate.name = "mha";
  candidate.holds_logits = weights_of(layer) != AttentionWeights::none;
  candidate.call = [=, module = module.ptr()]() -> Results {
    const auto asked = query.expand({-1, s.B, -1});
    const auto [output, returned] =
        module->forward(asked, key, value, ignored, weights != AttentionWeights::none, {}, weights == AttentionWeights::mean);
    return {output.transpose(0, 1), weights == AttentionWeights::none ? Tensor() : returned};
  };
  candidate.leaves = {query, key};
  if (!s.one_context) candidate.leaves.push_back(value);
  for (const auto& parameter : module->parameters()) candidate.leaves.push_back(parameter);
  return candidate;
}

Candidate folded(const Layer& layer) {
  if (layer.shape.orders == "SS") return without("folded", "the standard order is the cheapest");
  if (layer.grad.defined()) {  // nothing is made ahead
    return make(
        "folded", layer, [&layer] { return Folded(layer); },
        [](const Folded& folded) { return folded.attend(folded.context()); });
  }
  const auto folded = std::make_shared<Folded>(layer);
  return make(
      "folded", layer, [folded] { return folded->context(); },
      [folded](const auto& context) { return folded->attend(context); });
}

Candidate module(const Layer& layer) {
  const auto module = layer.module.ptr();
  const auto mask = mask_of(layer);
  const auto query = layer.query.expand({layer.shape.B, -1, -1});
  if (layer.shape.timed == Timed::attend) {
    return make(
        "module", layer, [&layer, module, mask] { return module->context(layer.key, layer.value, mask); },
        [module, query](const auto& context) { return module->attend(query, context); });
  }
  return make(
      "module", layer, [] { return 0; },
      [&layer, module, query, mask](int) { return module->forward(query, layer.key, layer.value, mask); });
}

Candidate frozen(const Layer& layer, const char* name = "frozen", std::optional<at::ScalarType> storage = {}) {
  if (layer.shape.timed == Timed::backward) return without(name, "it has no gradients");
  const bool learned = layer.shape.learned_query;
  const auto frozen = layer.module->freeze({.query = learned ? layer.query[0] : Tensor(), .storage = storage});
  const auto mask = mask_of(layer);
  if (layer.shape.timed == Timed::attend) {
    return make(
        name, layer, [&layer, frozen, mask] { return frozen.context(layer.key, layer.value, mask); },
        [&layer, frozen, learned](const auto& context) {
          return learned ? frozen.attend(context) : frozen.attend(layer.query, context);
        });
  }
  return make(
      name, layer, [] { return 0; },
      [&layer, frozen, learned, mask](int) {
        return learned ? frozen.forward(layer.key, layer.value, mask)
                       : frozen.forward(layer.query, layer.key, layer.value, mask);
      });
}

// What it gains from half the memory shows where a context is kept: nearly all of such a call is reading.
Candidate stored_in_bfloat16(const Layer& layer) {
  auto candidate = frozen(layer, "frozen, bfloat16", at::kBFloat16);
  candidate.rounds = true;
  return candidate;
}

// With one backend of scaled_dot_product_attention on, the others off.
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

std::vector<Candidate> candidates(const Layer& layer) {
  std::vector<Candidate> result = {eager(layer), sdpa(layer), mha(layer), folded(layer), module(layer), frozen(layer)};
  if (layer.key.is_cpu() && layer.shape.timed == Timed::attend) result.push_back(stored_in_bfloat16(layer));
  if (layer.key.is_cuda() && weights_of(layer) == AttentionWeights::none) {
    result.push_back(with_backend(sdpa(layer), "flash", &at::Context::setSDPUseFlash));
    result.push_back(with_backend(sdpa(layer), "efficient", &at::Context::setSDPUseMemEfficient));
    result.push_back(with_backend(sdpa(layer), "cudnn", &at::Context::setSDPUseCuDNN));
    result.push_back(with_backend(sdpa(layer), "math", &at::Context::setSDPUseMath));
  }
  return result;
}

}  // namespace bench
