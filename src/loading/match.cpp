// SPDX-License-Identifier: Apache-2.0
#include "loading/match.h"

#include <torch/nn/modules/activation.h>
#include <xattn/block.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/stacks.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <set>
#include <type_traits>
#include <utility>

#include "base/describe.h"
#include "base/text.h"
#include "files/check_file.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/find_stacks.h"
#include "loading/layouts.h"
#include "loading/refusals.h"
#include "modules/option_names.h"

namespace xattn::detail {
namespace {

using Names = std::vector<std::string>;

bool converts(torch::ScalarType from, torch::ScalarType to) {
  return from == to || (c10::isFloatingType(from) && c10::isFloatingType(to)) ||
         (c10::isComplexType(from) && c10::isComplexType(to));
}

// The reason why a value from a file does not fit a tensor of the module; empty if it fits.
std::string misfit(torch::ScalarType type, const std::vector<int64_t>& shape, const torch::Tensor& target) {
  if (target.sizes() != shape) {
    return formatted("must have shape {}, but has [{}]", shape_of(target), joined(shape));
  }
  if (!converts(type, target.scalar_type())) {
    return formatted("must convert to {}, but is {}", type_of(target), c10::getDtypeNames(type).first);
  }
  return "";
}

// The prefix of options, with the point at its end if names of the file have one there.
std::string prefix_of(const LoadOptions& options, const Infos& infos) {
  const auto prefix = options.prefix.value_or("");
  return any_below(with_point(prefix), infos) ? with_point(prefix) : prefix;
}

class Matcher {
 public:
  explicit Matcher(const MatchRequest& request)
      : in_(request), prefix_(prefix_of(in_.options, in_.source.infos)), state_(state_of(in_.module)) {}

  Match run() {
    find_layouts();
    check_prefix();
    pair();
    refuse_faults();
    return {std::move(prefix_), std::move(state_), std::move(pairs_), std::move(report_)};
  }

 private:
  // Adds recipes for the module's stacks, blocks and attention layers that the file names by a layout.
  void find_layouts() {
    const auto own_layers = modules_of<CrossAttentionImpl>(in_.module);
    if (own_layers.empty()) return check_torch_modules();  // stacks, blocks and decoupled layers hold one, too
    const auto& infos = in_.source.infos;
    find_stacks_of<EncoderImpl>(StackKind::encoder);
    find_stacks_of<DecoderImpl>(StackKind::decoder);
    const auto own_blocks = modules_of<CrossAttentionBlockImpl>(in_.module);
    const auto blocks = own_blocks.empty() ? std::vector<FoundBlock>() : find_blocks(infos, in_.options.layout);
    const auto layers = find_layers(infos, in_.options.layout);
    std::vector<FoundLayer> decoupled;
    std::ranges::copy_if(layers, std::back_inserter(decoupled), [](const auto& layer) { return !layer.added.empty(); });
    choose_prefix<CrossAttentionBlockImpl>(blocks);
    choose_prefix<DecoupledCrossAttentionImpl>(decoupled);
    choose_prefix<CrossAttentionImpl>(layers);
    for (const auto& [path, own] : own_blocks) {
      const auto* found = at_prefix(blocks, path);
      if (!found || done_.contains(own->attention.get())) continue;
      add_block(*found, path, *own);
      add(recipes(*found, infos), path);
      add(name_roles(*found, infos), found->prefix);
    }
    for (const auto& [path, own] : modules_of<DecoupledCrossAttentionImpl>(in_.module)) {
      add_layer(layers, path, path + "attention.", *own->attention);
    }
    for (const auto& [path, own] : own_layers) add_layer(layers, path, path, *own);
    check_torch_modules();
  }

  template <class Impl>
  void find_stacks_of(StackKind kind) {
    const auto own = modules_of<Impl>(in_.module);
    if (own.empty()) return;
    const auto stacks = find_stacks(in_.source.infos, kind, in_.options.layout);
    choose_prefix<Impl>(stacks);
    for (const auto& [path, stack] : own) {
      if (const auto* found = at_prefix(stacks, path)) add_stack(*found, path, *stack);
    }
  }

