// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/cross_attention_options.h>
#include <xattn/export.h>
#include <xattn/layout.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace xattn {

/// The library's table of layouts, in the order in which they are tried.
[[nodiscard]] XATTN_API std::vector<Layout> layouts();

enum class AttentionKind {
  cross,    ///< the layer's name says so, or its query and key widths differ
  self,     ///< the layer's name says so
  unknown,  ///< neither name nor widths show it
};

/// An attention layer found among the tensors of a file.
struct XATTN_API FoundLayer {
  std::string prefix;  ///< prefix of its names; empty, or ending in a dot
  std::string layout;  ///< name of its layout
  AttentionKind kind;
  CrossAttentionOptions options;        ///< widths, biases and norms, with the fewest heads that the widths allow
  bool heads_known;                     ///< whether options.num_heads() is certain: a norm per head has the size of a head
  std::vector<std::string> added = {};  ///< key projections of further contexts, as in "add_k_proj"; see decoupled.h
  /// What does not fit together: biases and norms of other sizes, norms of another kind, half of a learned key and value; as in
  /// "q_proj.bias must have shape [16], but has [7]". The options are those of a layer without them.
  std::vector<std::string> misshapen = {};
  std::shared_ptr<const Layout> own_layout = {};  ///< the layout that you gave, if it is not one of the table

  /// The numbers of heads that the widths allow; the weights do not determine which of them the model has.
  std::vector<int64_t> possible_heads() const;

  /// The options with this many heads. Throws c10::ValueError, listing the possible numbers, if the widths do not allow it.
  CrossAttentionOptions with_heads(int64_t num_heads) const;
};

/// All attention layers of a file, in order of prefix, found by names and shapes only. With a `layout`, only layers in it.
/// Throws c10::ValueError, listing the names, if the table has no layout of this name.
[[nodiscard]] XATTN_API std::vector<FoundLayer> find_layers(const std::map<std::string, TensorInfo>& tensors,
                                                            const LayoutChoice& layout = {});

/// Names that may change what the layer computes and that its layout does not explain: names below the layer's prefix, without
/// it, and by their full names low-rank weights for the layer in kohya's naming ("lora_unet_..."), which are at the top level of
/// a file, and T5's bias of positions, which all self-attention of a stack reads from the first layer.
[[nodiscard]] XATTN_API std::vector<std::string> unexplained_names(const FoundLayer& layer,
                                                                   const std::map<std::string, TensorInfo>& tensors);

/// Chooses a layer of a file: the layer at `prefix` (with or without the trailing dot) if it is given; else the only
/// cross-attention layer, or the only layer that is not known to be self-attention. Throws FileError, listing prefixes, if no
/// layer or several remain.
[[nodiscard]] XATTN_API FoundLayer choose_layer(const Checkpoint& checkpoint,
                                                const std::optional<std::string>& prefix = {},
                                                const LayoutChoice& layout = {});

}  // namespace xattn
