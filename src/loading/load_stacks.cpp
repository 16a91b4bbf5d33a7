// SPDX-License-Identifier: Apache-2.0
#include <xattn/load_stacks.h>

#include <torch/utils.h>
#include <xattn/find_layers.h>
#include <xattn/load_modules.h>

#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/find_stacks.h"
#include "loading/model_config.h"
#include "loading/module_options.h"
#include "loading/recipes.h"
#include "loading/refusals.h"
#include "loading/stack_layouts.h"
#include "modules/option_names.h"

namespace xattn {
namespace {

using detail::FoundStack;
using detail::in_quotes;
using detail::StackKind;

FoundStack chosen(const Checkpoint& checkpoint, const StackOptionsFromFile& options, StackKind kind) {
  const auto stacks = detail::find_stacks(checkpoint.tensors(), kind, options.layout);
  if (stacks.empty() && find_layers(checkpoint.tensors(), options.layout).empty()) {
    detail::explain_none(checkpoint, options.prefix.value_or(""), options.layout);
  }
  return detail::choose(checkpoint.path(), stacks, kind == StackKind::encoder ? "an encoder" : "a decoder", options.prefix);
}

// One stack of a file: options of a module that is like it, and the weights for that module.
class StackReader {
 public:
  StackReader(const Checkpoint& checkpoint, const StackOptionsFromFile& options, StackKind kind)
      : checkpoint_(checkpoint),
        infos_(checkpoint.tensors()),
        options_(options),
        check_(detail::load_check(checkpoint.path())),
        config_(checkpoint),
        stack_(chosen(checkpoint, options, kind)),
        recipes_(detail::recipes(stack_, infos_)),
        layout_(detail::stack_layout_named(stack_.layout)) {
    const auto name = "stack " + in_quotes(stack_.prefix);
    check_(stack_.fault.empty(), "{} must have {}", name, stack_.fault);
    const auto unexpected = names_of(detail::NameRole::unexplained, name_roles(stack_, infos_));
    check_(options.allow_unexpected || unexpected.empty(), "{} must have only names that layout {} explains{}{}", name,
           stack_.layout, detail::list("unexpected", unexpected), detail::advice_on(unexpected));
    detail::refuse_other_stack(config_, stack_.prefix);
    if (!layout_.relative_position_bias.empty()) read_bias(kind == StackKind::encoder);
  }

  EncoderOptions encoder() {
    std::vector<CrossAttentionBlockOptions> layers;
    for (const auto& layer : stack_.layers) layers.push_back(block(layer.self));
    const auto norm = norm_behind(layers.back());
    return EncoderOptions(std::move(layers)).norm(norm).relative_position_bias(bias_);
  }

  DecoderOptions decoder() {
    std::vector<DecoderLayerOptions> layers;
    for (const auto& layer : stack_.layers) layers.emplace_back(block(layer.self), block(*layer.cross));
    const auto norm = norm_behind(layers.back().cross());
    return DecoderOptions(std::move(layers)).norm(norm).relative_position_bias(bias_).causal(options_.causal);
  }

  // Fills a module made with these options.
  void load(torch::nn::Module& module) const {
    const auto type = detail::type_of(checkpoint_, recipes_, options_.dtype);
    module.to(type);
    const torch::NoGradGuard no_grad;
    const auto source = lazy(checkpoint_);
    const auto parameters = module.named_parameters();
    TORCH_INTERNAL_ASSERT(parameters.size() == recipes_.size());
    for (const auto& parameter : parameters) {
      const auto& recipe = recipes_.at(parameter.key());
      const auto misfit = recipe.misfit(infos_);
      check_(misfit.empty(), "{}", misfit);
      const auto value = recipe.make(source, type);
      check_(value.sizes() == parameter.value().sizes(), "{} must have shape [{}], but has [{}]", in_quotes(recipe.source),
             detail::joined(parameter.value().sizes()), detail::joined(value.sizes()));
      parameter.value().copy_(value);
    }
  }

