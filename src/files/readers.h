// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>

#include "files/pickled_tensors.h"
#include "files/stored_tensor.h"
#include "files/zip.h"

// One function for each format, in a source file of the same name. `path` is only for messages: "[reader] path: reason".
namespace xattn::detail {

/// https://github.com/huggingface/safetensors
Index read_safetensors(const std::string& path, Bytes file);

/// The index of a sharded set, "model.safetensors.index.json": for each tensor the file that holds it, a plain name in the same
/// folder; and the metadata, where values other than strings are given as JSON.
struct ShardIndex {
  std::map<std::string, std::string> file_of;
  std::map<std::string, std::string> metadata;
};
ShardIndex read_shard_index(const std::string& path, Bytes file);

/// Archives of `torch.save`: a state dict, or a checkpoint that contains one.
Index read_state_dict(const std::string& path, const ZipFile& zip);

/// The same from its pickle, whose storages lie elsewhere.
Index read_pickled_state_dict(const std::string& path, const Pickle& pickle, const FindStorage& find_storage);

/// Files of `torch.save` from before PyTorch 1.6, which are no archives.
Index read_legacy(const std::string& path, Bytes file);

/// Archives of `torch.jit.save`, or `torch::save` of a C++ module: parameters and buffers by name.
Index read_torchscript(const std::string& path, const ZipFile& zip);

/// Archives of `torch.export.save`: parameters, buffers and constants with raw weights.
Index read_pt2(const std::string& path, const ZipFile& zip);

}  // namespace xattn::detail
