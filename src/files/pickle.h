// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files/mapped_file.h"

namespace xattn::detail {

/// The contents of a pickle as plain data: nothing is imported, called or built. Values are shared as in the pickle, and may
/// contain themselves. Texts point into the pickle's bytes, which must outlive this, or into `texts`. Takes at most about 25 times their memory.
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
    storage,       ///< items as in torch.serialization: "storage", class, key, device, number of elements, and perhaps a view
    tensor,        ///< items: the arguments of torch._utils._rebuild_tensor, _v2 or _v3
    other_tensor,  ///< sparse, quantized, without data ...: text is the function or class, "torch._utils._rebuild_qtensor"
    object,        ///< of a class in TorchScript; items: its state, a dict of attributes, unless it has none
    foreign,       ///< a class or function that no reader knows, or an object made by it; text: its name, "argparse.Namespace"
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
  std::vector<Id> pool;         // items of all nodes
  std::set<std::string> texts;  // those that the pickle does not hold byte by byte
  Id root = 0;
  size_t bytes = 0;  ///< size of the pickle itself, which other bytes may follow
};

/// How names other than those of torch.load with weights_only=True are read.
enum class PickleNames {
  state_dict,   ///< as foreign: what is made by them becomes a record without contents
  torchscript,  ///< as classes of the archive's own code
};

inline constexpr size_t kMaxPickle = size_t{1} << 26;  ///< bytes: about a hundred thousand tensors

/// Reads the pickle at the beginning of these bytes, of at most kMaxPickle, in any protocol. Throws FileError with "[pickle]
/// path: reason" for each defect.
Pickle read_pickle(const std::string& path, Bytes bytes, PickleNames names);

}  // namespace xattn::detail
