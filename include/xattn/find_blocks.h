// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_options.h>
#include <xattn/checkpoint.h>
#include <xattn/export.h>
#include <xattn/find_layers.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace xattn {

/// A Transformer block with cross-attention found among the tensors of a file.
struct XATTN_API FoundBlock {
  std::string prefix;  ///< prefix of its names; empty, or ending in a dot
  std::string layout;  ///< name of the layout of everything around the attention
  FoundLayer attention;
  /// Derived from names, shapes and layout: the attention with the fewest heads that its widths allow, kinds of norms, whether
  /// they have biases, gates, the feed-forward branch; placement, activation and eps if the layout determines them.
  CrossAttentionBlockOptions options;
  /// What does not fit together around the attention, as in FoundLayer: biases of the feed-forward branch that have other sizes
  /// or that only some of its layers have, norms whose names have two spellings.
  std::vector<std::string> misshapen = {};
};

/// All blocks with cross-attention in a file, in order of prefix, found by names and shapes only. With a `layout`, only those
/// whose attention has it.
[[nodiscard]] XATTN_API std::vector<FoundBlock> find_blocks(const std::map<std::string, TensorInfo>& tensors,
                                                            const LayoutChoice& layout = {});

/// Names that neither the block's layout nor that of its attention explains, as for a layer.
[[nodiscard]] XATTN_API std::vector<std::string> unexplained_names(const FoundBlock& block,
                                                                   const std::map<std::string, TensorInfo>& tensors);

/// Chooses a block of a file: the block at `prefix` (of the block, not of its attention; with or without the trailing dot) if
/// it is given, else the only one. Throws FileError, listing prefixes, if no block or several remain.
[[nodiscard]] XATTN_API FoundBlock choose_block(const Checkpoint& checkpoint,
                                                const std::optional<std::string>& prefix = {},
                                                const LayoutChoice& layout = {});

}  // namespace xattn
