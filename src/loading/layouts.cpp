// SPDX-License-Identifier: Apache-2.0
#include "loading/layouts.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/printed.h"
#include "base/text.h"
#include "files/json.h"

namespace xattn::detail {
namespace {

using Names = std::vector<std::string>;

LinearNames linear(const std::string& name) {
  return {name + ".weight", name + ".bias"};
}

LinearNames without_bias(const std::string& name) {
  return {name + ".weight", ""};
}

std::array<LinearNames, 4> linears(const std::string& q, const std::string& k, const std::string& v, const std::string& out) {
  return {linear(q), linear(k), linear(v), linear(out)};
}

// One of the equal parts that a weight and its bias pack.
LinearNames part(const std::string& name, int part, int parts) {
  return {name + ".weight", name + ".bias", part, parts, parts};
}

// Query, then key and value in one weight, each of which may have a bias.
std::array<LinearNames, 4> key_value(const std::string& q, const std::string& kv, const std::string& out) {
  return {linear(q), part(kv, 0, 2), part(kv, 1, 2), linear(out)};
}

// Query, key and value in one weight.
std::array<LinearNames, 4> query_key_value(const std::string& qkv, const std::string& out) {
  return {part(qkv, 0, 3), part(qkv, 1, 3), part(qkv, 2, 3), linear(out)};
}

std::vector<Layout> make_layouts() {
  const Names heads = {"decoder_attention_heads", "num_attention_heads", "num_heads", "n_head",
                       "mask_decoder_config.num_attention_heads"};
  constexpr auto kMemory = "of SAM 2's memory, whose queries and keys have rotary embeddings";
  const Names norm_behind = {"output.LayerNorm.weight", "output.LayerNorm.bias", "output.LayerNorm.gamma",
                             "output.LayerNorm.beta"};
  // Perceiver resamplers of Flamingo and IP-Adapter Plus, which attend to their latents, too, in the same softmax.
  const Names resampler = {"norm_media.weight", "norm1.weight"};
  // Wan's image-to-video models; up to three IP-Adapters at once.
  const std::vector<AddedNames> added_in_diffusers = {{"add_k_proj", "add_v_proj", "norm_added_k"},
                                                      {"processor.to_k_ip.0", "processor.to_v_ip.0"},
                                                      {"processor.to_k_ip.1", "processor.to_v_ip.1"},
                                                      {"processor.to_k_ip.2", "processor.to_v_ip.2"}};
  return {
      {.name = std::string(kReference),
       .used_by = "this project, and the PyTorch reference that it mirrors",
       .projections = linears("query_linear", "key_linear", "value_linear", "output_linear"),
       .qk_norm = {"query_norm", "key_norm"},
       .bias_kv = {"bias_k", "bias_v"},
       .num_heads = heads},
      {.name = "torch",
       .used_by = "torch.nn.MultiheadAttention, nn.TransformerDecoderLayer, the original DETR, SigLIP's head, OpenCLIP",
       .projections = {LinearNames{"in_proj_weight", "in_proj_bias", 0, 3, 3},
                       {"in_proj_weight", "in_proj_bias", 1, 3, 3},
                       {"in_proj_weight", "in_proj_bias", 2, 3, 3},
                       linear("out_proj")},
       .bias_kv = {"bias_k", "bias_v"},
       .num_heads = {"vision_config.num_attention_heads", "num_attention_heads", "num_heads"}},
      {.name = "torch_separate",
       .used_by = "torch.nn.MultiheadAttention with kdim and vdim",
       .projections = {LinearNames{"q_proj_weight", "in_proj_bias", 0, 1, 3},
                       {"k_proj_weight", "in_proj_bias", 1, 1, 3},
                       {"v_proj_weight", "in_proj_bias", 2, 1, 3},
                       linear("out_proj")},
       .bias_kv = {"bias_k", "bias_v"},
       .num_heads = heads},
      {.name = "out_proj",
       .used_by = "BART, mBART, M2M-100, Marian, Pegasus, fairseq, Whisper, DETR (Hugging Face), MusicGen, SAM",
       .projections = linears("q_proj", "k_proj", "v_proj", "out_proj"),
       .other_in = {"memory_attention"},
       .other = kMemory,
       .num_heads = heads},
      {.name = "o_proj",
       .used_by = "Mllama, Moonshine, DETR (newer Hugging Face), LightGlue (Hugging Face)",
       .projections = linears("q_proj", "k_proj", "v_proj", "o_proj"),
       .qk_norm = {"q_norm", "k_norm", 1e-5, {"rms_norm_eps"}},
       .other_in = {"memory_attention"},
       .other = kMemory,
       .num_heads = {"decoder_num_attention_heads", "decoder_attention_heads", "num_attention_heads", "attention_heads"},
       .scale_root_in_config = "query_pre_attn_scalar"},
      {.name = "idefics",
       .used_by = "Idefics with norms of queries and keys",
       .projections = linears("q_proj", "k_proj", "v_proj", "o_proj"),
       .qk_norm = {"q_layer_norm", "k_layer_norm", 1e-6, {"rms_norm_eps"}},
       .num_heads = {"num_attention_heads"}},
      {.name = "bert",
       .used_by = "BERT, BLIP's text model, ALBEF",
       .projections = linears("self.query", "self.key", "self.value", "output.dense"),
       .beside = norm_behind,
       .num_heads = {"num_attention_heads"}},
      {.name = "albert",
       .used_by = "ALBERT",
       .projections = linears("query", "key", "value", "dense"),
       .beside_here = {"LayerNorm."},
       .num_heads = {"num_attention_heads"}},
      {.name = "qformer",
       .used_by = "Q-Former of BLIP-2 and InstructBLIP",
       .projections = linears("attention.query", "attention.key", "attention.value", "output.dense"),
       .beside = norm_behind,
       .num_heads = {"qformer_config.num_attention_heads", ".num_attention_heads"}},
      {.name = "perceiver",
       .used_by = "Perceiver (Hugging Face)",
       .projections = linears("self.query", "self.key", "self.value", "output.dense"),
       .input_norms = {"self.layernorm1", "self.layernorm2"},
       .num_heads = {"num_cross_attention_heads"},
       .num_heads_unknown = "decod"},  // the numbers of heads of decoders are not in the config
      {.name = "perceiver_lucidrains",
       .used_by = "perceiver-pytorch",
       .projections = key_value("fn.to_q", "fn.to_kv", "fn.to_out"),
       .input_norms = {"norm", "norm_context"}},
      {.name = "t5",
       .used_by = "T5, mT5, UMT5, Flan-T5",
       .projections = {without_bias("q"), without_bias("k"), without_bias("v"), without_bias("o")},
       .scale = 1.0,
       .beside_cross = {"relative_attention_bias.weight"},  // which T5 saves in its first block and never reads
       .bias_of_first = "relative_attention_bias.weight",
       .num_heads = {"num_heads"}},
      {.name = "wan",
       .used_by = "Wan's original files",
       .projections = linears("q", "k", "v", "o"),
       .qk_norm = {"norm_q", "norm_k", 1e-6, {"eps"}},
       .added = {{"k_img", "v_img", "norm_k_img"}},
       .num_heads = {"num_heads", "num_attention_heads"}},
      {.name = "whisper",
       .used_by = "Whisper (OpenAI)",
       .projections = linears("query", "key", "value", "out"),
       .num_heads = {"n_text_head"}},
      {.name = "gpt2",
       .used_by = "GPT-2 with cross-attention",
       .projections = key_value("q_attn", "c_attn", "c_proj"),
       .transposed = true,
       .beside = {"masked_bias"},
       .causal_mask = "bias",
       .num_heads = {"n_head"},
       .scaled_in_config = "scale_attn_weights",
       .by_layer_in_config = "scale_attn_by_inverse_layer_idx"},
      {.name = "flamingo",
       .used_by = "Flamingo (flamingo-pytorch, OpenFlamingo)",
       .projections = key_value("to_q", "to_kv", "to_out"),
       .input_norms = {"norm", ""}},
      {.name = "wan_diffusers",
       .used_by = "Wan in diffusers",
       .prefix_has = {"blocks", "vace_blocks"},
       .projections = linears("to_q", "to_k", "to_v", "to_out.0"),
       .qk_norm = {"norm_q", "norm_k", 1e-6, {"eps"}},
       .layer_norms_are = "those of HunyuanDiT, whose queries have rotary embeddings, which are not computed",
       .added = added_in_diffusers,
       .num_heads = {"num_attention_heads"}},
      {.name = "diffusers",
       .used_by = "Stable Diffusion in diffusers and in single files (LDM), SDXL, PixArt, Sana, LTX",
       .projections = linears("to_q", "to_k", "to_v", "to_out.0"),
       .qk_norm = {"norm_q", "norm_k", 1e-5, {"eps"}, {"transformer_blocks", "layers"}},
       .other_in = {"audio_to_video_attn", "video_to_audio_attn"},
       .other = "of LTX-2 between video and audio, whose queries and keys have rotary embeddings",
       .added = added_in_diffusers,
       .num_heads = {"num_cross_attention_heads", "num_attention_heads", "attention_head_dim"}},
      {.name = "blip_vision",
       .used_by = "BLIP's vision model (Hugging Face)",
       .projections = query_key_value("qkv", "projection"),
       .num_heads = {"vision_config.num_attention_heads", ".num_attention_heads"}},
      {.name = "timm",
       .used_by = "timm's ViT, DeiT and class attention's relatives, MAE, DINO; CLIP's attention pool in timm",
       .projections = query_key_value("qkv", "proj"),
       .qk_norm = {"q_norm", "k_norm"},
       .num_heads = {"model_args.num_heads", "num_heads"}},
      {.name = "timm_separate",
       .used_by = "timm's class attention (CaiT); CLIP's attention pool in timm",
       .projections = linears("q", "k", "v", "proj"),
       .num_heads = {"model_args.num_heads", "num_heads"}},
      {.name = "timm_key_value",
       .used_by = "PVT, SegFormer's original files, without reduction of keys",
       .projections = key_value("q", "kv", "proj")},
      {.name = "timm_pool",
       .used_by = "timm's attention pool, whose query is the tensor latent",
       .has = {"latent"},
       .projections = key_value("q", "kv", "proj"),
       .qk_norm = {"q_norm", "k_norm"},
       .beside_here = {"latent", "norm.", "mlp."}},
      {.name = "clip_pool",
       .used_by = "the attention pool of CLIP's ResNets (OpenAI, OpenCLIP)",
       .projections = linears("q_proj", "k_proj", "v_proj", "c_proj")},
      {.name = "pixart",
       .used_by = "the original files of PixArt, Sana and Open-Sora",
       .projections = key_value("q_linear", "kv_linear", "proj")},
      {.name = "pix2struct",
       .used_by = "Pix2Struct's decoder (Hugging Face)",
       .prefix_has = {"encoder_decoder_attention"},  // others with these names may have another scale
       .projections = {without_bias("query"), without_bias("key"), without_bias("value"), without_bias("output")},
       .scale = 1.0,
       .num_heads = {"text_config.num_heads", "num_heads"}},
      {.name = "lightglue",
       .used_by = "LightGlue, LighterGlue",
       .projections = linears("to_qk", "to_qk", "to_v", "to_out"),
       .beside_here = {"ffn."}},
      {.name = "bidirectional",
       .used_by = "bidirectional-cross-attention, the direction from its context",
       .projections = linears("to_qk", "context_to_qk", "context_to_v", "to_out"),
       .beside_here = {"to_v.", "context_to_out."}},
      {.name = "bidirectional_context",
       .used_by = "bidirectional-cross-attention, the direction to its context; only if it is asked for by name",
       .projections = linears("context_to_qk", "to_qk", "to_v", "context_to_out"),
       .beside_here = {"context_to_v.", "to_out."}},
      {.name = "to_kv",
       .used_by = "layers of lucidrains without norms of their own",
       .lacks = resampler,
       .projections = key_value("to_q", "to_kv", "to_out")},
      {.name = "to_kv_sequential",
       .used_by = "the same with a dropout behind the output",
       .lacks = resampler,
       .projections = key_value("to_q", "to_kv", "to_out.0")},
      {.name = "fc",
       .used_by = "meshed-memory Transformer, and tutorials",
       .projections = linears("fc_q", "fc_k", "fc_v", "fc_o"),
       .other_in = {"mab", "mab0", "mab1"},
       .other = "of the Set Transformer, which adds projected queries to the heads and has another scale"},
      {.name = "espnet",
       .used_by = "ESPnet, WeNet, NeMo, without relative positions",
       .projections = linears("linear_q", "linear_k", "linear_v", "linear_out")},
      {.name = "xlm",
       .used_by = "XLM, FlauBERT, DistilBERT",
       .projections = linears("q_lin", "k_lin", "v_lin", "out_lin"),
       .num_heads = {"n_heads"}},
      {.name = "annotated",
       .used_by = "The Annotated Transformer",
       .projections = linears("linears.0", "linears.1", "linears.2", "linears.3")},
      {.name = "linear",
       .used_by = "tutorials with q_linear and out",
       .projections = linears("q_linear", "k_linear", "v_linear", "out")},
      {.name = "w", .used_by = "tutorials with w_q and w_o", .projections = linears("w_q", "w_k", "w_v", "w_o")},
      {.name = "d2l", .used_by = "Dive into Deep Learning", .projections = linears("W_q", "W_k", "W_v", "W_o")},
      {.name = "flash_attn", .used_by = "flash-attn's cross-attention", .projections = key_value("Wq", "Wkv", "out_proj")},
      {.name = "x_transformers", .used_by = "x-transformers", .projections = linears("to_q", "to_k", "to_v", "to_out")},
      {.name = "mlx",
       .used_by = "MLX",
       .projections = linears("query_proj", "key_proj", "value_proj", "out_proj"),
       .num_heads = heads},
  };
}

}  // namespace

const std::vector<Layout>& layer_layouts() {
  static const auto layouts = make_layouts();
  return layouts;
}

const Layout& layout_named(std::string_view name) {
  return row_named(layer_layouts(), name);
}

const Layout& layout_of(const FoundLayer& layer) {
  return layer.own_layout ? *layer.own_layout : layout_named(layer.layout);
}

bool has_component(const std::string& prefix, const std::vector<std::string>& words) {
  const auto components = "." + prefix;
  return std::ranges::any_of(words, [&](const auto& word) { return components.find("." + word + ".") != std::string::npos; });
}

std::optional<int64_t> number_of(const std::string& component) {
  const auto number = json_number<int64_t>(component);
  return number && *number >= 0 ? number : std::nullopt;
}

std::vector<ParameterName> parameter_names(const Layout& layout) {
  constexpr std::array kProjections = {"query_linear", "key_linear", "value_linear", "output_linear"};
  std::vector<ParameterName> names;
  const auto add = [&](const std::string& parameter, const std::string& name, int part, int parts, bool transposed) {
    if (!name.empty()) names.push_back({parameter, name, parts == 1 ? 0 : part, parts, transposed});
  };
  for (size_t i = 0; i < kProjections.size(); ++i) {
    const auto& [weight, bias, part, parts, bias_parts] = layout.projections.at(i);
    add(formatted("{}.weight", kProjections.at(i)), weight, part, parts, layout.transposed);
    add(formatted("{}.bias", kProjections.at(i)), bias, part, bias_parts, false);
  }
  add("bias_k", layout.bias_kv[0], 0, 1, false);
  add("bias_v", layout.bias_kv[1], 0, 1, false);
  if (layout.qk_norm.query.empty()) return names;
  for (const std::string ending : {".weight", ".bias"}) {
    add("query_norm" + ending, layout.qk_norm.query + ending, 0, 1, false);
    add("key_norm" + ending, layout.qk_norm.key + ending, 0, 1, false);
  }
  return names;
}

}  // namespace xattn::detail

namespace xattn {

LayoutChoice::LayoutChoice(Layout own) : name_(own.name) {
  const auto check = [&](bool ok, const std::string& expectation) {
    detail::check_value(ok, "layouts", "layout {} must have {}, but has not.", detail::in_quotes(own.name), expectation);
  };
  check(!own.name.empty(), "a name");
  for (const auto& [weight, bias, part, parts, bias_parts] : own.projections) {
    check(!weight.empty(), "the names of four weights");
    check(part >= 0 && part < parts, detail::formatted("a part of {} from 0 to {}", weight, parts - 1));
    check(bias_parts == 1 || part < bias_parts, detail::formatted("a part of {} from 0 to {}", bias, bias_parts - 1));
  }
  own_ = std::make_shared<const Layout>(std::move(own));
}

}  // namespace xattn
