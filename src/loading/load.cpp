// SPDX-License-Identifier: Apache-2.0
#include <xattn/load.h>

#include <torch/utils.h>
#include <xattn/block.h>
#include <xattn/decoupled.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <string_view>
#include <utility>

#include "base/describe.h"
#include "base/text.h"
#include "files/check_file.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/layouts.h"
#include "loading/recipes.h"
#include "modules/option_names.h"

namespace xattn {
namespace {

using detail::added_recipes;
using detail::formatted;
using detail::list;
using detail::name_roles;
using detail::NameRole;
using detail::recipes;
using detail::TensorRecipe;
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

// The reason why a value from a file does not fit a tensor of the module; empty if it fits.
std::string misfit(torch::ScalarType type, const std::vector<int64_t>& shape, const torch::Tensor& target) {
  if (target.sizes() != shape) {
    return formatted("must have shape {}, but has [{}]", detail::shape_of(target), detail::joined(shape));
  }
  if (!converts(type, target.scalar_type())) {
    return formatted("must convert to {}, but is {}", detail::type_of(target), c10::getDtypeNames(type).first);
  }
  return "";
}

// The prefix of options, with the point at its end if names of the file have one there.
std::string prefix_of(const LoadOptions& options, const detail::Infos& infos) {
  auto prefix = options.prefix.value_or("");
  if (prefix.empty() || prefix.ends_with('.')) return prefix;
  const auto with_point = prefix + ".";
  const auto first = infos.lower_bound(with_point);
  return first != infos.end() && first->first.starts_with(with_point) ? with_point : prefix;
}

// Determines what a load will do before anything changes.
class Loader {
 public:
  // `name`: the file's, for messages.
  Loader(torch::nn::Module& module, std::string name, LazyTensors source, const LoadOptions& options)
      : module_(module),
        name_(std::move(name)),
        source_(std::move(source)),
        options_(options),
        prefix_(prefix_of(options, source_.infos)),
        state_(state_of(module)) {}

  LoadReport run() {
    find_layouts();
    match();
    refuse_faults();
    copy();
    return std::move(report_);
  }

 private:
  // Adds recipes for the module's blocks and attention layers that the file names by a layout.
  void find_layouts() {
    const auto own_blocks = modules_of<CrossAttentionBlockImpl>();
    const auto own_layers = modules_of<CrossAttentionImpl>();
    if (own_layers.empty()) return;  // blocks and decoupled layers hold one, too
    const auto& infos = source_.infos;
    const auto blocks = own_blocks.empty() ? std::vector<FoundBlock>() : find_blocks(infos, options_.layout);
    const auto layers = find_layers(infos, options_.layout);
    std::vector<FoundLayer> decoupled;
    std::ranges::copy_if(layers, std::back_inserter(decoupled), [](const auto& layer) { return !layer.added.empty(); });
    choose_prefix<CrossAttentionBlockImpl>(blocks);
    choose_prefix<DecoupledCrossAttentionImpl>(decoupled);
    choose_prefix<CrossAttentionImpl>(layers);
    for (const auto& [path, own] : own_blocks) {
      const auto* found = at_prefix(blocks, path);
      if (!found) continue;
      check_arithmetic(*found, path, *own);
      add(recipes(*found, infos), path);
      add(name_roles(*found, infos), found->prefix);
      misshapen_.insert(misshapen_.end(), found->attention.misshapen.begin(), found->attention.misshapen.end());
      done_.insert(own->attention.get());
    }
    for (const auto& [path, own] : modules_of<DecoupledCrossAttentionImpl>()) {
      add_layer(layers, path, path + "attention.", *own->attention);
    }
    for (const auto& [path, own] : own_layers) add_layer(layers, path, path, *own);
  }

  // If the module itself is one of these, and no prefix is given, the file's only one is used.
  template <class Impl, class Found>
  void choose_prefix(const std::vector<Found>& found) {
    if (!options_.prefix && module_.as<Impl>() && !found.empty()) prefix_ = detail::choose(name_, found, std::nullopt).prefix;
  }

  template <class Found>
  const Found* at_prefix(const std::vector<Found>& all, const std::string& path) const {
    const auto found = std::ranges::find(all, prefix_ + path, &Found::prefix);
    return found == all.end() ? nullptr : &*found;
  }

  // Adds the file's layer at `path` for the attention at `inner`: the same path, or the first part of a decoupled layer.
  void add_layer(const std::vector<FoundLayer>& layers,
                 const std::string& path,
                 const std::string& inner,
                 const CrossAttentionImpl& own) {
    const auto* found = at_prefix(layers, path);
    if (!found || !done_.insert(&own).second) return;
    check_arithmetic(*found, inner, own);
    misshapen_.insert(misshapen_.end(), found->misshapen.begin(), found->misshapen.end());
    add(recipes(*found, source_.infos), inner);
    add(added_recipes(*found, source_.infos), path);  // unexpected in a module without added contexts
    add(name_roles(*found, source_.infos), found->prefix);
  }

  void add(const detail::Recipes& of_layer, const std::string& path) {
    for (const auto& [parameter, recipe] : of_layer) recipes_.emplace(path + parameter, recipe);
  }

