// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/readers.h"
#include "files/types.h"

// An archive of torch.export.save, as PyTorch describes it in torch/csrc/export/pt2_archive_constants.h:
//
//   archive_format, archive_version, byteorder   "pt2", "0", "little"
//   models/NAME.json                             the graph, which is not read
//   data/weights/NAME_weights_config.json        of each parameter and buffer: its record, type, shape, strides, offset
//   data/weights/weight_0 ...                    storages, byte by byte; tied tensors, and views of one storage, share one
//   data/constants/NAME_constants_config.json    the same for constants and for buffers that are not in the state dict
//   data/constants/tensor_0 ...
namespace xattn::detail {
namespace {

static_assert(std::endian::native == std::endian::little, "storages are read as they are");

constexpr std::string_view kPt2 = "pt2";
constexpr uint64_t kStrided = 7;  // the number of this layout in torch/_export/serde/schema.py
constexpr char kOldForm[] =
    "{} pickled, as older versions of PyTorch wrote them, and pickles are not run; save it again in Python: "
    "torch.save(torch.export.load(PATH).state_dict, NEW_PATH)";

const FileType* type_of_number(uint64_t number) {
  return find_type([number](const FileType& each) { return each.pt2 == number; });
}

template <typename T>
constexpr std::string_view kKind = std::is_same_v<T, bool>          ? "true or false"
                                   : std::is_same_v<T, uint64_t>    ? "a non-negative integer"
                                   : std::is_same_v<T, std::string> ? "a string"
                                                                    : "a list";

// The description of one tensor in a config.
class Entry {
 public:
  Entry(const std::string& path, const std::string& name, const Json& json)
      : check_(kPt2, path), tensor_("tensor " + in_quotes(name)), json_(json) {}

  /// Why the tensor is sound, but not read; nothing if it is read.
  std::optional<std::string> reason_not_to_read() const {
    if (get<bool>("use_pickle")) {
      return "it is pickled, as objects and tensors of classes of their own are, and pickles are not run; save plain tensors "
             "in "
             "Python: torch.save({NAME: TENSOR, ...}, NEW_PATH)";
    }
    const auto layout = get<uint64_t>("tensor_meta/layout");
    if (layout != kStrided) return formatted("it has layout {}, not {}, strided", layout, kStrided);
    const auto number = get<uint64_t>("tensor_meta/dtype");
    if (!type_of_number(number)) return formatted("it has dtype {}, which is not one of PyTorch's type numbers", number);
    return {};
  }

  /// The tensor, a view of a storage in `folder`. REQUIRES: no reason not to read it.
  StoredTensor read(const ZipFile& zip, const std::string& folder) const {
    const auto record = folder + get<std::string>("path_name");
    check_(zip.has(record), "{} should be in {}, which is not there", tensor_, in_quotes(record));
    std::string reason;
    auto view =
        view_of(zip.bytes(record), type_of_number(get<uint64_t>("tensor_meta/dtype"))->type, counts("tensor_meta/sizes"),
                counts("tensor_meta/strides"), count("tensor_meta/storage_offset"), &reason);
    check_(view.has_value(), "{} {}", tensor_, reason);
    return *std::move(view);
  }

 private:
  /// The value at `place`, as in "tensor_meta/dtype".
  template <typename T>
  T get(const std::string& place) const {
    const auto* found = json_.find(place);
    auto value = found ? found->as<T>() : std::nullopt;
    check_(value.has_value(), "{} must have {}, {}", tensor_, place, kKind<T>);
    return *std::move(value);
  }

  /// A number that could be symbolic in a graph, but not here. From 2^63 on it becomes negative, which view_of rejects.
  int64_t count(const std::string& place) const { return static_cast<int64_t>(get<uint64_t>(place + "/as_int")); }

  std::vector<int64_t> counts(const std::string& place) const {
    std::vector<int64_t> all(get<Json::List>(place).size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = count(formatted("{}/{}", place, i));
    return all;
  }

  FileCheck check_;
  std::string tensor_;
  const Json& json_;
};

}  // namespace

Index read_pt2(const std::string& path, const ZipFile& zip) {
  const FileCheck check(kPt2, path);
  const auto says = [&zip](std::string_view record, std::string_view text) {
    return zip.has(record) && as_text(zip.bytes(record)) == text;
  };

  check(!zip.has("serialized_exported_program.json"), kOldForm, "its weights are");
  std::vector<std::string_view> models;
  for (const auto& [name, entry] : zip.entries()) {
    const auto record = std::string_view(name).substr(zip.folder().size());
    if (record.starts_with("models/") && record.ends_with(".json")) models.push_back(record.substr(7, record.size() - 12));
  }
  const bool is_compiled = std::ranges::any_of(
      zip.entries(), [](const auto& entry) { return entry.first.find("data/aotinductor/") != std::string::npos; });
  check(!models.empty() || !is_compiled,
        "is a package compiled by AOTInductor, whose weights have no names; save the program before it is compiled, in Python: "
        "torch.export.save(PROGRAM, NEW_PATH)");
  check(says("archive_format", "pt2"),
        "must be an archive of torch.save, torch.jit.save or torch.export.save, but is a zip file without data.pkl and without "
        "archive_format pt2");
  check(says("archive_version", "0"), "must have archive_version 0");
  check(says("byteorder", "little"), "must have byteorder little");

  check(models.size() == 1, "must have one model, models/NAME.json, but has {}", models.size());

  Index index;
  for (const std::string kind : {"weights", "constants"}) {
    const auto folder = "data/" + kind + "/";
    check(!zip.has(formatted("{}{}.pt", folder, models[0])), kOldForm, "its " + kind + " are");
    const auto config = formatted("{}{}_{}_config.json", folder, models[0], kind);
    check(zip.has(config), "has no {}", in_quotes(config));
    const auto json = parse_json(kPt2, path + ": " + config, zip.bytes(config));
    const auto* found = json.find("config");
    check(found && found->object(), "{} must have config, an object", in_quotes(config));
    for (const auto& [name, entry] : *found->object()) {
      const Entry tensor(path, name, entry);
      const auto reason = tensor.reason_not_to_read();
      const bool is_new = !index.tensors.contains(name) && !index.unreadable.contains(name);
      if (reason) {
        index.unreadable.emplace(name, *reason);
      } else {
        index.tensors.emplace(name, tensor.read(zip, folder));
      }
      check(is_new, "has the tensor {} twice, in weights and in constants", in_quotes(name));
    }
  }
  return index;
}

}  // namespace xattn::detail
