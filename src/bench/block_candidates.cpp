// SPDX-License-Identifier: Apache-2.0
#include "bench/block_candidates.h"

#include <torch/utils.h>
#include <xattn/frozen_block.h>
#include <xattn/frozen_decoupled.h>
#include <xattn/frozen_linear.h>

#include <cmath>
#include <memory>
#include <optional>
#include <utility>

#include "bench/exact.h"

namespace bench {

using torch::Tensor;
using xattn::CrossAttentionBlock;
using xattn::NormKind;
using xattn::NormPlacement;

namespace {

// ---- The definition, on LibTorch's operators -------------------------------------------------------------------------------

using Attend = Tensor (*)(const Tensor& q, const Tensor& k, const Tensor& v, double scale);

Tensor attend_eager(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return at::matmul(at::softmax(at::matmul(q, k.transpose(-2, -1)) * scale, -1), v);
}

Tensor attend_sdpa(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0, false, scale);
}

Tensor apply(const xattn::Norm& norm, const Tensor& x) {
  const auto& o = norm->options;
  if (o.kind() == NormKind::rms) return at::rms_norm(x, {o.size()}, norm->weight, o.eps());
  return at::layer_norm(x, {o.size()}, norm->weight, norm->bias, o.eps());
}

Tensor project_to_heads(const torch::nn::Linear& module, const Tensor& x, int64_t heads) {
  return split_heads(linear(module, x), heads, shapes::NormOver::nothing, nullptr);
}

struct KeysAndValues {
  Tensor k, v;  // [B, H, Lk, d]
};

// `layer`: an attention, or the projections of an added context.
template <class Layer>
KeysAndValues project_context(const Layer& layer, const Tensor& x, int64_t heads) {
  return {project_to_heads(layer->key_linear, x, heads), project_to_heads(layer->value_linear, x, heads)};
}

Tensor attend_to(const xattn::CrossAttention& layer,
                 const Tensor& x,
                 const std::vector<KeysAndValues>& contexts,
                 Attend attend) {
  const auto& o = layer->options;
  const auto scale = o.scale().value_or(1 / std::sqrt(static_cast<double>(o.head_dim().value())));
  const auto q = project_to_heads(layer->query_linear, x, o.num_heads());
  Tensor sum;
  for (const auto& [k, v] : contexts) {
    const auto attended = attend(q, k, v, scale);
    sum = sum.defined() ? sum + attended : attended;
  }
  return linear(layer->output_linear, sum.transpose(1, 2).flatten(2));
}

// One block, with the i-th of the kept contexts or one of the key.
Tensor apply_block(const BenchBlock& b, size_t i, const Tensor& x, const std::vector<KeysAndValues>& kept, Attend attend) {
  const auto& block = b.blocks[i];
  const auto& o = block->options;
  const bool before = o.norm_placement() == NormPlacement::before;
  const auto add_branch = [&](const Tensor& input, const xattn::Norm& norm, const Tensor& gate, const auto& branch) {
    const auto y = branch(before ? apply(norm, input) : input);
    const auto sum = input + (gate.defined() ? gate.tanh() * y : y);
    return before ? sum : apply(norm, sum);
  };
  const auto attended = add_branch(x, block->attention_norm, block->attention_gate, [&](const Tensor& input) {
    const auto context =
        b.row.kept ? kept[i] : project_context(block->attention, b.row.self ? input : b.key, o.attention().num_heads());
    return attend_to(block->attention, input, {context}, attend);
  });
  return add_branch(attended, block->feed_forward_norm, block->feed_forward_gate, [&](const Tensor& input) {
    const auto hidden = linear(block->feed_forward_in, input);
    return linear(block->feed_forward_out, o.activation() == xattn::Activation::relu ? at::relu(hidden) : at::gelu(hidden));
  });
}

std::vector<KeysAndValues> make_contexts(const BenchBlock& b) {
  const auto H = b.row.block.attention().num_heads();
  if (b.decoupled) {
    return {project_context(b.decoupled->attention, b.key, H), project_context(b.decoupled->added_projections[0], b.image, H)};
  }
  std::vector<KeysAndValues> contexts;
  for (const auto& block : b.blocks) contexts.push_back(project_context(block->attention, b.key, H));
  return contexts;
}

Candidate operators(const char* name, const BenchBlock& b, Attend attend) {
  std::vector<KeysAndValues> kept;
  if (b.row.kept) kept = make_contexts(b);
  for (auto& [k, v] : kept) {
    k = k.contiguous();
    v = v.contiguous();
  }
  return {.name = name, .call = [&b, attend, kept]() -> Outputs {
            if (b.linear) return {linear(b.linear, b.query), {}};
            if (b.decoupled) {
              return {attend_to(b.decoupled->attention, b.query, b.row.kept ? kept : make_contexts(b), attend), {}};
            }
            auto x = b.query;
            for (size_t i = 0; i < b.blocks.size(); ++i) x = apply_block(b, i, x, kept, attend);
            return {x, {}};
          }};
}

// ---- This library -----------------------------------------------------------------------------------------------------------

// Adds the size of a frozen layer's context; that of a module's is not reported.
void add_bytes(std::optional<int64_t>& sum, const xattn::FrozenContext& context) {
  sum = sum.value_or(0) + context.bytes();
}
void add_bytes(std::optional<int64_t>&, const xattn::Context&) {}

// A decoupled layer: a module or a frozen one.
template <class Layer>
Candidate of_decoupled(const char* name, const BenchBlock& b, const std::shared_ptr<Layer>& layer) {
  if (!b.row.kept) {
    return {.name = name, .call = [&b, layer] { return layer->forward(b.query, b.key, b.key, {{b.image, b.image}}); }};
  }
  const auto text = layer->context(b.key, b.key), image = layer->added_context(0, b.image, b.image);
  Candidate result{.name = name, .call = [&b, layer, text, image] { return layer->attend(b.query, text, {image}); }};
  for (const auto& context : {text, image}) add_bytes(result.context_bytes, context);
  return result;
}

// Blocks: modules or frozen ones.
template <class Block>
Candidate of_blocks(const char* name,
                    const BenchBlock& b,
                    const std::vector<std::shared_ptr<Block>>& blocks,
                    const xattn::ContextOptions& how = {}) {
  std::vector<decltype(blocks[0]->context(b.key, b.key))> kept;
  std::optional<int64_t> bytes;
  for (size_t i = 0; b.row.kept && i < blocks.size(); ++i) {
    kept.push_back(blocks[i]->context(b.key, b.key, {}, how));
    add_bytes(bytes, kept.back());
  }
  const auto call = [&b, blocks, kept]() -> Outputs {
    auto x = b.query;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const auto& key = b.row.self ? x : b.key;
      x = std::get<0>(b.row.kept ? blocks[i]->attend(x, kept[i]) : blocks[i]->forward(x, key, key));
    }
    return {x, {}};
  };
  return {.name = name, .call = call, .context_bytes = bytes};
}

