// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/pickle.h"
#include "files/pickled_tensors.h"
#include "files/readers.h"

namespace xattn {
namespace {

using detail::in_quotes;
using detail::Pickle;

constexpr char kChosen[] = "state_dict_key";  // metadata: where in a checkpoint the state dict is

// Under which key programs save the model, beside its optimizer, its averages and more; the first that is there counts.
constexpr std::array<std::string_view, 7> kModelKeys{"state_dict", "model_state_dict", "model", "module",
                                                     "net",        "weights",          "params"};

// A text, number or truth value as metadata; what is no text, as JSON.
std::optional<std::string> as_metadata(const Pickle& pickle, Pickle::Id value) {
  switch (pickle.kind(value)) {
    case Pickle::Kind::text: return std::string(pickle.text(value));
    case Pickle::Kind::integer: return detail::formatted("{}", pickle.integer(value));
    case Pickle::Kind::real: return detail::formatted("{}", pickle.real(value));
    case Pickle::Kind::boolean: return pickle.integer(value) != 0 ? "true" : "false";
    default: return {};
  }
}

class Reader {
 public:
  Reader(const std::string& path, const detail::ZipFile& zip)
      : path_(path),
        pickle_(detail::read_pickle(path, zip.bytes("data.pkl"), detail::PickleNames::state_dict)),
        found_(detail::kStateDict, path, zip, pickle_, Pickle::Kind::dict) {}

  detail::Index read() {
    auto dict = pickle_.root;
    check(pickle_.kind(dict) == Pickle::Kind::dict,
          "must hold a dict of tensors by name, but holds {}; save it so in Python: torch.save({{'NAME': tensor}}, PATH)",
          pickle_.kind(dict) == Pickle::Kind::tensor ? "one tensor" : "something else");
    check(found_.holds_tensors(dict) || pickle_.items(dict).empty(), "holds no tensors by name");
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
    return {std::move(found_.tensors), std::move(metadata_)};
  }

 private:
  using Entry = std::pair<Pickle::Id, Pickle::Id>;

  template <typename... Args>
  void check(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    detail::check_file(ok, detail::kStateDict, path_, format, std::forward<Args>(args)...);
  }

  // The entry of a checkpoint that is the model's state dict: under a key that is known, or the only one that holds tensors.
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

  const std::string& path_;
  Pickle pickle_;
  detail::PickledTensors found_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace

detail::Index detail::read_state_dict(const std::string& path, const ZipFile& zip) {
  return Reader(path, zip).read();
}

}  // namespace xattn
