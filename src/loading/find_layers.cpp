// SPDX-License-Identifier: Apache-2.0
#include <xattn/find_layers.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "loading/choose.h"
#include "loading/layouts.h"
#include "loading/recipes.h"

namespace xattn {
namespace {

using detail::formatted;
using detail::Infos;
using Shape = std::vector<int64_t>;

struct Sizes {
  int64_t out;
  int64_t in;
};

// A layer of this layout at a prefix, if it is present and its shapes fit together.
class Match {
 public:
  Match(const Infos& tensors, const Layout& layout, const std::string& prefix)
      : tensors_(tensors), layout_(layout), prefix_(prefix) {}

  // The number of tensors that the layout explains, to prefer the layout that explains more.
  size_t explained() const { return explained_.size(); }

  std::optional<FoundLayer> layer() {
    if (!layout_.prefix_has.empty() && !detail::has_component(prefix_, layout_.prefix_has)) return {};
    if (!std::ranges::all_of(layout_.has, [&](const auto& name) { return take(name); })) return {};
    if (std::ranges::any_of(layout_.lacks, [&](const auto& name) { return find(name); })) return {};
    const auto& names = layout_.projections;
    const auto query = weight(names[0]);   // [H * d, Eq]
    const auto key = weight(names[1]);     // [G * d, Ek]
    const auto value = weight(names[2]);   // [G * e, Ev]
    const auto output = weight(names[3]);  // [Eo, H * e]
    if (!query || !key || !value || !output || !input_norms()) return {};
    const auto group = query->out / key->out;  // H / G
    if (query->out % key->out != 0 || output->in % value->out != 0 || output->in / value->out != group) return {};

    const bool has_k = take(layout_.bias_kv[0]), has_v = take(layout_.bias_kv[1]);
    if (has_k != has_v) report_half(layout_.bias_kv[0], layout_.bias_kv[1]);
    auto options = CrossAttentionOptions(query->in, key->in, value->in, output->out)
                       .num_heads(group)
                       .kv_heads(1)
                       .head_dim(key->out)
                       .value_head_dim(value->out)
                       .query_bias(bias(names[0], query->out))
                       .key_bias(bias(names[1], key->out))
                       .value_bias(bias(names[2], value->out))
                       .output_bias(bias(names[3], output->out))
                       .scale(layout_.scale)
                       .bias_kv(has_k && has_v);
    const auto kind = query->in != key->in ? AttentionKind::cross : AttentionKind::unknown;
    FoundLayer layer{prefix_, layout_.name, kind, options, false};
    if (!qk_norms(layer)) return {};
    for (const auto& added : layout_.added) {
      const bool norm = added.key_norm.empty() || find(added.key_norm + ".weight");
      if (norm && take(added.key + ".weight") && take(added.value + ".weight")) layer.added.push_back(added.key);
    }
    if (detail::has_component(prefix_, layout_.other_in)) {
      misshapen_.push_back(
          formatted("{} must be of a layer that computes attention alone, but is {}", names[0].weight, layout_.other));
    }
    layer.misshapen = std::move(misshapen_);
    return layer;
  }