  template <class Impl>
  void add_stack(const FoundStack& found, const std::string& path, const Impl& own) {
    if (in_.config) refuse_other_stack(*in_.config, in_file(found).prefix);
    if (!found.fault.empty()) misshapen_.push_back(formatted("{} must have {}", which(path), found.fault));
    add(recipes(found, in_.source.infos), path);
    add(name_roles(found, in_.source.infos), found.prefix);
    const auto modules = own.named_modules("", /*include_self=*/false);
    for (const auto& [place, block] : found.blocks()) {
      const auto* module = modules.find(place.substr(0, place.size() - 1));  // null behind the last layer of the module
      if (module) add_block(*block, path + place, *(*module)->template as<CrossAttentionBlockImpl>());
    }
    if (own.relative_position_bias) check_distance(path, *own.relative_position_bias);
  }

  void check_distance(const std::string& path, const RelativePositionBiasImpl& own) {
    const auto distance = in_.config ? in_.config->max_distance() : std::nullopt;
    if (distance)
      require_said(path + "relative_position_bias.", "max_distance", std::vector{*distance}, own.options.max_distance());
  }

  // Checks a block that has recipes.
  void add_block(const FoundBlock& found, const std::string& path, const CrossAttentionBlockImpl& own) {
    check_arithmetic(found, path, own);
    misshapen_.insert(misshapen_.end(), found.attention.misshapen.begin(), found.attention.misshapen.end());
    misshapen_.insert(misshapen_.end(), found.misshapen.begin(), found.misshapen.end());
    done_.insert(own.attention.get());
  }

  // If the module itself is one of these, and no prefix is given, the file's only one is used.
  template <class Impl, class Found>
  void choose_prefix(const std::vector<Found>& found) {
    if (!in_.module.as<Impl>() || found.empty()) return;
    if (!in_.options.prefix) prefix_ = choose(in_.file, found, "", std::nullopt).prefix;
    for (const auto& one : found) places_.push_back(one.prefix);
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
    add(recipes(*found, in_.source.infos), inner);
    add(added_recipes(*found, in_.source.infos), path);  // unexpected in a module without added contexts
    add(name_roles(*found, in_.source.infos), found->prefix);
  }

  void add(const Recipes& of_layer, const std::string& path) {
    for (const auto& [parameter, recipe] : of_layer) recipes_.emplace(path + parameter, recipe);
  }

  // Records names below the prefix of a layer or block that are not part of it, and its names elsewhere.
  void add(const std::map<std::string, NameRole>& roles, const std::string& prefix) {
    const bool is_stack = in_.module.as<EncoderImpl>() || in_.module.as<DecoderImpl>();
    for (const auto& [name, role] : roles) {
      const bool known = role == NameRole::beside || (role == NameRole::input_norm && in_.options.without_input_norms);
      if (known) surrounding_.insert(prefix + name);
      if (role == NameRole::around && is_stack) surrounding_.insert(prefix + name);
      if (role == NameRole::unexplained) unexplained_.insert(in_.source.infos.contains(prefix + name) ? prefix + name : name);
    }
  }

  // A layer or block at the place that it has in the file, for which config.json may have a part of its own.
  template <class Found>
  Found in_file(Found found) const {
    const auto first = in_.names.lower_bound(found.prefix);
    if (first == in_.names.end() || !first->first.starts_with(found.prefix)) return found;
    const auto& [now, name] = *first;
    const auto rest = now.substr(found.prefix.size());
    found.prefix = name.ends_with(rest) ? name.substr(0, name.size() - rest.size()) : name;
    return found;
  }

  // The module must compute what the layout and config.json say; nothing in the tensors would reveal a difference.
  void check_arithmetic(const FoundLayer& layer,
                        const std::string& path,
                        const CrossAttentionImpl& attention,
                        const Names& heads_in_config = {}) {
    const auto& layout = layout_of(layer);
    const auto& has = attention.options;
    if (layout.scale) require(path, "scale", *layout.scale, *has.scale(), layer.layout);
    if (!in_.config) return;
    const auto in_config = in_file(layer);
    refuse_other_attention(*in_.config, in_config);
    const auto& names = heads_in_config.empty() ? layout.num_heads : heads_in_config;
    const auto by = in_.config->heads_in_metadata(in_config) ? "the file's metadata" : "config.json";
    require_said(path, "num_heads", in_.config->possible_num_heads(in_config, names), has.num_heads(), by);
    if (has.qk_norm() != NormKind::none)
      require_said(path, "qk_norm_eps", in_.config->possible_qk_norm_eps(in_config), has.qk_norm_eps());
    if (const auto scale = in_.config->scale(in_config, *has.head_dim()))
      require_said(path, "scale", std::vector{*scale}, *has.scale());
  }