// The module frozen, with this storage.
Candidate frozen(const char* name,
                 const BenchBlock& b,
                 std::optional<at::ScalarType> storage = {},
                 const xattn::ContextOptions& how = {}) {
  if (b.linear) {
    return {.name = name, .call = [&b, linear = xattn::FrozenLinear(*b.linear, storage)]() -> Outputs {
              return {linear.forward(b.query), {}};
            }};
  }
  const xattn::FreezeOptions options{.storage = storage};
  if (b.decoupled) {
    return of_decoupled(name, b, std::make_shared<const xattn::FrozenDecoupled>(b.decoupled->freeze(options)));
  }
  std::vector<std::shared_ptr<const xattn::FrozenBlock>> blocks;
  for (const auto& block : b.blocks) blocks.push_back(std::make_shared<const xattn::FrozenBlock>(block->freeze(options)));
  return of_blocks(name, b, blocks, how);
}

Candidate module(const BenchBlock& b) {
  if (b.decoupled) return of_decoupled("module", b, b.decoupled.ptr());
  std::vector<std::shared_ptr<xattn::CrossAttentionBlockImpl>> blocks;
  for (const auto& block : b.blocks) blocks.push_back(block.ptr());
  return of_blocks("module", b, blocks);
}

// ---- Random numbers ---------------------------------------------------------------------------------------------------------

