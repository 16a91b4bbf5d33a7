// SPDX-License-Identifier: Apache-2.0
#include <xattn/safetensors.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string_view>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "files/safetensors_types.h"
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
    const detail::SafetensorsType* type;
    std::string name;
    const TensorInfo* info;
  };
  std::vector<Item> items;
  for (const auto& [name, info] : tensors.infos) {
    check(name != detail::kSafetensorsMetadata, "a tensor must not have the format's own name {}", in_quotes(name));
    const auto* type = detail::find_safetensors_type(info.type);
    check(type, "tensor {} is {}, which the format does not have", in_quotes(name), c10::getDtypeNames(info.type).first);
    items.push_back({type, name, &info});
  }
  std::ranges::stable_sort(items, {}, &Item::type);

  std::string header;
  const auto add = [&header](const std::string& name, const std::string& value) {
    header += detail::formatted("{}{}:{}", header.empty() ? "{" : ",", nlohmann::json(name).dump(), value);
  };
  try {
    if (!metadata.empty()) add(std::string(detail::kSafetensorsMetadata), nlohmann::json(metadata).dump());
    uint64_t offset = 0;
    for (const auto& [type, name, info] : items) {
      const uint64_t end = offset + static_cast<uint64_t>(byte_count(*info));
      add(name, detail::formatted(R"({{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", type->name,
                                  detail::joined(info->shape, ","), offset, end));
      offset = end;
    }
  } catch (const nlohmann::json::type_error&) {
    check.fail("names and metadata must be UTF-8");
  }
  header += header.empty() ? "{}" : "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  const uint64_t header_size = header.size();
  check(header_size <= detail::kMaxSafetensorsHeader, "header length {} exceeds the format's limit of {}", header_size,
        detail::kMaxSafetensorsHeader);

  detail::write_beside(detail::kSafetensors, path, [&](std::ostream& out) {
    out.write(reinterpret_cast<const char*>(&header_size), sizeof(header_size));
    out.write(header.data(), static_cast<std::streamsize>(header_size));
    for (const auto& item : items) {
      if (!out) return;  // writing failed: the rest need not be made
      const auto plain = detail::plain(tensors.make(item.name));
      out.write(static_cast<const char*>(plain.const_data_ptr()), static_cast<std::streamsize>(plain.nbytes()));
    }
  });
}

}  // namespace xattn
