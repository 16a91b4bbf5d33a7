// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/file_error.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace xattn {

/// Tensors keyed by their names in a file.
using NamedTensors = std::map<std::string, at::Tensor>;

enum class FileFormat {
  safetensors,  ///< one file, or a sharded set through its index.json; https://github.com/huggingface/safetensors
  state_dict,   ///< torch.save of a state dict, or of a checkpoint that contains one; also a sharded set
  torchscript,  ///< torch.jit.save, or torch::save of a C++ module
  pt2,          ///< torch.export.save
};

/// "safetensors", "state dict", "torchscript", "pt2".
XATTN_API std::string to_string(FileFormat format);

/// Type and shape of a tensor in a file.
struct TensorInfo {
  at::ScalarType type;
  std::vector<int64_t> shape;
};

/// The size of the tensor in memory, in bytes.
XATTN_API int64_t byte_count(const TensorInfo& info);

/// Tensors that are created one at a time, on demand: their types and shapes, and a function from a name to its tensor.
struct LazyTensors {
  std::map<std::string, TensorInfo> infos;
  std::function<at::Tensor(const std::string& name)> make;
};

/// Wraps tensors that are already in memory. Throws c10::ValueError if one is undefined.
XATTN_API LazyTensors lazy(NamedTensors tensors);

/// An open file of weights. Its names, types and shapes have been read and checked, the tensors' data has not. Files are mapped
/// into memory and never executed, and pickles are read as plain data: opening is safe whatever the file contains, and its time
/// and memory grow with the header, not with the file. Copies share the file. Safe to share between threads. The file must not
/// be written to while a Checkpoint of it exists; replacing it by renaming another file over it is fine.
///
///   auto checkpoint = xattn::open_checkpoint("pytorch_model.bin");
///   at::Tensor weight = checkpoint.tensor("decoder.layers.0.encoder_attn.q_proj.weight");
class XATTN_API Checkpoint {
 public:
  struct Contents;
  explicit Checkpoint(std::shared_ptr<const Contents> contents);

  const std::string& path() const;
  /// The files that are read: `path` and the shards of a sharded set.
  std::vector<std::string> files() const;
  FileFormat format() const;
  const std::map<std::string, TensorInfo>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;

  bool contains(const std::string& name) const { return tensors().contains(name); }

  /// Reads this tensor alone into a new CPU tensor with its own memory, whatever device it was saved from. Contiguous unless it
  /// was saved as a view that repeats elements (`expand`). Throws FileError if there is no such tensor or the file has changed.
  at::Tensor tensor(const std::string& name) const;

  /// Returns this file with tensors of another file added: `names` maps names in the other file to names here. Path, format and
  /// metadata stay the same. Throws FileError if the other file has no such tensor, or this file already has it.
  Checkpoint with(const Checkpoint& other, const std::map<std::string, std::string>& names) const;

 private:
  std::shared_ptr<const Contents> contents_;
};

/// Opens a file; its format is detected from its contents. Throws FileError, one line naming the defect, unless the
/// descriptions of all tensors are valid, their data lies in the file, no tensor is larger than the file, and all tensors
/// together are at most 32 times as large (views may repeat elements). For files from before PyTorch 1.6, and for objects other
/// than tensors, the message has the line of Python that saves them again in a supported form.
[[nodiscard]] XATTN_API Checkpoint open_checkpoint(const std::string& path);

/// The tensors of a file, each read on demand.
XATTN_API LazyTensors lazy(const Checkpoint& checkpoint);

/// Reads all tensors of a file.
XATTN_API NamedTensors load_tensors(const std::string& path);

}  // namespace xattn
