// SPDX-License-Identifier: Apache-2.0
#include <xattn/block_layouts.h>

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "loading/layout_names.h"

namespace xattn {
namespace {

// ---- The table -------------------------------------------------------------------------------------------------------------

constexpr std::array kBlockLayouts = {
    BlockLayout{.name = "fc1_fc2",
                .used_by = "BART, Marian (norms after); mBART, M2M-100, Pegasus, Whisper, MusicGen (before)",
                .attention = "encoder_attn.",
                .attention_norm = "encoder_attn_layer_norm",
                .feed_forward_norm = "final_layer_norm",
                .feed_forward_in = "fc1",
                .feed_forward_out = "fc2",
                .beside = "self_attn. self_attn_layer_norm.",
                .models_before = "mbart m2m_100 pegasus whisper musicgen musicgen_decoder",
                .models_after = "bart marian",
                .activation_in_config = "activation_function"},
    BlockLayout{.name = "torch",
                .used_by = "torch.nn.TransformerDecoderLayer",
                .attention = "multihead_attn.",
                .attention_norm = "norm2",
                .feed_forward_norm = "norm3",
                .feed_forward_in = "linear1",
                .feed_forward_out = "linear2",
                .beside = "self_attn. norm1."},
    BlockLayout{.name = "moonshine",
                .used_by = "Moonshine",
                .attention = "encoder_attn.",
                .attention_norm = "post_attention_layernorm",
                .feed_forward_norm = "final_layernorm",
                .feed_forward_in = "mlp.fc1",
                .feed_forward_multiplier = "mlp.fc1",
                .feed_forward_out = "mlp.fc2",
                .beside = "self_attn. input_layernorm.",
                .norm_placement = NormPlacement::before,
                .activation = Activation::silu,
                .activation_in_config = "decoder_hidden_act"},
    BlockLayout{.name = "qformer",
                .used_by = "Q-Former of BLIP-2 and InstructBLIP, its part for queries",
                .attention = "crossattention.",
                .attention_norm = "crossattention.output.LayerNorm",
                .feed_forward_norm = "output_query.LayerNorm",
                .feed_forward_in = "intermediate_query.dense",
                .feed_forward_out = "output_query.dense",
                .beside = "attention. intermediate. output.",
                .norm_eps = 1e-12,
                .norm_placement = NormPlacement::after,
                .activation = Activation::gelu,
                .activation_in_config = "qformer_config.hidden_act .hidden_act",
                .norm_eps_in_config = "qformer_config.layer_norm_eps .layer_norm_eps"},
    BlockLayout{.name = "bert",
                .used_by = "BERT, BLIP's text model, ALBEF",
                .attention = "crossattention.",
                .attention_norm = "crossattention.output.LayerNorm",
                .feed_forward_norm = "output.LayerNorm",
                .feed_forward_in = "intermediate.dense",
                .feed_forward_out = "output.dense",
                .beside = "attention.",
                .norm_eps = 1e-12,
                .norm_placement = NormPlacement::after,
                .activation = Activation::gelu,
                .activation_in_config = "hidden_act",
                .norm_eps_in_config = "layer_norm_eps"},
    BlockLayout{.name = "t5",
                .used_by = "T5",
                .attention = "layer.1.EncDecAttention.",
                .attention_norm = "layer.1.layer_norm",
                .feed_forward_norm = "layer.2.layer_norm",
                .feed_forward_in = "layer.2.DenseReluDense.wi",
                .feed_forward_out = "layer.2.DenseReluDense.wo",
                .beside = "layer.0.",
                .norm = NormKind::rms,
                .norm_eps = 1e-6,
                .norm_placement = NormPlacement::before,
                .activation = Activation::relu,
                .activation_in_config = "dense_act_fn feed_forward_proj",
                .norm_eps_in_config = "layer_norm_epsilon"},
    BlockLayout{.name = "t5_gated",
                .used_by = "T5 v1.1, Flan-T5, mT5, UMT5",
                .attention = "layer.1.EncDecAttention.",
                .attention_norm = "layer.1.layer_norm",
                .feed_forward_norm = "layer.2.layer_norm",
                .feed_forward_in = "layer.2.DenseReluDense.wi_0",
                .feed_forward_multiplier = "layer.2.DenseReluDense.wi_1",
                .feed_forward_out = "layer.2.DenseReluDense.wo",
                .beside = "layer.0.",
                .norm = NormKind::rms,
                .norm_eps = 1e-6,
                .norm_placement = NormPlacement::before,
                .activation = Activation::gelu_tanh,
                .activation_in_config = "dense_act_fn feed_forward_proj",
                .norm_eps_in_config = "layer_norm_epsilon"},
    BlockLayout{.name = "whisper",
                .used_by = "Whisper (OpenAI)",
                .attention = "cross_attn.",
                .attention_norm = "cross_attn_ln",
                .feed_forward_norm = "mlp_ln",
                .feed_forward_in = "mlp.0",
                .feed_forward_out = "mlp.2",
                .beside = "attn. attn_ln.",
                .norm_placement = NormPlacement::before,
                .activation = Activation::gelu},
    BlockLayout{.name = "gpt2",
                .used_by = "GPT-2 with cross-attention",
                .attention = "crossattention.",
                .attention_norm = "ln_cross_attn",
                .feed_forward_norm = "ln_2",
                .feed_forward_in = "mlp.c_fc",
                .feed_forward_out = "mlp.c_proj",
                .beside = "attn. ln_1.",
                .transposed = true,
                .norm_placement = NormPlacement::before,
                .activation = Activation::gelu_tanh,
                .activation_in_config = "activation_function",
                .norm_eps_in_config = "layer_norm_epsilon"},
    BlockLayout{.name = "mllama",
                .used_by = "Mllama",
                .attention = "cross_attn.",
                .attention_norm = "input_layernorm",
                .feed_forward_norm = "post_attention_layernorm",
                .feed_forward_in = "mlp.gate_proj",
                .feed_forward_multiplier = "mlp.up_proj",
                .feed_forward_out = "mlp.down_proj",
                .attention_gate = "cross_attn_attn_gate",
                .feed_forward_gate = "cross_attn_mlp_gate",
                .norm = NormKind::rms,
                .norm_placement = NormPlacement::before,
                .activation = Activation::silu,
                .activation_in_config = "hidden_act hidden_activation",
                .norm_eps_in_config = "rms_norm_eps"},
    BlockLayout{.name = "idefics",
                .used_by = "Idefics",
                .attention = "cross_attn.",
                .attention_norm = "input_layernorm",
                .feed_forward_norm = "post_attention_layernorm",
                .feed_forward_in = "mlp.gate_proj",
                .feed_forward_multiplier = "mlp.up_proj",
                .feed_forward_out = "mlp.down_proj",
                .attention_gate = "alpha_cross_attn",
                .feed_forward_gate = "alpha_dense",
                .norm = NormKind::rms,
                .norm_eps = 1e-6,
                .norm_placement = NormPlacement::before,
                .activation = Activation::silu,
                .activation_in_config = "hidden_act",
                .norm_eps_in_config = "rms_norm_eps"},
    BlockLayout{.name = "flamingo",
                .used_by = "Flamingo (flamingo-pytorch, OpenFlamingo)",
                .attention = "attn.",
                .attention_norm = "attn.norm",
                .feed_forward_norm = "ff.0",
                .feed_forward_in = "ff.1",
                .feed_forward_out = "ff.3",
                .attention_gate = "attn_gate",
                .feed_forward_gate = "ff_gate",
                .norm_placement = NormPlacement::before,
                .activation = Activation::gelu},
};

// ---- Matching --------------------------------------------------------------------------------------------------------------

using Infos = std::map<std::string, TensorInfo>;
using Shape = std::vector<int64_t>;

// Of a norm's weight and bias. Models that were first written for TensorFlow have the others in old files.
constexpr std::array kNormEndings = {std::pair(".weight", ".bias"), std::pair(".gamma", ".beta")};

// How many parts feed_forward_in has in its tensor, of which it is the last.
int parts_of_in(const BlockLayout& layout) {
  return layout.feed_forward_multiplier == layout.feed_forward_in ? 2 : 1;
}

// A block of this layout around an attention layer, if it is there and its shapes fit together.
class BlockMatch {
 public:
  BlockMatch(const Infos& tensors, const BlockLayout& layout, std::string prefix)
      : tensors_(tensors), layout_(layout), prefix_(std::move(prefix)) {}

