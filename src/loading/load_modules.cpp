// SPDX-License-Identifier: Apache-2.0
#include <xattn/block_layouts.h>
#include <xattn/load.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/mapped_file.h"
#include "files/stored_tensor.h"
#include "loading/choose.h"
#include "loading/layout_names.h"

// Modules made from files: what load.h has beside load_weights.
namespace xattn {
namespace {

constexpr std::string_view kLoadReader = "load";
constexpr std::string_view kActivations = "relu, gelu, gelu_tanh, silu";

using detail::in_quotes;

// config.json beside a file of weights; says nothing if it is not there. Read as the weights are: FileError unless it is a regular
// file of JSON, of at most some MB.
class ModelConfig {
 public:
  explicit ModelConfig(const Checkpoint& checkpoint) {
    constexpr size_t kMaxConfig = 8'000'000;  // bytes; those that name ten thousands of classes take one
    const auto path = (std::filesystem::path(checkpoint.path()).parent_path() / "config.json").string();
    std::error_code error;
    if (std::filesystem::status(path, error).type() == std::filesystem::file_type::not_found) return;
    const detail::MappedFile file(path, kMaxConfig);
    json_ = detail::parse_json(kLoadReader, path, file.bytes(), kMaxConfig);
  }

  // What it has under these names, as far as it is a T; see Layout::num_heads for where they are.
  template <class T>
  std::vector<T> all(std::string_view names) const {
    std::vector<T> result;
    const auto add = [&](std::string path) {
      std::ranges::replace(path, '.', '/');
      const nlohmann::json::json_pointer pointer(path);
      if (json_.contains(pointer) && is<T>(json_[pointer])) result.push_back(json_[pointer].template get<T>());
    };
    for (const auto& name : detail::words(names)) {
      if (name.find('.') != std::string::npos) {
        add(name.starts_with('.') ? name : "." + name);
      } else {
        for (const std::string place : {".", ".text_config.", ".decoder."}) add(place + name);
      }
    }
    return result;
  }

  // Names and values of all numbers and truth values in the parts where these names are looked for.
  std::vector<std::pair<std::string, double>> numbers_beside(std::string_view names) const {
    std::vector<std::string> parts = {"/text_config", "/decoder"};
    for (auto name : detail::words(names)) {
      if (!name.starts_with('.')) name = "." + name;
      std::ranges::replace(name, '.', '/');
      parts.push_back(name.substr(0, name.rfind('/')));
    }
    std::vector<std::pair<std::string, double>> numbers;
    for (const auto& part : parts) {
      const nlohmann::json::json_pointer pointer(part);
      if (!json_.contains(pointer) || !json_[pointer].is_object()) continue;
      for (const auto& [name, value] : json_[pointer].items()) {
        if (value.is_number()) numbers.emplace_back(name, value.template get<double>());
      }
    }
    return numbers;
  }

  template <class T>
  std::optional<T> first(std::string_view names) const {
    const auto values = all<T>(names);
    return values.empty() ? std::nullopt : std::optional(values.front());
  }

 private:
  template <class T>
  static bool is(const nlohmann::json& value) {
    if constexpr (std::is_same_v<T, int64_t>) return value.is_number_integer();
    if constexpr (std::is_same_v<T, double>) return value.is_number();
    if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
    if constexpr (std::is_same_v<T, std::string>) return value.is_string();
  }

