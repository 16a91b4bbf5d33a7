// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/export.h>

#include <map>
#include <string>

namespace xattn {

/// Combines a Stable Diffusion U-Net and an IP-Adapter's own file into one checkpoint, with the names that diffusers uses once
/// the adapter has been loaded into the U-Net: every cross-attention layer has the adapter's projections as an added context.
///
/// In the adapter these are named "ip_adapter.1.to_k_ip.weight", with odd numbers for the cross-attention layers in the order
/// of down blocks, up blocks, mid block. For layers that these numbers do not identify, such as those of a file with one layer,
/// `places` maps prefixes of layers in the base to prefixes in the adapter. Throws FileError, listing names, unless each layer
/// has its projections and, without `places`, the adapter has no others. The network that makes image tokens ("image_proj") is
/// the caller's. Then each layer is made by itself, from the prefixes of `find_layers`; it takes one adapter:
///
///   auto unet = xattn::with_ip_adapter(xattn::open_checkpoint("unet/diffusion_pytorch_model.safetensors"),
///                                      xattn::open_checkpoint("ip-adapter_sd15.safetensors"));
///   auto layer = xattn::decoupled_cross_attention_from(
///       unet, {.prefix = "down_blocks.0.attentions.0.transformer_blocks.0.attn2", .num_heads = 8}, /*scale=*/0.6);
[[nodiscard]] XATTN_API Checkpoint with_ip_adapter(const Checkpoint& base,
                                                   const Checkpoint& adapter,
                                                   const std::map<std::string, std::string>& places = {});

}  // namespace xattn