  std::optional<FoundBlock> block(const FoundLayer& attention) const {
    const auto Eq = attention.options.dim_query();
    const auto* in = find(layout_.feed_forward_in, ".weight");
    if (!in || in->shape.size() != 2) return {};
    const auto parts = parts_of_in(layout_);
    const auto hidden = in->shape[layout_.transposed ? 1 : 0] / parts;
    const bool glu = !layout_.feed_forward_multiplier.empty();
    const bool bias = find(layout_.feed_forward_in, ".bias") != nullptr;
    const auto gate = gate_of(Eq);
    const auto norm_bias = norm(layout_.attention_norm, Eq);
    const bool fits = attention.options.dim_output() == Eq && hidden > 0 && gate &&                   //
                      norm_bias && norm_bias == norm(layout_.feed_forward_norm, Eq) &&                //
                      linear(layout_.feed_forward_in, Eq, parts * hidden, bias) &&                    //
                      (!glu || linear(layout_.feed_forward_multiplier, Eq, parts * hidden, bias)) &&  //
                      linear(layout_.feed_forward_out, hidden, Eq, bias);
    if (!fits) return {};
    auto options = CrossAttentionBlockOptions(attention.options)
                       .norm(layout_.norm)
                       .norm_eps(layout_.norm_eps)
                       .norm_bias(*norm_bias || layout_.norm != NormKind::layer)
                       .gate(*gate)
                       .feed_forward(hidden)
                       .feed_forward_glu(glu)
                       .feed_forward_bias(bias);
    if (layout_.norm_placement) options.norm_placement(*layout_.norm_placement);
    if (layout_.activation) options.activation(*layout_.activation);
    return FoundBlock{prefix_, &layout_, attention, options};
  }