  nlohmann::json json_;
};

// Kinds of attention that a config tells of and names of tensors do not, and that are not computed.
void refuse_by_config(const Checkpoint& checkpoint, const FoundLayer& layer, const ModelConfig& config) {
  struct Refused {
    std::string_view key;
    std::string_view value;  // what its text begins with
    bool with_norms;         // only of layers with norms of queries and keys
    std::string_view what;
  };
  constexpr std::array kRefused = {
      Refused{"model_type", "t5gemma2", false, "attention to its own tokens and to the context in one softmax"},
      Refused{"model_type", "gemma", true, "norms whose weights count from one"},
      Refused{"model_type", "t5gemma", true, "norms whose weights count from one"},
      Refused{"_class_name", "HunyuanDiT2D", false, "rotary embeddings of its queries"},
      Refused{"qk_norm", "l2", false, "norms of queries and keys that have no weights"},
      Refused{"qk_norm", "fp32_layer_norm", false, "norms of queries and keys that have no weights"},
  };
  if (layer.layout->name == "qformer") return;  // all of this would be of the language model in the same file
  const bool has_norms = layer.options.qk_norm() != NormKind::none;
  for (const auto& [key, value, with_norms, what] : kRefused) {
    for (const auto& text : config.all<std::string>(key)) {
      const bool refused = text.starts_with(value) && (has_norms || !with_norms);
      detail::check_file(!refused, kLoadReader, checkpoint.path(), "its config.json says {} {}, which has {}: not computed",
                         key, in_quotes(text), what);
    }
  }
  for (const auto& [key, number] : config.numbers_beside(layer.layout->num_heads)) {
    const bool caps = key.find("att") != std::string::npos &&
                      (key.find("softcap") != std::string::npos || key.find("soft_cap") != std::string::npos ||
                       key.find("logit_cap") != std::string::npos);
    detail::check_file(!caps || number == 0, kLoadReader, checkpoint.path(),
                       "its config.json caps logits softly, by {} of {}: not computed", in_quotes(key), number);
  }
}

// Of the logits, as far as a config tells it.
std::optional<double> scale_of(const Checkpoint& checkpoint,
                               const FoundLayer& layer,
                               const ModelConfig& config,
                               int64_t head_dim) {
  const auto& layout = *layer.layout;
  if (const auto root = config.first<double>(layout.scale_root_in_config)) {
    detail::check_file(*root > 0, kLoadReader, checkpoint.path(), "{} in its config.json must be positive, but is {}",
                       layout.scale_root_in_config, *root);
    return 1 / std::sqrt(*root);
  }
  std::optional<double> scale;
  if (config.first<bool>(layout.scaled_in_config) == false) scale = 1;
  if (config.first<bool>(layout.by_layer_in_config) == true) {
    std::optional<int64_t> index;  // the last number in the prefix
    std::istringstream components(layer.prefix);
    for (std::string component; std::getline(components, component, '.');) {
      int64_t number = 0;
      const auto* end = component.data() + component.size();
      const auto [parsed, error] = std::from_chars(component.data(), end, number);
      if (error == std::errc() && parsed == end && number >= 0) index = number;
    }
    detail::check_file(index.has_value(), kLoadReader, checkpoint.path(),
                       "its config.json says {}, but prefix {} does not tell the number of the layer",
                       layout.by_layer_in_config, in_quotes(layer.prefix));
    scale = scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))) / static_cast<double>(*index + 1);
  }
  return scale;
}

// Some classes of diffusers have their number of heads under the name that others have the size of a head under.
bool calls_heads_head_dim(const ModelConfig& config) {
  constexpr std::array kClasses = {"UNet2DCondition", "UNet3DCondition", "UNetMotion", "I2VGenXLUNet", "ControlNet"};
  const auto of_class = config.first<std::string>("._class_name");
  return !of_class ||
         std::ranges::any_of(kClasses, [&](const auto* name) { return of_class->find(name) != std::string::npos; });
}

std::optional<int64_t> heads_in_config(const FoundLayer& layer, const ModelConfig& config) {
  const auto& layout = *layer.layout;
  if (!layout.num_heads_untold.empty() && layer.prefix.find(layout.num_heads_untold) != std::string::npos) return {};
  for (const auto& name : detail::words(layout.num_heads)) {
    if (name == "attention_head_dim" && !calls_heads_head_dim(config)) continue;
    if (const auto number = config.first<int64_t>(name)) return number;
  }
  return {};
}

