// SPDX-License-Identifier: Apache-2.0
#include "loading/find_stacks.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "base/text.h"
#include "files/check_file.h"
#include "loading/block_layouts.h"
#include "loading/stack_layouts.h"

namespace xattn::detail {
namespace {

using Attention = std::map<std::string, FoundLayer>;  // by prefix

// The prefix of a stack that has this attention in one of its layers; nothing if it has another name.
std::optional<std::string> stack_around(const StackLayout& layout, const std::string& inner, std::string_view attention) {
  if (!attention.ends_with("." + inner)) return {};
  attention.remove_suffix(inner.size() + 1);
  const auto point = attention.rfind('.');
  if (point == std::string_view::npos || !number_of(std::string(attention.substr(point + 1)))) return {};
  attention = attention.substr(0, point + 1);
  if (!attention.ends_with(layout.layers)) return {};
  attention.remove_suffix(layout.layers.size());
  return attention.empty() || attention.ends_with('.') ? std::optional(std::string(attention)) : std::nullopt;
}

// The block of one of these layouts at a prefix.
std::optional<FoundBlock> block_at(const std::string& prefix,
                                   const std::vector<std::string>& layouts,
                                   const Attention& attention,
                                   const Infos& tensors) {
  for (const auto& name : layouts) {
    const auto& layout = block_layout_named(name);
    const auto inner = attention.find(prefix + layout.attention);
    if (inner == attention.end()) continue;
    if (auto block = match_block(layout, inner->second, tensors)) return block;
  }
  return {};
}

// A stack of this layout at a prefix, if one of its layers is there.
std::optional<FoundStack> stack_at(
    const std::string& prefix, const StackLayout& layout, StackKind kind, const Attention& attention, const Infos& tensors) {
  const bool decodes = kind == StackKind::decoder;
  FoundStack stack{prefix, layout.name, decodes && !layout.decoder_norm.empty() ? layout.decoder_norm : layout.norm};
  std::map<int64_t, std::set<std::string>> names;  // of each layer
  const auto in = prefix + layout.layers;
  for (auto item = tensors.lower_bound(in); item != tensors.end() && item->first.starts_with(in); ++item) {
    const auto rest = item->first.substr(in.size());
    const auto point = rest.find('.');
    if (point == std::string::npos) continue;
    if (const auto number = number_of(rest.substr(0, point))) names[*number].insert(rest.substr(point + 1));
  }
  const auto has_cross = [&](const auto& layer) {
    return std::ranges::any_of(layout.cross, [&](const auto& name) {
      return attention.contains(stack.layer_prefix(layer.first) + block_layout_named(name).attention);
    });
  };
  if (std::ranges::any_of(names, has_cross) != decodes) return {};

  std::map<int64_t, FoundStackLayer> found;
  for (const auto& [number, of_layer] : names) {
    const auto at = stack.layer_prefix(number);
    auto self = block_at(at, decodes ? std::vector{layout.decoder} : layout.encoder, attention, tensors);
    auto cross = decodes ? block_at(at, layout.cross, attention, tensors) : std::nullopt;
    if (self && cross.has_value() == decodes) found.emplace(number, FoundStackLayer{*std::move(self), std::move(cross)});
  }
  if (found.empty()) return {};
  for (const auto& [number, of_layer] : names) {
    const auto next = static_cast<int64_t>(stack.layers.size());
    if (number != next) {
      stack.fault = formatted("layers up to {}, but layer {} is missing", names.rbegin()->first, next);
    } else if (const auto layer = found.find(number); layer != found.end()) {
      stack.layers.push_back(std::move(layer->second));
      continue;
    } else {
      const auto& [other, whole] = *std::ranges::find_if(names, [&](const auto& one) { return found.contains(one.first); });
      std::vector<std::string> missing;
      std::ranges::set_difference(whole, of_layer, std::back_inserter(missing));
      stack.fault = formatted("layers of one layout, but layer {} is not like layer {}{}", number, other,
                              missing.empty() ? "; its shapes do not fit together" : list("missing", missing));
    }
    break;
  }
  return stack;
}

}  // namespace

std::string FoundStack::layer_prefix(int64_t number) const {
  return formatted("{}{}{}.", prefix, stack_layout_named(layout).layers, number);
}

std::vector<std::pair<std::string, const FoundBlock*>> FoundStack::blocks() const {
  std::vector<std::pair<std::string, const FoundBlock*>> blocks;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [self, cross] = layers[i];
    const auto path = formatted("layers.{}.", i);
    blocks.emplace_back(cross ? path + "self." : path, &self);
    if (cross) blocks.emplace_back(path + "cross.", &*cross);
  }
  return blocks;
}

