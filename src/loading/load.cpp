// SPDX-License-Identifier: Apache-2.0
#include <xattn/load.h>

#include <xattn/block_layouts.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "files/check_file.h"
#include "loading/choose.h"
#include "loading/layout_names.h"
#include "modules/option_names.h"

namespace xattn {
namespace {

using detail::list;
using Names = std::vector<std::string>;

NamedTensors state_of(const torch::nn::Module& module) {
  NamedTensors state;
  for (const auto& item : module.named_parameters()) state.emplace(item.key(), item.value());
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) state.emplace(item.key(), item.value());
  }
  return state;
}

bool converts(torch::ScalarType from, torch::ScalarType to) {
  return from == to || (c10::isFloatingType(from) && c10::isFloatingType(to)) ||
         (c10::isComplexType(from) && c10::isComplexType(to));
}

// Why a value from a file does not fit into a tensor of the module; empty if it does.
std::string misfit(torch::ScalarType type, const std::vector<int64_t>& shape, const torch::Tensor& target) {
  const auto type_name = [](torch::ScalarType scalar) { return c10::getDtypeNames(scalar).first; };
  if (target.sizes() != shape) {
    return detail::formatted("must have shape {}, but has [{}]", detail::shape_of(target), detail::joined(shape));
  }
  if (!converts(type, target.scalar_type())) {
    return detail::formatted("must convert to {}, but is {}", type_name(target.scalar_type()), type_name(type));
  }
  return "";
}

// What a load will do, found out before anything changes.
class Loader {
 public:
  // `name` of the file, for messages.
  Loader(torch::nn::Module& module, std::string name, LazyTensors source, const LoadOptions& options)
      : module_(module),
        name_(std::move(name)),
        source_(std::move(source)),
        options_(options),
        prefix_(options.prefix),
        state_(state_of(module)) {}

  LoadReport run() {
    find_layouts();
    match();
    refuse_faults();
    copy();
    return std::move(report_);
  }

 private:
  // Blocks and attention layers of the module that the file spells in a layout: their parameters get recipes.
  void find_layouts() {
    const auto own_blocks = modules_of<CrossAttentionBlockImpl>();
    const auto own_layers = modules_of<CrossAttentionImpl>();
    if (own_layers.empty()) return;  // and so nothing that holds one
    const auto* only = detail::layout_or_none(options_.layout);
    const auto blocks = own_blocks.empty() ? std::vector<FoundBlock>() : find_blocks(source_.infos, only);
    const auto layers = find_layers(source_.infos, only);
    std::vector<FoundLayer> decoupled;
    std::ranges::copy_if(layers, std::back_inserter(decoupled), [](const auto& layer) { return !layer.added.empty(); });
    choose_prefix<CrossAttentionBlockImpl>(blocks);
    choose_prefix<DecoupledCrossAttentionImpl>(decoupled);
    choose_prefix<CrossAttentionImpl>(layers);
    for (const auto& [path, own] : own_blocks) {
      const auto found = std::ranges::find(blocks, prefix_ + path, &FoundBlock::prefix);
      if (found == blocks.end()) continue;
      check_arithmetic(*found, path, *own);
      add(recipes(*found, source_.infos), path);
      add_surrounding(*found);
      misshapen_.insert(misshapen_.end(), found->attention.misshapen.begin(), found->attention.misshapen.end());
      done_.insert(own->attention.get());
    }
    for (const auto& [path, own] : modules_of<DecoupledCrossAttentionImpl>()) {
      add_layer(layers, path, path + "attention.", *own->attention);
    }
    for (const auto& [path, own] : own_layers) add_layer(layers, path, path, *own);
  }

  // If the module itself is one of these, and no prefix is given, the file's only one is meant.
  template <class Impl, class Found>
  void choose_prefix(const std::vector<Found>& found) {
    if (prefix_.empty() && module_.as<Impl>() && !found.empty()) prefix_ = detail::choose(name_, found, std::nullopt).prefix;
  }

