// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <xattn/checkpoint.h>
#include <xattn/export.h>
#include <xattn/file_error.h>
#include <xattn/layout.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace xattn {

/// Rules that rewrite the names of a file whose modules nest otherwise than those of the program: each replaces every match of
/// a regular expression (ECMAScript, as std::regex) by a text in which $1 is the first group. All rules are applied to each
/// whole name, in their order, each to the result of those before it:
///
///   {{"attention\\.output\\.LayerNorm", "attention_norm"}, {"^bert\\.encoder\\.layer\\.", "layers."}}
///
/// Throws FileError if a rule matches no name or two tensors get one name, and c10::ValueError for an invalid expression.
using RenameRules = std::vector<std::pair<std::string, std::string>>;

struct LoadOptions {
  /// Prefix of the names to load, as in "decoder.layers.0.cross.", with or without the trailing dot; it is removed from the
  /// names. If not given, all names are loaded; for a module that is itself a layer, block or stack, those of the file's only
  /// one. If no name begins with it, LoadError lists the file's prefixes.
  std::optional<std::string> prefix = {};
  LayoutChoice layout = {};          ///< of attention layers; detected from names if not given; see layout.h
  bool allow_missing = false;        ///< leave parameters and buffers that the file does not have unchanged
  bool allow_unexpected = false;     ///< ignore names in the file that the module does not have
  bool without_input_norms = false;  ///< the caller applies the norms in front of layers: see `input_norms` in load_modules.h
  RenameRules rename = {};           ///< applied before anything else: prefix and report have the new names
  bool ignore_config = false;        ///< do not compare the module with config.json and the metadata of `save_safetensors`
};

/// Every name, without the prefix, in one of five lists.
struct XATTN_API LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;     ///< in the module, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the module
  std::vector<std::string> misshapen;   ///< in both, with other shapes, inconvertible types, or for other options
  /// Below the prefix of a layer or block, but known not to be part of it, such as the self-attention in front of a block; and
  /// what stands around a stack, such as embeddings, if the module itself is that stack.
  std::vector<std::string> surrounding;
  /// "loaded 8 tensors; missing: a, b; unexpected: c".
  std::string summary() const;
};

/// Thrown if file and module do not match. Lists missing, unexpected and misshapen names that the options do not allow, up to a
/// hundred of each; `report()` has all of them. Nothing was loaded, not even names in `report().loaded`.
class XATTN_API LoadError : public FileError {
 public:
  LoadError(const std::string& message, LoadReport report) : FileError(message), report_(std::move(report)) {}
  const LoadReport& report() const { return report_; }

 private:
  LoadReport report_;
};

/// Loads the parameters and buffers of any module by name, all or nothing: everything is checked before anything changes.
/// Values are copied into the module's own tensors, and so into its types and devices. Floating point types convert to each
/// other, as do complex types; every other type must match the module's. A tensor that the module has under two names (shared
/// parameters) may be in the file under only one, or under both with equal values. Throws LoadError if file and module do not
/// match. No other thread may use the module meanwhile.
///
/// A CrossAttention, DecoupledCrossAttention, CrossAttentionBlock, Encoder or Decoder anywhere in the module may have the names
/// of any layout. The computation of a layout is checked too: T5's scale of 1; the norms of a block, their placement if all
/// files with these names agree, gates and glu. What else no tensor shows is compared with the config.json beside the file, if
/// there is one: numbers of heads, also of torch::nn::MultiheadAttention; placement, eps and activation of blocks; eps of query
/// and key norms; scales; T5's max_distance. A difference is misshapen, with both values; `ignore_config` allows it. FileError
/// names kinds of attention that are not computed (see `cross_attention_from`). Weights of a float8 type, in any module, are
/// multiplied by the scales stored with them (`scale_weight`, `weight_scale`, `weight_scale_inv`). Names below the prefix of a
/// layer or block that its layout does not explain are unexpected: gates, norms and keys that the module does not have, and
/// low-rank weights, which must first be merged in Python.
///
/// If the module itself is a layer, block or stack and no prefix is given, the file's only one is loaded; a FileError lists
/// them if there are several. `Checkpoint::unread` lists what several loads have left out.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const Checkpoint& checkpoint, const LoadOptions& options = {});

/// The same from a file or folder, opened by `open_checkpoint`.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options = {});

/// The same from tensors in memory.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {});

/// Writes the parameters and buffers of a module by name; see save_safetensors(path, tensors, metadata). The number of heads of
/// each CrossAttention in the module is added to the metadata, as in "fusion.num_heads": "8" for the layer below "fusion.";
/// `cross_attention_from` reads it, and `load_weights` compares the module with it. Throws c10::ValueError if `metadata` has
/// another value there.
XATTN_API void save_safetensors(const std::string& path,
                                const torch::nn::Module& module,
                                const std::map<std::string, std::string>& metadata = {});

struct SaveOptions {
  Checkpoint like;        ///< the file whose spelling is used
  LoadOptions load = {};  ///< those that the module was loaded with; allow_unexpected and ignore_config have no effect
};

/// Writes a module in the spelling of the file that it was loaded from, so that the file's own class reads it in Python: the
/// inverse of `load_weights`, layouts, prefix and rules of renaming included. Names, shapes and types are those of `like`;
/// tensors that the module does not have are copied from it; a tensor that the module has under two names (shared parameters)
/// is written under those that are in `like`. With allow_missing, parameters that `like` does not have are added under the
/// prefix and their own names. Metadata is that of `like`, and "format": "pt", which transformers asks for. One tensor is in
/// memory at a time, and `path` may be the file of `like`.
///
///   auto checkpoint = xattn::open_checkpoint("blip");
///   xattn::load_weights(*model, checkpoint);
///   ...  // train
///   xattn::save_safetensors("blip-tuned/model.safetensors", *model, {.like = checkpoint});  // beside a copy of config.json
///
/// Throws LoadError if `load_weights` would, and FileError for a tensor that cannot be written back: weights with scales of
/// float8, and those that `like` names but that are not read.
XATTN_API void save_safetensors(const std::string& path, const torch::nn::Module& module, const SaveOptions& options);

}  // namespace xattn