 private:
  const TensorInfo* find(std::string_view name, std::string_view ending = "") const {
    const auto found = tensors_.find(prefix_ + std::string(name) + std::string(ending));
    return found == tensors_.end() ? nullptr : &found->second;
  }

  bool has(std::string_view name, std::string_view ending, const Shape& shape) const {
    const auto* info = find(name, ending);
    return info && info->shape == shape;
  }

  // Whether the norm has a bias; nothing if it is not there, or not of the layout's kind.
  std::optional<bool> norm(std::string_view name, int64_t size) const {
    for (const auto& [weight, bias] : kNormEndings) {
      if (!has(name, weight, {size})) continue;
      if (!find(name, bias)) return false;
      return layout_.norm == NormKind::layer && has(name, bias, {size}) ? std::optional(true) : std::nullopt;
    }
    return {};
  }

  bool linear(std::string_view name, int64_t in, int64_t out, bool bias) const {
    return has(name, ".weight", layout_.transposed ? Shape{in, out} : Shape{out, in}) && has(name, ".bias", {out}) == bias;
  }

  // Of both gates; nothing if they are not as the layout has them.
  std::optional<BlockGate> gate_of(int64_t Eq) const {
    if (layout_.attention_gate.empty()) return BlockGate::none;
    const auto* first = find(layout_.attention_gate);
    const auto* second = find(layout_.feed_forward_gate);
    if (!first || !second || first->shape != second->shape) return {};
    const auto shape = TensorRecipe{.flat = true}.shape(*first);
    if (shape == Shape{1}) return BlockGate::scalar;
    return shape == Shape{Eq} ? std::optional(BlockGate::per_feature) : std::nullopt;
  }