  void check_arithmetic(const FoundBlock& found, const std::string& path, const CrossAttentionBlockImpl& block) {
    const auto &needed = found.options, &has = block.options;
    const auto& layout = block_layout_named(found.layout);
    check_arithmetic(found.attention, path + "attention.", *block.attention, layout.num_heads);
    require(path, "norm", name_of(needed.norm()), name_of(has.norm()), found.layout);
    if (const auto& placement = layout.norm_placement) {
      require(path, "norm_placement", name_of(*placement), name_of(has.norm_placement()), found.layout);
    }
    require(path, "gate", name_of(needed.gate()), name_of(has.gate()), found.layout);
    if (has.feed_forward().value_or(0) > 0) {
      require(path, "feed_forward_glu", needed.feed_forward_glu(), has.feed_forward_glu(), found.layout);
    }
    if (!in_.config) return;
    const auto placement = layout.norm_placement ? std::nullopt : in_.config->norm_placement(layout);
    if (placement)
      require_said(path, "norm_placement", Names{std::string(name_of(*placement))}, std::string(name_of(has.norm_placement())));
    require_said(path, "norm_eps", in_.config->possible<double>(layout.norms.eps_in_config, in_file(found).prefix),
                 has.norm_eps());
    if (has.feed_forward().value_or(0) == 0) return;
    require_said(path, "activation", in_.config->possible_activations(in_file(found)), std::string(name_of(has.activation())));
  }

  // torch.nn.MultiheadAttention has the names of its layout; only its number of heads may differ.
  void check_torch_modules() {
    const auto own = modules_of<torch::nn::MultiheadAttentionImpl>(in_.module);
    if (own.empty() || !in_.config) return;
    const auto layers = find_layers(in_.source.infos, in_.options.layout);
    for (const auto& [path, module] : own) {
      const auto* found = at_prefix(layers, path);
      if (!found) continue;
      const auto numbers = in_.config->possible_num_heads(in_file(*found), layout_of(*found).num_heads);
      require_said(path, "num_heads", numbers, module->options.num_heads());
    }
  }

  static std::string which(const std::string& path) { return path.empty() ? "the module" : path.substr(0, path.size() - 1); }

  template <class T>
  void require(const std::string& path, std::string_view option, const T& needed, const T& has, std::string_view layout) {
    if (needed == has) return;
    report_.misshapen.push_back(
        formatted("{} must have {} {}, as layout {} needs, but has {}", which(path), option, needed, layout, has));
  }

  // `said`: the values that config.json may mean, one of which is enough; none if it says nothing.
  template <class T>
  void require_said(const std::string& path,
                    std::string_view option,
                    const std::vector<T>& said,
                    const T& has,
                    std::string_view by = "config.json") {
    const auto is_same = [&](const T& one) {
      if constexpr (std::is_floating_point_v<T>) return std::abs(one - has) <= 1e-6 * std::abs(one);  // 1 / sqrt(d) is rounded
      return one == has;
    };
    if (said.empty() || std::ranges::any_of(said, is_same)) return;
    report_.misshapen.push_back(
        formatted("{} must have {} {}, as {} says, but has {}", which(path), option, said.front(), by, has));
  }

  TensorRecipe recipe_of(const std::string& name) const {
    const auto found = recipes_.find(name);
    if (found != recipes_.end()) return found->second;
    auto recipe = with_scale({prefix_ + name}, in_.source.infos);
    const auto scale = recipe.scale.substr(std::min(prefix_.size(), recipe.scale.size()));
    return state_.contains(scale) ? TensorRecipe{prefix_ + name} : recipe;  // the module may have a parameter of this name
  }

