// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/pickle.h"
#include "files/pickled_tensors.h"
#include "files/readers.h"

namespace xattn::detail {
namespace {

constexpr char kChosen[] = "state_dict_key";  // metadata: the key of the state dict in its checkpoint

// Keys under which programs save the model, beside its optimizer, its averages and more; the first one present is used.
constexpr std::array<std::string_view, 7> kModelKeys{"state_dict", "model_state_dict", "model", "module",
                                                     "net",        "weights",          "params"};

// A text, number or boolean as metadata; numbers and booleans as in JSON.
std::optional<std::string> as_metadata(const Pickle& pickle, Pickle::Id value) {
  switch (pickle.kind(value)) {
    case Pickle::Kind::text: return std::string(pickle.text(value));
    case Pickle::Kind::integer: return formatted("{}", pickle.integer(value));
    case Pickle::Kind::real: return formatted("{}", pickle.real(value));
    case Pickle::Kind::boolean: return pickle.integer(value) != 0 ? "true" : "false";
    default: return {};
  }
}

class Reader {
 public:
  Reader(const std::string& path, const Pickle& pickle, FindStorage find_storage)
      : check_(kStateDict, path),
        pickle_(pickle),
        found_(kStateDict, path, std::move(find_storage), pickle_, Pickle::Kind::dict) {}

  Index read() {
    auto dict = pickle_.root;
    refuse_object(dict, "");
    check_(pickle_.kind(dict) == Pickle::Kind::dict,
           "must hold a dict of tensors by name, but holds {}; save it so in Python: torch.save({{'NAME': tensor}}, PATH)",
           pickle_.kind(dict) == Pickle::Kind::tensor ? "one tensor" : "something else");
    if (!found_.holds_tensors(dict)) refuse_objects(dict);
    check_(found_.holds_tensors(dict) || pickle_.items(dict).empty(), "holds no tensors by name");
    std::string chosen;
    add_metadata(dict);
    while (const auto entry = nested(dict)) {
      const auto key = pickle_.text(entry->first);
      found_.charge(key.size());
      if (!chosen.empty()) chosen += '.';
      chosen += key;
      dict = entry->second;
      add_metadata(dict);
    }
    if (!chosen.empty()) metadata_[kChosen] = chosen;
    found_.add_all("", dict);
    return {std::move(found_.tensors), std::move(metadata_), std::move(found_.unreadable)};
  }

 private:
  using Entry = std::pair<Pickle::Id, Pickle::Id>;

  // Objects are records without contents: a whole module in place of its tensors cannot be read. `place` is Python's way to it.
  void refuse_object(Pickle::Id value, const std::string& place) const {
    check_(pickle_.kind(value) != Pickle::Kind::foreign,
           "holds an object of class {}, which is not a tensor; if you trust the file, whose code this runs, save only the "
           "tensors, in Python: torch.save(torch.load(PATH, weights_only=False){}.state_dict(), NEW_PATH)",
           pickle_.kind(value) == Pickle::Kind::foreign ? shown(pickle_.text(value)) : "", place);
  }

  // Throws if an entry of a dict without tensors is an object: the one under a known key, or else the first.
  void refuse_objects(Pickle::Id dict) const {
    const auto entries = found_.entries(dict);
    const auto refuse = [&](const auto& is_meant) {
      for (size_t i = 0; i < entries.size(); i += 2) {
        if (pickle_.kind(entries[i]) != Pickle::Kind::text || !is_meant(pickle_.text(entries[i]))) continue;
        refuse_object(entries[i + 1], formatted("['{}']", shown(pickle_.text(entries[i]))));
      }
    };
    refuse([](std::string_view key) { return std::ranges::count(kModelKeys, key) > 0; });
    refuse([](std::string_view) { return true; });
  }

  // The entry of a checkpoint that holds the model's state dict: the one under a known key, or the only one with tensors.
  std::optional<Entry> nested(Pickle::Id checkpoint) {
    const auto entries = found_.entries(checkpoint);
    std::vector<Entry> holders;
    for (size_t i = 0; i < entries.size(); i += 2) {
      if (found_.holds_tensors(entries[i + 1])) holders.emplace_back(entries[i], entries[i + 1]);
    }
    const auto is_dict = [&](const Entry& entry) {
      return pickle_.kind(entry.first) == Pickle::Kind::text && pickle_.kind(entry.second) == Pickle::Kind::dict;
    };
    for (const auto key : kModelKeys) {
      const auto known =
          std::ranges::find_if(holders, [&](const Entry& entry) { return is_dict(entry) && pickle_.text(entry.first) == key; });
      if (known != holders.end()) return *known;
    }
    if (holders.size() == 1 && is_dict(holders[0])) return holders[0];
    return {};
  }

  void add_metadata(Pickle::Id dict) {
    const auto entries = found_.entries(dict);
    for (size_t i = 0; i < entries.size(); i += 2) {
      if (pickle_.kind(entries[i]) != Pickle::Kind::text) continue;
      auto value = as_metadata(pickle_, entries[i + 1]);
      if (!value) continue;
      found_.charge(pickle_.text(entries[i]).size() + value->size());
      metadata_.insert_or_assign(std::string(pickle_.text(entries[i])), *std::move(value));
    }
  }

  FileCheck check_;
  const Pickle& pickle_;
  PickledTensors found_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace

Index read_pickled_state_dict(const std::string& path, const Pickle& pickle, const FindStorage& find_storage) {
  return Reader(path, pickle, find_storage).read();
}

Index read_state_dict(const std::string& path, const ZipFile& zip) {
  const auto pickle = read_pickle(path, zip.bytes("data.pkl"), PickleNames::state_dict);
  return read_pickled_state_dict(path, pickle, storages_of(kStateDict, path, zip));
}

}  // namespace xattn::detail
