// SPDX-License-Identifier: Apache-2.0
#include "loading/block_layouts.h"

#include "loading/layouts.h"

namespace xattn::detail {
namespace {

// The self-attention of an encoder's layer, with the feed-forward branch, in the same family.
BlockLayout encoder_of(BlockLayout layout, const std::string& name, const std::string& attention, const std::string& norm) {
  layout.name = name;
  layout.attention = attention;
  layout.norms.attention = norm;
  layout.beside = {};
  layout.is_self = true;
  return layout;
}

// The self-attention of a decoder's layer, whose feed-forward branch is in the block of its cross-attention.
BlockLayout decoder_of(BlockLayout encoder, const std::string& name) {
  encoder.name = name;
  encoder.norms.feed_forward = "";
  encoder.feed_forward = {};
  encoder.num_heads = {};
  return encoder;
}

// Places in config.json of composed models, in the order in which they are looked up for an encoder.
std::vector<std::string> of_vision(const std::string& name) {
  return {"vision_config." + name, "encoder." + name, "." + name};
}

std::vector<BlockLayout> make_block_layouts() {
  constexpr auto kBefore = NormPlacement::before, kAfter = NormPlacement::after;
  const BlockLayout t5 = {.name = "t5",
                          .attention = "layer.1.EncDecAttention.",
                          .norms = {"layer.1.layer_norm", "layer.2.layer_norm", NormKind::rms, 1e-6, {"layer_norm_epsilon"}},
                          .feed_forward = {"layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"},
                          .beside = {"layer.0."},
                          .norm_placement = kBefore,
                          .activation = Activation::relu,
                          .activation_in_config = {"dense_act_fn", "feed_forward_proj"}};
  auto t5_gated = t5;
  t5_gated.name = "t5_gated";  // T5 v1.1, Flan-T5, mT5, UMT5
  t5_gated.feed_forward = {"layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wo", "layer.2.DenseReluDense.wi_1"};
  t5_gated.activation = Activation::gelu_tanh;
  const BlockLayout mllama = {.name = "mllama",
                              .attention = "cross_attn.",
                              .norms = {"input_layernorm", "post_attention_layernorm", NormKind::rms, 1e-5, {"rms_norm_eps"}},
                              .feed_forward = {"mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"},
                              .gates = {"cross_attn_attn_gate", "cross_attn_mlp_gate"},
                              .norm_placement = kBefore,
                              .activation = Activation::silu,
                              .activation_in_config = {"hidden_act", "hidden_activation"}};
  auto idefics = mllama;
  idefics.name = "idefics";
  idefics.norms.eps = 1e-6;
  idefics.gates = {"alpha_cross_attn", "alpha_dense"};
  idefics.activation_in_config = {"hidden_act"};
  const BlockLayout fc1_fc2 = {
      .name = "fc1_fc2",  // BART, Marian (norms after); mBART, M2M-100, Pegasus, Whisper, MusicGen (before)
      .attention = "encoder_attn.",
      .norms = {"encoder_attn_layer_norm", "final_layer_norm"},
      .feed_forward = {"fc1", "fc2"},
      .beside = {"self_attn.", "self_attn_layer_norm."},
      .models_before = {"mbart", "m2m_100", "pegasus", "whisper", "musicgen", "musicgen_decoder"},
      .models_after = {"bart", "marian"},
      .activation_in_config = {"activation_function"}};
  const BlockLayout torch = {.name = "torch",  // torch.nn.TransformerDecoderLayer
                             .attention = "multihead_attn.",
                             .norms = {"norm2", "norm3"},
                             .feed_forward = {"linear1", "linear2"},
                             .beside = {"self_attn.", "norm1."}};
  const BlockLayout bert = {
      .name = "bert",  // BERT, BLIP's text model, ALBEF
      .attention = "crossattention.",
      .norms = {"crossattention.output.LayerNorm", "output.LayerNorm", NormKind::layer, 1e-12, {"layer_norm_eps"}},
      .feed_forward = {"intermediate.dense", "output.dense"},
      .beside = {"attention."},
      .norm_placement = kAfter,
      .activation = Activation::gelu,
      .activation_in_config = {"hidden_act"}};
  const BlockLayout whisper = {.name = "whisper",  // Whisper (OpenAI)
                               .attention = "cross_attn.",
                               .norms = {"cross_attn_ln", "mlp_ln"},
                               .feed_forward = {"mlp.0", "mlp.2"},
                               .beside = {"attn.", "attn_ln."},
                               .norm_placement = kBefore,
                               .activation = Activation::gelu};
  auto whisper_mlx = whisper;
  whisper_mlx.name = "whisper_mlx";
  whisper_mlx.feed_forward = {"mlp1", "mlp2"};

  auto fc1_fc2_encoder = encoder_of(fc1_fc2, "fc1_fc2_encoder", "self_attn.", "self_attn_layer_norm");
  fc1_fc2_encoder.num_heads = {"encoder_attention_heads", "num_attention_heads", "num_heads"};
  auto torch_encoder = encoder_of(torch, "torch_encoder", "self_attn.", "norm1");
  torch_encoder.norms.feed_forward = "norm2";
  auto bert_encoder = encoder_of(bert, "bert_encoder", "attention.", "attention.output.LayerNorm");
  bert_encoder.norms.eps_in_config = {"encoder.layer_norm_eps", "layer_norm_eps"};
  bert_encoder.activation_in_config = {"encoder.hidden_act", "hidden_act"};
  bert_encoder.num_heads = {"encoder.num_attention_heads", "num_attention_heads"};
  auto bert_decoder = decoder_of(encoder_of(bert, "", bert_encoder.attention, bert_encoder.norms.attention), "bert_decoder");
  auto t5_encoder = encoder_of(t5, "t5_encoder", "layer.0.SelfAttention.", "layer.0.layer_norm");
  t5_encoder.norms.feed_forward = "layer.1.layer_norm";
  t5_encoder.feed_forward = {"layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"};
  auto t5_gated_encoder = t5_encoder;
  t5_gated_encoder.name = "t5_gated_encoder";
  t5_gated_encoder.feed_forward = {"layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wo", "layer.1.DenseReluDense.wi_1"};
  t5_gated_encoder.activation = t5_gated.activation;
  auto whisper_encoder = encoder_of(whisper, "whisper_encoder", "attn.", "attn_ln");
  whisper_encoder.num_heads = {"n_audio_head"};
  auto whisper_mlx_encoder = whisper_encoder;
  whisper_mlx_encoder.name = "whisper_mlx_encoder";
  whisper_mlx_encoder.feed_forward = whisper_mlx.feed_forward;
  return {
      fc1_fc2,
      torch,
      {.name = "moonshine",  // Moonshine
       .attention = "encoder_attn.",
       .norms = {"post_attention_layernorm", "final_layernorm"},
       .feed_forward = {"mlp.fc1", "mlp.fc2", "mlp.fc1"},
       .beside = {"self_attn.", "input_layernorm."},
       .norm_placement = kBefore,
       .activation = Activation::silu,
       .activation_in_config = {"decoder_hidden_act"}},
      {.name = "qformer",  // Q-Former of BLIP-2 and InstructBLIP, its part for queries
       .attention = "crossattention.",
       .norms = {"crossattention.output.LayerNorm",
                 "output_query.LayerNorm",
                 NormKind::layer,
                 1e-12,
                 {"qformer_config.layer_norm_eps", ".layer_norm_eps"}},
       .feed_forward = {"intermediate_query.dense", "output_query.dense"},
       .beside = {"attention.", "intermediate.", "output."},
       .norm_placement = kAfter,
       .activation = Activation::gelu,
       .activation_in_config = {"qformer_config.hidden_act", ".hidden_act"}},
      bert,
      t5,
      t5_gated,
      whisper,
      whisper_mlx,
      {.name = "pix2struct",  // Pix2Struct's decoder
       .attention = "encoder_decoder_attention.attention.",
       .norms = {"encoder_decoder_attention.layer_norm",
                 "mlp.layer_norm",
                 NormKind::rms,
                 1e-6,
                 {"text_config.layer_norm_epsilon", "layer_norm_epsilon"}},
       .feed_forward = {"mlp.DenseReluDense.wi_0", "mlp.DenseReluDense.wo", "mlp.DenseReluDense.wi_1"},
       .beside = {"self_attention."},
       .norm_placement = kBefore,
       .activation = Activation::gelu_tanh,
       .activation_in_config = {"text_config.dense_act_fn", "dense_act_fn"}},
      {.name = "gpt2",  // GPT-2 with cross-attention
       .attention = "crossattention.",
       .norms = {"ln_cross_attn", "ln_2", NormKind::layer, 1e-5, {"layer_norm_epsilon"}},
       .feed_forward = {.in = "mlp.c_fc", .out = "mlp.c_proj", .transposed = true},
       .beside = {"attn.", "ln_1."},
       .norm_placement = kBefore,
       .activation = Activation::gelu_tanh,
       .activation_in_config = {"activation_function"}},
      mllama,
      idefics,
      {.name = "flamingo",  // Flamingo (flamingo-pytorch, OpenFlamingo)
       .attention = "attn.",
       .norms = {"attn.norm", "ff.0"},
       .feed_forward = {"ff.1", "ff.3"},
       .gates = {"attn_gate", "ff_gate"},
       .norm_placement = kBefore,
       .activation = Activation::gelu},
      fc1_fc2_encoder,
      decoder_of(fc1_fc2_encoder, "fc1_fc2_decoder"),
      torch_encoder,
      decoder_of(torch_encoder, "torch_decoder"),
      bert_encoder,
      bert_decoder,
      t5_encoder,
      t5_gated_encoder,
      decoder_of(t5_encoder, "t5_decoder"),
      whisper_encoder,
      whisper_mlx_encoder,
      decoder_of(whisper_encoder, "whisper_decoder"),
      {.name = "vit",  // ViT, DeiT, AST
       .attention = "attention.",
       .norms = {"layernorm_before", "layernorm_after", NormKind::layer, 1e-12, of_vision("layer_norm_eps")},
       .feed_forward = {"intermediate.dense", "output.dense"},
       .norm_placement = kBefore,
       .activation = Activation::gelu,
       .activation_in_config = of_vision("hidden_act"),
       .is_self = true,
       .num_heads = of_vision("num_attention_heads")},
      {.name = "blip_vision",  // BLIP's vision model
       .attention = "self_attn.",
       .norms = {"layer_norm1", "layer_norm2", NormKind::layer, 1e-5, of_vision("layer_norm_eps")},
       .feed_forward = {"mlp.fc1", "mlp.fc2"},
       .norm_placement = kBefore,
       .activation_in_config = of_vision("hidden_act"),
       .is_self = true,
       .num_heads = of_vision("num_attention_heads")},
      {.name = "timm",  // ViT, DeiT, MAE and DINO in timm and in their own files
       .attention = "attn.",
       .norms = {"norm1", "norm2", NormKind::layer, 1e-6},
       .feed_forward = {"mlp.fc1", "mlp.fc2"},
       .norm_placement = kBefore,
       .is_self = true},
  };
}

}  // namespace

const std::vector<BlockLayout>& block_layouts() {
  static const auto layouts = make_block_layouts();
  return layouts;
}

const BlockLayout& block_layout_named(std::string_view name) {
  return row_named(block_layouts(), name);
}

}  // namespace xattn::detail
