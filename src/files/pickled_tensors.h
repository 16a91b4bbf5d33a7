// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/pickle.h"
#include "files/stored_tensor.h"
#include "files/zip.h"

namespace xattn::detail {

inline constexpr std::string_view kStateDict = "state dict";  ///< in messages

/// The size of the items of a storage by the name of its class, in bytes; nothing if torch has no such class.
std::optional<size_t> size_of_items(std::string_view storage_class);

/// The bytes of the storage with this key. Throws FileError if there is none.
using FindStorage = std::function<Bytes(std::string_view key)>;

/// The storages of an archive, which must outlive this. Throws FileError if the archive is big-endian.
FindStorage storages_of(std::string_view reader, const std::string& path, const ZipFile& zip);

/// The tensors of a pickle of torch.save or torch.jit.save, collected by name. Throws FileError with "[reader] path: reason".
class PickledTensors {
 public:
  /// `container` is the kind of value whose entries name tensors: dict, or object in TorchScript. The texts and the pickle must
  /// outlive this.
  PickledTensors(
      std::string_view reader, const std::string& path, FindStorage find_storage, const Pickle& pickle, Pickle::Kind container);

  /// Name, value, name, value, ... of a container; nothing for an optimizer's state dict, which holds no weights.
  std::span<const Pickle::Id> entries(Pickle::Id container) const;

  /// Whether this is a tensor, or a container that holds one at any depth. Throws FileError if a container holds itself, or if
  /// containers nest deeper than 100 levels.
  bool holds_tensors(Pickle::Id id, int depth = 0);

  /// Adds all tensors of a container, named `prefix` and their own name; a nested container extends the prefix by "name.".
  void add_all(const std::string& prefix, Pickle::Id container, int depth = 0);

  /// Counts bytes of memory, or steps, that the pickle causes. Throws FileError when they are many times its own bytes: a small
  /// pickle that shares its values could otherwise take years.
  void charge(size_t cost);

  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> unreadable;  ///< as in Index

 private:
  enum class Holds : uint8_t { unknown, being_asked, none, some };

  void add(const std::string& name, Pickle::Id tensor);
  std::optional<std::string> reason_not_to_read(Pickle::Id tensor) const;
  std::vector<int64_t> integers(const std::string& name, Pickle::Id tuple) const;
  Bytes storage(const std::string& name, std::span<const Pickle::Id> storage, size_t item) const;

  FileCheck check_;
  FindStorage find_storage_;
  const Pickle& pickle_;
  Pickle::Kind container_;
  std::vector<Holds> holds_;  // by id
  size_t left_;               // cost that may still be charged
};

}  // namespace xattn::detail
