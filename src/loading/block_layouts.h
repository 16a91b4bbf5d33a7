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

// How families of models name the parts of a block around its attention, and what they compute. The attention is in layouts.h.
// All names follow the block's prefix; the names of norms and linear layers precede ".weight" and ".bias".
namespace xattn::detail {

/// Endings of a norm's weight and bias; old files of models first written for TensorFlow have the second pair.
inline constexpr std::array kNormEndings = {std::pair(".weight", ".bias"), std::pair(".gamma", ".beta")};

struct FeedForwardNames {
  std::string in = {};  ///< empty without a feed-forward branch, which is then in the block behind
  std::string out = {};
  std::string multiplier = {};  ///< of a gated linear unit; the same as `in` if one tensor packs both, the multiplier first
  bool transposed = false;      ///< weights are stored [in, out]

  int parts() const { return multiplier == in ? 2 : 1; }  ///< parts of the tensor `in`; the last one is `in` itself
};

struct BlockNorms {
  std::string attention;
  std::string feed_forward;  ///< empty without the branch
  NormKind kind = NormKind::layer;
  double eps = 1e-5;                            ///< the family's value unless its config.json says otherwise
  std::vector<std::string> eps_in_config = {};  ///< as Layout::num_heads
};

/// A row of the table in block_layouts.cpp.
struct BlockLayout {
  std::string name;
  std::string attention;  ///< prefix of the attention layer, "encoder_attn."
  BlockNorms norms;
  FeedForwardNames feed_forward;
  std::array<std::string, 2> gates = {};  ///< gates of the attention and feed-forward branches: both or neither
  /// Names below the block's prefix that are not part of it, such as the self-attention in front of it. A name that ends in a
  /// point stands for all names that begin with it.
  std::vector<std::string> beside = {};
  /// The placement in all files with these names. If empty, config.json determines it, by one of the model types below.
  std::optional<NormPlacement> norm_placement = {};
  std::vector<std::string> models_before = {};
  std::vector<std::string> models_after = {};
  /// The family's value unless its config.json says otherwise. If empty, config.json must give it.
  std::optional<Activation> activation = {};
  std::vector<std::string> activation_in_config = {};
  bool is_self = false;                     ///< self-attention, which is found only as part of a stack: see stack_layouts.h
  std::vector<std::string> num_heads = {};  ///< as Layout::num_heads, and in its place if not empty
};

/// The whole table, in the order in which layouts are tried.
const std::vector<BlockLayout>& block_layouts();

/// The layout of this name. Throws c10::ValueError, listing the names, if there is none.
XATTN_API const BlockLayout& block_layout_named(std::string_view name);

}  // namespace xattn::detail
