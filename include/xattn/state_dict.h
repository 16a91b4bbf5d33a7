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
/// Each tensor is written with memory of its own, also if it shares some with another. The file is written beside, brought to
/// disk and renamed: `path` holds either what it held before or the whole new file, with the same permissions; a symbolic link
/// stays one. Throws FileError, also for a type that is not saved so: quantized ones, and those smaller than a byte.
XATTN_API void save_state_dict(const std::string& path, const NamedTensors& tensors);

/// The same, with one tensor in memory at a time.
XATTN_API void save_state_dict(const std::string& path, const LazyTensors& tensors);

}  // namespace xattn
