// SPDX-License-Identifier: Apache-2.0
#include <xattn/load_modules.h>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/text.h"
#include "files/check_file.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/layouts.h"
#include "loading/model_config.h"
#include "loading/module_options.h"
#include "loading/recipes.h"
#include "loading/refusals.h"

namespace xattn {
namespace {

using detail::added_recipes;
using detail::in_quotes;
using detail::load_check;
using detail::NameRole;
using detail::recipes;
using detail::Recipes;

// The options of a layer of the file, with its number of heads, which config.json has under these names.
CrossAttentionOptions sizes_of(const Checkpoint& checkpoint,
                               const detail::ModelConfig& config,
                               const FoundLayer& layer,
                               const LayerOptions& options,
                               const std::vector<std::string>& heads_in_config) {
  const auto check = load_check(checkpoint.path());
  detail::refuse_other_attention(config, layer);
  const auto possible = layer.possible_heads();
  auto num_heads = options.num_heads ? options.num_heads : config.num_heads(layer, heads_in_config);
  if (!num_heads && possible.size() == 1) num_heads = possible.front();
  if (!num_heads && layer.layout == detail::kReference) num_heads = layer.options.num_heads();
  check(num_heads.has_value(),
        "the number of heads of {} is not among its weights, nor in a config.json beside it; give one of {}",
        in_quotes(layer.prefix), detail::joined(possible));
  check(std::ranges::count(possible, *num_heads) == 1, "the number of heads of {} must be one of {}, but is {}",
        in_quotes(layer.prefix), detail::joined(possible), *num_heads);
  auto sizes = layer.with_heads(*num_heads).attention_weights(options.attention_weights);

  const auto& norm = detail::layout_of(layer).qk_norm;
  const auto eps = options.qk_norm_eps ? options.qk_norm_eps : config.qk_norm_eps(layer);
  const bool is_of_family =
      norm.eps_known_in.empty() || (!config.class_name() && detail::has_component(layer.prefix, norm.eps_known_in));
  check(eps || sizes.qk_norm() == NormKind::none || !options.layout.is_any() || is_of_family,
        "the eps of the norms of queries and keys of {} is not among its weights, nor in a config.json beside it, and neither "
        "its prefix nor a _class_name identifies the family; give qk_norm_eps: 1e-05 for LTX and Sana, 1e-06 for Wan, LTX-2 "
        "and SD3",
        in_quotes(layer.prefix));
  if (eps) sizes.qk_norm_eps(*eps);
  if (const auto scale = config.scale(layer, *sizes.head_dim())) sizes.scale(scale);
  return sizes;
}

CrossAttentionOptions sizes_of(const Checkpoint& checkpoint, const FoundLayer& layer, const LayerOptions& options) {
  return sizes_of(checkpoint, detail::ModelConfig(checkpoint), layer, options, detail::layout_of(layer).num_heads);
}

// Throws if a layer has tensors beside its parameters that a module made from it would drop.
void refuse_the_rest(const Checkpoint& checkpoint, const FoundLayer& layer, const LayerOptions& options, bool takes_added) {
  const auto check_file = load_check(checkpoint.path());
  const auto roles = detail::name_roles(layer, checkpoint.tensors());
  const auto check = [&](bool ok, NameRole role, std::string_view expectation, const std::string& advice) {
    const auto names = names_of(role, roles);
    check_file(ok || names.empty(), "layer {} must have {}{}{}", in_quotes(layer.prefix), expectation,
               detail::list("unexpected", names), advice);
  };
  check(options.allow_unexpected, NameRole::unexplained, detail::formatted("only names that layout {} explains", layer.layout),
        detail::advice_on(names_of(NameRole::unexplained, roles)));
  check(options.without_input_norms, NameRole::input_norm, "no norms of its own in front of its projections",
        "; apply those that input_norms returns, and set without_input_norms");
  check(options.allow_unexpected || takes_added, NameRole::added, "one context",
        "; decoupled_cross_attention_from makes a module with further ones");
}

// A module of this type, with the weights below a prefix.
template <class Module, class ModuleOptions, class Options>
Module loaded(const Checkpoint& checkpoint,
              const std::string& prefix,
              const ModuleOptions& of_module,
              at::ScalarType type,
              const Options& options) {
  LoadOptions load{.prefix = prefix,
                   .layout = options.layout,
                   .allow_unexpected = options.allow_unexpected,
                   .ignore_config = true};  // the options have been chosen
  if constexpr (std::is_same_v<Options, LayerOptions>) load.without_input_norms = options.without_input_norms;
  Module module(of_module);
  module->to(type);
  load_weights(*module, checkpoint, load);
  return module;
}

}  // namespace

namespace detail {

void refuse_misshapen(const Checkpoint& checkpoint, const FoundLayer& layer) {
  load_check(checkpoint.path())(layer.misshapen.empty(), "layer {} does not fit together{}", in_quotes(layer.prefix),
                                list("misshapen", layer.misshapen));
}

void refuse_misshapen(const Checkpoint& checkpoint, const FoundBlock& block) {
  refuse_misshapen(checkpoint, block.attention);
  load_check(checkpoint.path())(block.misshapen.empty(), "block {} does not fit together{}", in_quotes(block.prefix),
                                list("misshapen", block.misshapen));
}

at::ScalarType type_of(const Checkpoint& checkpoint, const Recipes& all, std::optional<at::ScalarType> wanted) {
  check_value(!wanted || has_arithmetic(*wanted), "load", "dtype must be float64, float32, bfloat16 or float16, but is {}.",
              c10::getDtypeNames(wanted.value_or(at::kFloat)).first);
  std::optional<at::ScalarType> widest;
  for (const auto& [parameter, recipe] : all) {
    refuse_quantized(checkpoint, recipe.source);
    const auto type = recipe.type(checkpoint.tensors());
    if (has_arithmetic(type)) widest = widest ? c10::promoteTypes(*widest, type) : type;
  }
  return wanted.value_or(widest.value_or(at::kHalf));
}

CrossAttentionBlockOptions block_options(const Checkpoint& checkpoint,
                                         const ModelConfig& config,
                                         const FoundBlock& found,
                                         const BlockOptionsFromFile& options) {
  const auto& layout = block_layout_named(found.layout);
  const auto known = [&](const auto& value, std::string_view option, std::string_view values) {
    load_check(checkpoint.path())(value.has_value(),
                                  "the {} of {} is not among its weights, nor in a config.json beside it; give one of {}",
                                  option, in_quotes(found.prefix), values);
    return *value;
  };
  const auto placement = options.norm_placement ? options.norm_placement : config.norm_placement(layout);
  const auto activation = options.activation ? options.activation : config.activation(found);
  const auto eps = options.norm_eps ? options.norm_eps : config.first<double>(layout.norms.eps_in_config, found.prefix);

  const LayerOptions of_layer{.layout = options.layout,
                              .num_heads = options.num_heads,
                              .qk_norm_eps = options.qk_norm_eps,
                              .attention_weights = options.attention_weights};
  const auto& heads_in_config = layout.num_heads.empty() ? layout_of(found.attention).num_heads : layout.num_heads;
  auto result = found.options;
  result.attention(sizes_of(checkpoint, config, found.attention, of_layer, heads_in_config))
      .norm_placement(known(placement, "norm_placement", "before, after"))
      .activation(known(activation, "activation", kActivations))
      .norm_eps(eps.value_or(layout.norms.eps));
  return result;
}

}  // namespace detail

std::string refused_by_config(const Checkpoint& checkpoint, const FoundLayer& layer) {
  try {
    detail::refuse_other_attention(detail::ModelConfig(checkpoint), layer);
  } catch (const FileError& error) {
    return error.what();
  }
  return {};
}

CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  const auto type = detail::type_of(checkpoint, recipes(layer, checkpoint.tensors()), options.dtype);
  refuse_the_rest(checkpoint, layer, options, /*takes_added=*/false);
  detail::refuse_misshapen(checkpoint, layer);
  return loaded<CrossAttention>(checkpoint, layer.prefix, sizes_of(checkpoint, layer, options), type, options);
}

DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                       const LayerOptions& options,
                                                       double scale) {
  const auto layer = choose_layer(checkpoint, options.prefix, options.layout);
  const auto parts = added_recipes(layer, checkpoint.tensors());
  auto all = recipes(layer, checkpoint.tensors());
  all.insert(parts.begin(), parts.end());
  const auto type = detail::type_of(checkpoint, all, options.dtype);
  refuse_the_rest(checkpoint, layer, options, /*takes_added=*/true);
  detail::refuse_misshapen(checkpoint, layer);
  load_check(checkpoint.path())(!layer.added.empty(),
                                "layer {} must have projections of a second context, but has none that layout {} defines",
                                in_quotes(layer.prefix), layer.layout);
  std::vector<AddedContextOptions> added;
  for (size_t i = 0; i < layer.added.size(); ++i) {
    const auto named = [&](std::string_view part) { return detail::formatted("added{}.{}", i, part); };
    const auto width = [&](std::string_view part) {
      const auto& shape = checkpoint.tensors().at(parts.at(named(part)).source).shape;
      return shape.size() == 2 ? shape[1] : 0;  // the module rejects it
    };
    added.push_back(AddedContextOptions(width("key_linear.weight"), width("value_linear.weight"))
                        .key_bias(parts.contains(named("key_linear.bias")))
                        .value_bias(parts.contains(named("value_linear.bias")))
                        .scale(scale));
  }
  const auto of_module = DecoupledCrossAttentionOptions(sizes_of(checkpoint, layer, options)).added(added);
  return loaded<DecoupledCrossAttention>(checkpoint, layer.prefix, of_module, type, options);
}

CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint, const BlockOptionsFromFile& options) {
  const auto found = choose_block(checkpoint, options.prefix, options.layout);
  const auto type = detail::type_of(checkpoint, recipes(found, checkpoint.tensors()), options.dtype);
  detail::refuse_misshapen(checkpoint, found);
  const auto block_options = detail::block_options(checkpoint, detail::ModelConfig(checkpoint), found, options);
  return loaded<CrossAttentionBlock>(checkpoint, found.prefix, block_options, type, options);
}

std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer) {
  constexpr double kEps = 1e-5;  // the default of LayerNorm, which all of these are
  const auto norm = [&](const std::string& name, int64_t size) {
    if (name.empty()) return Norm(NormKind::none, size);
    const auto prefix = layer.prefix + name + ".";
    Norm made(NormOptions(NormKind::layer, size).eps(kEps));
    const auto type = checkpoint.tensors().at(prefix + "weight").type;
    made->to(detail::has_arithmetic(type) ? type : at::kHalf);
    load_weights(*made, checkpoint, {.prefix = prefix});
    return made;
  };
  const auto& [of_query, of_context] = detail::layout_of(layer).input_norms;
  return {norm(of_query, layer.options.dim_query()), norm(of_context, layer.options.dim_key())};
}

}  // namespace xattn