// The options of a layer of the file, with its number of heads.
CrossAttentionOptions sizes_of(const Checkpoint& checkpoint, const FoundLayer& layer, const LayerOptions& options) {
  const ModelConfig config(checkpoint);
  refuse_by_config(checkpoint, layer, config);
  auto num_heads = options.num_heads;
  if (!num_heads) num_heads = heads_in_config(layer, config);
  const auto possible = layer.possible_heads();
  if (!num_heads && possible.size() == 1) num_heads = possible.front();
  if (!num_heads && layer.layout->name == "reference") num_heads = layer.options.num_heads();
  detail::check_file(num_heads.has_value(), kLoadReader, checkpoint.path(),
                     "the number of heads of {} is not among its weights, nor in a config.json beside it; give one of {}",
                     in_quotes(layer.prefix), detail::joined(possible));
  detail::check_file(std::ranges::count(possible, *num_heads) == 1, kLoadReader, checkpoint.path(),
                     "the number of heads of {} must be one of {}, but is {}", in_quotes(layer.prefix),
                     detail::joined(possible), *num_heads);
  auto sizes = layer.with_heads(*num_heads).attention_weights(options.attention_weights);
  if (const auto eps = config.first<double>(layer.layout->qk_norm_eps_in_config)) sizes.qk_norm_eps(*eps);
  if (options.qk_norm_eps) sizes.qk_norm_eps(*options.qk_norm_eps);
  if (const auto scale = scale_of(checkpoint, layer, config, *sizes.head_dim())) sizes.scale(*scale);
  return sizes;
}

// What a layer has beside that a module made of it would drop; `rest` as name_roles has it.
void refuse_the_rest(const Checkpoint& checkpoint, const FoundLayer& layer, const LayerOptions& options, bool takes_added) {
  std::map<NameRole, std::vector<std::string>> rest;
  for (const auto& [name, role] : name_roles(layer, checkpoint.tensors())) rest[role].push_back(name);
  const auto check = [&](bool ok, NameRole role, std::string_view expectation, const std::string& advice) {
    detail::check_file(ok || rest[role].empty(), kLoadReader, checkpoint.path(), "layer {} must have {}{}{}",
                       in_quotes(layer.prefix), expectation, detail::list("unexpected", rest[role]), advice);
  };
  check(options.allow_unexpected, NameRole::unexplained,
        detail::formatted("only names that layout {} explains", layer.layout->name), advice_on(rest[NameRole::unexplained]));
  check(options.without_input_norms, NameRole::input_norm, "no norms of its own in front of its projections",
        "; apply those that input_norms returns, and set without_input_norms");
  check(options.allow_unexpected || takes_added, NameRole::added, "one context",
        "; decoupled_cross_attention_from makes a module with further ones");
  detail::check_file(layer.misshapen.empty(), kLoadReader, checkpoint.path(), "layer {} does not fit together{}",
                     in_quotes(layer.prefix), detail::list("misshapen", layer.misshapen));
}

