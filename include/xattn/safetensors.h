// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace xattn {

/// A safetensors file, opened: its header is read and checked, its tensors are read when asked for.
/// Format: https://github.com/huggingface/safetensors. Little-endian machines only. Safe to share between threads.
///
///   SafetensorsFile file("weights.safetensors");
///   at::Tensor weight = file.tensor("query_linear.weight");
class XATTN_API SafetensorsFile {
 public:
  struct Entry {
    at::ScalarType type;
    std::vector<int64_t> shape;
    uint64_t offset;  // of its first byte in the file
    uint64_t bytes;
  };

  /// Throws FileError, with a message for each defect, unless the whole header is sound and agrees with the size of the file.
  explicit SafetensorsFile(std::string path);

  const std::map<std::string, Entry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// A new CPU tensor, contiguous, with memory of its own. Throws FileError if there is none of this name.
  at::Tensor tensor(const std::string& name) const;

 private:
  std::string path_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes tensors (any device, any strides) and metadata. The file is written beside and renamed, so that `path` holds either
/// what it held before or the whole new file. Throws FileError, also for a type that the format does not have.
XATTN_API void save_safetensors(const std::string& path,
                                const std::map<std::string, at::Tensor>& tensors,
                                const std::map<std::string, std::string>& metadata = {});

}  // namespace xattn
