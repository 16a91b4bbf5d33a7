// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

// How families of models name the layers of an encoder or decoder and what stands around them.
namespace xattn::detail {

/// A row of the table in stack_layouts.cpp. Layers are named by block layouts. All names follow the stack's prefix.
struct StackLayout {
  std::string name;
  std::string layers;                       ///< in front of the number of a layer, "layers."
  std::vector<std::string> encoder;         ///< layouts of an encoder's layer, of which one fits
  std::string decoder = {};                 ///< of the self-attention of a decoder's layer; empty if there are no decoders
  std::vector<std::string> cross = {};      ///< of the rest of a decoder's layer, of which one fits
  std::string norm = {};                    ///< behind the last layer, in front of ".weight"; empty if there is none
  std::string decoder_norm = {};            ///< the same of a decoder; empty if it has the same name
  bool has_norm = false;                    ///< whether all files with these names have the norm
  std::string relative_position_bias = {};  ///< below the first layer; all files have it
  /// Names that are the caller's, as BlockLayout::beside: embeddings, convolutions, poolers.
  std::vector<std::string> beside = {};
};

/// The whole table, in the order in which layouts are tried.
const std::vector<StackLayout>& stack_layouts();

/// The layout of this name. Throws c10::ValueError, listing the names, if there is none.
const StackLayout& stack_layout_named(std::string_view name);

}  // namespace xattn::detail
