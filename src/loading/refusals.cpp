// SPDX-License-Identifier: Apache-2.0
#include "loading/refusals.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "loading/layouts.h"

namespace xattn::detail {
namespace {

enum class To { all, normed, self };

using Words = std::vector<std::string_view>;

struct Refused {
  const char* name;  // in the config
  Words words;       // with which its text begins; of timm's architectures, which it contains
  std::string_view reason;
  To to = To::all;  // layers that it applies to
};

constexpr std::string_view kRotary = "rotary embeddings of its queries and keys";
constexpr std::string_view kInPart = "attention that is not to all keys";

const std::vector<Refused>& all_refused() {
  static const Words kRotaryModels = {"lightglue", "roformer", "clvp",        "sam3",      "video_llama_3", "paddleocr_vl",
                                      "qwen2_vl",  "qwen2_5",  "qwen3_vl",    "qwen3_5",   "qwen3_omni",    "glm4v",
                                      "glm46v",    "glm_ocr",  "ernie4_5_vl", "exaone4_5", "dots"};
  static const std::vector<Refused> kRefused = {
      {"model_type", {"t5gemma2"}, "attention to its own tokens and to the context in one softmax"},
      {"model_type", {"gemma", "t5gemma"}, "norms whose weights count from one", To::normed},
      {"model_type", {"dia"}, "logits without a scale"},
      {"model_type", {"bros", "layoutlmv3", "mpnet", "speecht5"}, "logits that depend on positions", To::self},
      {"model_type", {"canine", "mra", "nystromformer", "yoso"}, kInPart, To::self},
      {"attention_type", {"block_sparse"}, kInPart, To::self},  // of BigBird
      {"model_type", kRotaryModels, kRotary, To::self},
      {"position_embedding_type", {"rotary"}, kRotary, To::self},
      {"architecture", {"eva", "dinov3", "rope", "vit_pe"}, kRotary},
      {"_class_name", {"HunyuanDiT2D"}, "rotary embeddings of its queries"},
      {"qk_norm", {"l2", "fp32_layer_norm"}, "norms of queries and keys that have no weights"},
  };
  return kRefused;
}

void refuse_by_name(const ModelConfig& config, const FoundLayer& layer) {
  const bool has_norms = layer.options.qk_norm() != NormKind::none, is_cross = layer.kind == AttentionKind::cross;
  for (const auto& [name, words, reason, to] : all_refused()) {
    if ((to == To::normed && !has_norms) || (to == To::self && is_cross)) continue;
    for (const auto& text : config.all<std::string>({name}, layer.prefix)) {
      const bool is_one = std::ranges::any_of(words, [&, &name = name](const auto& word) {
        return name == std::string_view("architecture") ? text.find(word) != std::string::npos : text.starts_with(word);
      });
      config.check()(!is_one, "its config.json says {} {}, which has {}: not computed", name, in_quotes(text), reason);
    }
  }
}

// Rotary embeddings of self-attention, by their parameters.
void refuse_rotary(const ModelConfig& config, const FoundLayer& layer) {
  if (layer.kind == AttentionKind::cross) return;
  const auto* part = config.part_of(layer.prefix);
  if (!part && has_component(layer.prefix, {"language_model"})) part = config.json().find("text_config");
  if (!part) part = &config.json();
  for (const auto* name : {"rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base"}) {
    const auto* found = part->find(name);
    const bool is_set = found && (found->object() || found->as<double>());  // null means none
    config.check()(!is_set, "its config.json has {}, for {}: not computed", name, kRotary);
  }
}

// Soft caps of logits, in the parts of the config where numbers of heads are looked up.
void refuse_soft_caps(const ModelConfig& config, const FoundLayer& layer) {
  constexpr const char* kCap = "attn_logit_softcapping";
  const auto around = layer.prefix.substr(0, layer.prefix.rfind('.', layer.prefix.size() - 2) + 1);
  const bool is_t5gemma = !layer.prefix.empty() && config.tensors().contains(around + "pre_cross_attn_layernorm.weight");
  const bool is_known = std::ranges::any_of(places_of(kCap), [&](const auto& place) { return config.json().find(place); });
  config.check()(!is_t5gemma || is_known,
                 "layer {} is T5Gemma's, whose config.json says whether logits are capped softly by {}, but there is none",
                 in_quotes(layer.prefix), in_quotes(kCap));
  std::vector<std::string> parts = {"text_config", "decoder"};
  for (const auto& name : layout_of(layer).num_heads) {
    const auto place = places_of(name).front();
    const auto end = place.rfind('/');
    parts.push_back(end == std::string::npos ? "" : place.substr(0, end));
  }
  for (const auto& part : parts) {
    const auto* found = config.json().find(part);
    if (!found || !found->object()) continue;
    for (const auto& [name, value] : *found->object()) {
      const auto has = [&name = name](const char* word) { return name.find(word) != std::string::npos; };
      const bool is_cap = has("att") && (has("softcap") || has("soft_cap") || has("logit_cap"));
      const auto cap = value.as<double>().value_or(0);
      config.check()(!is_cap || cap == 0, "its config.json caps logits softly, by {} of {}: not computed", in_quotes(name),
                     cap);
    }
  }
}

}  // namespace

void refuse_other_attention(const ModelConfig& config, const FoundLayer& layer) {
  if (layer.layout == "qformer") return;  // the config is that of the language model in the same file
  refuse_by_name(config, layer);
  refuse_rotary(config, layer);
  refuse_soft_caps(config, layer);
}

void refuse_other_positions(const ModelConfig& config, const std::string& prefix) {
  // These models add positions to the inputs or the keys of each layer.
  constexpr std::array kInEachLayer = {"detr", "table-transformer", "nezha", "maskformer", "mask2former", "oneformer"};
  for (const auto& type : config.all<std::string>({"position_embedding_type", "encoder.position_embedding_type"}, prefix)) {
    config.check()(type == "absolute",
                   "position_embedding_type in its config.json must be \"absolute\", but is {}: not computed", in_quotes(type));
  }
  for (const auto& type : config.all<std::string>({"model_type"}, prefix)) {
    const auto is_in = [&type](const char* word) { return type.find(word) != std::string::npos; };
    config.check()(std::ranges::none_of(kInEachLayer, is_in),
                   "its config.json says model_type {}, which adds positions in each layer: not computed", in_quotes(type));
  }
}

}  // namespace xattn::detail
