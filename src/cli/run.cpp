// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/cross_attention.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cli.h"
#include "program.h"

namespace xattn::cli {
namespace {

constexpr auto kFooter =
    R"(Example: xattn run weights.safetensors --inputs in.safetensors --output out.safetensors --weights mean

IN holds query [B, Lq, Eq], key [B, Lk, Ek] and value [B, Lk, Ev], or context for both of these; optionally mask (boolean,
true = may attend, [B|1, Lk] or [B|1, H|1, Lq|1, Lk]) and bias (added to the logits). The layer runs in the type of query.
OUT gets output [B, Lq, Eo] and, if asked for, weights: mean [B, Lq, Lk] or per-head [B, H, Lq, Lk].)";

struct Arguments {
  std::string file;
  std::string inputs;
  std::string output;
  std::optional<std::string> prefix;
  int64_t heads = 1;
  std::string weights = "none";
  std::string device = program::default_device();
  int threads = 0;
};

[[noreturn]] void fail(const std::string& path, const std::string& message) {
  throw FileError(fmt::format("[run] {}: {}", path, message));
}

FoundLayer choose_layer(const NamedTensors& tensors, const Arguments& arguments) {
  const auto layers = find_layers(tensors);
  if (layers.empty()) {
    fail(arguments.file, "must hold query_linear, key_linear, value_linear and output_linear of a layer, but does not");
  }
  if (!arguments.prefix && layers.size() == 1) return layers.front();

  std::vector<std::string> prefixes;
  for (const auto& layer : layers) {
    if (arguments.prefix && (layer.prefix == *arguments.prefix || layer.prefix == *arguments.prefix + ".")) return layer;
    prefixes.push_back(nlohmann::json(layer.prefix).dump());
  }
  const auto given = arguments.prefix ? fmt::format("is \"{}\"", *arguments.prefix) : "was not given";
  fail(arguments.file, fmt::format("--prefix must be one of {}, but {}", fmt::join(prefixes, ", "), given));
}

struct Inputs {
  torch::Tensor query;
  torch::Tensor key;
  torch::Tensor value;
  Mask mask;
};

Inputs read_inputs(const std::string& path, torch::Device device) {
  const SafetensorsFile file(path);
  const auto has = [&](const char* name) { return file.entries().contains(name); };
  const auto get = [&](const char* name) { return file.tensor(name).to(device); };

  static const std::set<std::string> known = {"query", "key", "value", "context", "mask", "bias"};
  for (const auto& [name, entry] : file.entries()) {
    if (!known.contains(name)) {
      fail(path, fmt::format("may hold {} only, but holds {}", fmt::join(known, ", "), nlohmann::json(name).dump()));
    }
  }
  const bool pair = has("key") && has("value") && !has("context");
  const bool context = has("context") && !has("key") && !has("value");
  if (!has("query") || !(pair || context)) fail(path, "must hold query, and either key and value, or context");

  Inputs inputs{get("query"), get(pair ? "key" : "context"), get(pair ? "value" : "context"), {}};
  if (!inputs.query.is_floating_point()) fail(path, "query must have a floating point type");
  if (has("mask")) {
    const auto mask = get("mask");
    if (mask.dim() != 2 && mask.dim() != 4) {
      fail(path,
           fmt::format("mask must have shape [B|1, Lk] or [B|1, H|1, Lq|1, Lk], but has [{}]", fmt::join(mask.sizes(), ", ")));
    }
    inputs.mask = mask.dim() == 2 ? Mask::key_padding(mask) : Mask::dense(mask);
  }
  if (has("bias")) inputs.mask = inputs.mask & Mask::bias(get("bias"));
  return inputs;
}

// Whether or not the names differ: a hard link is the same file, too.
void check_output(const Arguments& arguments) {
  for (const auto& input : {arguments.file, arguments.inputs}) {
    std::error_code ignored;
    if (std::filesystem::equivalent(input, arguments.output, ignored)) {
      throw CLI::ValidationError("--output", "must not be an input, but is " + input);
    }
  }
}

AttentionWeights weights_of(const std::string& name) {
  if (name == "mean") return AttentionWeights::mean;
  return name == "none" ? AttentionWeights::none : AttentionWeights::per_head;
}

void run(const Arguments& arguments) {
  check_output(arguments);
  const auto device = program::find_device(arguments.device);
  program::set_threads(arguments.threads);

  const auto tensors = load_tensors(arguments.file);
  const auto layer = choose_layer(tensors, arguments);
  const auto inputs = read_inputs(arguments.inputs, device);

  CrossAttention attention(layer.with_heads(arguments.heads).attention_weights(weights_of(arguments.weights)));
  attention->to(device, inputs.query.scalar_type());
  load_weights(*attention, tensors, {.prefix = layer.prefix, .allow_unexpected = true});
  attention->eval();

  const torch::NoGradGuard no_grad;
  const auto [output, weights] = attention->forward(inputs.query, inputs.key, inputs.value, inputs.mask);
  std::map<std::string, torch::Tensor> results = {{"output", output}};
  if (weights.defined()) results["weights"] = weights;
  save_safetensors(arguments.output, results);
}

}  // namespace

void add_run(CLI::App& program) {
  auto* command = program.add_subcommand("run", "Run a cross-attention layer of a file on inputs from another.");
  const auto arguments = std::make_shared<Arguments>();
  command->add_option("FILE", arguments->file, "Weights: safetensors, or a TorchScript archive (trusted: it may run code)")
      ->required();
  command->add_option("--inputs", arguments->inputs, "safetensors with the inputs, as described below")
      ->required()
      ->type_name("IN");
  command->add_option("--output", arguments->output, "safetensors to write")->required()->type_name("OUT");
  command->add_option("--prefix", arguments->prefix, "What the layer's names begin with; needed if FILE holds several layers");
  command->add_option("--heads", arguments->heads, "Number of heads, which no file tells")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  command->add_option("--weights", arguments->weights, "Attention weights to write")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "mean", "per-head"}));
  program::add_device_option(*command, arguments->device);
  program::add_threads_option(*command, arguments->threads);
  command->footer(kFooter);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace xattn::cli
