// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>

#include "files/stored_tensor.h"
#include "files/zip.h"

// One function for each format, each in a source file of its own. `path` is only for messages: "[reader] path: reason".
namespace xattn::detail {

/// https://github.com/huggingface/safetensors (safetensors.cpp)
Index read_safetensors(const std::string& path, Bytes file);

/// The index of a sharded set, "model.safetensors.index.json" (shards.cpp): the shard's file, a plain name in the same folder,
/// for each tensor; and the metadata, values that are no strings as JSON.
struct ShardIndex {
  std::map<std::string, std::string> file_of;
  std::map<std::string, std::string> metadata;
};
ShardIndex read_shard_index(const std::string& path, Bytes file);

/// What `torch.save` wrote: a state dict, or a checkpoint that nests one (state_dict.cpp).
Index read_state_dict(const std::string& path, const ZipFile& zip);

/// What `torch.jit.save`, or `torch::save` of a C++ module, wrote: parameters and buffers by name (torchscript.cpp).
Index read_torchscript(const std::string& path, const ZipFile& zip);

/// What `torch.export.save` wrote: parameters, buffers and constants with raw weights (pt2.cpp).
Index read_pt2(const std::string& path, const ZipFile& zip);

}  // namespace xattn::detail