// Norms and gates that are new would hide errors: they multiply by one or zero.
void randomise(const CrossAttentionBlock& block) {
  const torch::NoGradGuard no_grad;
  for (const auto* norm : {&block->attention_norm, &block->feed_forward_norm}) {
    (*norm)->weight.uniform_(0.5, 1.5);
    if ((*norm)->bias.defined()) (*norm)->bias.uniform_(-0.5, 0.5);
  }
  for (const auto* gate : {&block->attention_gate, &block->feed_forward_gate}) {
    if (gate->defined()) gate->uniform_(0.5, 1);
  }
}

void stop_training(torch::nn::Module& module) {
  module.eval();
  for (auto& parameter : module.parameters()) parameter.requires_grad_(false);
}

template <class Module>
Module in_double(const Module& module) {
  auto copy = std::dynamic_pointer_cast<typename Module::ContainedType>(module->clone());
  copy->to(at::kDouble);
  return Module(std::move(copy));
}

}  // namespace

BenchBlock make_block(const BlockRow& row) {
  torch::manual_seed(0);
  BenchBlock b{.row = row, .blocks = {}, .query = {}, .key = {}, .image = {}};
  const auto& attention = row.block.attention();
  switch (row.kind) {
    case BlockKind::linear:
      b.linear = torch::nn::Linear(torch::nn::LinearOptions(attention.dim_query(), attention.dim_output()).bias(false));
      stop_training(*b.linear);
      break;
    case BlockKind::decoupled:
      b.decoupled = xattn::DecoupledCrossAttention(
          xattn::DecoupledCrossAttentionOptions(attention).added({{attention.dim_key(), attention.dim_value()}}));
      stop_training(*b.decoupled);
      break;
    case BlockKind::block:
      for (int64_t i = 0; i < row.layers; ++i) {
        b.blocks.emplace_back(row.block);
        randomise(b.blocks.back());
        stop_training(*b.blocks.back());
      }
  }
  b.query = torch::randn({row.B, row.Lq, attention.dim_query()});
  b.key = torch::randn({row.B, row.Lk, attention.dim_key()});
  b.image = torch::randn({row.B, row.image, attention.dim_key()});
  return b;
}

Tensor exact(const BenchBlock& block) {
  auto wide = block;
  for (auto& each : wide.blocks) each = in_double(each);
  if (wide.decoupled) wide.decoupled = in_double(wide.decoupled);
  if (wide.linear) wide.linear = in_double(wide.linear);
  for (auto* x : {&wide.query, &wide.key, &wide.image}) *x = x->to(at::kDouble);
  return std::get<0>(operators("eager", wide, attend_eager).call());
}

std::vector<Candidate> candidates(const BenchBlock& block) {
  std::vector<Candidate> result = {operators("eager", block, attend_eager)};
  if (!block.linear) {
    result.push_back(operators("sdpa", block, attend_sdpa));
    result.push_back(module(block));
  }
  result.push_back(frozen("frozen", block));
  result.push_back(frozen("frozen, bfloat16", block, at::kBFloat16));
  result.back().rounds = true;
  if (block.row.kept && block.row.layers > 1) {
    result.push_back(frozen("frozen, shared", block, {}, {.expected_queries = 1, .share = true}));
  }
  return result;
}

}  // namespace bench