  void pair() {
    std::set<std::string> used;  // names of the file
    std::set<const void*> filled;
    Names absent;
    for (const auto& [name, target] : state_) {
      const auto recipe = recipe_of(name);
      const auto info = in_.source.infos.find(recipe.source);
      if (info == in_.source.infos.end()) {
        const auto reason = in_.source.unreadable.find(recipe.source);
        if (reason == in_.source.unreadable.end()) {
          absent.push_back(name);
        } else {
          used.insert(recipe.source);
          report_.misshapen.push_back(formatted("{} is not read: {}", name, reason->second));
        }
        continue;
      }
      used.insert(recipe.source);
      used.insert(recipe.scale);
      if (const auto reason = recipe.misfit(in_.source.infos); !reason.empty()) {
        report_.misshapen.push_back(reason);
        continue;
      }
      if (const auto reason = misfit(recipe.type(in_.source.infos), recipe.shape(info->second), target); !reason.empty()) {
        report_.misshapen.push_back(name + " " + reason);
        continue;
      }
      report_.loaded.push_back(name);
      pairs_.push_back({name, target, recipe});
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
    for (const auto& [full_name, info] : in_.source.infos) sort_in(full_name);
    for (const auto& [full_name, reason] : in_.source.unreadable) sort_in(full_name);
  }

  // Throws if a prefix is given and no name of the file begins with it.
  void check_prefix() {
    const bool is_there = any_below(prefix_, in_.source.infos) || any_below(prefix_, in_.source.unreadable);
    if (state_.empty() || is_there || !in_.options.prefix) return;
    for (const auto& [name, tensor] : state_) report_.missing.push_back(name);
    auto prefixes = places_.empty() ? places_of_all() : places_;
    if (prefixes.empty()) prefixes = first_components();
    fail(must_be_one_of(std::move(prefixes), in_.options.prefix));
  }

  // Prefixes at which the file has all tensors of the module.
  Names places_of_all() const {
    Names prefixes;
    if (state_.empty()) return prefixes;
    const auto ending = "." + state_.begin()->first;
    for (const auto& [name, info] : in_.source.infos) {
      if (!("." + name).ends_with(ending)) continue;
      const auto prefix = name.substr(0, name.size() + 1 - ending.size());
      const bool all = std::ranges::all_of(state_, [&, &infos = in_.source.infos](const auto& own) {
        const auto found = infos.find(prefix + own.first);
        return found != infos.end() && own.second.sizes() == found->second.shape;
      });
      if (all) prefixes.push_back(prefix);
    }
    return prefixes;
  }

  Names first_components() const {
    std::set<std::string> components;
    for (const auto& [name, info] : in_.source.infos)
      components.insert(name.substr(0, name.find('.') + 1));  // "" without a point
    return {components.begin(), components.end()};
  }

  void refuse_faults() {
    const auto faults = (in_.options.allow_missing ? "" : list("missing", report_.missing)) +
                        (in_.options.allow_unexpected ? "" : list("unexpected", report_.unexpected)) +
                        list("misshapen", report_.misshapen);
    if (faults.empty()) return;
    const auto advice = in_.options.allow_unexpected ? "" : advice_on(report_.unexpected);
    const auto places = report_.loaded.empty() ? list("the prefix may be", places_.empty() ? places_of_all() : places_) : "";
    fail(formatted("does not fit the module{}{}{}", faults, advice, places));
  }

  [[noreturn]] void fail(const std::string& reason) { fail_to_match(in_.caller, in_.file, reason, std::move(report_)); }

  const MatchRequest& in_;
  std::string prefix_;
  NamedTensors state_;
  Recipes recipes_;                           // by name in the module
  std::set<const CrossAttentionImpl*> done_;  // attention that has recipes
  std::set<std::string> surrounding_;         // names in the file below the prefix of a layer or block, but not part of it
  std::set<std::string> unexplained_;         // names in the file of a layer or block that its layout does not explain
  Names misshapen_;                           // tensors of the file's layers that do not fit together, whatever the module has
  Names places_;                              // prefixes of the file's layers, blocks or stacks, if the module is one
  std::vector<Match::Pair> pairs_;
  LoadReport report_;
};

}  // namespace

NamedTensors state_of(const torch::nn::Module& module) {
  NamedTensors state;
  for (const auto& item : module.named_parameters()) state.emplace(item.key(), item.value());
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) state.emplace(item.key(), item.value());
  }
  return state;
}

Match match(const MatchRequest& request) {
  return Matcher(request).run();
}

void fail_to_match(std::string_view caller, const std::string& file, const std::string& reason, LoadReport report) {
  throw LoadError(one_line(formatted("[{}] {}: {}", caller, file, reason)), std::move(report));
}

}  // namespace xattn::detail
