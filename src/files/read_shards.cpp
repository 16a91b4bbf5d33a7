// SPDX-License-Identifier: Apache-2.0
#include <string_view>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/readers.h"

namespace xattn::detail {
namespace {

using namespace std::string_view_literals;

constexpr std::string_view kShards = "shards";

// Whether the name is that of a file in the same folder.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of("/\\\0"sv) == std::string::npos;
}

}  // namespace

ShardIndex read_shard_index(const std::string& path, Bytes file) {
  const FileCheck check(kShards, path);
  const auto json = parse_json(kShards, path, file);
  check(json.is_object() && json.contains("weight_map"),
        "must be the index of a sharded set, an object with the file of each tensor as weight_map, but has no weight_map");
  const auto& weight_map = json["weight_map"];
  check(weight_map.is_object(), "weight_map must be an object");

  ShardIndex index;
  for (const auto& [name, value] : weight_map.items()) {
    check(value.is_string(), "the file of tensor {} must be a string", in_quotes(name));
    const auto& shard = value.get_ref<const std::string&>();
    check(is_plain_name(shard), "the file of tensor {} must be a plain name in the same folder, but is {}", in_quotes(name),
          in_quotes(shard));
    index.file_of.emplace(name, shard);
  }
  if (!json.contains("metadata")) return index;
  const auto& metadata = json["metadata"];
  check(metadata.is_object(), "metadata must be an object");
  for (const auto& [name, value] : metadata.items()) {
    index.metadata.emplace(name, value.is_string() ? value.get<std::string>() : value.dump());
  }
  return index;
}

}  // namespace xattn::detail
