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

/// What a file says of one of its tensors.
struct TensorInfo {
  at::ScalarType type;
  std::vector<int64_t> shape;
};

/// How much memory the tensor takes.
XATTN_API int64_t byte_count(const TensorInfo& info);

/// Tensors that are made one at a time, when they are asked for: what they will be, and how to make the one of a name.
struct LazyTensors {
  std::map<std::string, TensorInfo> infos;
  std::function<at::Tensor(const std::string& name)> make;
};

/// Those in memory. Throws c10::ValueError if one is undefined.
XATTN_API LazyTensors lazy(NamedTensors tensors);

/// A file of weights, opened: what it holds is known and checked, no tensor has been read. Files are mapped into memory, never
/// executed, and never unpickled in general: opening is safe whatever the file holds, and takes time and memory by its header,
/// not by its size. A handle; copies share the file. Safe to share between threads. The file must not be written to while a
/// Checkpoint of it lives; replacing it by renaming another over it is fine.
///
///   auto checkpoint = xattn::open_checkpoint("pytorch_model.bin");
///   at::Tensor weight = checkpoint.tensor("decoder.layers.0.encoder_attn.q_proj.weight");
class XATTN_API Checkpoint {
 public:
  struct Contents;
  explicit Checkpoint(std::shared_ptr<const Contents> contents);

  const std::string& path() const;
  /// The files that it reads from: `path` and, of a sharded set, its shards.
  std::vector<std::string> files() const;
  FileFormat format() const;
  const std::map<std::string, TensorInfo>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;

  bool contains(const std::string& name) const { return tensors().contains(name); }

  /// A new CPU tensor with memory of its own, wherever it was saved; contiguous, unless it was saved as a view that shows elements
  /// more than once (`expand`). Reads this tensor only. Throws FileError if there is none of this name, or the file has changed.
  at::Tensor tensor(const std::string& name) const;

  /// This file as if it had tensors of another, too: `names` are what they are called there, and here. Path, format and metadata
  /// are this one's. Throws FileError if the other has no such tensor, or this one has it already.
  Checkpoint with(const Checkpoint& other, const std::map<std::string, std::string>& names) const;

 private:
  std::shared_ptr<const Contents> contents_;
};

/// Opens a file in any of the formats, told by content. Throws FileError, one line naming the defect, unless what it says of
/// its tensors is sound and lies in it, and none shows more bytes than it has (all together 32 times these). Files from before
/// PyTorch 1.6, and objects that are no tensors, are refused with the line of Python that saves them anew.
XATTN_API Checkpoint open_checkpoint(const std::string& path);

/// Those of a file, each read when it is asked for.
XATTN_API LazyTensors lazy(const Checkpoint& checkpoint);

/// All tensors of a file.
XATTN_API NamedTensors load_tensors(const std::string& path);

}  // namespace xattn
