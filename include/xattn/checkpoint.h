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

/// Tensors by their names in a file.
using NamedTensors = std::map<std::string, at::Tensor>;

enum class FileFormat {
  safetensors,  ///< one file, or a sharded set through its index.json; https://github.com/huggingface/safetensors
  state_dict,   ///< torch.save of a state dict, or of a checkpoint that nests one; a sharded set likewise
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

/// The memory that the tensor takes, in bytes.
XATTN_API int64_t byte_count(const TensorInfo& info);

/// Tensors that are made one at a time, on demand: their types and shapes, and a function that makes the tensor of a name.
struct LazyTensors {
  std::map<std::string, TensorInfo> infos;
  std::function<at::Tensor(const std::string& name)> make;
};

/// Tensors that are in memory already. Throws c10::ValueError if one is undefined.
XATTN_API LazyTensors lazy(NamedTensors tensors);

/// An open file of weights. Its names, types and shapes are known and checked; no tensor has been read. Files are mapped into
/// memory and never executed, and pickles are read as plain data: opening is safe whatever the file holds, and its time and memory
/// grow with the header, not with the file. A handle; copies share the file. Safe to share between threads. The file must not be
/// written to while a Checkpoint of it exists; replacing it by renaming another file over it is fine.
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

  /// A new CPU tensor with memory of its own, whatever device it was saved from; contiguous, unless it was saved as a view that
  /// repeats elements (`expand`). Reads this tensor only. Throws FileError if there is no such tensor, or the file has changed.
  at::Tensor tensor(const std::string& name) const;

  /// This file with tensors of another file added: `names` maps names in the other file to names here. Path, format and metadata
  /// stay. Throws FileError if the other file has no such tensor, or this file has it already.
  Checkpoint with(const Checkpoint& other, const std::map<std::string, std::string>& names) const;

 private:
  std::shared_ptr<const Contents> contents_;
};

/// Opens a file in any of the formats, which is detected from its contents. Throws FileError, one line naming the defect, unless
/// the descriptions of all tensors are valid, their data lies in the file, no tensor is larger than the file, and all together are
/// at most 32 times as large (views may repeat elements). Files from before PyTorch 1.6, and objects other than tensors, are
/// refused with the line of Python that saves them anew.
[[nodiscard]] XATTN_API Checkpoint open_checkpoint(const std::string& path);

/// The tensors of a file, each read on demand.
XATTN_API LazyTensors lazy(const Checkpoint& checkpoint);

/// All tensors of a file.
XATTN_API NamedTensors load_tensors(const std::string& path);

}  // namespace xattn