  // Records names below the prefix of a layer or block that are not part of it, and its names elsewhere.
  void add(const std::map<std::string, NameRole>& roles, const std::string& prefix) {
    for (const auto& [name, role] : roles) {
      const bool known = role == NameRole::beside || (role == NameRole::input_norm && options_.without_input_norms);
      if (known) surrounding_.insert(prefix + name);
      if (role == NameRole::unexplained) unexplained_.insert(source_.infos.contains(prefix + name) ? prefix + name : name);
    }
  }

  // All submodules of this type, the module itself included, by their paths: empty, or ending in a point.
  template <class Impl>
  std::vector<std::pair<std::string, Impl*>> modules_of() const {
    std::vector<std::pair<std::string, Impl*>> result;
    if (auto* self = module_.as<Impl>()) result.emplace_back("", self);
    for (const auto& item : module_.named_modules("", /*include_self=*/false)) {
      if (auto* one = item.value()->template as<Impl>()) result.emplace_back(item.key() + ".", one);
    }
    return result;
  }

  // The module must compute what the layout computes; nothing in the tensors would reveal a difference.
  void check_arithmetic(const FoundLayer& layer, const std::string& path, const CrossAttentionImpl& attention) {
    const auto& scale = detail::layout_of(layer).scale;
    if (scale) require(path, "scale", *scale, *attention.options.scale(), layer.layout);
  }

  void check_arithmetic(const FoundBlock& found, const std::string& path, const CrossAttentionBlockImpl& block) {
    using detail::name_of;
    const auto &needed = found.options, &has = block.options;
    const auto& placement = detail::block_layout_named(found.layout).norm_placement;
    check_arithmetic(found.attention, path + "attention.", *block.attention);
    require(path, "norm", name_of(needed.norm()), name_of(has.norm()), found.layout);
    if (placement) require(path, "norm_placement", name_of(*placement), name_of(has.norm_placement()), found.layout);
    require(path, "gate", name_of(needed.gate()), name_of(has.gate()), found.layout);
    require(path, "feed_forward_glu", needed.feed_forward_glu(), has.feed_forward_glu(), found.layout);
  }

  template <class T>
  void require(const std::string& path, std::string_view option, const T& needed, const T& has, std::string_view layout) {
    if (needed == has) return;
    const auto which = path.empty() ? "the module" : path.substr(0, path.size() - 1);
    report_.misshapen.push_back(
        formatted("{} must have {} {}, as layout {} needs, but has {}", which, option, needed, layout, has));
  }

  TensorRecipe recipe_of(const std::string& name) const {
    const auto found = recipes_.find(name);
    if (found != recipes_.end()) return found->second;
    auto recipe = detail::with_scale({prefix_ + name}, source_.infos);
    const auto scale = recipe.scale.substr(std::min(prefix_.size(), recipe.scale.size()));
    return state_.contains(scale) ? TensorRecipe{prefix_ + name} : recipe;  // the module may have a parameter of this name
  }

  void match() {
    std::set<std::string> used;  // names of the file
    std::set<const void*> filled;
    Names absent;
    for (const auto& [name, target] : state_) {
      const auto recipe = recipe_of(name);
      const auto info = source_.infos.find(recipe.source);
      if (info == source_.infos.end()) {
        const auto reason = source_.unreadable.find(recipe.source);
        if (reason == source_.unreadable.end()) {
          absent.push_back(name);
        } else {
          used.insert(recipe.source);
          report_.misshapen.push_back(formatted("{} is not read: {}", name, reason->second));
        }
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
    const auto sort_in = [&](const std::string& full_name) {
      const bool below = full_name.starts_with(prefix_);
      if (used.contains(full_name) || (!below && !unexplained_.contains(full_name))) return;
      auto& list = surrounding_.contains(full_name) ? report_.surrounding : report_.unexpected;
      list.push_back(below ? full_name.substr(prefix_.size()) : full_name);
    };
    for (const auto& [full_name, info] : source_.infos) sort_in(full_name);
    for (const auto& [full_name, reason] : source_.unreadable) sort_in(full_name);
  }

  void refuse_faults() {
    const auto faults = (options_.allow_missing ? "" : list("missing", report_.missing)) +
                        (options_.allow_unexpected ? "" : list("unexpected", report_.unexpected)) +
                        list("misshapen", report_.misshapen);
    if (faults.empty()) return;
    const auto advice = options_.allow_unexpected ? "" : detail::advice_on(report_.unexpected);
    const auto message = formatted("[load_weights] {}: does not fit the module{}{}", name_, faults, advice);
    throw LoadError(detail::one_line(message), std::move(report_));
  }

  void copy() {
    const torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> values;  // all of them before anything changes: reading may fail, and memory run out
    for (const auto& [target, recipe] : copies_) {
      values.push_back(recipe.make(source_, target.scalar_type()).to(target.scalar_type()));
    }
    for (size_t i = 0; i < values.size(); ++i) copies_[i].target.copy_(values[i]);
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
  detail::Recipes recipes_;                   // by name in the module
  std::set<const CrossAttentionImpl*> done_;  // attention that has recipes
  std::set<std::string> surrounding_;         // names in the file below the prefix of a layer or block, but not part of it
  std::set<std::string> unexplained_;         // names in the file of a layer or block that its layout does not explain
  Names misshapen_;                           // tensors of the file's layers that do not fit together, whatever the module has
  std::vector<Copy> copies_;
  LoadReport report_;
};

}  // namespace

std::string LoadReport::summary() const {
  return formatted("loaded {} tensors", loaded.size()) + list("missing", missing) + list("unexpected", unexpected) +
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