std::vector<FoundStack> find_stacks(const Infos& tensors, StackKind kind, const LayoutChoice& attention_layout) {
  Attention attention;
  for (auto& layer : find_layers(tensors, attention_layout)) attention.emplace(layer.prefix, layer);
  std::map<std::string, std::set<const StackLayout*>> places;
  for (const auto& layout : stack_layouts()) {
    const auto& inner = block_layout_named(layout.encoder.front()).attention;  // the same in a decoder
    for (const auto& [prefix, layer] : attention) {
      if (const auto place = stack_around(layout, inner, prefix)) places[*place].insert(&layout);
    }
  }
  std::vector<FoundStack> stacks;
  for (const auto& [prefix, layouts] : places) {
    for (const auto* layout : layouts) {
      if (auto stack = stack_at(prefix, *layout, kind, attention, tensors)) stacks.push_back(*std::move(stack));
    }
  }
  return stacks;
}

Recipes recipes(const FoundStack& stack, const Infos& tensors) {
  const auto& layout = stack_layout_named(stack.layout);
  Recipes result;
  const auto add = [&](const std::string& parameter, const std::string& name) {
    if (tensors.contains(name)) result.emplace(parameter, TensorRecipe{name});
  };
  for (const auto& [path, block] : stack.blocks()) {
    for (const auto& [parameter, recipe] : recipes(*block, tensors)) result.emplace(path + parameter, recipe);
  }
  for (const auto& [weight, bias] : kNormEndings) {
    const auto norm = stack.prefix + stack.norm;
    if (stack.norm.empty() || !tensors.contains(norm + weight)) continue;
    add("norm.weight", norm + weight);
    add("norm.bias", norm + bias);
    break;
  }
  if (const auto& bias = layout.relative_position_bias; !bias.empty()) {
    add("relative_position_bias.weight", stack.layer_prefix(0) + bias);
  }
  return result;
}

std::map<std::string, NameRole> name_roles(const FoundStack& stack, const Infos& tensors) {
  std::map<std::string, NameRole> roles;
  const auto& around = stack_layout_named(stack.layout).beside;
  for (auto item = tensors.lower_bound(stack.prefix); item != tensors.end() && item->first.starts_with(stack.prefix); ++item) {
    const auto name = item->first.substr(stack.prefix.size());
    const bool is_around = std::ranges::any_of(around, [&](const auto& beginning) { return name.starts_with(beginning); });
    roles.emplace(name, is_around ? NameRole::around : NameRole::unexplained);
  }
  for (const auto& [path, block] : stack.blocks()) {
    // A name beside one block belongs to the layer's other block, which explains its own names.
    const auto& beside = block_layout_named(block->layout).beside;
    for (const auto& [name, role] : name_roles(*block, tensors)) {
      const auto full = block->prefix + name;
      const auto begins = [&each = name](const auto& word) { return each.starts_with(word); };
      const bool is_of_other = role == NameRole::beside && std::ranges::any_of(beside, begins);
      if (!tensors.contains(full)) {
        roles.emplace(name, role);  // a low-rank weight at the top of the file
      } else if (role != NameRole::unexplained && !is_of_other) {
        roles[full.substr(stack.prefix.size())] = role;
      }
    }
  }
  for (const auto& [parameter, recipe] : recipes(stack, tensors)) {
    roles[recipe.source.substr(stack.prefix.size())] = NameRole::parameter;
  }
  return roles;
}

}  // namespace xattn::detail
