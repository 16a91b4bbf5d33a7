// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_options.h>
#include <xattn/export.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// How families of models spell what a block has around its attention, and what it computes; layouts.h has the attention itself.
// All names are those behind the block's prefix: of norms and linear layers in front of ".weight" and ".bias".
namespace xattn::detail {

/// A weight's ending and its bias's, of norms; models first written for TensorFlow have the second ones in old files.
inline constexpr std::array kNormEndings = {std::pair(".weight", ".bias"), std::pair(".gamma", ".beta")};

struct FeedForwardNames {
  std::string in;
  std::string out;
  std::string multiplier = {};  ///< of a gated linear unit; the same as `in` if one tensor packs both, the multiplier first
  bool transposed = false;      ///< weights are stored [in, out]

  int parts() const { return multiplier == in ? 2 : 1; }  ///< of the tensor of `in`, which is the last of them
};

struct BlockNorms {
  std::string attention;
  std::string feed_forward;
  NormKind kind = NormKind::layer;
  double eps = 1e-5;                            ///< what the family uses unless its config.json says otherwise
  std::vector<std::string> eps_in_config = {};  ///< as LayerLayout::num_heads
};

/// A row of the table in block_layouts.cpp.
struct BlockLayout {
  std::string name;
  std::string attention;  ///< prefix of the attention layer, "encoder_attn."
  BlockNorms norms;
  FeedForwardNames feed_forward;
  std::array<std::string, 2> gates = {};  ///< of attention and feed-forward branch: both or neither
  /// Names below the block's prefix that are not the block's, such as the self-attention in front of it; with a point at the
  /// end all that begin so.
  std::vector<std::string> beside = {};
  /// The same for all files with these names; without it config.json tells, by one of the model types below.
  std::optional<NormPlacement> norm_placement = {};
  std::vector<std::string> models_before = {};
  std::vector<std::string> models_after = {};
  /// What the family uses unless its config.json says otherwise; without it config.json must say.
  std::optional<Activation> activation = {};
  std::vector<std::string> activation_in_config = {};
};

/// The whole table, in the order in which layouts are tried.
const std::vector<BlockLayout>& block_layouts();

/// The layout of this name. Throws c10::ValueError, listing the names, if there is none.
XATTN_API const BlockLayout& block_layout_named(std::string_view name);

}  // namespace xattn::detail
