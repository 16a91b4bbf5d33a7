// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/cat.h>
#include <ATen/ops/repeat_interleave.h>
#include <xattn/layouts.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "loading/layout_names.h"

namespace xattn {
namespace {

using Infos = std::map<std::string, TensorInfo>;

struct Shape2 {
  int64_t out;
  int64_t in;
};

// Whether one of these words, if there are any, stands in the prefix between its points.
bool has_component(const std::string& prefix, std::string_view words) {
  const auto all = detail::words(words);
  const auto is_there = [prefix = "." + prefix](const std::string& word) {
    return prefix.find("." + word + ".") != std::string::npos;
  };
  return all.empty() || std::ranges::any_of(all, is_there);
}

// A layer of this layout behind a prefix, if it is there and its shapes fit together.
class Match {
 public:
  Match(const Infos& tensors, const Layout& layout, const std::string& prefix)
      : tensors_(tensors), layout_(layout), prefix_(prefix) {}

  // The number of tensors that the layout explains, to prefer the layout that explains more.
  size_t explained() const { return explained_.size(); }

  std::optional<FoundLayer> layer() {
    if (!has_component(prefix_, layout_.prefix_has)) return {};
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
      const bool norm = added.key_norm.empty() || find(std::string(added.key_norm) + ".weight");
      if (norm && take(added.key, ".weight") && take(added.value, ".weight")) layer.added.push_back(&added);
    }
    layer.misshapen = std::move(misshapen_);
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
    if (!take(names.bias, "")) return false;
    const auto& shape = find(names.bias)->shape;
    if (shape == std::vector<int64_t>{out * names.bias_parts}) return true;
    misshapen_.push_back(
        detail::formatted("{} must have shape [{}], but has [{}]", names.bias, out * names.bias_parts, detail::joined(shape)));
    return false;
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
    const auto refuse = [&] {
      misshapen_.push_back(
          detail::formatted("{}.weight and {}.weight must be of a head, or of all heads, but have shapes [{}] and [{}]",
                            layout_.query_norm, layout_.key_norm, detail::joined(query_size), detail::joined(key_size)));
      return true;
    };
    if (query_size.size() != 1 || key_size.size() != 1 || query_size[0] == 0) return refuse();
    if (centred && !layout_.layer_norms_are.empty()) {
      misshapen_.push_back(detail::formatted("{} and {} must be norms of kind rms, but are layer norms, as {}",
                                             layout_.query_norm, layout_.key_norm, layout_.layer_norms_are));
    }
    const auto kind = centred ? NormKind::layer : NormKind::rms;
    if (query_size[0] == group * inner_key && key_size[0] == inner_key) {
      options.qk_norm(kind).qk_norm_eps(layout_.qk_norm_eps).qk_norm_scope(NormScope::across_heads);
      return true;
    }
    const auto d = query_size[0];
    const auto kv_heads = inner_key / d;
    if (key_size[0] != d || inner_key != kv_heads * d || inner_value % kv_heads != 0) return refuse();
    options.qk_norm(kind).qk_norm_eps(layout_.qk_norm_eps);
    options.num_heads(group * kv_heads).kv_heads(kv_heads).head_dim(d).value_head_dim(inner_value / kv_heads);
    layer.heads_known = true;
    return true;
  }

