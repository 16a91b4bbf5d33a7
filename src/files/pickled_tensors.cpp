// SPDX-License-Identifier: Apache-2.0
#include "files/pickled_tensors.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <utility>

#include "base/text.h"
#include "files/types.h"

namespace xattn::detail {
namespace {

using Id = Pickle::Id;
using Kind = Pickle::Kind;

constexpr int kMaxNesting = 100;
constexpr size_t kChargesPerByte = 16;  // a tensor has about 60 bytes of pickle, and is charged about 150

const FileType* type_of_name(std::string_view name) {
  return find_type([name](const FileType& each) { return c10::getDtypeNames(each.type).first == name; });
}

// A class without its module. TorchScript has a storage class for each type.
const FileType* type_of_storage(std::string_view name) {
  return find_type([name](const FileType& each) { return name == formatted("{}Storage", c10::toString(each.type)); });
}

std::string_view without_module(std::string_view name) {
  return name.substr(name.rfind('.') + 1);
}

}  // namespace

std::optional<size_t> size_of_items(std::string_view storage_class) {
  if (const auto* type = type_of_storage(storage_class)) return c10::elementSize(type->type);
  constexpr std::array<std::string_view, 5> kOfBytes = {"UntypedStorage", "QInt8Storage", "QUInt8Storage", "QUInt4x2Storage",
                                                        "QUInt2x4Storage"};
  if (std::ranges::count(kOfBytes, storage_class) > 0) return 1;
  return storage_class == "QInt32Storage" ? std::optional<size_t>(4) : std::nullopt;
}

FindStorage storages_of(std::string_view reader, const std::string& path, const ZipFile& zip) {
  const auto order = zip.has("byteorder") ? as_text(zip.bytes("byteorder")) : "little";  // written since PyTorch 2.1
  FileCheck(reader, path)(order == "little", "must be little-endian, but gives its byte order as {}", in_quotes(order));
  return [&zip](std::string_view key) { return zip.bytes(formatted("data/{}", key)); };
}

PickledTensors::PickledTensors(
    std::string_view reader, const std::string& path, FindStorage find_storage, const Pickle& pickle, Kind container)
    : check_(reader, path),
      find_storage_(std::move(find_storage)),
      pickle_(pickle),
      container_(container),
      holds_(pickle.nodes.size()),
      left_(kChargesPerByte * pickle.bytes) {}

std::span<const Id> PickledTensors::entries(Id container) const {
  if (pickle_.kind(container) == Kind::object) {
    const auto state = pickle_.items(container);
    if (state.empty() || pickle_.kind(state[0]) != Kind::dict) return {};
    return pickle_.items(state[0]);
  }
  const auto items = pickle_.items(container);
  bool state = false;
  bool groups = false;
  for (size_t i = 0; i < items.size(); i += 2) {
    if (pickle_.kind(items[i]) != Kind::text) continue;
    state |= pickle_.text(items[i]) == "state" && pickle_.kind(items[i + 1]) == Kind::dict;
    groups |= pickle_.text(items[i]) == "param_groups" && pickle_.kind(items[i + 1]) == Kind::list;
  }
  return state && groups ? std::span<const Id>() : items;
}

bool PickledTensors::holds_tensors(Id id, int depth) {
  const auto kind = pickle_.kind(id);
  if (kind != container_) return kind == Kind::tensor || kind == Kind::other_tensor;
  check_(holds_[id] != Holds::being_asked, "must not hold a dict or a module that holds itself");
  if (holds_[id] != Holds::unknown) return holds_[id] == Holds::some;
  check_(depth <= kMaxNesting, "nests deeper than {} levels", kMaxNesting);
  holds_[id] = Holds::being_asked;
  bool some = false;
  const auto all = entries(id);
  for (size_t i = 1; i < all.size(); i += 2) some |= holds_tensors(all[i], depth + 1);
  holds_[id] = some ? Holds::some : Holds::none;
  return some;
}

void PickledTensors::add_all(const std::string& prefix, Id container, int depth) {
  check_(depth <= kMaxNesting, "nests deeper than {} levels", kMaxNesting);
  const auto all = entries(container);
  charge(all.size());
  for (size_t i = 0; i < all.size(); i += 2) {
    const auto value = all[i + 1];
    if (!holds_tensors(value, depth + 1)) continue;
    check_(pickle_.kind(all[i]) == Kind::text, "must name its tensors by texts, but has another key after {}",
           in_quotes(prefix));
    charge(prefix.size() + pickle_.text(all[i]).size());
    const auto name = formatted("{}{}", prefix, pickle_.text(all[i]));
    if (pickle_.kind(value) == container_) {
      add_all(name + ".", value, depth + 1);
    } else {
      add(name, value);
    }
  }
}

void PickledTensors::charge(size_t cost) {
  check_(cost <= left_, "expands to far more than a pickle of {} bytes should", pickle_.bytes);
  left_ -= cost;
}

// Arguments: storage, offset, shape, strides, whether it is trained, hooks; then its type, in _v3 only; then flags, if any.
std::optional<std::string> PickledTensors::reason_not_to_read(Id tensor) const {
  if (pickle_.kind(tensor) == Kind::other_tensor) return formatted("it is made by {}", shown(pickle_.text(tensor)));
  const auto arguments = pickle_.items(tensor);
  for (const auto argument : arguments) {
    if (pickle_.kind(argument) != Kind::foreign) continue;
    return formatted("it depends on an object of class {}", shown(pickle_.text(argument)));
  }
  const auto is = [&](size_t i, Kind kind) { return i < arguments.size() && pickle_.kind(arguments[i]) == kind; };
  for (size_t i = 6; i < arguments.size(); ++i) {
    if (is(i, Kind::dict) && !pickle_.items(arguments[i]).empty()) return "it is a conjugate or negative view";
  }
  if (!is(0, Kind::storage)) return {};
  const auto storage_class = without_module(pickle_.text(pickle_.items(arguments[0])[1]));
  const auto type = is(6, Kind::global) ? pickle_.text(arguments[6]) : storage_class;
  const bool known = is(6, Kind::global) ? type_of_name(type) != nullptr : type_of_storage(type) != nullptr;
  if (known && (type_of_storage(storage_class) != nullptr || storage_class == "UntypedStorage")) return {};
  return formatted("it is of type {} in {}", in_quotes(type), in_quotes(storage_class));
}

void PickledTensors::add(const std::string& name, Id tensor) {
  if (auto reason = reason_not_to_read(tensor)) {
    charge(64 + reason->size());
    check_(!tensors.contains(name) && unreadable.emplace(name, *std::move(reason)).second, "has the name {} twice",
           in_quotes(name));
    return;
  }
  const auto arguments = pickle_.items(tensor);
  const auto is = [&](size_t i, Kind kind) { return i < arguments.size() && pickle_.kind(arguments[i]) == kind; };
  check_(is(0, Kind::storage) && is(1, Kind::integer) && is(2, Kind::tuple) && is(3, Kind::tuple),
         "tensor {} must have a storage, an offset, a shape and strides", in_quotes(name));
  const auto parts = pickle_.items(arguments[0]);
  const auto storage_class = without_module(pickle_.text(parts[1]));
  const auto* type = is(6, Kind::global) ? type_of_name(pickle_.text(arguments[6])) : type_of_storage(storage_class);

  const auto shape = integers(name, arguments[2]);
  charge(64 + 16 * shape.size() + pickle_.text(parts[2]).size());
  const auto bytes = storage(name, parts, size_of_items(storage_class).value());
  std::string reason;
  auto stored = view_of(bytes, type->type, shape, integers(name, arguments[3]), pickle_.integer(arguments[1]), &reason);
  check_(stored.has_value(), "tensor {} {}", in_quotes(name), reason);
  check_(!unreadable.contains(name) && tensors.emplace(name, *std::move(stored)).second, "has the name {} twice",
         in_quotes(name));
}

std::vector<int64_t> PickledTensors::integers(const std::string& name, Id tuple) const {
  std::vector<int64_t> values;
  for (const auto item : pickle_.items(tuple)) {
    check_(pickle_.kind(item) == Kind::integer, "tensor {} must have a shape and strides of integers", in_quotes(name));
    values.push_back(pickle_.integer(item));
  }
  return values;
}

// The bytes of a storage with items of `item` bytes; `parts` is as in torch.serialization. Before PyTorch 0.4, a storage could be
// a part of another: its key, offset and size are then the last of `parts`.
Bytes PickledTensors::storage(const std::string& name, std::span<const Id> parts, size_t item) const {
  const auto key = pickle_.text(parts[2]);
  const auto count = pickle_.integer(parts[4]);
  const auto record = find_storage_(key);
  // An untyped storage may end in the middle of an item.
  const bool fits = count >= 0 && static_cast<uint64_t>(count) == record.size() / item;
  check_(fits, "tensor {} lies in storage {} of {} items of {} bytes, but its record has {} bytes", in_quotes(name),
         in_quotes(key), count, item, record.size());
  if (parts.size() < 6 || pickle_.kind(parts[5]) != Kind::tuple) return record.first(static_cast<size_t>(count) * item);
  const auto view = pickle_.items(parts[5]);
  const auto integer = [&](size_t i) {
    return i < view.size() && pickle_.kind(view[i]) == Kind::integer ? pickle_.integer(view[i]) : -1;
  };
  const auto offset = integer(1), size = integer(2);
  check_(offset >= 0 && size >= 0 && offset <= count && size <= count - offset,
         "tensor {} lies in a part of storage {}, which has {} items, that is not in it", in_quotes(name), in_quotes(key),
         count);
  return record.subspan(static_cast<size_t>(offset) * item, static_cast<size_t>(size) * item);
}

}  // namespace xattn::detail
