// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>
#include <xattn/torchscript.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli.h"

namespace xattn::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr auto kFooter = R"(Example: xattn inspect weights.safetensors

--json prints one object:
  format    "safetensors" or "torchscript"
  metadata  object of strings
  tensors   list of {name, type, shape}, by name; types as in "float32"
  layers    list of {prefix, layout, dim_query, dim_key, dim_value, dim_output, inner_qk, inner_v, group,
            query_bias, key_bias, value_bias, output_bias}, by prefix. layout is "reference"; inner_qk and inner_v
            are the widths of all heads together; group is the number of query heads to a key/value head.)";

struct Arguments {
  std::string file;
  bool json = false;
};

struct Contents {
  std::string format;
  std::map<std::string, std::string> metadata;
  NamedTensors tensors;  // of a safetensors file on the meta device, which has types and shapes, and no data
};

Contents read(const std::string& path) {
  if (detect_format(path) == FileFormat::torchscript) {
    return {"torchscript", {}, load_torchscript(path)};
  }
  const SafetensorsFile file(path);
  Contents contents{"safetensors", file.metadata(), {}};
  for (const auto& [name, entry] : file.entries()) {
    contents.tensors.emplace(name, torch::empty(entry.shape, torch::dtype(entry.type).device(torch::kMeta)));
  }
  return contents;
}

std::string type_name(const torch::Tensor& tensor) {
  return std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

Json layer_as_json(const FoundLayer& layer) {
  const auto& options = layer.options;
  return {{"prefix", layer.prefix},
          {"layout", "reference"},
          {"dim_query", options.dim_query()},
          {"dim_key", options.dim_key()},
          {"dim_value", options.dim_value()},
          {"dim_output", options.dim_output()},
          {"inner_qk", options.num_heads() * options.head_dim().value()},
          {"inner_v", options.num_heads() * options.value_head_dim().value()},
          {"group", options.num_heads() / options.kv_heads().value()},
          {"query_bias", options.query_bias()},
          {"key_bias", options.key_bias()},
          {"value_bias", options.value_bias()},
          {"output_bias", options.output_bias()}};
}

Json as_json(const Contents& contents, const std::vector<FoundLayer>& layers) {
  Json tensors = Json::array();
  for (const auto& [name, tensor] : contents.tensors) {
    tensors.push_back({{"name", name}, {"type", type_name(tensor)}, {"shape", tensor.sizes().vec()}});
  }
  Json found = Json::array();
  for (const auto& layer : layers) found.push_back(layer_as_json(layer));
  return {{"format", contents.format}, {"metadata", contents.metadata}, {"tensors", tensors}, {"layers", found}};
}

// Text from the file is shown as JSON strings, which cannot drive the terminal.
void print(const Contents& contents, const std::vector<FoundLayer>& layers) {
  std::cout << fmt::format("{}, {} tensors\n", contents.format, contents.tensors.size());
  size_t width = 0;
  for (const auto& [name, tensor] : contents.tensors) width = std::max(width, Json(name).dump().size());
  for (const auto& [name, tensor] : contents.tensors) {
    const auto shape = fmt::format("[{}]", fmt::join(tensor.sizes(), ", "));
    std::cout << fmt::format("  {:{}}  {:15}  {}\n", Json(name).dump(), width, type_name(tensor), shape);
  }
  if (!contents.metadata.empty()) std::cout << "metadata\n";
  for (const auto& [key, value] : contents.metadata) {
    std::cout << fmt::format("  {}: {}\n", Json(key).dump(), Json(value).dump());
  }
  std::cout << (layers.empty() ? "no cross-attention layer\n" : "cross-attention layers\n");
  for (const auto& layer : layers) {
    std::vector<std::string> properties;
    const auto json = layer_as_json(layer);
    for (const auto& [key, value] : json.items()) properties.push_back(fmt::format("{} {}", key, value.dump()));
    std::cout << fmt::format("  {}\n", fmt::join(properties, ", "));
  }
}

void inspect(const Arguments& arguments) {
  const auto contents = read(arguments.file);
  const auto layers = find_layers(contents.tensors);
  if (arguments.json) {
    std::cout << as_json(contents, layers).dump(2) << "\n";
  } else {
    print(contents, layers);
  }
}

}  // namespace

void add_inspect(CLI::App& program) {
  auto* command = program.add_subcommand("inspect", "Show the tensors of a file, and the cross-attention layers among them.");
  const auto arguments = std::make_shared<Arguments>();
  command->add_option("FILE", arguments->file, "safetensors, or a TorchScript archive (trusted: it may run code)")->required();
  command->add_flag("--json", arguments->json, "Print JSON, as described below");
  command->footer(kFooter);
  command->callback([arguments] { inspect(*arguments); });
}

}  // namespace xattn::cli