 private:
  const TensorInfo* find(const std::string& name) const {
    const auto found = tensors_.find(prefix_ + name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  // Whether there is such a tensor; if so, marks it as explained.
  bool take(const std::string& name) {
    const bool is_there = !name.empty() && find(name);
    if (is_there) explained_.insert(name);
    return is_there;
  }

  std::optional<Sizes> weight(const LinearNames& names) {
    const auto* info = find(names.weight);
    if (!info || info->shape.size() != 2) return {};
    auto out = info->shape[0], in = info->shape[1];
    if (layout_.transposed) std::swap(out, in);
    constexpr int64_t kMost = int64_t{1} << 60;  // a bias may have a few times as many
    if (out <= 0 || out > kMost || in <= 0 || out % names.parts != 0) return {};
    take(names.weight);
    return Sizes{out / names.parts, in};
  }

  void report_half(const std::string& one, const std::string& other) {
    misshapen_.push_back(formatted("{} and {} must both be there", one, other));
  }

  bool bias(const LinearNames& names, int64_t out) {
    if (!take(names.bias)) return false;
    const auto& shape = find(names.bias)->shape;
    if (shape == Shape{out * names.bias_parts}) return true;
    misshapen_.push_back(
        formatted("{} must have shape [{}], but has [{}]", names.bias, out * names.bias_parts, detail::joined(shape)));
    return false;
  }

  // Whether the norms in front of the projections are present; a layout has them always or never.
  bool input_norms() {
    return std::ranges::all_of(layout_.input_norms, [&](const auto& name) {
      if (name.empty()) return true;
      take(name + ".bias");
      return take(name + ".weight");
    });
  }

  // Whether the optional norms of projected queries and keys are both present or both absent.
  bool qk_norms(FoundLayer& layer) {
    const auto &query = layout_.qk_norm.query, &key = layout_.qk_norm.key;
    if (query.empty()) return true;
    const bool has_norms = take(query + ".weight");
    if (has_norms != take(key + ".weight")) return false;
    const bool centred = take(query + ".bias"), key_centred = take(key + ".bias");
    if (centred != key_centred) report_half(query + ".bias", key + ".bias");
    if (!has_norms && (centred || key_centred)) report_half(query + ".weight", key + ".weight");
    if (!has_norms) return true;
    const auto query_size = find(query + ".weight")->shape, key_size = find(key + ".weight")->shape;
    auto& options = layer.options;
    const auto group = options.num_heads(), inner_key = *options.head_dim(), inner_value = *options.value_head_dim();
    const auto d = query_size.size() == 1 ? query_size[0] : 0;
    const auto kv_heads = d == 0 ? 0 : inner_key / d;
    const bool across_heads = query_size == Shape{group * inner_key} && key_size == Shape{inner_key};
    const bool per_head = kv_heads > 0 && key_size == query_size && inner_key == kv_heads * d && inner_value % kv_heads == 0;
    if (!across_heads && !per_head) {
      misshapen_.push_back(
          formatted("{}.weight and {}.weight must be of a head, or of all heads, but have shapes [{}] and [{}]", query, key,
                    detail::joined(query_size), detail::joined(key_size)));
      return true;
    }
    if (centred && !layout_.layer_norms_are.empty()) {
      misshapen_.push_back(
          formatted("{} and {} must be norms of kind rms, but are layer norms, as {}", query, key, layout_.layer_norms_are));
    }
    options.qk_norm(centred ? NormKind::layer : NormKind::rms).qk_norm_eps(layout_.qk_norm.eps);
    if (across_heads) {
      options.qk_norm_scope(NormScope::across_heads);
    } else {
      options.num_heads(group * kv_heads).kv_heads(kv_heads).head_dim(d).value_head_dim(inner_value / kv_heads);
      layer.heads_known = true;
    }
    return true;
  }

  const Infos& tensors_;
  const Layout& layout_;
  const std::string& prefix_;
  std::set<std::string> explained_;
  std::vector<std::string> misshapen_;
};

// The kind according to a model's names. The last word that implies a kind counts: "cross_attn.self_attn" is self.
AttentionKind kind_by_name(std::string_view prefix) {
  constexpr std::array kCross = {"cross",     "encoder_att", "EncDecAttention", "multihead_attn",
                                 "attn2",     "src_attn",    "enc_att",         "encoder_decoder_att",
                                 "attn_pool", "attnpool",    "attention_pool"};
  constexpr std::array kSelf = {"self", "attn1", "SelfAttention"};
  const auto end_of_last = [prefix](const auto& words) {
    size_t end = 0;
    for (const std::string_view word : words) {
      if (const auto found = prefix.rfind(word); found != std::string_view::npos) end = std::max(end, found + 1);
    }
    return end;
  };
  const auto cross = end_of_last(kCross), self = end_of_last(kSelf);
  return cross == self ? AttentionKind::unknown : cross > self ? AttentionKind::cross : AttentionKind::self;
}

std::optional<FoundLayer> layer_at(const Infos& tensors, const std::string& prefix, const std::vector<const Layout*>& layouts) {
  std::optional<FoundLayer> best;
  size_t most = 0;
  for (const auto* layout : layouts) {
    Match match(tensors, *layout, prefix);
    auto layer = match.layer();
    if (!layer || match.explained() <= most) continue;
    most = match.explained();
    best = std::move(layer);
  }
  if (const auto kind = kind_by_name(prefix); best && kind != AttentionKind::unknown) best->kind = kind;
  return best;
}

}  // namespace

std::vector<Layout> layouts() {
  return detail::layer_layouts();
}

std::vector<FoundLayer> find_layers(const Infos& tensors, const LayoutChoice& choice) {
  std::vector<const Layout*> wanted;
  if (choice.own()) {
    wanted = {choice.own().get()};
  } else if (!choice.is_any()) {
    wanted = {&detail::layout_named(choice.name())};
  } else {
    for (const auto& layout : detail::layer_layouts()) wanted.push_back(&layout);
  }
  std::map<std::string, std::vector<const Layout*>> places;  // layouts whose query projection is at a prefix, as they are tried
  for (const auto* layout : wanted) {
    for (const auto& [name, info] : tensors) {
      const auto& ending = layout->projections[0].weight;
      if (!name.ends_with(ending)) continue;
      const auto prefix = name.substr(0, name.size() - ending.size());
      if (prefix.empty() || prefix.ends_with('.')) places[prefix].push_back(layout);
    }
  }
  std::vector<FoundLayer> layers;
  std::set<std::string> queries;  // full names of the query projections of these layers
  for (const auto& [prefix, possible] : places) {
    auto layer = layer_at(tensors, prefix, possible);
    if (!layer) continue;
    layer->own_layout = choice.own();
    // A longer prefix comes later. The layer there is the same without what is around it, such as its norms.
    if (!queries.insert(prefix + detail::layout_of(*layer).projections[0].weight).second) continue;
    layers.push_back(*std::move(layer));
  }
  return layers;
}

std::vector<int64_t> FoundLayer::possible_heads() const {
  if (heads_known) return {options.num_heads()};
  const auto group = options.num_heads() / *options.kv_heads();
  const auto common = *options.kv_heads() * std::gcd(*options.head_dim(), *options.value_head_dim());
  // Divisors come in pairs; one of each pair is at most the square root.
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
  const auto kv_heads = num_heads * *options.kv_heads() / options.num_heads();
  auto result = options;
  return result.num_heads(num_heads)
      .kv_heads(kv_heads)
      .head_dim(*options.kv_heads() * *options.head_dim() / kv_heads)
      .value_head_dim(*options.kv_heads() * *options.value_head_dim() / kv_heads);
}

std::vector<std::string> unexplained_names(const FoundLayer& layer, const Infos& tensors) {
  return detail::names_of(detail::NameRole::unexplained, detail::name_roles(layer, tensors));
}

FoundLayer choose_layer(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const LayoutChoice& layout) {
  const auto layers = find_layers(checkpoint.tensors(), layout);
  if (layers.empty() || (prefix && !detail::find_at(layers, *prefix)))
    detail::explain_none(checkpoint, prefix.value_or(""), layout);
  return detail::choose(checkpoint.path(), layers, "an attention layer", prefix);
}

}  // namespace xattn
