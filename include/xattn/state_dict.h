// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/export.h>

#include <string>

namespace xattn {

/// Writes tensors (any device, any strides) as `torch.save` writes a state dict. In Python:
///
///   model.load_state_dict(torch.load(path, weights_only=True))
///
/// Each tensor is written with its own memory, even if it shares memory with another. A new file is written beside `path`,
/// flushed to disk and renamed: `path` holds either the old file or the whole new one, with the old permissions; a symbolic
/// link stays one. Throws FileError, also for types that cannot be saved: quantized types, and types smaller than a byte.
XATTN_API void save_state_dict(const std::string& path, const NamedTensors& tensors);

/// The same, with one tensor in memory at a time.
XATTN_API void save_state_dict(const std::string& path, const LazyTensors& tensors);

}  // namespace xattn