  const Infos& tensors_;
  const BlockLayout& layout_;
  std::string prefix_;
};

std::optional<FoundBlock> block_around(const FoundLayer& attention, const Infos& tensors) {
  for (const auto& layout : kBlockLayouts) {
    if (!attention.prefix.ends_with(layout.attention)) continue;
    const auto prefix = attention.prefix.substr(0, attention.prefix.size() - layout.attention.size());
    if (!prefix.empty() && !prefix.ends_with('.')) continue;
    if (auto block = BlockMatch(tensors, layout, prefix).block(attention)) return block;
  }
  return {};
}

}  // namespace

std::span<const BlockLayout> block_layouts() {
  return kBlockLayouts;
}

std::vector<FoundBlock> find_blocks(const Infos& tensors, const Layout* only) {
  std::vector<FoundBlock> blocks;
  for (const auto& attention : find_layers(tensors, only)) {
    if (auto block = block_around(attention, tensors)) blocks.push_back(*std::move(block));
  }
  return blocks;
}

std::map<std::string, TensorRecipe> recipes(const FoundBlock& block, const Infos& tensors) {
  const auto& layout = *block.layout;
  std::map<std::string, TensorRecipe> result;
  for (auto& [parameter, recipe] : recipes(block.attention, tensors)) result.emplace("attention." + parameter, recipe);
  const auto add = [&](const std::string& parameter, std::string_view name, std::string_view ending, TensorRecipe recipe) {
    recipe.source = detail::formatted("{}{}{}", block.prefix, name, ending);
    if (!name.empty() && tensors.contains(recipe.source)) result.emplace(parameter, detail::with_scale(recipe, tensors));
  };
  const auto add_norm = [&](const std::string& parameter, std::string_view name) {
    for (const auto& [weight, bias] : kNormEndings) {
      add(parameter + ".weight", name, weight, {});
      add(parameter + ".bias", name, bias, {});
    }
  };
  const auto add_linear = [&](const std::string& parameter, std::string_view name, int part, int parts) {
    add(parameter + ".weight", name, ".weight", {.part = part, .parts = parts, .transposed = layout.transposed});
    add(parameter + ".bias", name, ".bias", {.part = part, .parts = parts});
  };
  const auto parts = parts_of_in(layout);
  add_norm("attention_norm", layout.attention_norm);
  add_norm("feed_forward_norm", layout.feed_forward_norm);
  add_linear("feed_forward_in", layout.feed_forward_in, parts - 1, parts);
  add_linear("feed_forward_multiplier", layout.feed_forward_multiplier, 0, parts);
  add_linear("feed_forward_out", layout.feed_forward_out, 0, 1);
  add("attention_gate", layout.attention_gate, "", {.flat = true});
  add("feed_forward_gate", layout.feed_forward_gate, "", {.flat = true});
  return result;
}

std::vector<std::string> unexplained_names(const FoundBlock& block, const Infos& tensors) {
  const auto& attention = block.attention;
  const auto roles = name_roles(attention, tensors);
  std::set<std::string> explained;
  for (const auto& [parameter, recipe] : recipes(block, tensors)) {
    explained.insert({recipe.source, recipe.scale});
    for (auto& name : detail::activation_scales(recipe, tensors)) explained.insert(std::move(name));
  }
  const auto beside = detail::words(block.layout->beside);
  const auto is_beside = [&](const std::string& name) {
    return std::ranges::any_of(beside,
                               [&](const auto& word) { return word.ends_with('.') ? name.starts_with(word) : name == word; });
  };
  std::vector<std::string> names;
  for (auto item = tensors.lower_bound(block.prefix); item != tensors.end() && item->first.starts_with(block.prefix); ++item) {
    const auto& full_name = item->first;
    auto name = full_name.substr(block.prefix.size());
    if (explained.contains(full_name) || is_beside(name)) continue;
    const auto role =
        full_name.starts_with(attention.prefix) ? roles.at(full_name.substr(attention.prefix.size())) : NameRole::unexplained;
    if (role != NameRole::beside) names.push_back(std::move(name));
  }
  return names;
}

}  // namespace xattn
