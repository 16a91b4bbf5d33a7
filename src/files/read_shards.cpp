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
  const auto* files = json.find("weight_map");
  check(files,
        "must be the index of a sharded set, an object with the file of each tensor as weight_map, but has no weight_map");
  check(files->object(), "weight_map must be an object");

  ShardIndex index;
  for (const auto& [name, value] : *files->object()) {
    const auto shard = value.as<std::string>();
    check(shard.has_value(), "the file of tensor {} must be a string", in_quotes(name));
    check(is_plain_name(*shard), "the file of tensor {} must be a plain name in the same folder, but is {}", in_quotes(name),
          in_quotes(*shard));
    index.file_of.emplace(name, *shard);
  }
  const auto* metadata = json.find("metadata");
  if (!metadata) return index;
  check(metadata->object(), "metadata must be an object");
  for (const auto& [name, value] : *metadata->object()) {
    const auto text = value.as<std::string>();
    index.metadata.emplace(name, text ? *text : value.text());
  }
  return index;
}

}  // namespace xattn::detail
