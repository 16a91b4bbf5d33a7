// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/cat.h>
#include <xattn/layouts.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "check.h"
#include "describe.h"
#include "text.h"

namespace xattn {
namespace {

using Infos = std::map<std::string, TensorInfo>;

struct Shape2 {
  int64_t out;
  int64_t in;
};

// A layer of this layout behind a prefix, if it is there and its shapes fit together.
class Match {
 public:
  Match(const Infos& tensors, const Layout& layout, const std::string& prefix)
      : tensors_(tensors), layout_(layout), prefix_(prefix) {}

  // The number of tensors that the layout explains, to prefer the layout that explains more.
  size_t explained() const { return explained_.size(); }

  std::optional<FoundLayer> layer() {
    if (!prefix_.starts_with(layout_.prefix_start)) return {};
    const auto query = weight(layout_.query);    // [H * d, Eq]
    const auto key = weight(layout_.key);        // [G * d, Ek]
    const auto value = weight(layout_.value);    // [G * e, Ev]
    const auto output = weight(layout_.output);  // [Eo, H * e]
    if (!query || !key || !value || !output || !inputs()) return {};
    const auto group = query->out / key->out;  // H / G
    if (query->out != group * key->out || output->in != group * value->out) return {};

    auto options = CrossAttentionOptions(query->in, key->in, value->in, output->out)
                       .num_heads(group)
                       .kv_heads(1)
                       .head_dim(key->out)
                       .value_head_dim(value->out)
                       .query_bias(bias(layout_.query, query->out))
                       .key_bias(bias(layout_.key, key->out))
                       .value_bias(bias(layout_.value, value->out))
                       .output_bias(bias(layout_.output, output->out))
                       .scale(layout_.scale)
                       .bias_kv(take(layout_.bias_k, "") && take(layout_.bias_v, ""));
    const auto kind = query->in != key->in ? AttentionKind::cross : AttentionKind::unknown;
    FoundLayer layer{prefix_, &layout_, kind, options, false};
    if (!norms(layer)) return {};
    for (const auto& added : layout_.added) {
      if (take(added.key, ".weight") && take(added.value, ".weight")) layer.added.push_back(&added);
    }
    return layer;
  }

 private:
  const TensorInfo* find(std::string_view name) const {
    const auto found = tensors_.find(prefix_ + std::string(name));
    return found == tensors_.end() ? nullptr : &found->second;
  }

  // Whether there is such a tensor; if so, it is explained.
  bool take(std::string_view name, std::string_view ending) {
    if (name.empty()) return false;
    const auto full = std::string(name) + std::string(ending);
    if (!find(full)) return false;
    explained_.insert(full);
    return true;
  }

  std::optional<Shape2> weight(const ProjectionNames& names) {
    const auto* info = find(names.weight);
    if (!info || info->shape.size() != 2) return {};
    auto out = info->shape[0], in = info->shape[1];
    if (layout_.transposed) std::swap(out, in);
    if (out == 0 || in == 0 || out % names.parts != 0) return {};
    explained_.insert(std::string(names.weight));
    return Shape2{out / names.parts, in};
  }

  bool bias(const ProjectionNames& names, int64_t out) {
    const auto* info = names.bias.empty() ? nullptr : find(names.bias);
    return info && info->shape == std::vector<int64_t>{out * names.bias_parts} && take(names.bias, "");
  }

  // Norms in front of the projections, which a layout has always or never.
  bool inputs() {
    for (const auto name : {layout_.query_input, layout_.context_input}) {
      if (!name.empty() && !take(name, ".weight")) return false;
      take(name, ".bias");
    }
    return true;
  }

  // Norms of projected queries and keys, which a layer may have or not.
  bool norms(FoundLayer& layer) {
    const bool query = take(layout_.query_norm, ".weight");
    if (query != take(layout_.key_norm, ".weight")) return false;
    if (!query) return true;
    const bool centred = take(layout_.query_norm, ".bias") && take(layout_.key_norm, ".bias");
    const auto query_size = find(std::string(layout_.query_norm) + ".weight")->shape;
    const auto key_size = find(std::string(layout_.key_norm) + ".weight")->shape;
    auto& options = layer.options;
    const auto group = options.num_heads(), inner_key = *options.head_dim(), inner_value = *options.value_head_dim();
    if (query_size.size() != 1 || key_size.size() != 1 || query_size[0] == 0) return false;
    options.qk_norm(centred ? NormKind::layer : NormKind::rms).qk_norm_eps(layout_.qk_norm_eps);
    if (query_size[0] == group * inner_key && key_size[0] == inner_key) {
      options.qk_norm_scope(NormScope::across_heads);
      return true;
    }
    const auto d = query_size[0];
    const auto kv_heads = inner_key / d;
    if (key_size[0] != d || inner_key != kv_heads * d || inner_value % kv_heads != 0) return false;
    options.num_heads(group * kv_heads).kv_heads(kv_heads).head_dim(d).value_head_dim(inner_value / kv_heads);
    layer.heads_known = true;
    return true;
  }

