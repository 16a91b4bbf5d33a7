// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/block_options.h>
#include <xattn/checkpoint.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/load_modules.h>

#include <optional>

#include "loading/model_config.h"
#include "loading/recipes.h"

// What modules made from a file need to know beside names and shapes. All of these throw FileError.
namespace xattn::detail {

/// The options of a block of the file, all of which are known then: by its tensors, its layout, config.json or the caller.
CrossAttentionBlockOptions block_options(const Checkpoint& checkpoint,
                                         const ModelConfig& config,
                                         const FoundBlock& found,
                                         const BlockOptionsFromFile& options);

/// The type of parameters made by these recipes: the wanted one, or the widest, and at least float16.
at::ScalarType type_of(const Checkpoint& checkpoint, const Recipes& all, std::optional<at::ScalarType> wanted);

/// Throws if biases or norms of the layer do not fit its weights.
void refuse_misshapen(const Checkpoint& checkpoint, const FoundLayer& layer);
void refuse_misshapen(const Checkpoint& checkpoint, const FoundBlock& block);  ///< or of anything else in the block

}  // namespace xattn::detail
