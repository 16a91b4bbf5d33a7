// SPDX-License-Identifier: Apache-2.0
#include "loading/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <sstream>
#include <string_view>
#include <system_error>

#include "base/text.h"
#include "files/mapped_file.h"
#include "modules/option_names.h"

namespace xattn::detail {
namespace {

using Names = std::vector<std::string>;

// Whether a name of a layout may stand in any part of a config.
bool is_anywhere(std::string_view name) {
  return !name.empty() && name.find('.') == std::string_view::npos;
}

// The name for layers with this prefix: configs of one part have names like "decoder_attention_heads" and, for the encoder,
// "encoder_attention_heads".
std::string name_for(const std::string& name, const std::string& prefix) {
  constexpr std::string_view kDecoder = "decoder_";
  const bool of_encoder = has_component(prefix, {"encoder"}) && !has_component(prefix, {"decoder"});
  return of_encoder && name.starts_with(kDecoder) ? "encoder_" + name.substr(kDecoder.size()) : name;
}

template <class T>
void add(const Json* found, std::vector<T>& values) {
  if (const auto value = found ? found->as<T>() : std::nullopt) values.push_back(*value);
}

// The last number among the components of a prefix.
std::optional<int64_t> layer_number(const std::string& prefix) {
  std::optional<int64_t> last;
  std::istringstream components(prefix);
  for (std::string component; std::getline(components, component, '.');) {
    if (const auto number = number_of(component)) last = number;
  }
  return last;
}

// Names are those of Hugging Face's ACT2FN.
std::optional<Activation> activation_named(std::string_view name) {
  if (name == "gated-gelu") return Activation::gelu_tanh;  // T5's feed_forward_proj: it has always been the approximation
  if (name.starts_with("gated-")) name.remove_prefix(std::string_view("gated-").size());
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "silu" || name == "swish") return Activation::silu;
  return {};
}

}  // namespace

Names places_of(std::string name) {
  if (name.empty()) return {};
  if (is_anywhere(name)) return {name, "text_config/" + name, "decoder/" + name};
  std::ranges::replace(name, '.', '/');
  if (name.starts_with('/')) name.erase(0, 1);
  return {name};
}

ModelConfig::ModelConfig(const Checkpoint& checkpoint)
    : check_(load_check(checkpoint.path())), tensors_(&checkpoint.tensors()), metadata_(&checkpoint.metadata()) {
  if (checkpoint.files().empty()) return;   // a file in memory has no place
  constexpr size_t kMaxConfig = 8'000'000;  // bytes; a config that names tens of thousands of classes has one million
  const auto path = (std::filesystem::path(checkpoint.path()).parent_path() / "config.json").string();
  std::error_code error;
  if (std::filesystem::status(path, error).type() == std::filesystem::file_type::not_found) return;
  const MappedFile file(path, kMaxConfig);
  json_ = parse_json("load", path, file.bytes(), kMaxConfig);
}

const Json* ModelConfig::part_of(const std::string& prefix) const {
  constexpr std::string_view kEnding = "_config";
  std::istringstream components(prefix);
  for (std::string component; json_.object() && std::getline(components, component, '.');) {
    for (const auto& [name, value] : *json_.object()) {
      const auto word = name.ends_with(kEnding) ? name.substr(0, name.size() - kEnding.size()) : name;
      if (value.object() && !word.empty() && component.starts_with(word)) return &value;
    }
  }
  return nullptr;
}

template <class T>
std::vector<T> ModelConfig::all(const Names& names, const std::string& prefix) const {
  std::vector<T> values;
  const auto* part = part_of(prefix);
  for (const auto& any : names) {
    const auto name = name_for(any, prefix);
    if (part && is_anywhere(name)) {
      add(part->find(name), values);
      add(json_.find(name), values);
    } else {
      for (const auto& place : places_of(name)) add(json_.find(place), values);
    }
  }
  return values;
}

template <class T>
std::vector<T> ModelConfig::possible(const Names& names, const std::string& prefix) const {
  const auto* part = part_of(prefix);
  for (const auto& any : names) {
    const auto name = name_for(any, prefix);
    const auto* found = part && is_anywhere(name) ? part->find(name) : nullptr;
    if (const auto value = found ? found->template as<T>() : std::nullopt) return {*value};
  }
  const bool is_of_some_part = !part && !has_component(prefix, {"encoder", "decoder"}) && json_.object();
  for (const auto& name : names) {
    auto values = all<T>({name}, prefix);
    if (is_of_some_part && is_anywhere(name)) {
      add(json_.find(name_for(name, "encoder.")), values);
      for (const auto& [key, value] : *json_.object()) add(value.find(name), values);
    }
    if (!values.empty()) return values;
  }
  return {};
}

template std::vector<std::string> ModelConfig::all(const Names& names, const std::string& prefix) const;
template std::vector<double> ModelConfig::all(const Names& names, const std::string& prefix) const;
template std::vector<double> ModelConfig::possible(const Names& names, const std::string& prefix) const;

std::optional<std::string> ModelConfig::class_name() const {
  return first<std::string>({"._class_name"});
}

