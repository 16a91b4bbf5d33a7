// SPDX-License-Identifier: Apache-2.0
#include <xattn/block_layouts.h>
#include <xattn/load.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "check.h"
#include "check_file.h"
#include "choose.h"
#include "json.h"
#include "mapped_file.h"
#include "stored_tensor.h"
#include "text.h"

// Modules made from files: what load.h has beside load_weights.
namespace xattn {
namespace {

constexpr std::string_view kLoadReader = "load";
constexpr std::string_view kActivations = "relu, gelu, gelu_tanh, silu";

using detail::in_quotes;

std::vector<std::string> words(std::string_view text) {
  std::istringstream in{std::string(text)};
  return {std::istream_iterator<std::string>(in), {}};
}

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
    for (const auto& name : words(names)) {
      if (name.find('.') != std::string::npos) {
        add(name.starts_with('.') ? name : "." + name);
      } else {
        for (const std::string place : {".", ".text_config.", ".decoder."}) add(place + name);
      }
    }
    return result;
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
    if constexpr (std::is_same_v<T, std::string>) return value.is_string();
  }

  nlohmann::json json_;
};

// The options of a layer of the file, with its number of heads.
CrossAttentionOptions sizes_of(const Checkpoint& checkpoint, const FoundLayer& layer, const LayerOptions& options) {
  auto num_heads = options.num_heads;
  if (!num_heads) num_heads = ModelConfig(checkpoint).first<int64_t>(layer.layout->num_heads);
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
  if (options.qk_norm_eps) sizes.qk_norm_eps(*options.qk_norm_eps);
  return sizes;
}

at::ScalarType type_of_layer(const Checkpoint& checkpoint, const FoundLayer& layer) {
  return checkpoint.tensors().at(layer.prefix + std::string(layer.layout->query.weight)).type;
}

// By the layout, else by the type of the model.
std::optional<NormPlacement> placement_of(const BlockLayout& layout, const ModelConfig& config) {
  if (layout.norm_placement) return layout.norm_placement;
  const auto before = words(layout.models_before), after = words(layout.models_after);
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
  const auto found = std::ranges::find(kNames, name, &std::pair<std::string_view, Activation>::first);
  return found == kNames.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace

FoundLayer choose_layer(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const std::string& layout) {
  return detail::choose(checkpoint.path(), find_layers(checkpoint.tensors(), detail::layout_or_none(layout)), prefix);
}

FoundBlock choose_block(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const std::string& layout) {
  return detail::choose(checkpoint.path(), find_blocks(checkpoint.tensors(), detail::layout_or_none(layout)), prefix);
}

CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  CrossAttention attention(sizes_of(checkpoint, layer, options));
  attention->to(type_of_layer(checkpoint, layer));
  load_weights(*attention, checkpoint, {.prefix = layer.prefix, .allow_unexpected = true, .layout = options.layout});
  return attention;
}

DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                       const LayerOptions& options,
                                                       double scale) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  detail::check_file(!layer.added.empty(), kLoadReader, checkpoint.path(),
                     "layer {} must have projections of a second context, but has none that layout {} knows",
                     in_quotes(layer.prefix), layer.layout->name);
  const auto parts = added_recipes(layer, checkpoint.tensors());
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
  attention->to(type_of_layer(checkpoint, layer));
  load_weights(*attention, checkpoint, {.prefix = layer.prefix, .allow_unexpected = true, .layout = options.layout});
  return attention;
}

CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint, const BlockOptionsFromFile& options) {
  const auto found = choose_block(checkpoint, options.prefix, options.layout);
  const auto& layout = *found.layout;
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
  block->to(type_of_layer(checkpoint, found.attention));
  load_weights(*block, checkpoint, {.prefix = found.prefix, .layout = options.layout});
  return block;
}

std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer) {
  constexpr double kEps = 1e-5;  // of LayerNorm, which all of these are
  const auto norm = [&](std::string_view name, int64_t size) {
    if (name.empty()) return Norm(NormKind::none, size);
    const auto prefix = layer.prefix + std::string(name) + ".";
    Norm made(NormOptions(NormKind::layer, size).eps(kEps));
    made->to(checkpoint.tensors().at(prefix + "weight").type);
    load_weights(*made, checkpoint, {.prefix = prefix});
    return made;
  };
  return {norm(layer.layout->query_input, layer.options.dim_query()),
          norm(layer.layout->context_input, layer.options.dim_key())};
}

}  // namespace xattn
