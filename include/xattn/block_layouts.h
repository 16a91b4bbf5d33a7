// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_options.h>
#include <xattn/checkpoint.h>
#include <xattn/export.h>
#include <xattn/layouts.h>

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace xattn {

/// How a family of models spells what a block has around its attention, and what it computes. All names are those behind the
/// block's prefix: of norms and linear layers in front of ".weight" and ".bias" (of norms in old files ".gamma" and ".beta"), of
/// gates whole. How the attention itself is spelled is told by layouts.h. A block layout is a row of the table in
/// block_layouts.cpp.
struct BlockLayout {
  std::string_view name;
  std::string_view used_by;
  std::string_view attention;  ///< prefix of the attention layer, "encoder_attn."
  std::string_view attention_norm;
  std::string_view feed_forward_norm;
  std::string_view feed_forward_in;
  /// Empty without a gated linear unit; feed_forward_in again if one tensor packs both, the multiplier first.
  std::string_view feed_forward_multiplier = {};
  std::string_view feed_forward_out;
  std::string_view attention_gate = {};  ///< both or neither
  std::string_view feed_forward_gate = {};
  /// Names behind the block's prefix that are not of the block, separated by spaces, as of the self-attention in front of it; all
  /// that begin so if there is a point at the end.
  std::string_view beside = {};
  bool transposed = false;  ///< weights of the feed-forward branch are stored [in, out]
  NormKind norm = NormKind::layer;
  double norm_eps = 1e-5;  ///< what the family uses unless its config says otherwise
  /// Of all that are spelled so; without it config.json tells, by one of these model types.
  std::optional<NormPlacement> norm_placement = {};
  std::string_view models_before = {};
  std::string_view models_after = {};
  /// What the family uses unless its config says otherwise; without it that must say.
  std::optional<Activation> activation = {};
  std::string_view activation_in_config = {};  ///< names in config.json, as for Layout::num_heads
  std::string_view norm_eps_in_config = {};
};

/// All that are known, in the order in which they are tried.
XATTN_API std::span<const BlockLayout> block_layouts();

/// A block found among the tensors of a file.
struct XATTN_API FoundBlock {
  std::string prefix;  ///< in front of its names; empty, or with a point at the end
  const BlockLayout* layout;
  FoundLayer attention;
  /// All that names, shapes and layout tell: the attention with the fewest heads that its widths allow, kinds of norms, whether
  /// they have biases, gates, the feed-forward branch; placement, activation and eps if the layout has them.
  CrossAttentionBlockOptions options;
};

/// All blocks with cross attention of a file, in order of prefix, by names and shapes alone. `only`: those with their attention
/// in this layout.
XATTN_API std::vector<FoundBlock> find_blocks(const std::map<std::string, TensorInfo>& tensors, const Layout* only = nullptr);

/// How to make each parameter of a CrossAttentionBlock from a file with this block, by the parameter's name.
XATTN_API std::map<std::string, TensorRecipe> recipes(const FoundBlock& block,
                                                      const std::map<std::string, TensorInfo>& tensors);

/// Names behind the block's prefix, without it, that neither its layout nor that of its attention explains.
XATTN_API std::vector<std::string> unexplained_names(const FoundBlock& block, const std::map<std::string, TensorInfo>& tensors);

}  // namespace xattn
