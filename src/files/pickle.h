// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files/mapped_file.h"

namespace xattn::detail {

/// The contents of a pickle as plain data: nothing is imported, called or built. Values are shared as in the pickle, and may
/// contain themselves. Texts point into the pickle's bytes, which must outlive this. Takes at most about 25 times their memory.
struct Pickle {
  using Id = uint32_t;

  enum class Kind : uint8_t {
    none,
    boolean,
    integer,
    real,
    text,
    tuple,         ///< items in order
    list,          ///< items in order
    dict,          ///< items: key, value, key, value, ...
    global,        ///< a name of module torch, as text: "FloatStorage", "float32"
    storage,       ///< items as in torch.serialization: "storage", class, key, device, number of elements
    tensor,        ///< items: the arguments of torch._utils._rebuild_tensor_v2 or _v3
    other_tensor,  ///< sparse, quantized, without data ...: text is the name of the function in torch._utils
    object,        ///< of a class in TorchScript; items: its state, a dict of attributes, unless it has none
    other,         ///< a value that no reader needs
  };

  struct Node {
    Kind kind = Kind::none;
    uint8_t use = 0;    // for a global: how calls to it are read
    uint32_t size = 0;  // of text or items
    union {
      int64_t integer = 0;  // also the value of a boolean
      double real;
      const char* text;
      uint64_t first;  // place of the first item in `pool`
    };
  };

  Kind kind(Id id) const { return nodes[id].kind; }
  int64_t integer(Id id) const { return nodes[id].integer; }                       ///< REQUIRES: integer or boolean
  double real(Id id) const { return nodes[id].real; }                              ///< REQUIRES: real
  std::string_view text(Id id) const { return {nodes[id].text, nodes[id].size}; }  ///< REQUIRES: a kind that has text

  /// REQUIRES: a kind that has items.
  std::span<const Id> items(Id id) const { return {pool.data() + nodes[id].first, nodes[id].size}; }

  std::vector<Node> nodes;
  std::vector<Id> pool;  // items of all nodes
  Id root = 0;
  size_t bytes = 0;  ///< size of the pickle itself
};

/// Classes and functions that a pickle may name. The error for others has their name, and Python to save only tensors.
enum class PickleNames {
  state_dict,   ///< the names that torch.load accepts with weights_only=True
  torchscript,  ///< any name, for classes of the archive's own code
};

/// Reads protocols 2 to 5. Throws FileError with "[pickle] path: reason" for each defect.
Pickle read_pickle(const std::string& path, Bytes bytes, PickleNames names);

}  // namespace xattn::detail