// Classes of diffusers do not write the eps of these norms into config.json: norm_eps is that of other norms.
std::optional<double> ModelConfig::eps_of_class(const FoundLayer& layer) const {
  struct Eps {
    std::string_view classes;  // begins their names
    double eps;
  };
  constexpr std::array kEps = {Eps{"LTXVideo", 1e-5}, Eps{"Sana", 1e-5}, Eps{"PixArt", 1e-5},    Eps{"Cosmos", 1e-5},
                               Eps{"LTX2", 1e-6},     Eps{"SD3", 1e-6},  Eps{"CogVideoX", 1e-6}, Eps{"ConsisID", 1e-6}};
  const auto of_class = class_name();
  if (!of_class || layout_of(layer).qk_norm.eps_known_in.empty()) return {};
  for (const auto& [classes, eps] : kEps) {
    if (of_class->starts_with(classes)) return eps;
  }
  return {};
}

std::optional<double> ModelConfig::qk_norm_eps(const FoundLayer& layer) const {
  const auto eps = first<double>(layout_of(layer).qk_norm.eps_in_config, layer.prefix);
  return eps ? eps : eps_of_class(layer);
}

std::vector<double> ModelConfig::possible_qk_norm_eps(const FoundLayer& layer) const {
  auto values = possible<double>(layout_of(layer).qk_norm.eps_in_config, layer.prefix);
  if (const auto eps = eps_of_class(layer); eps && values.empty()) values.push_back(*eps);
  return values;
}

std::optional<int64_t> ModelConfig::max_distance() const {
  return first<int64_t>({"relative_attention_max_distance"});
}

// Those of the names that give a number of heads for this layer.
Names ModelConfig::names_of_heads(const FoundLayer& layer, Names names) const {
  // In these classes of diffusers attention_head_dim is the number of heads; in others it is the size of a head.
  constexpr std::array kClasses = {"UNet2DCondition", "UNetMotion", "ControlNet"};
  constexpr const char* kIgnoresHeads = "I2VGenXLUNet";  // takes attention_head_dim in place of num_attention_heads
  const auto& layout = layout_of(layer);
  if (!layout.num_heads_unknown.empty() && layer.prefix.find(layout.num_heads_unknown) != std::string::npos) return {};
  const auto of_class = class_name();
  const auto is_a = [&](const char* name) { return of_class && of_class->find(name) != std::string::npos; };
  if (of_class && std::ranges::none_of(kClasses, is_a)) std::erase(names, "attention_head_dim");
  if (is_a(kIgnoresHeads)) std::erase(names, "num_attention_heads");
  return names;
}

std::optional<int64_t> ModelConfig::heads_in_metadata(const FoundLayer& layer) const {
  const auto found = metadata_->find(heads_key(layer.prefix));
  if (layer.layout != kReference || found == metadata_->end()) return {};
  const auto number = number_of(found->second);
  check_(number.has_value(), "metadata {} must be a number of heads, but is {}", in_quotes(found->first),
         in_quotes(found->second));
  return number;
}

std::optional<int64_t> ModelConfig::num_heads(const FoundLayer& layer, const Names& names) const {
  const auto heads = heads_in_metadata(layer);
  return heads ? heads : first<int64_t>(names_of_heads(layer, names), layer.prefix);
}

std::vector<int64_t> ModelConfig::possible_num_heads(const FoundLayer& layer, const Names& names) const {
  if (const auto heads = heads_in_metadata(layer)) return {*heads};
  auto numbers = possible<int64_t>(names_of_heads(layer, names), layer.prefix);
  const auto of_widths = layer.possible_heads();
  std::erase_if(numbers, [&](int64_t number) { return std::ranges::count(of_widths, number) == 0; });  // another layer's
  return numbers;
}

std::optional<double> ModelConfig::scale(const FoundLayer& layer, int64_t head_dim) const {
  const auto& layout = layout_of(layer);
  if (const auto root = first<double>({layout.scale_root_in_config})) {
    check_(*root > 0, "{} in its config.json must be positive, but is {}", layout.scale_root_in_config, *root);
    return 1 / std::sqrt(*root);
  }
  std::optional<double> scale;
  if (first<bool>({layout.scaled_in_config}) == false) scale = 1;
  if (first<bool>({layout.by_layer_in_config}) == true) {
    const auto number = layer_number(layer.prefix);
    check_(number.has_value(), "its config.json says {}, but prefix {} does not contain the number of the layer",
           layout.by_layer_in_config, in_quotes(layer.prefix));
    scale = scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))) / static_cast<double>(*number + 1);
  }
  return scale;
}

std::optional<NormPlacement> ModelConfig::norm_placement(const BlockLayout& layout) const {
  if (layout.norm_placement) return layout.norm_placement;
  for (const auto& model : all<std::string>({"model_type"})) {
    if (std::ranges::count(layout.models_before, model) > 0) return NormPlacement::before;
    if (std::ranges::count(layout.models_after, model) > 0) return NormPlacement::after;
  }
  return {};
}

std::optional<Activation> ModelConfig::activation(const FoundBlock& block) const {
  const auto& layout = block_layout_named(block.layout);
  const auto name = first<std::string>(layout.activation_in_config, block.prefix);
  if (!name) return layout.activation;
  const auto activation = activation_named(*name);
  check_(activation.has_value(), "the activation in its config.json, {}, is not known; give one of {}", in_quotes(*name),
         kActivations);
  return activation;
}

std::vector<std::string> ModelConfig::possible_activations(const FoundBlock& block) const {
  auto names = possible<std::string>(block_layout_named(block.layout).activation_in_config, block.prefix);
  for (auto& name : names) {
    if (const auto activation = activation_named(name)) name = name_of(*activation);
  }
  return names;
}

}  // namespace xattn::detail
