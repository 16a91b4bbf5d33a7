// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>
#include <caffe2/serialize/inline_container.h>
#include <xattn/state_dict.h>

#include <ostream>
#include <string_view>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/pickled_tensors.h"
#include "files/stored_tensor.h"
#include "files/types.h"
#include "files/writable.h"
#include "files/write_beside.h"

namespace xattn {
namespace {

using detail::in_quotes;

// Instructions of a pickle of protocol 2; see Python's pickletools.
template <typename T>
void put_number(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void put_text(std::string& out, std::string_view text) {
  out += 'X';
  put_number(out, static_cast<uint32_t>(text.size()));
  out += text;
}

void put_integer(std::string& out, int64_t value) {
  out += "\x8a\x08";
  put_number(out, value);
}

void put_tuple(std::string& out, at::IntArrayRef values) {
  out += '(';
  for (const auto value : values) put_integer(out, value);
  out += 't';
}

// A call of torch._utils._rebuild_tensor_v2 or _v3 with a contiguous tensor's storage, offset, shape, strides, no gradient, no
// hooks, and in _v3 its type.
void put_tensor(std::string& out, const TensorInfo& info, std::string_view key) {
  const auto type = info.type;
  const bool typed = detail::find_type(type)->has_storage_class;
  out += typed ? "ctorch._utils\n_rebuild_tensor_v2\n((" : "ctorch._utils\n_rebuild_tensor_v3\n((";
  put_text(out, "storage");
  out += typed ? detail::formatted("ctorch\n{}Storage\n", c10::toString(type)) : "ctorch.storage\nUntypedStorage\n";
  put_text(out, key);
  put_text(out, "cpu");
  put_integer(out, typed ? byte_count(info) / static_cast<int64_t>(c10::elementSize(type)) : byte_count(info));
  out += "tQ";
  put_integer(out, 0);
  put_tuple(out, info.shape);
  put_tuple(out, detail::contiguous_strides(info.shape));
  out +=
      "\x89"
      "ccollections\nOrderedDict\n)R";
  if (!typed) out += detail::formatted("ctorch\n{}\n", c10::getDtypeNames(type).first);
  out += "tR";
}

std::string pickle_of(const std::map<std::string, TensorInfo>& infos) {
  std::string out = "\x80\x02}(";
  int64_t key = 0;
  for (const auto& [name, info] : infos) {
    put_text(out, name);
    put_tensor(out, info, std::to_string(key++));
  }
  out += "u.";
  return out;
}

}  // namespace

void save_state_dict(const std::string& path, const NamedTensors& tensors) {
  save_state_dict(path, detail::writable(detail::kStateDict, path, tensors));
}

void save_state_dict(const std::string& path, const LazyTensors& tensors) {
  const detail::FileCheck check(detail::kStateDict, path);
  for (const auto& [name, info] : tensors.infos) {
    check(detail::json_string(name).has_value(), "names must be UTF-8");
    check(detail::find_type(info.type), "tensor {} is {}, which cannot be saved", in_quotes(name), c10::toString(info.type));
  }
  detail::write_beside(detail::kStateDict, path, [&](std::ostream& out) {
    // Errors are checked at the end, in `out`, and hidden from PyTorch's writer, whose destructor would throw.
    const auto write = [&out](const void* data, size_t size) {
      out.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
      return size;
    };
    caffe2::serialize::PyTorchStreamWriter archive(write);
    const auto pickle = pickle_of(tensors.infos);
    archive.writeRecord("data.pkl", pickle.data(), pickle.size());
    archive.writeRecord("byteorder", "little", 6);
    int64_t key = 0;
    for (const auto& [name, info] : tensors.infos) {
      if (!out) break;  // writing failed: the rest need not be made
      const auto tensor = detail::made(detail::kStateDict, tensors, name);
      archive.writeRecord(detail::formatted("data/{}", key++), tensor.const_data_ptr(), tensor.nbytes());
    }
    archive.writeEndOfFile();
  });
}

}  // namespace xattn
