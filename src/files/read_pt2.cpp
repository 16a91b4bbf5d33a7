// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/readers.h"

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

using Json = nlohmann::json;

constexpr std::string_view kPt2 = "pt2";
constexpr uint64_t kStrided = 7;
constexpr char kOldForm[] =
    "{} pickled, as older versions of PyTorch wrote them, and pickles are not run; save it anew in Python: "
    "torch.save(torch.export.load(PATH).state_dict, NEW_PATH)";

// Both numbers, as all in the configs, are those of torch/_export/serde/schema.py, not of c10.
constexpr std::array<std::pair<uint64_t, at::ScalarType>, 21> kTypeNumbers{{
    {1, at::kByte},
    {2, at::kChar},
    {3, at::kShort},
    {4, at::kInt},
    {5, at::kLong},
    {6, at::kHalf},
    {7, at::kFloat},
    {8, at::kDouble},
    {9, at::kComplexHalf},
    {10, at::kComplexFloat},
    {11, at::kComplexDouble},
    {12, at::kBool},
    {13, at::kBFloat16},
    {28, at::kUInt16},
    {29, at::kFloat8_e4m3fn},
    {30, at::kFloat8_e5m2},
    {31, at::kFloat8_e4m3fnuz},
    {32, at::kFloat8_e5m2fnuz},
    {33, at::kFloat8_e8m0fnu},
    {34, at::kUInt32},
    {35, at::kUInt64},
}};

template <typename T>
constexpr std::string_view kKind = "";
template <>
constexpr std::string_view kKind<bool> = "true or false";
template <>
constexpr std::string_view kKind<uint64_t> = "a non-negative integer";
template <>
constexpr std::string_view kKind<std::string> = "a string";
template <>
constexpr std::string_view kKind<Json::array_t> = "a list";

// What a config says of one tensor.
class Entry {
 public:
  Entry(const std::string& path, const std::string& name, const Json& json)
      : path_(path), tensor_("tensor " + in_quotes(name)), json_(json) {}

  /// Its view of a storage in `folder`.
  StoredTensor read(const ZipFile& zip, const std::string& folder) const {
    check(!get<bool>("use_pickle"),
          "{} is pickled, as objects and tensors of classes of their own are, and pickles are not run; save plain tensors in "
          "Python: torch.save({{NAME: TENSOR, ...}}, NEW_PATH)",
          tensor_);
    const auto record = folder + get<std::string>("path_name");
    check(zip.has(record), "{} should be in {}, which is not there", tensor_, in_quotes(record));
    const auto layout = get<uint64_t>("tensor_meta/layout");
    check(layout == kStrided, "{} must have layout {}, strided, but has {}", tensor_, kStrided, layout);
    const auto number = get<uint64_t>("tensor_meta/dtype");
    const auto* type = std::ranges::find(kTypeNumbers, number, &std::pair<uint64_t, at::ScalarType>::first);
    check(type != kTypeNumbers.end(), "{} has dtype {}, which is none of PyTorch's numbers of types", tensor_, number);

    std::string reason;
    auto view = view_of(zip.bytes(record), type->second, counts("tensor_meta/sizes"), counts("tensor_meta/strides"),
                        count("tensor_meta/storage_offset"), &reason);
    check(view.has_value(), "{} {}", tensor_, reason);
    return *std::move(view);
  }

 private:
  template <typename... Args>
  void check(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    check_file(ok, kPt2, path_, format, std::forward<Args>(args)...);
  }

  /// The value at `place`, as in "tensor_meta/dtype".
  template <typename T>
  const T& get(const std::string& place) const {
    const Json::json_pointer pointer("/" + place);
    const T* value = json_.contains(pointer) ? json_[pointer].get_ptr<const T*>() : nullptr;
    check(value, "{} must have {}, {}", tensor_, place, kKind<T>);
    return *value;
  }

  /// A number that could be symbolic in a graph, but not here. From 2^63 on it becomes negative, which view_of refuses.
  int64_t count(const std::string& place) const { return static_cast<int64_t>(get<uint64_t>(place + "/as_int")); }

  std::vector<int64_t> counts(const std::string& place) const {
    std::vector<int64_t> all(get<Json::array_t>(place).size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = count(formatted("{}/{}", place, i));
    return all;
  }

  const std::string& path_;
  std::string tensor_;
  const Json& json_;
};

}  // namespace

Index read_pt2(const std::string& path, const ZipFile& zip) {
  const auto check = [&path]<typename... Args>(bool ok, fmt::format_string<Args...> format, Args&&... args) {
    check_file(ok, kPt2, path, format, std::forward<Args>(args)...);
  };
  const auto says = [&zip](std::string_view record, std::string_view text) {
    return zip.has(record) && as_text(zip.bytes(record)) == text;
  };

  check(!zip.has("serialized_exported_program.json"), kOldForm, "its weights are");
  check(says("archive_format", "pt2"),
        "must be an archive of torch.save, torch.jit.save or torch.export.save, but is a zip file without data.pkl and without "
        "archive_format pt2");
  check(says("archive_version", "0"), "must have archive_version 0");
  check(says("byteorder", "little"), "must have byteorder little");

  std::vector<std::string_view> models;
  for (const auto& [name, entry] : zip.entries()) {
    const auto record = std::string_view(name).substr(zip.folder().size());
    if (record.starts_with("models/") && record.ends_with(".json")) models.push_back(record.substr(7, record.size() - 12));
  }
  check(models.size() == 1, "must have one model, models/NAME.json, but has {}", models.size());

  Index index;
  for (const std::string kind : {"weights", "constants"}) {
    const auto folder = "data/" + kind + "/";
    check(!zip.has(formatted("{}{}.pt", folder, models[0])), kOldForm, "its " + kind + " are");
    const auto config = formatted("{}{}_{}_config.json", folder, models[0], kind);
    check(zip.has(config), "has no {}", in_quotes(config));
    const auto json = parse_json(kPt2, path + ": " + config, zip.bytes(config));
    check(json.is_object() && json.contains("config") && json["config"].is_object(), "{} must have config, an object",
          in_quotes(config));
    for (const auto& [name, entry] : json["config"].items()) {
      const bool is_new = index.tensors.emplace(name, Entry(path, name, entry).read(zip, folder)).second;
      check(is_new, "has the tensor {} twice, in weights and in constants", in_quotes(name));
    }
  }
  return index;
}

}  // namespace xattn::detail