  const Infos& tensors_;
  const Layout& layout_;
  const std::string& prefix_;
  std::set<std::string> explained_;
  std::vector<std::string> misshapen_;
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

namespace {

at::Tensor part_of(const TensorRecipe& recipe, const at::Tensor& whole) {
  if (recipe.flat) return whole.flatten();
  const auto upright = recipe.transposed ? whole.t() : whole;
  return recipe.parts == 1 ? upright : upright.chunk(recipe.parts)[static_cast<size_t>(recipe.part)];
}

}  // namespace

at::ScalarType TensorRecipe::type(const Infos& tensors) const {
  if (scale.empty()) return tensors.at(source).type;
  return tensors.at(scale).type == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor TensorRecipe::apply(const at::Tensor& source_tensor) const {
  detail::check_value(scale.empty(), "layouts", "{} must be multiplied by {}, as make does it.", source, scale);
  return part_of(*this, source_tensor);
}

namespace {

constexpr std::array kFloat8 = {at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz};
constexpr std::array kWithArithmetic = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};
constexpr std::array kScales = {"scale_weight", "weight_scale", "weight_scale_inv"};
constexpr std::array kActivationScales = {"input_scale", "scale_input", "activation_scale", "input_scale_ub"};

// How many of `count` rows or columns have the same of `scales` scales; 0 if these are no blocks of them. See TensorRecipe.
int64_t block_of(int64_t count, int64_t scales) {
  constexpr int64_t kBlock = 128;
  if (scales <= 0) return 0;
  if (scales > 1 && (count + kBlock - 1) / kBlock == scales) return kBlock;
  return count % scales == 0 ? count / scales : 0;
}

bool is_one_number(const std::vector<int64_t>& shape) {
  return std::ranges::all_of(shape, [](int64_t size) { return size == 1; });
}

// What a name that ends in "weight" is with another word in its place; empty if it does not.
std::string renamed(std::string_view weight, std::string_view word) {
  constexpr std::string_view kWeight = "weight";
  if (!weight.ends_with(kWeight)) return "";
  return detail::formatted("{}{}", weight.substr(0, weight.size() - kWeight.size()), word);
}

bool is_float8(const Infos& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found != tensors.end() && std::ranges::count(kFloat8, found->second.type) > 0;
}

}  // namespace

namespace detail {

TensorRecipe with_scale(TensorRecipe recipe, const Infos& tensors) {
  if (!is_float8(tensors, recipe.source)) return recipe;
  for (const auto* word : kScales) {
    auto name = renamed(recipe.source, word);
    if (recipe.scale.empty() && tensors.contains(name)) recipe.scale = std::move(name);
  }
  return recipe;
}

std::vector<std::string> activation_scales(const TensorRecipe& recipe, const Infos& tensors) {
  std::vector<std::string> names;
  if (!is_float8(tensors, recipe.source)) return names;
  for (const auto* word : kActivationScales) {
    if (auto name = renamed(recipe.source, word); tensors.contains(name)) names.push_back(std::move(name));
  }
  return names;
}

}  // namespace detail

std::string TensorRecipe::misfit(const Infos& tensors) const {
  if (scale.empty()) return "";
  const auto &of_scale = tensors.at(scale), &of_source = tensors.at(source);
  if (std::ranges::count(kWithArithmetic, of_scale.type) == 0) {
    return detail::formatted("{} must have type float64, float32, bfloat16 or float16, but has {}", scale,
                             c10::getDtypeNames(of_scale.type).first);
  }
  const auto &shape = of_scale.shape, &whole = of_source.shape;
  const bool of_rows = shape.size() == 1 && whole.size() == 2 && shape[0] == whole[0] && !transposed;
  const bool of_blocks =
      shape.size() == 2 && whole.size() == 2 && block_of(whole[0], shape[0]) > 0 && block_of(whole[1], shape[1]) > 0;
  if (is_one_number(shape) || of_rows || of_blocks) return "";
  return detail::formatted("{} must be one number, one for each row or one for each block of {} [{}], but has shape [{}]",
                           scale, source, detail::joined(whole), detail::joined(of_scale.shape));
}

at::Tensor TensorRecipe::make(const LazyTensors& tensors, std::optional<at::ScalarType> wanted) const {
  if (scale.empty()) return part_of(*this, tensors.make(source));
  const auto reason = misfit(tensors.infos);
  detail::check_value(reason.empty(), "layouts", "{}.", reason);
  const auto of_product = wanted == at::kDouble ? at::kDouble : type(tensors.infos);
  auto weight = tensors.make(source).to(of_product);
  auto factors = tensors.make(scale).to(of_product);
  if (is_one_number(tensors.infos.at(scale).shape)) return part_of(*this, weight.mul_(factors.squeeze()));
  if (factors.dim() == 1) factors = factors.unsqueeze(1);
  for (const int64_t axis : {0, 1}) {
    const auto count = weight.size(axis);
    if (factors.size(axis) == 1) continue;
    factors = at::repeat_interleave(factors, block_of(count, factors.size(axis)), axis).narrow(axis, 0, count);
  }
  return part_of(*this, weight.mul_(factors));
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
    if (!tensors.contains(source)) continue;
    result.emplace(parameter, detail::with_scale({source, part, parts, transposed}, tensors));
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
        result.emplace(detail::formatted("added{}.{}{}", i, part, ending), detail::with_scale({source}, tensors));
      }
    }
  }
  return result;
}

