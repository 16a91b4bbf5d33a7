// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/find_layers.h>

#include <string>

#include "loading/model_config.h"

// Models whose tensors are named as a layout's but whose attention differs, which only config.json shows.
namespace xattn::detail {

/// Throws FileError for a kind of attention that is not computed.
void refuse_other_attention(const ModelConfig& config, const FoundLayer& layer);

/// Throws FileError for a stack with this prefix whose logits or inputs depend on positions, or whose norms are placed, in a way
/// that no tensor shows.
void refuse_other_stack(const ModelConfig& config, const std::string& prefix);

}  // namespace xattn::detail