bool has_arithmetic(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

std::string_view name_of(at::ScalarType type) {
  return c10::getDtypeNames(type).first;
}

void refuse_quantized(const Checkpoint& checkpoint, const std::string& name) {
  const auto type = checkpoint.tensors().at(name).type;
  const auto* advice = c10::isIntegralType(type, /*includeBool=*/false)
                           ? "; quantized weights must first be dequantised in Python, and saved anew"
                           : "";
  detail::check_file(c10::isFloatingType(type), kLoadReader, checkpoint.path(),
                     "tensor {} must have a floating point type, but has {}{}", in_quotes(name), name_of(type), advice);
}

// The type of parameters made by these recipes.
at::ScalarType type_of(const Checkpoint& checkpoint,
                       const std::vector<std::map<std::string, TensorRecipe>>& all,
                       std::optional<at::ScalarType> wanted) {
  detail::check_value(!wanted || has_arithmetic(*wanted), kLoadReader,
                      "dtype must be float64, float32, bfloat16 or float16, but is {}.", name_of(wanted.value_or(at::kFloat)));
  std::optional<at::ScalarType> widest;
  for (const auto& of_layer : all) {
    for (const auto& [parameter, recipe] : of_layer) {
      refuse_quantized(checkpoint, recipe.source);
      const auto type = recipe.type(checkpoint.tensors());
      if (has_arithmetic(type)) widest = widest ? c10::promoteTypes(*widest, type) : type;
    }
  }
  return wanted.value_or(widest.value_or(at::kHalf));
}

// No layer that is known: perhaps for a reason that can be named.
void explain_none(const Checkpoint& checkpoint, const std::string& prefix) {
  std::vector<std::string> names;
  for (const auto& [name, info] : checkpoint.tensors()) {
    if (!name.starts_with(prefix)) continue;
    names.push_back(name);
    const auto is_weight = [&name = name](const Layout& layout) { return name.ends_with(layout.query.weight); };
    constexpr std::string_view kPacked = "qweight";  // as GPTQ and AWQ call weights of four bits
    if (std::ranges::any_of(layouts(), is_weight) || name.ends_with(kPacked)) refuse_quantized(checkpoint, name);
  }
  const auto advice = advice_on(names);
  detail::check_file(advice.empty(), kLoadReader, checkpoint.path(),
                     "must hold an attention layer in a layout that is known, but holds none{}", advice);
}

LoadOptions loading(const std::string& prefix, const LayerOptions& options) {
  return {.prefix = prefix,
          .allow_unexpected = options.allow_unexpected,
          .layout = options.layout,
          .without_input_norms = options.without_input_norms};
}

// By the layout, else by the type of the model.
std::optional<NormPlacement> placement_of(const BlockLayout& layout, const ModelConfig& config) {
  if (layout.norm_placement) return layout.norm_placement;
  const auto before = detail::words(layout.models_before), after = detail::words(layout.models_after);
  for (const auto& model : config.all<std::string>("model_type")) {
    if (std::ranges::count(before, model)) return NormPlacement::before;
    if (std::ranges::count(after, model)) return NormPlacement::after;
  }
  return {};
}

// As Hugging Face's ACT2FN spells them.
std::optional<Activation> activation_of(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Activation>, 7> kNames = {{{"relu", Activation::relu},
                                                                              {"gelu", Activation::gelu},
                                                                              {"gelu_new", Activation::gelu_tanh},
                                                                              {"gelu_fast", Activation::gelu_tanh},
                                                                              {"gelu_pytorch_tanh", Activation::gelu_tanh},
                                                                              {"silu", Activation::silu},
                                                                              {"swish", Activation::silu}}};
  if (name.starts_with("gated-")) {  // T5's feed_forward_proj, where "gated-gelu" has always been the approximation
    name.remove_prefix(std::string_view("gated-").size());
    if (name == "gelu") name = "gelu_new";
  }
  const auto found = std::ranges::find(kNames, name, &std::pair<std::string_view, Activation>::first);
  return found == kNames.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace

FoundLayer choose_layer(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const std::string& layout) {
  const auto layers = find_layers(checkpoint.tensors(), detail::layout_or_none(layout));
  const auto is_meant = [&](const FoundLayer& layer) { return layer.prefix == prefix || layer.prefix == *prefix + "."; };
  if (prefix ? std::ranges::none_of(layers, is_meant) : layers.empty()) explain_none(checkpoint, prefix.value_or(""));
  return detail::choose(checkpoint.path(), layers, prefix);
}

FoundBlock choose_block(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const std::string& layout) {
  const auto* only = detail::layout_or_none(layout);
  const auto blocks = find_blocks(checkpoint.tensors(), only);
  if (blocks.empty() && find_layers(checkpoint.tensors(), only).empty()) explain_none(checkpoint, prefix.value_or(""));
  return detail::choose(checkpoint.path(), blocks, prefix);
}

CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  const auto type = type_of(checkpoint, {recipes(layer, checkpoint.tensors())}, options.dtype);
  refuse_the_rest(checkpoint, layer, options, /*takes_added=*/false);
  CrossAttention attention(sizes_of(checkpoint, layer, options));
  attention->to(type);
  load_weights(*attention, checkpoint, loading(layer.prefix, options));
  return attention;
}

DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                       const LayerOptions& options,
                                                       double scale) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  const auto parts = added_recipes(layer, checkpoint.tensors());
  const auto type = type_of(checkpoint, {recipes(layer, checkpoint.tensors()), parts}, options.dtype);
  refuse_the_rest(checkpoint, layer, options, /*takes_added=*/true);
  detail::check_file(!layer.added.empty(), kLoadReader, checkpoint.path(),
                     "layer {} must have projections of a second context, but has none that layout {} knows",
                     in_quotes(layer.prefix), layer.layout->name);
  std::vector<AddedContextOptions> added;
  for (size_t i = 0; i < layer.added.size(); ++i) {
    const auto named = [&](std::string_view part) { return detail::formatted("added{}.{}", i, part); };
    const auto width = [&](std::string_view part) {
      const auto& shape = checkpoint.tensors().at(parts.at(named(part)).source).shape;
      return shape.size() == 2 ? shape[1] : 0;  // refused by the module
    };
    added.push_back(AddedContextOptions(width("key_linear.weight"), width("value_linear.weight"))
                        .key_bias(parts.contains(named("key_linear.bias")))
                        .value_bias(parts.contains(named("value_linear.bias")))
                        .scale(scale));
  }
  DecoupledCrossAttention attention(DecoupledCrossAttentionOptions(sizes_of(checkpoint, layer, options)).added(added));
  attention->to(type);
  load_weights(*attention, checkpoint, loading(layer.prefix, options));
  return attention;
}

CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint, const BlockOptionsFromFile& options) {
  const auto found = choose_block(checkpoint, options.prefix, options.layout);
  const auto& layout = *found.layout;
  const auto type = type_of(checkpoint, {recipes(found, checkpoint.tensors())}, options.dtype);
  detail::check_file(found.attention.misshapen.empty(), kLoadReader, checkpoint.path(), "layer {} does not fit together{}",
                     in_quotes(found.attention.prefix), detail::list("misshapen", found.attention.misshapen));
  const ModelConfig config(checkpoint);
  const auto told = [&](const auto& value, std::string_view option, std::string_view values) {
    detail::check_file(value.has_value(), kLoadReader, checkpoint.path(),
                       "the {} of {} is not among its weights, nor in a config.json beside it; give one of {}", option,
                       in_quotes(found.prefix), values);
    return *value;
  };

  auto placement = options.norm_placement;
  if (!placement) placement = placement_of(layout, config);
  auto activation = options.activation;
  if (const auto name = config.first<std::string>(layout.activation_in_config); name && !activation) {
    activation = activation_of(*name);
    detail::check_file(activation.has_value(), kLoadReader, checkpoint.path(),
                       "the activation in its config.json, {}, is not known; give one of {}", in_quotes(*name), kActivations);
  }
  if (!activation) activation = layout.activation;
  auto eps = options.norm_eps;
  if (!eps) eps = config.first<double>(layout.norm_eps_in_config);

  const LayerOptions of_layer{
      .num_heads = options.num_heads, .qk_norm_eps = options.qk_norm_eps, .attention_weights = options.attention_weights};
  auto block_options = found.options;
  block_options.attention(sizes_of(checkpoint, found.attention, of_layer))
      .norm_placement(told(placement, "norm_placement", "before, after"))
      .activation(told(activation, "activation", kActivations))
      .norm_eps(eps.value_or(layout.norm_eps));
  CrossAttentionBlock block(block_options);
  block->to(type);
  load_weights(*block, checkpoint,
               {.prefix = found.prefix, .allow_unexpected = options.allow_unexpected, .layout = options.layout});
  return block;
}

std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer) {
  constexpr double kEps = 1e-5;  // of LayerNorm, which all of these are
  const auto norm = [&](std::string_view name, int64_t size) {
    if (name.empty()) return Norm(NormKind::none, size);
    const auto prefix = layer.prefix + std::string(name) + ".";
    Norm made(NormOptions(NormKind::layer, size).eps(kEps));
    const auto type = checkpoint.tensors().at(prefix + "weight").type;
    made->to(has_arithmetic(type) ? type : at::kHalf);
    load_weights(*made, checkpoint, {.prefix = prefix});
    return made;
  };
  return {norm(layer.layout->query_input, layer.options.dim_query()),
          norm(layer.layout->context_input, layer.options.dim_key())};
}

}  // namespace xattn
