// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>

#include <string>
#include <string_view>

#include "files/check_file.h"

// What the writers of all formats do with tensors.
namespace xattn::detail {

/// Tensors that can be written. Throws FileError for one that is not dense or has no data.
inline LazyTensors writable(std::string_view reader, const std::string& path, const NamedTensors& tensors) {
  for (const auto& [name, tensor] : tensors) {
    const bool dense = tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta();
    check_file(dense, reader, path, "tensor {} must be dense and have data", in_quotes(name));
  }
  return lazy(tensors);
}

/// On the CPU, contiguous, and its values as they are in memory.
inline at::Tensor plain(const at::Tensor& tensor) {
  return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
}

}  // namespace xattn::detail
