// SPDX-License-Identifier: Apache-2.0
#include "loading/recipes.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/repeat_interleave.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <functional>
#include <numeric>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "loading/block_layouts.h"

namespace xattn::detail {
namespace {

constexpr std::array kFloat8 = {at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz};
constexpr std::array kScales = {"scale_weight", "weight_scale", "weight_scale_inv"};
constexpr std::array kActivationScales = {"input_scale", "scale_input", "activation_scale", "input_scale_ub"};

at::Tensor part_of(const TensorRecipe& recipe, const at::Tensor& whole) {
  if (recipe.flat) return whole.flatten();
  const auto upright = recipe.transposed ? whole.t() : whole;
  return recipe.parts == 1 ? upright : upright.chunk(recipe.parts)[static_cast<size_t>(recipe.part)];
}

// How many of `count` rows or columns share one of `scales` scales; 0 if they cannot. See TensorRecipe.
int64_t block_of(int64_t count, int64_t scales) {
  constexpr int64_t kBlock = 128;
  if (scales <= 0) return 0;
  if (scales > 1 && (count + kBlock - 1) / kBlock == scales) return kBlock;
  return count % scales == 0 ? count / scales : 0;
}

bool is_one_number(const std::vector<int64_t>& shape) {
  return std::ranges::all_of(shape, [](int64_t size) { return size == 1; });
}

// The tensors beside a float8 weight whose names have one of these words in place of "weight".
std::vector<std::string> beside_weight(const std::string& weight, std::span<const char* const> words, const Infos& tensors) {
  std::vector<std::string> names;
  const auto found = tensors.find(weight);
  if (found == tensors.end() || std::ranges::count(kFloat8, found->second.type) == 0 || !weight.ends_with("weight"))
    return names;
  for (const auto* word : words) {
    auto name = weight.substr(0, weight.size() - std::string_view("weight").size()) + word;
    if (tensors.contains(name)) names.push_back(std::move(name));
  }
  return names;
}

// Calls `visit` with each name that begins with the prefix, and with the rest of that name.
template <class Visit>
void for_each_below(const std::string& prefix, const Infos& tensors, const Visit& visit) {
  for (auto item = tensors.lower_bound(prefix); item != tensors.end() && item->first.starts_with(prefix); ++item) {
    visit(item->first, item->first.substr(prefix.size()));
  }
}

// Low-rank weights in kohya's spelling: "lora_unet_" or the like, the name of a module with underscores in place of points,
// which may lack the first components of ours, and ".lora_down.weight".
std::vector<std::string> low_rank_names(const Recipes& recipes, const Infos& tensors) {
  constexpr std::array kBeginnings = {"lora_", "lycoris_"};
  constexpr int kMostWords = 2;  // in front of the module's name
  std::set<std::string, std::less<>> modules;
  for (const auto& [parameter, recipe] : recipes) {
    auto name = recipe.source.substr(0, recipe.source.rfind('.'));
    for (auto point = name.find('.'); point != std::string::npos; point = name.find('.')) {
      auto flat = name;
      std::ranges::replace(flat, '.', '_');
      modules.insert(std::move(flat));
      name.erase(0, point + 1);
    }
    modules.insert(name);
  }
  std::vector<std::string> names;
  for (const auto* beginning : kBeginnings) {
    for_each_below(beginning, tensors, [&](const std::string& name, const std::string&) {
      auto rest = std::string_view(name).substr(0, name.find('.'));
      for (int word = 0; word < kMostWords && rest.find('_') != std::string_view::npos; ++word) {
        rest.remove_prefix(rest.find('_') + 1);
        if (!modules.contains(rest)) continue;
        names.push_back(name);
        break;
      }
    });
  }
  return names;
}

}  // namespace

// ---- One tensor ------------------------------------------------------------------------------------------------------------

bool has_arithmetic(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

std::vector<int64_t> TensorRecipe::shape(const TensorInfo& source_info) const {
  auto shape = source_info.shape;
  if (flat) return {std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies())};
  if (transposed && shape.size() == 2) std::swap(shape[0], shape[1]);
  if (!shape.empty()) shape[0] /= parts;
  return shape;
}

at::ScalarType TensorRecipe::type(const Infos& tensors) const {
  if (scale.empty()) return tensors.at(source).type;
  return tensors.at(scale).type == at::kDouble ? at::kDouble : at::kFloat;
}

std::string TensorRecipe::misfit(const Infos& tensors) const {
  if (scale.empty()) return "";
  const auto& [scale_type, shape] = tensors.at(scale);
  const auto& whole = tensors.at(source).shape;
  if (!has_arithmetic(scale_type)) {
    return formatted("{} must have type float64, float32, bfloat16 or float16, but has {}", scale,
                     c10::getDtypeNames(scale_type).first);
  }
  const bool of_rows = shape.size() == 1 && whole.size() == 2 && shape[0] == whole[0] && !transposed;
  const bool of_blocks =
      shape.size() == 2 && whole.size() == 2 && block_of(whole[0], shape[0]) > 0 && block_of(whole[1], shape[1]) > 0;
  if (is_one_number(shape) || of_rows || of_blocks) return "";
  return formatted("{} must be one number, one for each row or one for each block of {} [{}], but has shape [{}]", scale,
                   source, joined(whole), joined(shape));
}

at::Tensor TensorRecipe::make(const LazyTensors& tensors, std::optional<at::ScalarType> wanted) const {
  if (scale.empty()) return part_of(*this, tensors.make(source));
  const auto reason = misfit(tensors.infos);
  check_value(reason.empty(), "layouts", "{}.", reason);
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

void TensorRecipe::write(const at::Tensor& value, const at::Tensor& source_tensor) const {
  TORCH_INTERNAL_ASSERT(scale.empty() && source_tensor.is_contiguous(), source);
  part_of(*this, source_tensor).copy_(value);
}

TensorRecipe with_scale(TensorRecipe recipe, const Infos& tensors) {
  const auto scales = beside_weight(recipe.source, kScales, tensors);
  if (!scales.empty()) recipe.scale = scales.front();
  return recipe;
}

// ---- Layers and blocks -----------------------------------------------------------------------------------------------------

Recipes recipes(const FoundLayer& layer, const Infos& tensors) {
  Recipes result;
  for (const auto& [parameter, name, part, parts, transposed] : parameter_names(layout_of(layer))) {
    const auto source = layer.prefix + name;
    if (tensors.contains(source)) result.emplace(parameter, with_scale({source, part, parts, transposed}, tensors));
  }
  return result;
}

Recipes added_recipes(const FoundLayer& layer, const Infos& tensors) {
  Recipes result;
  size_t index = 0;
  for (const auto& [key, value, key_norm] : layout_of(layer).added) {
    if (std::ranges::count(layer.added, key) == 0) continue;
    for (const auto& [part, name] : {std::pair("key_linear", key), {"value_linear", value}, {"key_norm", key_norm}}) {
      for (const auto* ending : {".weight", ".bias"}) {
        const auto source = layer.prefix + name + ending;
        if (name.empty() || !tensors.contains(source)) continue;
        result.emplace(formatted("added{}.{}{}", index, part, ending), with_scale({source}, tensors));
      }
    }
    ++index;
  }
  return result;
}

Recipes recipes(const FoundBlock& block, const Infos& tensors) {
  const auto& layout = block_layout_named(block.layout);
  Recipes result;
  for (auto& [parameter, recipe] : recipes(block.attention, tensors)) result.emplace("attention." + parameter, recipe);
  const auto add = [&](const std::string& parameter, const std::string& name, const char* ending, TensorRecipe recipe) {
    recipe.source = block.prefix + name + ending;
    if (!name.empty() && tensors.contains(recipe.source)) result.emplace(parameter, with_scale(recipe, tensors));
  };
  const auto add_norm = [&](const std::string& parameter, const std::string& name) {
    for (const auto& [weight, bias] : kNormEndings) {
      add(parameter + ".weight", name, weight, {});
      add(parameter + ".bias", name, bias, {});
    }
  };
  const auto& [in, out, multiplier, transposed] = layout.feed_forward;
  const auto add_linear = [&](const std::string& parameter, const std::string& name, int part, int parts) {
    add(parameter + ".weight", name, ".weight", {.part = part, .parts = parts, .transposed = layout.feed_forward.transposed});
    add(parameter + ".bias", name, ".bias", {.part = part, .parts = parts});
  };
  const auto parts = layout.feed_forward.parts();
  add_norm("attention_norm", layout.norms.attention);
  add_norm("feed_forward_norm", layout.norms.feed_forward);
  add_linear("feed_forward_in", in, parts - 1, parts);
  add_linear("feed_forward_multiplier", multiplier, 0, parts);
  add_linear("feed_forward_out", out, 0, 1);
  add("attention_gate", layout.gates[0], "", {.flat = true});
  add("feed_forward_gate", layout.gates[1], "", {.flat = true});
  return result;
}

NamedTensors spell(const NamedTensors& parameters, const Layout& layout, const std::string& prefix) {
  std::map<std::string, std::vector<at::Tensor>> packed;  // by name in the file
  std::set<std::string> spelled;
  for (const auto& [parameter, name, part, parts, transposed] : parameter_names(layout)) {
    const auto found = parameters.find(parameter);
    if (found == parameters.end()) continue;
    auto& of_name = packed[prefix + name];
    of_name.resize(static_cast<size_t>(parts));
    auto& place = of_name[static_cast<size_t>(part)];
    const auto upright = transposed ? found->second.t() : found->second;
    check_value(!place.defined() || upright.is_meta() || upright.equal(place), "layouts",
                "layout {} has one {} for query and key, but theirs differ.", layout.name, name);
    place = upright;
    spelled.insert(parameter);
  }
  for (const auto& [parameter, tensor] : parameters) {
    check_value(spelled.contains(parameter), "layouts", "layout {} must have a name for {}, but has none.", layout.name,
                parameter);
  }
  NamedTensors result;
  for (const auto& [name, of_name] : packed) {
    const bool complete = std::ranges::all_of(of_name, [](const at::Tensor& part) { return part.defined(); });
    check_value(complete, "layouts", "layout {} packs several parts into {}, but some of them are missing.", layout.name, name);
    for (const auto& part : of_name) {
      check_value(part.sizes() == of_name.front().sizes(), "layouts",
                  "layout {} packs parts of one shape into {}, but they have {} and {}.", layout.name, name,
                  shape_of(of_name.front()), shape_of(part));
    }
    const auto axis = layout.transposed && of_name.front().dim() == 2 ? 1 : 0;
    result.emplace(name, of_name.size() == 1 ? of_name.front().contiguous() : at::cat(of_name, axis));
  }
  return result;
}

// ---- Roles of names --------------------------------------------------------------------------------------------------------

namespace {

// Roles by name, without the prefix of the layer or block. At first no name is explained.
class Roles {
 public:
  Roles(const std::string& prefix, const Infos& tensors) : prefix_(prefix), tensors_(tensors) {
    for_each_below(prefix, tensors, [&](const auto&, const auto& name) { roles.emplace(name, NameRole::unexplained); });
  }

  void set(const std::string& name, NameRole role) {
    if (const auto found = roles.find(name); found != roles.end()) found->second = role;
  }

  // Sets the role of this name, or of all names that begin with it if it ends in a point.
  void set_all(const std::string& word, NameRole role) {
    if (!word.ends_with('.')) return set(word, role);
    for (auto& [name, own] : roles) {
      if (name.starts_with(word)) own = role;
    }
  }

  // Sets the role of the sources of recipes and of the scales beside them.
  void set(const Recipes& recipes, NameRole role) {
    for (const auto& [parameter, recipe] : recipes) {
      set(recipe.source.substr(prefix_.size()), role);
      if (!recipe.scale.empty()) set(recipe.scale.substr(prefix_.size()), role);
      for (const auto& name : beside_weight(recipe.source, kActivationScales, tensors_)) {
        set(name.substr(prefix_.size()), NameRole::beside);
      }
    }
    for (auto& name : low_rank_names(recipes, tensors_)) roles.emplace(std::move(name), NameRole::unexplained);
  }

  std::map<std::string, NameRole> roles;

 private:
  const std::string& prefix_;
  const Infos& tensors_;
};

// The bias of positions that self-attention reads from the first layer of its stack: the full name, which has a 0 in place of
// one number of the prefix; empty if there is none.
std::string bias_of_first(const FoundLayer& layer, const Infos& tensors) {
  const auto& bias = layout_of(layer).bias_of_first;
  const auto& prefix = layer.prefix;
  if (bias.empty() || layer.kind == AttentionKind::cross || tensors.contains(prefix + bias)) return "";
  for (size_t begin = 0, end = prefix.find('.'); end != std::string::npos; begin = end + 1, end = prefix.find('.', begin)) {
    if (!number_of(prefix.substr(begin, end - begin))) continue;
    auto name = prefix.substr(0, begin) + "0" + prefix.substr(end) + bias;
    if (tensors.contains(name)) return name;
  }
  return "";
}

}  // namespace

std::map<std::string, NameRole> name_roles(const FoundLayer& layer, const Infos& tensors) {
  const auto& layout = layout_of(layer);
  Roles found(layer.prefix, tensors);
  const auto set_beside = [&](const std::vector<std::string>& words) {
    for (const auto& word : words) found.set_all(word, NameRole::beside);
  };
  const auto is_mask = [](const std::vector<int64_t>& shape) {
    return shape.size() == 4 && shape[0] == 1 && shape[1] == 1 && shape[2] == shape[3];
  };
  for (const auto& any : layer_layouts()) {
    set_beside(any.beside);
    const auto mask = any.causal_mask.empty() ? tensors.end() : tensors.find(layer.prefix + any.causal_mask);
    if (mask != tensors.end() && is_mask(mask->second.shape)) found.set(any.causal_mask, NameRole::beside);
  }
  set_beside(layout.beside);  // also if it is not one of the table
  set_beside(layout.beside_here);
  if (layer.kind == AttentionKind::cross) set_beside(layout.beside_cross);
  for (const auto& norm : layout.input_norms) {
    if (norm.empty()) continue;
    for (const auto* ending : {".weight", ".bias"}) found.set(norm + ending, NameRole::input_norm);
  }
  found.set(added_recipes(layer, tensors), NameRole::added);
  found.set(recipes(layer, tensors), NameRole::parameter);
  if (auto bias = bias_of_first(layer, tensors); !bias.empty()) found.roles.emplace(std::move(bias), NameRole::unexplained);
  return std::move(found.roles);
}

std::map<std::string, NameRole> name_roles(const FoundBlock& block, const Infos& tensors) {
  const auto& beside = block_layout_named(block.layout).beside;
  const auto inner = block.attention.prefix.substr(block.prefix.size());
  Roles found(block.prefix, tensors);
  for (const auto& [name, role] : name_roles(block.attention, tensors)) {
    if (role == NameRole::beside) found.set(inner + name, role);
  }
  for (const auto& word : beside) found.set_all(word, NameRole::beside);
  found.set(recipes(block, tensors), NameRole::parameter);
  return std::move(found.roles);
}

std::vector<std::string> names_of(NameRole role, const std::map<std::string, NameRole>& roles) {
  std::vector<std::string> names;
  for (const auto& [name, own] : roles) {
    if (own == role) names.push_back(name);
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
             "diffusers, and all saved again"},
      Advice{{"positional_embedding", "pos_embed"},
             "learned positions are not part of the layer: add them to its inputs, and allow these names"},
      Advice{{"add_q_proj", "to_add_out", "norm_added_q"},
             "joint attention, as in SD3 and Flux, where the context attends as well, is not computed"},
      Advice{{"group_norm", "add_k_proj", "add_v_proj"},
             "attention with added keys in the same softmax, behind a group norm, as in Kandinsky and DeepFloyd IF, is not "
             "computed"}};
  const auto lower = [](std::string text) {
    std::ranges::transform(text, text.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
  };
  for (const auto& [parts, text] : kAdvice) {
    const auto is_meant = [&lower, &all = parts](const std::string& name) {
      return std::ranges::any_of(all, [own = lower(name)](auto part) { return own.find(part) != std::string::npos; });
    };
    if (std::ranges::any_of(names, is_meant)) return formatted("; {}", text);
  }
  return "";
}

}  // namespace xattn::detail