  // What the file has at `path` for an attention at `inner`, the same or the first part of a decoupled one.
  void add_layer(const std::vector<FoundLayer>& layers,
                 const std::string& path,
                 const std::string& inner,
                 const CrossAttentionImpl& own) {
    const auto found = std::ranges::find(layers, prefix_ + path, &FoundLayer::prefix);
    if (found == layers.end() || !done_.insert(&own).second) return;
    check_arithmetic(*found, inner, own);
    misshapen_.insert(misshapen_.end(), found->misshapen.begin(), found->misshapen.end());
    add(recipes(*found, source_.infos), inner);
    add(added_recipes(*found, source_.infos), path);  // unexpected in a module without added contexts
    for (const auto& [name, role] : name_roles(*found, source_.infos)) {
      const bool known = role == NameRole::beside || (role == NameRole::input_norm && options_.without_input_norms);
      if (known) surrounding_.insert(found->prefix + name);
    }
  }

  // All behind the prefix of a block that its layout explains; those with recipes are used, and never looked up here.
  void add_surrounding(const FoundBlock& found) {
    const auto unexplained = unexplained_names(found, source_.infos);
    const auto& infos = source_.infos;
    for (auto item = infos.lower_bound(found.prefix); item != infos.end() && item->first.starts_with(found.prefix); ++item) {
      const bool known = !std::ranges::binary_search(unexplained, item->first.substr(found.prefix.size()));
      if (known) surrounding_.insert(item->first);
    }
    for (const auto& [parameter, recipe] : recipes(found, infos)) surrounding_.erase(recipe.source);
  }

  // All of a kind in the module, itself included, with their paths: empty, or with a point at the end.
  template <class Impl>
  std::vector<std::pair<std::string, Impl*>> modules_of() const {
    std::vector<std::pair<std::string, Impl*>> result;
    if (auto* self = module_.as<Impl>()) result.emplace_back("", self);
    for (const auto& item : module_.named_modules("", /*include_self=*/false)) {
      if (auto* one = item.value()->template as<Impl>()) result.emplace_back(item.key() + ".", one);
    }
    return result;
  }

  void add(const std::map<std::string, TensorRecipe>& of_layer, const std::string& path) {
    for (const auto& [parameter, recipe] : of_layer) recipes_.emplace(path + parameter, recipe);
  }

  // What a layout computes, the module must compute, too; nothing in the tensors would show that it does not.
  void check_arithmetic(const FoundLayer& layer, const std::string& path, const CrossAttentionImpl& attention) {
    if (layer.layout->scale) require(path, "scale", *layer.layout->scale, *attention.options.scale(), layer.layout->name);
  }

  void check_arithmetic(const FoundBlock& found, const std::string& path, const CrossAttentionBlockImpl& block) {
    using detail::name_of;
    const auto& layout = *found.layout;
    const auto &needed = found.options, &has = block.options;
    check_arithmetic(found.attention, path + "attention.", *block.attention);
    require(path, "norm", name_of(needed.norm()), name_of(has.norm()), layout.name);
    if (layout.norm_placement) {
      require(path, "norm_placement", name_of(*layout.norm_placement), name_of(has.norm_placement()), layout.name);
    }
    require(path, "gate", name_of(needed.gate()), name_of(has.gate()), layout.name);
    require(path, "feed_forward_glu", needed.feed_forward_glu(), has.feed_forward_glu(), layout.name);
  }

  template <class T>
  void require(const std::string& path, std::string_view option, const T& needed, const T& has, std::string_view layout) {
    if (needed == has) return;
    const auto which = path.empty() ? "the module" : path.substr(0, path.size() - 1);
    report_.misshapen.push_back(
        detail::formatted("{} must have {} {}, as layout {} needs, but has {}", which, option, needed, layout, has));
  }

  TensorRecipe recipe_of(const std::string& name) const {
    const auto found = recipes_.find(name);
    if (found != recipes_.end()) return found->second;
    auto recipe = detail::with_scale({prefix_ + name}, source_.infos);
    const auto scale = recipe.scale.substr(std::min(prefix_.size(), recipe.scale.size()));
    return state_.contains(scale) ? TensorRecipe{prefix_ + name} : recipe;  // which has a use of its own for it
  }

