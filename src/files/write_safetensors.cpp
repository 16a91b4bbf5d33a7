// SPDX-License-Identifier: Apache-2.0
#include <xattn/safetensors.h>

#include <algorithm>
#include <ostream>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/safetensors_format.h"
#include "files/types.h"
#include "files/writable.h"
#include "files/write_beside.h"

namespace xattn {

using detail::in_quotes;

void save_safetensors(const std::string& path,
                      const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata) {
  save_safetensors(path, detail::writable(detail::kSafetensors, path, tensors), metadata);
}

void save_safetensors(const std::string& path, const LazyTensors& tensors, const std::map<std::string, std::string>& metadata) {
  const detail::FileCheck check(detail::kSafetensors, path);
  struct Item {
    const detail::FileType* type;
    std::string name;
    const TensorInfo* info;
  };
  std::vector<Item> items;
  for (const auto& [name, info] : tensors.infos) {
    check(name != detail::kSafetensorsMetadata, "a tensor must not have the format's own name {}", in_quotes(name));
    const auto* type = detail::find_type(info.type);
    check(type && !type->safetensors.empty(), "tensor {} is {}, which the format does not have", in_quotes(name),
          c10::getDtypeNames(info.type).first);
    items.push_back({type, name, &info});
  }
  std::ranges::stable_sort(items, {}, &Item::type);

  const auto quoted = [&check](std::string_view text) {
    const auto string = detail::json_string(text);
    check(string.has_value(), "names and metadata must be UTF-8");
    return *string;
  };
  std::vector<std::string> texts, entries;
  for (const auto& [name, text] : metadata) texts.push_back(detail::formatted("{}:{}", quoted(name), quoted(text)));
  if (!texts.empty()) {
    entries.push_back(detail::formatted("{}:{{{}}}", quoted(detail::kSafetensorsMetadata), detail::joined(texts, ",")));
  }
  uint64_t offset = 0;
  for (const auto& [type, name, info] : items) {
    const uint64_t end = offset + static_cast<uint64_t>(byte_count(*info));
    entries.push_back(detail::formatted(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", quoted(name),
                                        type->safetensors, detail::joined(info->shape, ","), offset, end));
    offset = end;
  }
  auto header = detail::formatted("{{{}}}", detail::joined(entries, ","));
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  const uint64_t header_size = header.size();
  check(header_size <= detail::kMaxSafetensorsHeader, "header length {} exceeds the format's limit of {}", header_size,
        detail::kMaxSafetensorsHeader);

  detail::write_beside(detail::kSafetensors, path, [&](std::ostream& out) {
    out.write(reinterpret_cast<const char*>(&header_size), sizeof(header_size));
    out.write(header.data(), static_cast<std::streamsize>(header_size));
    for (const auto& item : items) {
      if (!out) return;  // writing failed: the rest need not be made
      const auto tensor = detail::made(detail::kSafetensors, tensors, item.name);
      out.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
    }
  });
}

}  // namespace xattn
