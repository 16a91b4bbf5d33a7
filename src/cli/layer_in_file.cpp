// SPDX-License-Identifier: Apache-2.0
#include "cli/layer_in_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/ip_adapter.h>
#include <xattn/load_modules.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "base/printed.h"

namespace xattn::cli {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& message) {
  throw FileError(fmt::format("[inputs] {}: {}", path, message));
}

struct Inputs {
  torch::Tensor query;
  torch::Tensor key;
  torch::Tensor value;
  torch::Tensor ip_context;  // undefined if there is none
  Mask mask;
};

void check_names(const Checkpoint& file, bool fixture) {
  std::set<std::string> known = {"query", "key", "value", "context", "ip_context", "mask", "bias"};
  if (fixture) known.insert({"output", "weights"});
  for (const auto& [name, info] : file.tensors()) {
    if (known.contains(name)) continue;
    fail(file.path(), fmt::format("may hold {} only, but holds {}", fmt::join(known, ", "), detail::in_quotes(name)));
  }
}

Inputs read_inputs(const Checkpoint& file, torch::Device device, bool fixture) {
  check_names(file, fixture);
  const auto has = [&](const char* name) { return file.contains(name); };
  const auto get = [&](const char* name) { return file.tensor(name).to(device); };
  const bool pair = has("key") && has("value") && !has("context");
  const bool context = has("context") && !has("key") && !has("value");
  if (!has("query") || !(pair || context)) fail(file.path(), "must hold query, and either key and value, or context");

  Inputs inputs{get("query"), get(pair ? "key" : "context"), get(pair ? "value" : "context"), {}, {}};
  if (has("ip_context")) inputs.ip_context = get("ip_context");
  constexpr std::array kTypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};
  if (!inputs.query.is_floating_point()) fail(file.path(), "query must have a floating point type");
  if (std::ranges::count(kTypes, inputs.query.scalar_type()) == 0) {
    fail(file.path(), fmt::format("query must have type float64, float32, bfloat16 or float16, but has {}",
                                  c10::getDtypeNames(inputs.query.scalar_type()).first));
  }
  if (has("mask")) {
    const auto mask = get("mask");
    if (mask.dim() != 2 && mask.dim() != 4) {
      fail(file.path(),
           fmt::format("mask must have shape [B|1, Lk] or [B|1, H|1, Lq|1, Lk], but has [{}]", fmt::join(mask.sizes(), ", ")));
    }
    inputs.mask = mask.dim() == 2 ? Mask::key_padding(mask) : Mask::dense(mask);
  }
  if (has("bias")) inputs.mask = inputs.mask & Mask::bias(get("bias"));
  return inputs;
}

}  // namespace

const char* const kInputsHelp =
    "query [B, Lq, Eq], key [B, Lk, Ek] and value [B, Lk, Ev], or context for both of these; optionally mask (boolean,\n"
    "true = may attend, [B|1, Lk] or [B|1, H|1, Lq|1, Lk]), bias (added to the logits), and ip_context [B, Lk2, Ek2] for a\n"
    "layer with a second context (IP-Adapter, Wan image-to-video). The layer runs in the type of query.";

void add_layer_options(program::Command& command, LayerArguments& arguments) {
  command.option("--prefix", arguments.prefix, "What the layer's names begin with; needed if FILE holds several layers");
  command.option("--layout", arguments.layout, "The layer's layout, as inspect prints it; by default found from the names");
  command.option("--heads", arguments.heads, "Number of heads; by default from a config.json beside FILE",
                 {.range = {{1, 65536}}});
  command.option("--qk-norm-eps", arguments.qk_norm_eps, "Of norms of queries and keys; by default that of the layout's family",
                 {.not_negative = true});
  command.flag(
      "--allow-unexpected", arguments.allow_unexpected,
      "Ignore names of the layer that its layout does not explain, as inspect lists them; results may then differ from "
      "the model's");
  command.option("--ip-scale", arguments.ip_scale, "Factor of the attention to ip_context");
  command.option("--ip-adapter", arguments.ip_adapter, "File of an IP-Adapter, with the second context of the layer in FILE");
  command.option("--ip-prefix", arguments.ip_prefix,
                 "What the layer's names in that file begin with; by default found from the layer's place in FILE",
                 {.needs = "--ip-adapter"});
  program::add_device_option(command, arguments.device);
  program::add_threads_option(command, arguments.threads);
}

LayerResults run_layer(const std::string& path,
                       const std::string& inputs,
                       const LayerArguments& arguments,
                       AttentionWeights weights,
                       bool fixture) {
  const auto device = program::find_device(arguments.device);
  program::set_threads(arguments.threads);
  auto file = open_checkpoint(path);
  const auto layer = choose_layer(file, arguments.prefix, arguments.layout);
  const auto given = read_inputs(open_checkpoint(inputs), device, fixture);
  if (!arguments.ip_adapter.empty()) {
    if (!given.ip_context.defined()) fail(inputs, "must hold ip_context for the IP-Adapter");
    std::map<std::string, std::string> places;
    if (!arguments.ip_prefix.empty()) places.emplace(layer.prefix, arguments.ip_prefix);
    file = with_ip_adapter(file, open_checkpoint(arguments.ip_adapter), places);
  }

  LayerOptions options{.prefix = layer.prefix,
                       .layout = arguments.layout,
                       .num_heads = arguments.heads,
                       .qk_norm_eps = arguments.qk_norm_eps,
                       .attention_weights = weights,
                       .dtype = given.query.scalar_type(),
                       .allow_unexpected = arguments.allow_unexpected,
                       .without_input_norms = true};  // applied below
  const auto prepare = [&](auto module) {
    module->to(device, given.query.scalar_type());
    module->eval();
    return module;
  };
  const torch::NoGradGuard no_grad;
  if (given.ip_context.defined()) {
    options.without_input_norms = false;  // this branch does not apply any
    const auto attention = prepare(decoupled_cross_attention_from(file, options, arguments.ip_scale));
    const auto [output, returned] =
        attention.ptr()->forward(given.query, given.key, given.value, {{given.ip_context, given.ip_context}}, given.mask);
    return {output, returned};
  }
  if (!layer.added.empty() && !arguments.allow_unexpected) {
    fail(inputs, fmt::format("must hold ip_context, for the second context of layer {}", detail::in_quotes(layer.prefix)));
  }
  const auto [of_query, of_context] = input_norms(file, layer);
  auto query_norm = prepare(of_query);
  auto context_norm = prepare(of_context);
  const auto attention = prepare(cross_attention_from(file, options));
  const auto [output, returned] =
      attention.ptr()->forward(query_norm(given.query), context_norm(given.key), context_norm(given.value), given.mask);
  return {output, returned};
}

}  // namespace xattn::cli
