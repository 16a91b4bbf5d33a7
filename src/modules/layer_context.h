// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "modules/layer.h"

// Contexts of a layer as values: made longer, shorter or of other batch entries. All functions return new contexts, are
// differentiable, and leave their arguments as they are.
namespace xattn::detail {

/// The contexts one behind the other, in new memory. There is room for up to `capacity` keys if `can_grow`.
LayerContext join(const Layer& layer, const std::vector<LayerContext>& parts, int64_t capacity = 0);

/// A context with the keys of another behind its own: written to its room if it can claim that, otherwise joined.
LayerContext append(const Layer& layer, const LayerContext& context, const LayerContext& more);

/// The first n keys of a context.
LayerContext truncate(const Layer& layer, const LayerContext& context, int64_t n);

/// The batch entries with these indices, int64 [n], on the device of the context.
LayerContext select_entries(const Layer& layer, const LayerContext& context, const at::Tensor& indices);

/// Whether keys can be written behind those of these contexts: neither folded, nor followed by the key of bias_kv, nor part of a
/// graph of gradients.
bool can_grow(const Layer& layer, const std::vector<LayerContext>& contexts);

/// Throws unless n lies in [0, length].
void check_length(std::string_view caller, int64_t n, int64_t length);

}  // namespace xattn::detail