  void match() {
    std::set<std::string> used;  // names of the file
    std::set<const void*> filled;
    Names absent;
    for (const auto& [name, target] : state_) {
      const auto recipe = recipe_of(name);
      const auto info = source_.infos.find(recipe.source);
      if (info == source_.infos.end()) {
        absent.push_back(name);
        continue;
      }
      used.insert(recipe.source);
      used.insert(recipe.scale);
      if (const auto reason = recipe.misfit(source_.infos); !reason.empty()) {
        report_.misshapen.push_back(reason);
        continue;
      }
      if (const auto reason = misfit(recipe.type(source_.infos), recipe.shape(info->second), target); !reason.empty()) {
        report_.misshapen.push_back(name + " " + reason);
        continue;
      }
      report_.loaded.push_back(name);
      copies_.push_back({target, recipe});
      filled.insert(target.unsafeGetTensorImpl());
    }
    for (const auto& name : absent) {
      const bool shared = filled.contains(state_.at(name).unsafeGetTensorImpl());
      (shared ? report_.loaded : report_.missing).push_back(name);
    }
    for (const auto& reason : misshapen_) {
      if (std::ranges::count(report_.misshapen, reason) == 0) report_.misshapen.push_back(reason);
    }
    std::ranges::sort(report_.loaded);
    for (const auto& [full_name, info] : source_.infos) {
      if (!full_name.starts_with(prefix_) || used.contains(full_name)) continue;
      auto& list = surrounding_.contains(full_name) ? report_.surrounding : report_.unexpected;
      list.push_back(full_name.substr(prefix_.size()));
    }
  }

  void refuse_faults() {
    const auto faults = (options_.allow_missing ? "" : list("missing", report_.missing)) +
                        (options_.allow_unexpected ? "" : list("unexpected", report_.unexpected)) +
                        list("misshapen", report_.misshapen);
    if (faults.empty()) return;
    const auto advice = options_.allow_unexpected ? "" : advice_on(report_.unexpected);
    const auto message = detail::formatted("[load_weights] {}: does not fit the module{}{}", name_, faults, advice);
    throw LoadError(detail::one_line(message), std::move(report_));
  }

  void copy() {
    struct Made {
      torch::Tensor target;
      torch::Tensor value;
    };
    const torch::NoGradGuard no_grad;
    std::vector<Made> made;  // reading may fail, and memory run out: before anything changes
    for (const auto& [target, recipe] : copies_) {
      made.push_back({target, recipe.make(source_, target.scalar_type()).to(target.scalar_type())});
    }
    for (auto& [target, value] : made) target.copy_(value);
  }

  struct Copy {
    torch::Tensor target;
    TensorRecipe recipe;
  };

  torch::nn::Module& module_;
  std::string name_;
  LazyTensors source_;
  const LoadOptions& options_;
  std::string prefix_;
  NamedTensors state_;
  std::map<std::string, TensorRecipe> recipes_;  // by name in the module
  std::set<const CrossAttentionImpl*> done_;     // have recipes
  std::set<std::string> surrounding_;            // names in the file, known not to be of a layer or block that has them
  Names misshapen_;                              // what does not fit together in layers of the file, whatever the module has
  std::vector<Copy> copies_;
  LoadReport report_;
};

}  // namespace

std::string LoadReport::summary() const {
  return detail::formatted("loaded {} tensors", loaded.size()) + list("missing", missing) + list("unexpected", unexpected) +
         list("misshapen", misshapen) + list("of the block around the layer", surrounding);
}

LoadReport load_weights(torch::nn::Module& module, const Checkpoint& checkpoint, const LoadOptions& options) {
  return Loader(module, checkpoint.path(), lazy(checkpoint), options).run();
}

LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options) {
  return load_weights(module, open_checkpoint(path), options);
}

LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options) {
  return Loader(module, "set of tensors", lazy(tensors), options).run();
}

void save_safetensors(const std::string& path,
                      const torch::nn::Module& module,
                      const std::map<std::string, std::string>& metadata) {
  save_safetensors(path, state_of(module), metadata);
}

}  // namespace xattn
