// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/file_error.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace xattn {

/// Tensors keyed by their names in a file.
using NamedTensors = std::map<std::string, at::Tensor>;

enum class FileFormat {
  safetensors,  ///< one file, or a sharded set through its index.json; https://github.com/huggingface/safetensors
  state_dict,   ///< torch.save of a state dict, or of a checkpoint that contains one, by any PyTorch since 0.1.12; also sharded
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

/// The size of the tensor in memory, in bytes. Throws c10::ValueError for negative axes, more than 64 axes,
/// or a size beyond int64_t.
XATTN_API int64_t byte_count(const TensorInfo& info);

/// Tensors that are created one at a time, on demand: their types and shapes, and a function from a name to its tensor.
struct LazyTensors {
  std::map<std::string, TensorInfo> infos;
  std::function<at::Tensor(const std::string& name)> make;
  std::map<std::string, std::string> unreadable = {};  ///< names of others that cannot be created, with the reasons
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

  const std::string& path() const;  ///< of the file, also if its folder was opened
  /// The files that are read: `path` and the shards of a sharded set.
  std::vector<std::string> files() const;
  FileFormat format() const;
  const std::map<std::string, TensorInfo>& tensors() const;
  /// Tensors that are in the file but are not read, by name, each with the reason: quantized and sparse ones, those of types
  /// that torch does not have (F4), tensor classes of other libraries. They are not among `tensors()`.
  const std::map<std::string, std::string>& unreadable() const;
  const std::map<std::string, std::string>& metadata() const;

  bool contains(const std::string& name) const { return tensors().contains(name); }

  /// Reads this tensor alone into a new CPU tensor with its own memory, whatever device it was saved from. Contiguous unless it
  /// was saved as a view that repeats elements (`expand`). Throws FileError if there is no such tensor, if it is one of
  /// `unreadable()`, or if the file has changed.
  at::Tensor tensor(const std::string& name) const;

  /// Names of the tensors that neither this Checkpoint nor a copy of it has read yet, `unreadable()` ones among them, in order:
  /// what all loads so far, of any function that takes a Checkpoint, have left out. Copying by `save_safetensors` reads, too.
  ///
  ///   auto checkpoint = xattn::open_checkpoint("bart");
  ///   auto encoder = xattn::encoder_from(checkpoint, {.prefix = "model.encoder"});
  ///   auto decoder = xattn::decoder_from(checkpoint, {.prefix = "model.decoder"});
  ///   for (const auto& name : checkpoint.unread()) std::cout << name << "\n";  // embeddings, still to be loaded
  std::vector<std::string> unread() const;

  /// Returns this file with tensors of another file added: `names` maps names in the other file to names here. Path, format and
  /// metadata stay the same, and no tensor counts as read. Throws FileError if the other file has no such tensor, or if this
  /// file already has it.
  Checkpoint with(const Checkpoint& other, const std::map<std::string, std::string>& names) const;

 private:
  std::shared_ptr<const Contents> contents_;
};

/// Opens a file, or the file of weights in a folder as `from_pretrained` takes it: the first that exists of
///
///   model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json;
///   the same of diffusers, diffusion_pytorch_model.safetensors, ...;
///   adapter_model.safetensors or .bin, pytorch_lora_weights.safetensors or .bin
///
/// If a folder has none of these, a FileError lists its files. The format is detected from the contents. Throws FileError,
/// one line naming the defect, unless the descriptions of all tensors are valid, their data lies in the file, no tensor is
/// larger than the file, and all tensors together are at most 32 times as large (views may repeat elements). Objects of other
/// classes in a pickle (options, callbacks, NumPy arrays) are passed over. If a file holds an object in place of all tensors,
/// the message has the line of Python that saves the tensors; a web page, a pointer of Git LFS, a GGUF file and a compiled
/// package are named for what they are.
[[nodiscard]] XATTN_API Checkpoint open_checkpoint(const std::string& path);

/// Opens a file that is in memory, in any of these formats but the index of a sharded set, without copying it. The bytes must
/// neither move nor change while a copy of the Checkpoint exists: either `owner` keeps them, or the caller does. `name` stands
/// for the path in messages and in `path()`; `files()` is empty.
///
///   auto file = std::make_shared<std::vector<std::byte>>(download());
///   auto checkpoint = xattn::open_checkpoint(*file, file);
[[nodiscard]] XATTN_API Checkpoint open_checkpoint(std::span<const std::byte> bytes,
                                                   std::shared_ptr<const void> owner = {},
                                                   const std::string& name = "file in memory");

/// The tensors of a file, each read on demand.
XATTN_API LazyTensors lazy(const Checkpoint& checkpoint);

/// Reads all tensors of a file. Throws FileError if one is unreadable.
XATTN_API NamedTensors load_tensors(const std::string& path);

}  // namespace xattn
