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

struct LoadOptions {
  /// Prefix of the names to load, as in "decoder.layers.0.cross.", with or without the trailing dot; it is removed from the
  /// names. If not given, all names are loaded; for a module that is itself a layer or block, those of the file's only one.
  std::optional<std::string> prefix = {};
  LayoutChoice layout = {};          ///< of attention layers; detected from names if not given; see layout.h
  bool allow_missing = false;        ///< leave parameters and buffers that the file does not have unchanged
  bool allow_unexpected = false;     ///< ignore names in the file that the module does not have
  bool without_input_norms = false;  ///< the caller applies the norms in front of layers: see `input_norms` in load_modules.h
};

/// Every name, without the prefix, in one of five lists.
struct XATTN_API LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;     ///< in the module, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the module
  std::vector<std::string> misshapen;   ///< in both, with other shapes, inconvertible types, or for other options
  /// Below the prefix of a layer or block, but known not to be part of it, such as the self-attention in front of a block.
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
/// parameters) may be in the file under only one. Throws LoadError if file and module do not match.
///
/// A CrossAttention, DecoupledCrossAttention or CrossAttentionBlock anywhere in the module may have the names of any layout.
/// The computation of a layout is checked too: T5's scale of 1; the norms of a block, their placement if all files with these
/// names agree, gates and glu. Activation and eps are not checked, because no file contains them. Weights of a float8 type, in
/// any module, are multiplied by the scales stored with them (`scale_weight`, `weight_scale`, `weight_scale_inv`). Names below
/// the prefix of a layer or block that its layout does not explain are unexpected: gates, norms and keys that the module does
/// not have, and low-rank weights, which must first be merged in Python.
///
/// If the module itself is a layer or block and no prefix is given, the file's only one is loaded; a FileError lists them if
/// there are several.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const Checkpoint& checkpoint, const LoadOptions& options = {});

/// The same from a file, opened by `open_checkpoint`.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options = {});

/// The same from tensors in memory.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {});

/// Writes the parameters and buffers of a module by name; see save_safetensors(path, tensors, metadata).
XATTN_API void save_safetensors(const std::string& path,
                                const torch::nn::Module& module,
                                const std::map<std::string, std::string>& metadata = {});

}  // namespace xattn
