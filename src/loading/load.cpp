// SPDX-License-Identifier: Apache-2.0
#include <xattn/load.h>

#include <torch/utils.h>
#include <xattn/cross_attention.h>
#include <xattn/safetensors.h>

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/text.h"
#include "files/check_file.h"
#include "loading/match.h"
#include "loading/model_config.h"
#include "loading/rename.h"

namespace xattn {
namespace {

using detail::list;

constexpr std::string_view kLoad = "load_weights", kSave = "save_safetensors";

// Throws if the file has different values for one tensor that the module has under several names.
void check_shared(const std::string& file, detail::Match& match, const std::vector<torch::Tensor>& values) {
  std::map<const void*, size_t> first;
  auto& misshapen = match.report.misshapen;
  for (size_t i = 0; i < values.size(); ++i) {
    const auto j = first.emplace(match.pairs[i].own.unsafeGetTensorImpl(), i).first->second;
    if (i == j || values[i].equal(values[j])) continue;
    misshapen.push_back(detail::formatted("{} and {} are one tensor of the module, but differ in the file", match.pairs[j].name,
                                          match.pairs[i].name));
  }
  if (misshapen.empty()) return;
  const auto reason = "does not fit the module" + list("misshapen", misshapen);
  detail::fail_to_match(kLoad, file, reason, std::move(match.report));
}

LoadReport load(torch::nn::Module& module,
                const std::string& file,
                LazyTensors source,
                const LoadOptions& options,
                const detail::ModelConfig* config) {
  std::map<std::string, std::string> names;
  if (!options.rename.empty()) {
    names = detail::rename(kLoad, file, source, options.rename);
    source = detail::renamed(std::move(source), names);
  }
  auto match = detail::match({kLoad, module, file, source, names, options, config});
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> values;  // all of them before anything changes: reading may fail, and memory run out
  for (const auto& [name, own, recipe] : match.pairs) {
    values.push_back(recipe.make(source, own.scalar_type()).to(own.scalar_type()));
  }
  check_shared(file, match, values);
  for (size_t i = 0; i < values.size(); ++i) match.pairs[i].own.copy_(values[i]);
  return std::move(match.report);
}

}  // namespace

std::string LoadReport::summary() const {
  return detail::formatted("loaded {} tensors", loaded.size()) + list("missing", missing) + list("unexpected", unexpected) +
         list("misshapen", misshapen) + list("of the block around the layer", surrounding);
}

LoadReport load_weights(torch::nn::Module& module, const Checkpoint& checkpoint, const LoadOptions& options) {
  std::optional<detail::ModelConfig> config;
  if (!options.ignore_config) config.emplace(checkpoint);
  return load(module, checkpoint.path(), lazy(checkpoint), options, config ? &*config : nullptr);
}

LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options) {
  return load_weights(module, open_checkpoint(path), options);
}

LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options) {
  return load(module, "set of tensors", lazy(tensors), options, nullptr);
}

void save_safetensors(const std::string& path,
                      const torch::nn::Module& module,
                      const std::map<std::string, std::string>& metadata) {
  auto with_heads = metadata;
  for (const auto& [layer, own] : detail::modules_of<CrossAttentionImpl>(module)) {
    const auto heads = std::to_string(own->options.num_heads());
    const auto& [name, text] = *with_heads.emplace(detail::heads_key(layer), heads).first;
    detail::check_value(text == heads, kSave, "metadata {} must be {}, the number of heads of that layer, but is {}.",
                        detail::in_quotes(name), heads, detail::in_quotes(text));
  }
  save_safetensors(path, detail::state_of(module), with_heads);
}

void save_safetensors(const std::string& path, const torch::nn::Module& module, const SaveOptions& options) {
  const auto& like = options.like;
  const detail::FileCheck check(kSave, like.path());
  std::vector<std::string> unreadable;
  for (const auto& [name, reason] : like.unreadable()) unreadable.push_back(name);
  check(unreadable.empty(), "must have only tensors that are read, to be copied{}", list("not read", unreadable));

  auto as = options.load;
  as.allow_unexpected = true;  // copied
  const auto names = detail::rename(kSave, like.path(), lazy(like), as.rename);
  const auto match = detail::match({kSave, module, like.path(), detail::renamed(lazy(like), names), names, as});
  std::map<std::string, std::vector<const detail::Match::Pair*>> parts;  // by name in the file
  for (const auto& pair : match.pairs) {
    check(pair.recipe.scale.empty(), "tensor {} must have a type other than float8 with a scale to be written back",
          detail::in_quotes(names.at(pair.recipe.source)));
    auto& of_name = parts[names.at(pair.recipe.source)];
    for (const auto* other : of_name) {  // a file may have one weight for query and key
      check(other->recipe.part != pair.recipe.part || other->own.equal(pair.own),
            "has one {} for several tensors of the module, but theirs differ", detail::in_quotes(names.at(pair.recipe.source)));
    }
    of_name.push_back(&pair);
  }
  auto tensors = lazy(like);
  NamedTensors added;
  for (const auto& name : match.report.missing) {
    const auto& own = match.state.at(name);
    const bool is_new = tensors.infos.emplace(match.prefix + name, TensorInfo{own.scalar_type(), own.sizes().vec()}).second;
    check(is_new, "has a tensor {}, which is also the name of one to be added", detail::in_quotes(match.prefix + name));
    added.emplace(match.prefix + name, own);
  }
  tensors.make = [&](const std::string& name) {
    if (const auto own = added.find(name); own != added.end()) return own->second;
    const torch::NoGradGuard no_grad;
    auto tensor = like.tensor(name);
    const auto own = parts.find(name);
    if (own == parts.end()) return tensor;
    tensor = tensor.contiguous();
    for (const auto* pair : own->second) pair->recipe.write(pair->own, tensor);
    return tensor;
  };
  auto metadata = like.metadata();
  for (const auto* of_shards : {"total_size", "total_parameters"}) metadata.erase(of_shards);
  metadata["format"] = "pt";
  save_safetensors(path, tensors, metadata);
}

}  // namespace xattn