std::map<std::string, NameRole> name_roles(const FoundLayer& layer, const Infos& tensors) {
  const auto& layout = *layer.layout;
  std::map<std::string, NameRole> roles;
  const auto set = [&](const std::string& full_name, NameRole role) {
    if (tensors.contains(full_name)) roles.insert_or_assign(full_name.substr(layer.prefix.size()), role);
  };
  for (auto name = tensors.lower_bound(layer.prefix); name != tensors.end() && name->first.starts_with(layer.prefix); ++name) {
    set(name->first, NameRole::unexplained);
  }
  const auto is_mask = [](const std::vector<int64_t>& shape) {
    return shape.size() == 4 && shape[0] == 1 && shape[1] == 1 && shape[2] == shape[3];
  };
  for (const auto& any : layouts()) {
    for (const auto& word : detail::words(any.beside)) set(layer.prefix + word, NameRole::beside);
    for (const auto& word : detail::words(any.causal_mask)) {
      const auto mask = tensors.find(layer.prefix + word);
      if (mask != tensors.end() && is_mask(mask->second.shape)) set(mask->first, NameRole::beside);
    }
  }
  for (const auto& word : detail::words(layer.kind == AttentionKind::cross ? layout.beside_cross : "")) {
    set(layer.prefix + word, NameRole::beside);
  }
  for (const auto norm : {layout.query_input, layout.context_input}) {
    if (norm.empty()) continue;
    for (const auto* ending : {".weight", ".bias"}) {
      set(detail::formatted("{}{}{}", layer.prefix, norm, ending), NameRole::input_norm);
    }
  }
  const auto set_recipes = [&](const std::map<std::string, TensorRecipe>& all, NameRole role) {
    for (const auto& [parameter, recipe] : all) {
      set(recipe.source, role);
      if (!recipe.scale.empty()) set(recipe.scale, role);
      for (const auto& name : detail::activation_scales(recipe, tensors)) set(name, NameRole::beside);
    }
  };
  set_recipes(added_recipes(layer, tensors), NameRole::added);
  set_recipes(recipes(layer, tensors), NameRole::parameter);
  return roles;
}

std::vector<std::string> unexplained_names(const FoundLayer& layer, const Infos& tensors) {
  std::vector<std::string> names;
  for (const auto& [name, role] : name_roles(layer, tensors)) {
    if (role == NameRole::unexplained) names.push_back(name);
  }
  return names;
}

std::string advice_on(const std::vector<std::string>& names) {
  struct Advice {
    std::vector<std::string_view> parts;  // of names
    std::string_view text;
  };
  static const std::array kAdvice = {
      Advice{{"lora", "dora_scale", "hada_w", "lokr_w", ".base_layer."},
             "low-rank weights must first be merged into the others in Python, by merge_and_unload of peft or fuse_lora of "
             "diffusers, and all saved anew"},
      Advice{{"add_q_proj", "to_add_out", "norm_added_q"},
             "joint attention, as in SD3 and Flux, where the context attends as well, is not computed"},
      Advice{{"group_norm", "add_k_proj", "add_v_proj"},
             "attention with added keys in the same softmax, behind a group norm, as in Kandinsky and DeepFloyd IF, is not "
             "computed"}};
  for (const auto& [parts, text] : kAdvice) {
    const auto is_meant = [&parts = parts](const std::string& name) {
      std::string lower = name;
      std::ranges::transform(lower, lower.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      return std::ranges::any_of(parts, [&](std::string_view part) { return lower.find(part) != std::string::npos; });
    };
    if (std::ranges::any_of(names, is_meant)) return detail::formatted("; {}", text);
  }
  return "";
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