 private:
  CrossAttentionBlockOptions block(const FoundBlock& found) const {
    const auto& layout = detail::block_layout_named(found.layout);
    detail::refuse_misshapen(checkpoint_, found);
    const BlockOptionsFromFile of_block{.layout = options_.layout,
                                        .num_heads = bias_ ? bias_->num_heads() : options_.num_heads,
                                        .norm_placement = options_.norm_placement,
                                        .activation = options_.activation,
                                        .norm_eps = options_.norm_eps};
    auto result = detail::block_options(checkpoint_, config_, found, of_block).dropout(options_.dropout);
    const auto& attention = result.attention();
    const auto E = stack_.layers.front().self.attention.options.dim_query();
    check_(attention.dim_query() == E, "layer {} must have a dim_query of {}, as the first, but has {}",
           in_quotes(found.prefix), E, attention.dim_query());
    check_(!layout.is_self || (attention.dim_key() == E && attention.dim_value() == E),
           "layer {} must have a dim_key and dim_value of {}, its dim_query, but has {} and {}", in_quotes(found.prefix), E,
           attention.dim_key(), attention.dim_value());
    const auto placement = result.norm_placement();
    check_(layout.norm_placement.value_or(placement) == placement,
           "norm_placement must be the one that layout {} needs, but is {}", found.layout, detail::name_of(placement));
    return result.norm_context(layout.is_self && placement == NormPlacement::before);
  }

  // The norm behind the last layer, which has the kind and eps of that layer's.
  std::optional<NormOptions> norm_behind(const CrossAttentionBlockOptions& last) const {
    if (!recipes_.contains("norm.weight")) {
      check_(!layout_.has_norm, "stack {} must have a norm behind its layers, {}, but has none", in_quotes(stack_.prefix),
             in_quotes(stack_.norm));
      return {};
    }
    const bool has_bias = recipes_.contains("norm.bias");
    check_(!has_bias || last.norm() == NormKind::layer, "{} must be a norm without a bias, but has one",
           in_quotes(stack_.prefix + stack_.norm));
    return NormOptions(last.norm(), last.attention().dim_query()).eps(last.norm_eps()).bias(has_bias);
  }

  // The relative position bias, which shows the number of heads.
  void read_bias(bool bidirectional) {
    const auto name = stack_.layer_prefix(0) + layout_.relative_position_bias;
    check_(infos_.contains(name), "stack {} must have a relative position bias, {}, but has none", in_quotes(stack_.prefix),
           in_quotes(name));
    const auto& shape = infos_.at(name).shape;
    check_(shape.size() == 2, "{} must have two axes, but has shape [{}]", in_quotes(name), detail::joined(shape));
    check_(options_.num_heads.value_or(shape[1]) == shape[1], "num_heads must be {}, as {} shows, but is {}", shape[1],
           in_quotes(name), options_.num_heads.value_or(0));
    bias_ = RelativePositionBiasOptions(shape[1]).num_buckets(shape[0]).bidirectional(bidirectional);
    if (const auto distance = config_.max_distance()) bias_->max_distance(*distance);
  }

  const Checkpoint& checkpoint_;
  const detail::Infos& infos_;
  const StackOptionsFromFile& options_;
  detail::FileCheck check_;
  detail::ModelConfig config_;
  FoundStack stack_;
  detail::Recipes recipes_;  // by name in the module
  const detail::StackLayout& layout_;
  std::optional<RelativePositionBiasOptions> bias_;
};

}  // namespace

Encoder encoder_from(const Checkpoint& checkpoint, const StackOptionsFromFile& options) {
  StackReader reader(checkpoint, options, StackKind::encoder);
  Encoder encoder(reader.encoder());
  reader.load(*encoder);
  return encoder;
}

Decoder decoder_from(const Checkpoint& checkpoint, const StackOptionsFromFile& options) {
  StackReader reader(checkpoint, options, StackKind::decoder);
  Decoder decoder(reader.decoder());
  reader.load(*decoder);
  return decoder;
}

}  // namespace xattn
