// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/export.h>

#include <map>
#include <string>

namespace xattn {

/// Writes tensors (any device, any strides) and metadata in the format of https://github.com/huggingface/safetensors. A new
/// file is written beside `path`, flushed to disk and renamed: `path` holds either the old file or the whole new one, with the
/// old permissions; a symbolic link stays one. Throws FileError, also for a type that the format does not support.
XATTN_API void save_safetensors(const std::string& path,
                                const NamedTensors& tensors,
                                const std::map<std::string, std::string>& metadata = {});

/// The same, with one tensor in memory at a time.
XATTN_API void save_safetensors(const std::string& path,
                                const LazyTensors& tensors,
                                const std::map<std::string, std::string>& metadata = {});

}  // namespace xattn
