// SPDX-License-Identifier: Apache-2.0
#include "loading/refusals.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <string>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "loading/layouts.h"

namespace xattn::detail {
namespace {

// The layers that a row applies to; none but the first two apply to cross-attention.
enum class To { all, normed, self, encoder };

using Words = std::vector<std::string_view>;

struct Refused {
  const char* name;  // in the config
  Words words;       // with which its text begins, a type of model as whole words; an architecture of timm contains it
  std::string_view reason;
  To to = To::all;
};

constexpr std::string_view kRotary = "rotary embeddings of its queries and keys";
constexpr std::string_view kInPart = "attention that is not to all keys";
constexpr std::string_view kPositions = "logits that depend on positions";
constexpr std::string_view kNoWeights = "norms of queries and keys that have no weights";

const std::vector<Refused>& all_refused() {
  static const Words kRotaryModels = {"lightglue", "roformer", "clvp",        "sam3",      "video_llama_3", "paddleocr_vl",
                                      "qwen2_vl",  "qwen2_5",  "qwen3_vl",    "qwen3_5",   "qwen3_omni",    "glm4v",
                                      "glm46v",    "glm_ocr",  "ernie4_5_vl", "exaone4_5", "dots"};
  static const Words kRotaryClasses = {"Allegro", "ChronoEdit", "Cosmos",      "LTX", "Lumina2",
                                       "OmniGen", "SkyReelsV2", "StableAudio", "Wan", "ZImage"};
  static const std::vector<Refused> kRefused = {
      {"model_type", {"t5gemma2"}, "attention to its own tokens and to the context in one softmax"},
      {"model_type", {"gemma", "t5gemma"}, "norms whose weights count from one", To::normed},
      {"model_type", {"dia", "gpt_neo"}, "logits without a scale"},
      {"model_type", {"autoformer"}, "autocorrelation in place of attention"},
      {"model_type", {"bros", "layoutlmv3", "mpnet", "nezha"}, kPositions, To::self},
      {"model_type", {"speecht5"}, kPositions, To::encoder},
      {"position_embedding_type", {"alibi", "relative_key"}, kPositions, To::self},
      {"model_type", {"canine", "hiera", "mra", "nystromformer", "yoso"}, kInPart, To::self},
      {"model_type", {"pegasus_x"}, kInPart, To::encoder},
      {"attention_type", {"block_sparse"}, kInPart, To::encoder},  // of BigBird
      {"attention_type", {"prob"}, kInPart, To::self},             // of Informer
      {"model_type", kRotaryModels, kRotary, To::self},
      {"position_embedding_type", {"rotary"}, kRotary, To::self},
      {"position_embeddings_type", {"rotary"}, kRotary, To::self},  // of Wav2Vec2-Conformer
      {"architecture", {"eva", "dinov3", "rope", "vit_pe"}, kRotary},
      {"architecture", {"hiera"}, kInPart},
      {"_class_name", {"HunyuanDiT2D", "LuminaNextDiT2D"}, "rotary embeddings of its queries"},
      {"_class_name", kRotaryClasses, kRotary, To::self},
      {"_class_name", {"CogVideoX", "ConsisID"}, "joint attention to text and video", To::self},
      {"_class_name", {"Sana"}, "linear attention", To::self},
      {"_class_name", {"AuraFlow", "CogView"}, kNoWeights},
      {"qk_norm", {"l2", "fp32_layer_norm"}, kNoWeights},
  };
  return kRefused;
}

bool applies(To to, const FoundLayer& layer) {
  if (to == To::all) return true;
  if (to == To::normed) return layer.options.qk_norm() != NormKind::none;
  return layer.kind != AttentionKind::cross && !(to == To::encoder && has_component(layer.prefix, {"decoder"}));
}

// Whether a text of the config is meant by a word of the table: "gemma3_text" by "gemma", but "gpt_neox" not by "gpt_neo".
bool is_meant(std::string_view name, std::string_view text, std::string_view word) {
  if (name == "architecture") return text.find(word) != std::string_view::npos;
  if (!text.starts_with(word)) return false;
  return name != "model_type" || text.size() == word.size() || std::isalpha(static_cast<unsigned char>(text[word.size()])) == 0;
}

void refuse_by_name(const ModelConfig& config, const FoundLayer& layer) {
  for (const auto& [name, words, reason, to] : all_refused()) {
    if (!applies(to, layer)) continue;
    for (const auto& text : config.all<std::string>({name}, layer.prefix)) {
      const bool is_one = std::ranges::any_of(words, [&, &key = name](auto word) { return is_meant(key, text, word); });
      config.check()(!is_one, "its config.json says {} {}, which has {}: not computed", name, in_quotes(text), reason);
    }
  }
}

// Rotary embeddings of self-attention, by their parameters, or by the type of this part of the model: the configs of some models
// leave out parameters that have their defaults.
void refuse_rotary(const ModelConfig& config, const FoundLayer& layer) {
  static const Words kTypes = {"llama",     "llama4_text", "mistral",   "ministral",   "mixtral",      "mllama_text_model",
                               "idefics",   "gemma",       "gemma2",    "gemma3_text", "gemma3n_text", "qwen2",
                               "qwen2_moe", "qwen3",       "qwen3_moe", "phi",         "phi3",         "phimoe",
                               "cohere",    "cohere2",     "persimmon", "stablelm",    "olmo",         "olmo2",
                               "granite",   "smollm3",     "starcoder2"};
  if (layer.kind == AttentionKind::cross) return;
  const auto* part = config.part_of(layer.prefix);
  if (!part && has_component(layer.prefix, {"language_model"})) part = config.json().find("text_config");
  if (!part) part = &config.json();
  for (const auto* name : {"rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base"}) {
    const auto* found = part->find(name);
    const bool is_set = found && (found->object() || found->as<double>());  // null means none
    config.check()(!is_set, "its config.json has {}, for {}: not computed", name, kRotary);
  }
  const auto* found = part->find("model_type");
  const std::string type = found ? found->as<std::string>().value_or("") : "";
  config.check()(std::ranges::count(kTypes, std::string_view(type)) == 0,
                 "its config.json says model_type {}, which has {}: not computed", in_quotes(type), kRotary);
}

// Soft caps of logits: at the top of the config, and in the part that the prefix names, or else in all parts where values of this
// layer are looked up.
void refuse_soft_caps(const ModelConfig& config, const FoundLayer& layer) {
  constexpr const char* kCap = "attn_logit_softcapping";
  const auto around = layer.prefix.substr(0, layer.prefix.rfind('.', layer.prefix.size() - 2) + 1);
  const bool is_t5gemma = !layer.prefix.empty() && config.tensors().contains(around + "pre_cross_attn_layernorm.weight");
  const bool is_known = std::ranges::any_of(places_of(kCap), [&](const auto& place) { return config.json().find(place); });
  config.check()(!is_t5gemma || is_known,
                 "layer {} is T5Gemma's, whose config.json says whether logits are capped softly by {}, but there is none",
                 in_quotes(layer.prefix), in_quotes(kCap));
  std::vector<const Json*> parts = {&config.json()};
  if (const auto* part = config.part_of(layer.prefix)) {
    parts.push_back(part);
  } else {
    for (const auto* name : {"text_config", "decoder"}) parts.push_back(config.json().find(name));
    for (const auto& name : layout_of(layer).num_heads) {
      const auto place = places_of(name).front();
      parts.push_back(config.json().find(place.substr(0, place.find('/'))));
    }
  }
  for (const auto* part : parts) {
    if (!part || !part->object()) continue;
    for (const auto& [name, value] : *part->object()) {
      const auto has = [&key = name](const char* word) { return key.find(word) != std::string::npos; };
      const bool is_cap = has("att") && (has("softcap") || has("soft_cap") || has("logit_cap"));
      const auto cap = value.as<double>().value_or(0);
      config.check()(!is_cap || cap == 0, "its config.json caps logits softly, by {} of {}: not computed", in_quotes(name),
                     cap);
    }
  }
}

}  // namespace

void refuse_other_attention(const ModelConfig& config, const FoundLayer& layer) {
  // The config is that of the language model in the same file. ViT has the names of a Q-Former.
  const auto has = [&](const char* word) { return layer.prefix.find(word) != std::string::npos; };
  if (layer.layout == "qformer" && (has("qformer") || has("Qformer") || config.json().find("qformer_config"))) return;
  refuse_by_name(config, layer);
  refuse_rotary(config, layer);
  refuse_soft_caps(config, layer);
}

void refuse_other_stack(const ModelConfig& config, const std::string& prefix) {
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
  for (const auto& architecture : config.all<std::string>({"architecture"}, prefix)) {
    config.check()(architecture.find("_rpn") == std::string::npos,
                   "its config.json says architecture {}, which has its norms behind its branches: not computed",
                   in_quotes(architecture));
  }
}

}  // namespace xattn::detail
