// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>
#include <xattn/file_error.h>
#include <xattn/find_layers.h>
#include <xattn/safetensors.h>
#include <xattn/state_dict.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/printed.h"
#include "cli/cli.h"
#include "loading/layouts.h"
#include "loading/recipes.h"
#include "programs/interrupt.h"
#include "programs/program.h"

namespace xattn::cli {
namespace {

using detail::advice_on;
using detail::name_roles;
using detail::NameRole;
using detail::recipes;
using detail::spell;

struct ConvertArguments {
  std::string input;
  std::string output;
  std::string layout;
  std::string to;
  bool allow_unexpected = false;
};

// The parameters of a layer, by their names in a CrossAttention; without data if `data` is false.
NamedTensors parameters_of(const FoundLayer& layer, const LazyTensors& tensors, bool data) {
  NamedTensors parameters;
  for (const auto& [name, recipe] : recipes(layer, tensors.infos)) {
    const auto like = at::dtype(recipe.type(tensors.infos)).device(at::kMeta);
    parameters[name] = data ? recipe.make(tensors) : at::empty(recipe.shape(tensors.infos.at(recipe.source)), like);
  }
  return parameters;
}

// Throws FileError unless the layer computes the same in its new layout, which must also have names for all of its tensors.
void check_convertible(const std::string& file,
                       const FoundLayer& layer,
                       const std::map<std::string, TensorInfo>& tensors,
                       const Layout& to) {
  const auto prefix = detail::in_quotes(layer.prefix);
  const auto refuse = [&](const std::string& reason) {
    throw FileError(fmt::format("[convert] {}: layer {} {}", file, prefix, reason));
  };
  const auto& from = detail::layout_of(layer);
  const bool is_other = &from != &to;
  std::vector<std::string> unexpected;
  for (const auto& [name, role] : name_roles(layer, tensors)) {
    const bool dropped = is_other && (role == NameRole::added || role == NameRole::input_norm);
    if (role == NameRole::unexplained || dropped) unexpected.push_back(name);
  }
  if (!unexpected.empty()) {
    refuse(fmt::format("must have only names that layout {} explains; unexpected: {}{}", is_other ? to.name : from.name,
                       fmt::join(unexpected, ", "), advice_on(unexpected)));
  }
  if (!layer.misshapen.empty()) refuse(fmt::format("does not fit together; misshapen: {}", fmt::join(layer.misshapen, ", ")));
  for (const auto& [name, recipe] : recipes(layer, tensors)) {
    if (const auto reason = recipe.misfit(tensors); !reason.empty()) refuse("does not fit together; misshapen: " + reason);
  }
  const auto text = [](const std::optional<double>& scale) { return scale ? fmt::format("{}", *scale) : "1 / sqrt(head_dim)"; };
  if (from.scale != to.scale) {
    refuse(fmt::format("has logits with scale {}, as layout {} says, but layout {} says {}", text(from.scale), from.name,
                       to.name, text(to.scale)));
  }
  if (layer.options.qk_norm() != NormKind::none && from.qk_norm.eps != to.qk_norm.eps) {
    refuse(fmt::format("has norms with eps {}, as layout {} says, but layout {} says {}", from.qk_norm.eps, from.name, to.name,
                       to.qk_norm.eps));
  }
}

// Renames the attention layers, cross and self, to another layout; data is made only when it is read. Throws FileError, naming
// the file, if two tensors would have one name.
LazyTensors renamed(const std::string& path, LazyTensors tensors, const std::vector<FoundLayer>& layers, const Layout& to) {
  LazyTensors result{tensors.infos, {}};
  std::map<std::string, FoundLayer> layer_of;  // by new name
  for (const auto& layer : layers) {
    for (const auto& [name, recipe] : recipes(layer, tensors.infos)) {
      result.infos.erase(recipe.source);
      result.infos.erase(recipe.scale);
    }
  }
  for (const auto& layer : layers) {
    for (const auto& [name, tensor] : spell(parameters_of(layer, tensors, /*data=*/false), to, layer.prefix)) {
      const bool is_new = result.infos.emplace(name, TensorInfo{tensor.scalar_type(), tensor.sizes().vec()}).second;
      if (!is_new) {
        throw FileError(
            fmt::format("[convert] {}: would have two tensors {} in layout {}", path, detail::in_quotes(name), to.name));
      }
      layer_of.emplace(name, layer);
    }
  }
  result.make = [tensors = std::move(tensors), layer_of = std::move(layer_of), &to](const std::string& name) {
    const auto layer = layer_of.find(name);
    if (layer == layer_of.end()) return tensors.make(name);
    return spell(parameters_of(layer->second, tensors, /*data=*/true), to, layer->second.prefix).at(name);
  };
  return result;
}

// Shows progress on a terminal, but not for small files.
LazyTensors with_progress(LazyTensors tensors) {
  constexpr int64_t kLarge = 1 << 28;
  int64_t all = 0;
  for (const auto& [name, info] : tensors.infos) all += byte_count(info);
  if (all < kLarge || isatty(STDERR_FILENO) == 0) return tensors;
  auto done = std::make_shared<int64_t>(0);
  return {tensors.infos, [tensors, done, all](const std::string& name) {
            *done += byte_count(tensors.infos.at(name));
            std::cerr << fmt::format("\r{:3} %  {:.1f} of {:.1f} GB{}", 100 * *done / all, 1e-9 * static_cast<double>(*done),
                                     1e-9 * static_cast<double>(all), *done == all ? "\n" : "")
                      << std::flush;
            return tensors.make(name);
          }};
}

// Stops before the next tensor after a signal; the unfinished file is then removed.
LazyTensors stoppable(const LazyTensors& tensors, const program::Interrupt& interrupt, const std::string& output) {
  return {tensors.infos, [tensors, &interrupt, output](const std::string& name) {
            interrupt.check(fmt::format("stopped; {} was not written", output));
            return tensors.make(name);
          }};
}

bool is_state_dict(const std::string& path) {
  constexpr std::array kEndings = {".pt", ".pth", ".bin"};
  return std::ranges::any_of(kEndings, [&](const auto* ending) { return path.ends_with(ending); });
}

void convert(const ConvertArguments& arguments) {
  if (!is_state_dict(arguments.output) && !arguments.output.ends_with(".safetensors")) {
    throw program::UsageError("OUT", "must end in .safetensors, .pt, .pth or .bin, but is " + arguments.output);
  }
  check_output(arguments.output, {arguments.input});
  const auto checkpoint = open_checkpoint(arguments.input);
  for (const auto& [name, reason] : checkpoint.unreadable()) checkpoint.tensor(name);  // throws: nothing is left out
  auto tensors = lazy(checkpoint);
  if (!arguments.to.empty()) {
    const auto& to = detail::layout_named(arguments.to);
    const auto layers = find_layers(tensors.infos, arguments.layout);
    for (const auto& layer : layers) {
      if (!arguments.allow_unexpected) check_convertible(arguments.input, layer, tensors.infos, to);
    }
    tensors = renamed(arguments.input, std::move(tensors), layers, to);
  }
  const program::Interrupt interrupt;
  tensors = stoppable(with_progress(std::move(tensors)), interrupt, arguments.output);
  if (is_state_dict(arguments.output)) {
    save_state_dict(arguments.output, tensors);
  } else {
    save_safetensors(arguments.output, tensors, checkpoint.metadata());
  }
}

}  // namespace

void add_convert(program::Command& xattn) {
  const auto arguments = std::make_shared<ConvertArguments>();
  auto command =
      xattn.subcommand("convert", "Write a file in another format or with other names.", [arguments] { convert(*arguments); });
  std::vector<std::string> names;
  for (const auto& layout : layouts()) names.emplace_back(layout.name);
  command.option("IN", arguments->input, "Weights in any format that inspect reads; for a sharded set its index.json or folder",
                 {.required = true});
  command.option("OUT", arguments->output, "File to write: safetensors, or for .pt, .pth and .bin a PyTorch state dict",
                 {.required = true});
  command.option("--to", arguments->to, "Rename the attention layers to this layout", {.one_of = names});
  command.option("--layout", arguments->layout, "Only the layers in this layout", {.one_of = names, .needs = "--to"});
  command.flag(
      "--allow-unexpected", arguments->allow_unexpected,
      "Keep names of layers that the new layout does not explain, and rename layers although it has another scale or eps",
      {.needs = "--to"});
  command.footer("Example: xattn convert pytorch_model.bin model.safetensors --to reference");
}

}  // namespace xattn::cli