  const Infos& tensors_;
  const Layout& layout_;
  const std::string& prefix_;
  std::set<std::string> explained_;
};

// By what models call their layers. The last word that says something counts: "cross_attn.self_attn" is self.
AttentionKind kind_by_name(std::string_view prefix) {
  constexpr std::array kCross = {"cross", "encoder_attn", "EncDecAttention", "multihead_attn", "attn2", "src_attn", "enc_attn"};
  constexpr std::array kSelf = {"self", "attn1", "SelfAttention"};
  size_t cross = 0, self = 0;  // one behind the last place
  const auto last = [prefix](const auto& words) {
    size_t place = 0;
    for (const std::string_view word : words) {
      if (const auto found = prefix.rfind(word); found != std::string_view::npos) place = std::max(place, found + 1);
    }
    return place;
  };
  cross = last(kCross);
  self = last(kSelf);
  return cross == self ? AttentionKind::unknown : cross > self ? AttentionKind::cross : AttentionKind::self;
}

std::optional<FoundLayer> layer_at(const Infos& tensors, const std::string& prefix, const Layout* only) {
  std::optional<FoundLayer> best;
  size_t most = 0;
  for (const auto& layout : layouts()) {
    if (only && only != &layout) continue;
    Match match(tensors, layout, prefix);
    auto layer = match.layer();
    if (layer && match.explained() > most) {
      most = match.explained();
      best = std::move(layer);
    }
  }
  if (best) {
    const auto by_name = kind_by_name(prefix);
    if (by_name != AttentionKind::unknown) best->kind = by_name;
  }
  return best;
}

}  // namespace

std::vector<FoundLayer> find_layers(const Infos& tensors, const Layout* only) {
  std::set<std::string> prefixes;
  for (const auto& [name, info] : tensors) {
    for (const auto& layout : layouts()) {
      const auto ending = layout.query.weight;
      if (!name.ends_with(ending)) continue;
      auto prefix = name.substr(0, name.size() - ending.size());
      if (prefix.empty() || prefix.ends_with('.')) prefixes.insert(std::move(prefix));
    }
  }
  std::vector<FoundLayer> layers;
  for (const auto& prefix : prefixes) {
    if (auto layer = layer_at(tensors, prefix, only)) layers.push_back(*std::move(layer));
  }
  return layers;
}

std::vector<int64_t> FoundLayer::possible_heads() const {
  const auto group = options.num_heads() / *options.kv_heads();
  if (heads_known) return {options.num_heads()};
  const auto inner_key = *options.kv_heads() * *options.head_dim(),
             inner_value = *options.kv_heads() * *options.value_head_dim();
  // Divisors of both widths come in pairs, of which one is at most the square root.
  const auto common = std::gcd(inner_key, inner_value);
  std::vector<int64_t> possible;
  for (int64_t kv_heads = 1; kv_heads <= common / kv_heads; ++kv_heads) {
    if (common % kv_heads != 0) continue;
    possible.push_back(group * kv_heads);
    if (const auto other = common / kv_heads; other != kv_heads) possible.push_back(group * other);
  }
  std::ranges::sort(possible);
  return possible;
}

CrossAttentionOptions FoundLayer::with_heads(int64_t num_heads) const {
  const auto possible = possible_heads();
  detail::check_value(std::ranges::count(possible, num_heads) == 1, "with_heads", "num_heads must be one of {}, but is {}.",
                      detail::joined(possible), num_heads);
  const auto group = options.num_heads() / *options.kv_heads();
  const auto kv_heads = num_heads / group;
  auto result = options;
  return result.num_heads(num_heads)
      .kv_heads(kv_heads)
      .head_dim(*options.kv_heads() * *options.head_dim() / kv_heads)
      .value_head_dim(*options.kv_heads() * *options.value_head_dim() / kv_heads);
}

// ---- From names to names ---------------------------------------------------------------------------------------------------

std::vector<int64_t> TensorRecipe::shape(const TensorInfo& source_info) const {
  auto shape = source_info.shape;
  if (flat) return {std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies())};
  if (transposed && shape.size() == 2) std::swap(shape[0], shape[1]);
  if (!shape.empty()) shape[0] /= parts;
  return shape;
}

