// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "base/text.h"
#include "files/check_file.h"
#include "files/pickle.h"
#include "files/pickled_tensors.h"
#include "files/readers.h"

// Such a file is a row of pickles, as PyTorch describes it in torch/serialization.py (_legacy_save):
//
//   the magic number 0x1950a86a20f9469cfc6c, the version 1001
//   a dict that describes the machine, "little_endian" above all
//   the saved object
//   the list of the keys of its storages
//
// and then, for each of these keys, the number of the storage's items in eight bytes and the items.
namespace xattn::detail {
namespace {

constexpr std::string_view kMagicNumber = "\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
constexpr std::string_view kMagicDigits = "119547037146038801333356";  // in protocols 0 and 1
constexpr int64_t kVersion = 1001;

class LegacyFile {
 public:
  LegacyFile(const std::string& path, Bytes file) : path_(path), check_(kStateDict, path), rest_(file) {}

  Index read() {
    const auto file = as_text(rest_);
    const auto magic = file.substr(0, next_pickle().bytes);
    check_(magic.find(kMagicNumber) != std::string_view::npos || magic.find(kMagicDigits) != std::string_view::npos,
           "is a pickle, but not of torch.save; pickles of other values are not read");
    const auto version = next_pickle();
    check_(version.kind(version.root) == Kind::integer && version.integer(version.root) == kVersion, "must have version {}",
           kVersion);
    check_machine(next_pickle());
    const auto object = next_pickle();
    find_storages(object);
    return read_pickled_state_dict(path_, object, [this](std::string_view key) {
      const auto storage = storages_.find(key);
      check_(storage != storages_.end(), "has no storage {}", in_quotes(key));
      return storage->second;
    });
  }

 private:
  using Kind = Pickle::Kind;

  Pickle next_pickle() {
    auto pickle = read_pickle(path_, rest_.first(std::min(rest_.size(), kMaxPickle)), PickleNames::state_dict);
    rest_ = rest_.subspan(pickle.bytes);
    return pickle;
  }

  void check_machine(const Pickle& pickle) const {
    check_(pickle.kind(pickle.root) == Kind::dict, "must describe its machine by a dict");
    const auto entries = pickle.items(pickle.root);
    for (size_t i = 0; i < entries.size(); i += 2) {
      if (pickle.kind(entries[i]) != Kind::text || pickle.text(entries[i]) != "little_endian") continue;
      const auto value = entries[i + 1];
      check_(pickle.kind(value) == Kind::boolean && pickle.integer(value) != 0, "must be little-endian, but is not");
    }
  }

  // Reads the list of keys, and where the storage of each key lies. The size of its items is in the object alone.
  void find_storages(const Pickle& object) {
    std::map<std::string_view, std::string_view> classes;
    for (const auto& node : object.nodes) {
      if (node.kind != Kind::storage) continue;
      const auto* parts = object.pool.data() + node.first;
      classes.emplace(object.text(parts[2]), object.text(parts[1]));
    }
    const auto keys = next_pickle();
    check_(keys.kind(keys.root) == Kind::list, "must have a list of its storages' keys");
    for (const auto id : keys.items(keys.root)) {
      check_(keys.kind(id) == Kind::text, "must have texts as its storages' keys");
      const auto found = classes.find(keys.text(id));
      check_(found != classes.end(), "has the storage {}, which no tensor uses", in_quotes(keys.text(id)));
      const auto& [key, name] = *found;
      const auto item = size_of_items(name.substr(name.rfind('.') + 1));
      check_(item.has_value(), "has storage {} of class {}, which torch does not have", in_quotes(key), in_quotes(name));
      check_(storages_.emplace(key, take_storage(key, *item)).second, "has the storage {} twice", in_quotes(key));
    }
  }

  Bytes take_storage(std::string_view key, size_t item) {
    int64_t count = 0;
    check_(rest_.size() >= sizeof(count), "ends before storage {}; a download may have been cut off", in_quotes(key));
    std::memcpy(&count, rest_.data(), sizeof(count));
    rest_ = rest_.subspan(sizeof(count));
    check_(count >= 0 && static_cast<uint64_t>(count) <= rest_.size() / item,
           "has {} bytes for storage {} of {} items of {} bytes; a download may have been cut off", rest_.size(),
           in_quotes(key), count, item);
    const auto storage = rest_.first(static_cast<size_t>(count) * item);
    rest_ = rest_.subspan(storage.size());
    return storage;
  }

  const std::string& path_;
  FileCheck check_;
  Bytes rest_;                                  // of the file
  std::map<std::string_view, Bytes> storages_;  // by key
};

}  // namespace

Index read_legacy(const std::string& path, Bytes file) {
  return LegacyFile(path, file).read();
}

}  // namespace xattn::detail
