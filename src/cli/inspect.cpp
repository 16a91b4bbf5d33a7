// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/checkpoint.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/load_modules.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/printed.h"
#include "cli/cli.h"
#include "modules/option_names.h"
#include "programs/program.h"

namespace xattn::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr auto kInspectFooter = R"(Example: xattn inspect weights.safetensors

--json prints one object, with every text whole:
  format    "safetensors", "state dict", "torchscript" or "pt2"
  metadata  object of strings
  tensors   list of {name, type, shape}, by name; types as in "float32"
  unreadable
            list of {name, reason}, by name: tensors that are in the file but are not read
  layers    list of {prefix, layout, kind, num_heads, dim_query, dim_key, dim_value, dim_output, inner_qk, inner_v, group,
            query_bias, key_bias, value_bias, output_bias, qk_norm, added_contexts, unexpected, misshapen, refused}, by prefix. kind is
            "cross", "self" or "unknown"; num_heads is null if the weights do not determine it; inner_qk and inner_v are the
            widths of all heads together; group is the number of query heads per key/value head; qk_norm is "none", "rms" or
            "layer"; added_contexts is the number of contexts beside the first. unexpected are names under the prefix that the
            layout does not explain, misshapen are tensors that do not fit together, and refused is why a config.json beside the
            file rules the layer out, or empty: run, verify and convert refuse layers with any of these.
  blocks    list of {prefix, layout, attention, norm, norm_bias, gate, feed_forward, feed_forward_glu, feed_forward_bias,
            unexpected, misshapen}, by prefix: the blocks around cross-attention layers. attention is the layer's prefix; norm
            is "rms" or "layer"; gate is "none", "scalar" or "per_feature"; feed_forward is the number of hidden features.)";

struct InspectArguments {
  std::string file;
  bool json = false;
};

Json layer_as_json(const FoundLayer& layer, const Checkpoint& file) {
  constexpr std::array kKinds = {"cross", "self", "unknown"};
  const auto& options = layer.options;
  return {{"prefix", layer.prefix},
          {"layout", layer.layout},
          {"kind", kKinds.at(static_cast<size_t>(layer.kind))},
          {"num_heads", layer.heads_known ? Json(options.num_heads()) : Json()},
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
          {"output_bias", options.output_bias()},
          {"qk_norm", detail::name_of(options.qk_norm())},
          {"added_contexts", layer.added.size()},
          {"unexpected", unexplained_names(layer, file.tensors())},
          {"misshapen", layer.misshapen},
          {"refused", refused_by_config(file, layer)}};
}

Json block_as_json(const FoundBlock& block, const Checkpoint& file) {
  const auto& options = block.options;
  return {{"prefix", block.prefix},
          {"layout", block.layout},
          {"attention", block.attention.prefix},
          {"norm", detail::name_of(options.norm())},
          {"norm_bias", options.norm() == NormKind::layer && options.norm_bias()},
          {"gate", detail::name_of(options.gate())},
          {"feed_forward", options.feed_forward().value()},
          {"feed_forward_glu", options.feed_forward_glu()},
          {"feed_forward_bias", options.feed_forward_bias()},
          {"unexpected", unexplained_names(block, file.tensors())},
          {"misshapen", block.misshapen}};
}

Json as_json(const Checkpoint& file) {
  auto tensors = Json::array(), unreadable = tensors, layers = tensors, blocks = tensors;
  for (const auto& [name, info] : file.tensors()) {
    tensors.push_back({{"name", name}, {"type", c10::getDtypeNames(info.type).first}, {"shape", info.shape}});
  }
  for (const auto& [name, reason] : file.unreadable()) unreadable.push_back({{"name", name}, {"reason", reason}});
  for (const auto& layer : find_layers(file.tensors())) layers.push_back(layer_as_json(layer, file));
  for (const auto& block : find_blocks(file.tensors())) blocks.push_back(block_as_json(block, file));
  return {{"format", to_string(file.format())},
          {"metadata", file.metadata()},
          {"tensors", tensors},
          {"unreadable", unreadable},
          {"layers", layers},
          {"blocks", blocks}};
}

// A value in a line of text. Names from the file become shortened JSON strings, which cannot control the terminal; of a list,
// the first few are shown.
std::string shown(const Json& value) {
  constexpr size_t kMostNames = 10;
  if (value.is_string()) return detail::in_quotes(value.get_ref<const std::string&>());
  if (!value.is_array()) return value.dump();
  std::vector<std::string> names;
  for (size_t i = 0; i < std::min(value.size(), kMostNames); ++i) names.push_back(shown(value[i]));
  if (value.size() > kMostNames) names.push_back(fmt::format("and {} more", value.size() - kMostNames));
  return fmt::format("[{}]", fmt::join(names, ", "));
}

void print(const Json& file) {
  constexpr size_t kWidest = 100;  // of the first column; longer names exceed it instead of widening every line
  const auto& tensors = file.at("tensors");
  std::cout << fmt::format("{}, {} tensors\n", file.at("format").get<std::string>(), tensors.size());
  size_t width = 0;
  for (const auto& tensor : tensors) {
    if (const auto size = shown(tensor.at("name")).size(); size <= kWidest) width = std::max(width, size);
  }
  for (const auto& tensor : tensors) {
    const auto shape = fmt::format("[{}]", fmt::join(tensor.at("shape").get<std::vector<int64_t>>(), ", "));
    std::cout << fmt::format("  {:{}}  {:15}  {}\n", shown(tensor.at("name")), width, tensor.at("type").get<std::string>(),
                             shape);
  }
  const auto &unreadable = file.at("unreadable"), &metadata = file.at("metadata");
  if (!unreadable.empty()) std::cout << "not read\n";
  for (const auto& tensor : unreadable) {
    const auto reason = detail::one_line(tensor.at("reason").get<std::string>());
    std::cout << fmt::format("  {}: {}\n", shown(tensor.at("name")), reason);
  }
  if (!metadata.empty()) std::cout << "metadata\n";
  for (const auto& [key, value] : metadata.items()) {
    std::cout << fmt::format("  {}: {}\n", detail::in_quotes(key), shown(value));
  }
  const auto list = [](const Json& all) {
    for (const auto& one : all) {
      std::vector<std::string> properties;
      for (const auto& [key, value] : one.items()) {
        properties.push_back(fmt::format("{} {}", key, shown(value)));
      }
      std::cout << fmt::format("  {}\n", fmt::join(properties, ", "));
    }
  };
  const auto &layers = file.at("layers"), &blocks = file.at("blocks");
  std::cout << (layers.empty() ? "no attention layer\n" : "attention layers\n");
  list(layers);
  if (!blocks.empty()) std::cout << "blocks around them\n";
  list(blocks);
}

void inspect(const InspectArguments& arguments) {
  const auto json = as_json(open_checkpoint(arguments.file));
  if (arguments.json) {
    std::cout << detail::printed_json(json.dump(2, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace)) << "\n";
  } else {
    print(json);
  }
}

}  // namespace

void add_inspect(program::Command& xattn) {
  const auto arguments = std::make_shared<InspectArguments>();
  auto command = xattn.subcommand("inspect", "Show the tensors of a file, and the attention layers and blocks among them.",
                                  [arguments] { inspect(*arguments); });
  command.option(
      "FILE", arguments->file,
      "safetensors (for a sharded set the index.json), the folder of a model, or an archive of torch.save, torch.jit.save or "
      "torch.export.save; nothing in it is ever executed",
      {.required = true});
  command.flag("--json", arguments->json, "Print JSON, as described below");
  command.footer(kInspectFooter);
}

}  // namespace xattn::cli
