// SPDX-License-Identifier: Apache-2.0
#include <xattn/ip_adapter.h>

#include <xattn/find_layers.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "loading/choose.h"

namespace xattn {
namespace {

constexpr std::string_view kIpAdapter = "ip_adapter";
constexpr std::string_view kPlaces = "ip_adapter.";

using detail::with_point;
using Places = std::map<std::string, std::string>;  // prefixes of layers in the base -> in the adapter

// A key that sorts layers in the order of diffusers: down, up and mid blocks, or their names in single files; 2 before 10.
std::pair<size_t, std::string> order_of(const std::string& prefix) {
  constexpr std::array kParts = {"down_blocks.",   "input_blocks.", "up_blocks.",
                                 "output_blocks.", "mid_block.",    "middle_block."};
  const auto* part = std::ranges::find_if(kParts, [&](const auto* name) { return prefix.find(name) != std::string::npos; });
  std::istringstream words(prefix);
  std::string padded;
  for (std::string word; std::getline(words, word, '.');) padded += detail::formatted("{:0>9}.", word);
  return {static_cast<size_t>(part - kParts.begin()) / 2, padded + prefix};  // "1" is not "01"
}

// Cross-attention layers have odd numbers, self-attention layers even ones.
Places places_by_order(const Checkpoint& base) {
  std::map<std::pair<size_t, std::string>, std::string> ordered;
  for (const auto& layer : find_layers(base.tensors(), "diffusers")) {
    const bool in_time = layer.prefix.find("motion_modules.") != std::string::npos;  // of AnimateDiff
    if (layer.kind == AttentionKind::cross && !in_time) ordered.emplace(order_of(layer.prefix), layer.prefix);
  }
  detail::FileCheck(kIpAdapter, base.path())(!ordered.empty(),
                                             "must hold cross-attention layers named as in diffusers, but holds none");
  Places places;
  for (const auto& [order, prefix] : ordered) {
    places.emplace(prefix, detail::formatted("{}{}.", kPlaces, 2 * places.size() + 1));
  }
  return places;
}

// Throws unless the base has all of these layers, and the adapter their places.
void check_places(const Checkpoint& base, const Checkpoint& adapter, const Places& places) {
  constexpr std::string_view kKey = "to_k_ip.weight";
  const auto layers = find_layers(base.tensors());
  std::vector<std::string> of_layers, of_places;
  for (const auto& layer : layers) of_layers.push_back(layer.prefix);
  for (const auto& [name, info] : adapter.tensors()) {
    if (name.ends_with(kKey)) of_places.push_back(name.substr(0, name.size() - kKey.size()));
  }
  for (const auto& [layer, place] : places) {
    const bool has_layer = detail::find_at(layers, layer) != nullptr;
    detail::FileCheck(kIpAdapter, base.path())(has_layer, "{}", detail::must_be_one_of(of_layers, layer));
    const bool has_place = detail::any_below(with_point(place), adapter.tensors());
    detail::FileCheck(kIpAdapter, adapter.path())(has_place, "{}", detail::must_be_one_of(of_places, place));
  }
}

}  // namespace

Checkpoint with_ip_adapter(const Checkpoint& base, const Checkpoint& adapter, const Places& places) {
  check_places(base, adapter, places);
  std::map<std::string, std::string> names;  // names in the adapter -> names in the U-Net of diffusers
  for (const auto& [layer, place] : places.empty() ? places_by_order(base) : places) {
    for (const auto* side : {"to_k_ip", "to_v_ip"}) {
      names.emplace(detail::formatted("{}{}.weight", with_point(place), side),
                    detail::formatted("{}processor.{}.0.weight", with_point(layer), side));
    }
  }
  std::vector<std::string> missing, unexpected;
  for (const auto& [theirs, ours] : names) {
    if (!adapter.contains(theirs)) missing.push_back(theirs);
  }
  const auto is_of_layers = [&](const std::string& name) {
    if (places.empty()) return name.starts_with(kPlaces);
    return std::ranges::any_of(places, [&](const auto& place) { return name.starts_with(with_point(place.second)); });
  };
  for (const auto& [name, info] : adapter.tensors()) {
    if (is_of_layers(name) && !names.contains(name)) unexpected.push_back(name);
  }
  detail::FileCheck(kIpAdapter, adapter.path())(
      missing.empty() && unexpected.empty(), "must have to_k_ip and to_v_ip for the {} cross-attention layers of {}{}{}",
      names.size() / 2, base.path(), detail::list("missing", missing), detail::list("unexpected", unexpected));
  return base.with(adapter, names);
}

}  // namespace xattn
