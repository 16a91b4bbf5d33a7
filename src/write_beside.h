// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <system_error>

#include "check_file.h"
#include "stored_tensor.h"
#include "text.h"

namespace xattn::detail {

/// Lets `write` fill a new file beside `path` through the std::ostream& it is given, and renames it: `path` holds either what
/// it held before or the whole new file. Throws FileError if that cannot be; leaves nothing behind, whatever is thrown.
template <typename Write>
void write_beside(std::string_view reader, const std::string& path, Write&& write) {
  std::error_code error;
  const auto there = std::filesystem::status(path, error);
  check_file(!exists(there) || is_regular_file(there), reader, path, "is there, but is not a regular file");
  const std::string beside = formatted("{}.{:08x}.tmp", path, std::random_device{}());
  try {
    std::ofstream out(beside, std::ios::binary);
    check_file(out.is_open(), reader, path, "cannot be written: {}", system_reason());
    write(out);
    out.close();
    check_file(out.good(), reader, path, "cannot be written: {}", system_reason());
    std::filesystem::rename(beside, path, error);
    check_file(!error, reader, path, "cannot be written: {}", error.message());
  } catch (...) {
    std::filesystem::remove(beside, error);
    throw;
  }
}

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