at::Tensor TensorRecipe::apply(const at::Tensor& source_tensor) const {
  if (flat) return source_tensor.flatten();
  const auto upright = transposed ? source_tensor.t() : source_tensor;
  return parts == 1 ? upright : upright.chunk(parts)[static_cast<size_t>(part)];
}

namespace {

struct Line {
  std::string parameter;
  std::string name;  // in the layout
  int part = 0;
  int parts = 1;
  bool transposed = false;
};

// Every parameter that a layer of this layout may have.
std::vector<Line> lines_of(const Layout& layout) {
  std::vector<Line> lines;
  const auto add = [&](std::string parameter, std::string_view name, int part, int parts, bool transposed) {
    if (!name.empty()) lines.push_back({std::move(parameter), std::string(name), part, parts, transposed});
  };
  const auto add_projection = [&](const std::string& parameter, const ProjectionNames& names) {
    add(parameter + ".weight", names.weight, names.parts == 1 ? 0 : names.part, names.parts, layout.transposed);
    add(parameter + ".bias", names.bias, names.bias_parts == 1 ? 0 : names.part, names.bias_parts, false);
  };
  add_projection("query_linear", layout.query);
  add_projection("key_linear", layout.key);
  add_projection("value_linear", layout.value);
  add_projection("output_linear", layout.output);
  add("bias_k", layout.bias_k, 0, 1, false);
  add("bias_v", layout.bias_v, 0, 1, false);
  for (const auto& [norm, name] : {std::pair("query_norm", layout.query_norm), {"key_norm", layout.key_norm}}) {
    if (name.empty()) continue;
    for (const std::string ending : {".weight", ".bias"}) add(norm + ending, std::string(name) + ending, 0, 1, false);
  }
  return lines;
}

}  // namespace

std::map<std::string, TensorRecipe> recipes(const FoundLayer& layer, const Infos& tensors) {
  std::map<std::string, TensorRecipe> result;
  for (const auto& [parameter, name, part, parts, transposed] : lines_of(*layer.layout)) {
    const auto source = layer.prefix + name;
    if (tensors.contains(source)) result.emplace(parameter, TensorRecipe{source, part, parts, transposed});
  }
  return result;
}

std::map<std::string, TensorRecipe> added_recipes(const FoundLayer& layer, const Infos& tensors) {
  std::map<std::string, TensorRecipe> result;
  for (size_t i = 0; i < layer.added.size(); ++i) {
    const auto& names = *layer.added[i];
    for (const auto& [part, name] :
         {std::pair("key_linear", names.key), {"value_linear", names.value}, {"key_norm", names.key_norm}}) {
      for (const auto* ending : {".weight", ".bias"}) {
        const auto source = detail::formatted("{}{}{}", layer.prefix, name, ending);
        if (name.empty() || !tensors.contains(source)) continue;
        result.emplace(detail::formatted("added{}.{}{}", i, part, ending), TensorRecipe{source});
      }
    }
  }
  return result;
}

NamedTensors spell(const NamedTensors& parameters, const Layout& layout, const std::string& prefix) {
  std::map<std::string, std::vector<at::Tensor>> parts;  // by name in the file
  std::set<std::string> spelled;
  for (const auto& [parameter, name, part, count, transposed] : lines_of(layout)) {
    const auto found = parameters.find(parameter);
    if (found == parameters.end()) continue;
    auto& of_name = parts[prefix + name];
    of_name.resize(static_cast<size_t>(count));
    of_name[static_cast<size_t>(part)] = transposed ? found->second.t() : found->second;
    spelled.insert(parameter);
  }
  for (const auto& [parameter, tensor] : parameters) {
    detail::check_value(spelled.contains(parameter), "layouts", "layout {} must have a name for {}, but has none.", layout.name,
                        parameter);
  }
  NamedTensors result;
  for (const auto& [name, of_name] : parts) {
    const bool complete = std::ranges::all_of(of_name, [](const at::Tensor& part) { return part.defined(); });
    detail::check_value(complete, "layouts", "layout {} packs {} of parts of which some are missing.", layout.name, name);
    const auto axis = layout.transposed && of_name.front().dim() == 2 ? 1 : 0;
    for (const auto& part : of_name) {
      detail::check_value(part.sizes() == of_name.front().sizes(), "layouts",
                          "layout {} packs {} of parts of one shape, but they have {} and {}.", layout.name, name,
                          detail::shape_of(of_name.front()), detail::shape_of(part));
    }
    result.emplace(name, of_name.size() == 1 ? of_name.front().contiguous() : at::cat(of_name, axis));
  }
  return result;
}

}  // namespace xattn
