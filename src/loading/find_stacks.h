// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/find_blocks.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "loading/recipes.h"

// Encoders and decoders among the tensors of a file.
namespace xattn::detail {

enum class StackKind { encoder, decoder };

struct FoundStackLayer {
  FoundBlock self;
  std::optional<FoundBlock> cross = {};  ///< in a decoder, with the feed-forward branch
};

struct FoundStack {
  std::string prefix;  ///< of its names; empty, or ending in a dot
  std::string layout;  ///< see stack_layouts.h
  std::string norm;    ///< the name of the norm behind the layers, if there is one
  std::vector<FoundStackLayer> layers = {};
  std::string fault = {};  ///< why a layer behind those is missing, if one is

  std::string layer_prefix(int64_t number) const;

  /// Its blocks by their paths in an Encoder or Decoder: "layers.0.", or "layers.0.self." and "layers.0.cross.".
  std::vector<std::pair<std::string, const FoundBlock*>> blocks() const;
};

/// All stacks of this kind, in order of prefix, found by names and shapes only: those of which at least one layer is whole. If
/// `attention_layout` is given, only those whose attention has it.
std::vector<FoundStack> find_stacks(const Infos& tensors, StackKind kind, const LayoutChoice& attention_layout);

/// How to make each parameter of an Encoder or Decoder from a file with this stack; see `recipes` of a layer.
Recipes recipes(const FoundStack& stack, const Infos& tensors);

/// The role of each name below the stack's prefix; see `name_roles` of a layer.
std::map<std::string, NameRole> name_roles(const FoundStack& stack, const Infos& tensors);

}  // namespace xattn::detail
