// SPDX-License-Identifier: Apache-2.0
#include "loading/stack_layouts.h"

#include "loading/layouts.h"

namespace xattn::detail {

const std::vector<StackLayout>& stack_layouts() {
  static const std::vector<StackLayout> layouts = {
      {.name = "fc1_fc2",  // BART, Marian (no norm); mBART, M2M-100, Pegasus, Whisper
       .layers = "layers.",
       .encoder = {"fc1_fc2_encoder"},
       .decoder = "fc1_fc2_decoder",
       .cross = {"fc1_fc2"},
       .norm = "layer_norm",
       .beside = {"embed_tokens.", "embed_positions.", "layernorm_embedding.", "conv1.", "conv2."}},
      {.name = "torch",  // torch.nn.TransformerEncoder, torch.nn.TransformerDecoder
       .layers = "layers.",
       .encoder = {"torch_encoder"},
       .decoder = "torch_decoder",
       .cross = {"torch"},
       .norm = "norm"},
      {.name = "bert",  // BERT, RoBERTa, BLIP's text model
       .layers = "layer.",
       .encoder = {"bert_encoder"},
       .decoder = "bert_decoder",
       .cross = {"bert"}},
      {.name = "t5",  // T5, Flan-T5, mT5
       .layers = "block.",
       .encoder = {"t5_encoder", "t5_gated_encoder"},
       .decoder = "t5_decoder",
       .cross = {"t5", "t5_gated"},
       .norm = "final_layer_norm",
       .has_norm = true,
       .relative_position_bias = "layer.0.SelfAttention.relative_attention_bias.weight",
       .beside = {"embed_tokens."}},
      {.name = "whisper",  // Whisper (OpenAI, MLX)
       .layers = "blocks.",
       .encoder = {"whisper_encoder", "whisper_mlx_encoder"},
       .decoder = "whisper_decoder",
       .cross = {"whisper", "whisper_mlx"},
       .norm = "ln_post",
       .decoder_norm = "ln",
       .has_norm = true,
       .beside = {"conv1.", "conv2.", "token_embedding.", "positional_embedding"}},
      {.name = "vit",  // ViT, DeiT
       .layers = "encoder.layer.",
       .encoder = {"vit"},
       .norm = "layernorm",
       .has_norm = true,
       .beside = {"embeddings.", "pooler."}},
      {.name = "timm",  // ViT, DeiT, MAE, DINO; norms in front of the layers have another eps, and are not explained
       .layers = "blocks.",
       .encoder = {"timm"},
       .norm = "norm",
       .beside = {"patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token", "mask_token", "attn_pool.", "fc_norm.",
                  "head.", "head_dist."}},
      {.name = "blip_vision",  // BLIP's vision model
       .layers = "encoder.layers.",
       .encoder = {"blip_vision"},
       .norm = "post_layernorm",
       .has_norm = true,
       .beside = {"embeddings."}},
  };
  return layouts;
}

const StackLayout& stack_layout_named(std::string_view name) {
  return row_named(stack_layouts(), name);
}

}  // namespace xattn::detail
