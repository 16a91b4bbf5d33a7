// SPDX-License-Identifier: Apache-2.0
#include <xattn/find_blocks.h>

#include <utility>

#include "base/text.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/recipes.h"

namespace xattn {
namespace {

using detail::BlockLayout;
using detail::formatted;
using detail::Infos;
using detail::joined;
using Shape = std::vector<int64_t>;

// A block of this layout at a prefix, if it is present and its shapes fit together.
class BlockMatch {
 public:
  BlockMatch(const Infos& tensors, const BlockLayout& layout, std::string prefix)
      : tensors_(tensors), layout_(layout), prefix_(std::move(prefix)) {}

  std::optional<FoundBlock> block(const FoundLayer& attention) {
    const auto Eq = attention.options.dim_query();
    if (attention.options.dim_output() != Eq) return {};
    const auto gate = gate_of(Eq);
    const auto norm_bias = norm(layout_.norms.attention, Eq);
    if (!gate || !norm_bias) return {};
    auto options = CrossAttentionBlockOptions(attention.options)
                       .norm(layout_.norms.kind)
                       .norm_eps(layout_.norms.eps)
                       .norm_bias(*norm_bias || layout_.norms.kind != NormKind::layer)
                       .gate(*gate)
                       .feed_forward(0);
    if (layout_.norm_placement) options.norm_placement(*layout_.norm_placement);
    if (layout_.activation) options.activation(*layout_.activation);
    if (!layout_.feed_forward.in.empty() && !add_feed_forward(options, *norm_bias)) return {};
    return FoundBlock{prefix_, layout_.name, attention, options, std::move(misshapen_)};
  }

 private:
  // Whether there is a feed-forward branch that fits; if so, adds it to the options.
  bool add_feed_forward(CrossAttentionBlockOptions& options, bool norm_bias) {
    const auto Eq = options.attention().dim_query();
    const auto& names = layout_.feed_forward;
    const auto* in = find(names.in + ".weight");
    if (!in || in->shape.size() != 2) return false;
    const auto inner = in->shape[names.transposed ? 1 : 0];  // of the packed tensor
    const auto hidden = inner / names.parts();
    const bool glu = !names.multiplier.empty();
    const bool bias = find(names.in + ".bias") != nullptr;
    options.feed_forward(hidden).feed_forward_glu(glu).feed_forward_bias(bias);
    return hidden > 0 && inner == names.parts() * hidden && norm_bias == norm(layout_.norms.feed_forward, Eq) &&
           linear(names.in, Eq, inner, bias) && (!glu || names.parts() > 1 || linear(names.multiplier, Eq, inner, bias)) &&
           linear(names.out, hidden, Eq, bias);
  }

  template <class... Args>
  void report(detail::Format<Args...> format, Args&&... args) {
    misshapen_.push_back(formatted(format, std::forward<Args>(args)...));
  }

  const TensorInfo* find(const std::string& name) const {
    const auto found = tensors_.find(prefix_ + name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  bool has(const std::string& name, const Shape& shape) const {
    const auto* info = find(name);
    return info && info->shape == shape;
  }

  // Whether the norm has a bias; nothing if there is no such norm of the layout's kind.
  std::optional<bool> norm(const std::string& name, int64_t size) {
    for (const auto& [weight, bias] : detail::kNormEndings) {
      if (!has(name + weight, {size})) continue;
      if (find(name + bias)) {
        return layout_.norms.kind == NormKind::layer && has(name + bias, {size}) ? std::optional(true) : std::nullopt;
      }
      for (const auto& [other_weight, other] : detail::kNormEndings) {
        if (!find(name + other)) continue;
        report("{0}{3} must be named {0}{2}, as {0}{1} is named", name, weight, bias, other);
        return true;
      }
      return false;
    }
    return {};
  }

  // Whether there is a linear layer of this size. Biases that do not fit are reported: `bias` is whether there must be one.
  bool linear(const std::string& name, int64_t in, int64_t out, bool bias) {
    const auto* found = find(name + ".bias");
    const auto has_it = found ? formatted("has shape [{}]", joined(found->shape)) : "is absent";
    if (bias && !has(name + ".bias", {out})) report("{}.bias must have shape [{}], but {}", name, out, has_it);
    if (!bias && found) report("{}.bias must be absent, as {}.bias is, but {}", name, layout_.feed_forward.in, has_it);
    return has(name + ".weight", layout_.feed_forward.transposed ? Shape{in, out} : Shape{out, in});
  }

  // The kind of both gates; nothing if they do not match the layout.
  std::optional<BlockGate> gate_of(int64_t Eq) const {
    if (layout_.gates[0].empty()) return BlockGate::none;
    const auto *first = find(layout_.gates[0]), *second = find(layout_.gates[1]);
    if (!first || !second || first->shape != second->shape) return {};
    const auto shape = detail::TensorRecipe{.flat = true}.shape(*first);
    if (shape == Shape{1}) return BlockGate::scalar;
    return shape == Shape{Eq} ? std::optional(BlockGate::per_feature) : std::nullopt;
  }

  const Infos& tensors_;
  const BlockLayout& layout_;
  std::string prefix_;
  std::vector<std::string> misshapen_;
};

std::optional<FoundBlock> block_around(const FoundLayer& attention, const Infos& tensors) {
  for (const auto& layout : detail::block_layouts()) {
    if (layout.is_self) continue;
    if (auto block = detail::match_block(layout, attention, tensors)) return block;
  }
  return {};
}

}  // namespace

std::optional<FoundBlock> detail::match_block(const BlockLayout& layout, const FoundLayer& attention, const Infos& tensors) {
  if (!attention.prefix.ends_with(layout.attention)) return {};
  const auto prefix = attention.prefix.substr(0, attention.prefix.size() - layout.attention.size());
  if (!prefix.empty() && !prefix.ends_with('.')) return {};
  return BlockMatch(tensors, layout, prefix).block(attention);
}

std::vector<FoundBlock> find_blocks(const Infos& tensors, const LayoutChoice& layout) {
  std::vector<FoundBlock> blocks;
  for (const auto& attention : find_layers(tensors, layout)) {
    if (auto block = block_around(attention, tensors)) blocks.push_back(*std::move(block));
  }
  return blocks;
}

std::vector<std::string> unexplained_names(const FoundBlock& block, const Infos& tensors) {
  return detail::names_of(detail::NameRole::unexplained, detail::name_roles(block, tensors));
}

FoundBlock choose_block(const Checkpoint& checkpoint, const std::optional<std::string>& prefix, const LayoutChoice& layout) {
  const auto blocks = find_blocks(checkpoint.tensors(), layout);
  if (blocks.empty() && find_layers(checkpoint.tensors(), layout).empty()) {
    detail::explain_none(checkpoint, prefix.value_or(""), layout);
  }
  return detail::choose(checkpoint.path(), blocks, "a block around cross-attention", prefix);
}

}  // namespace xattn
