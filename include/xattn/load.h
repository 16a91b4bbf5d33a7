// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>

#include <map>
#include <string>
#include <vector>

namespace xattn {

/// Tensors by their names in a file.
using NamedTensors = std::map<std::string, torch::Tensor>;

/// All tensors of a file, on the CPU. The format is told by content, not by extension: safetensors or a TorchScript archive
/// (see torchscript.h: trusted files only). Throws FileError.
XATTN_API NamedTensors load_tensors(const std::string& path);

struct LoadOptions {
  std::string prefix;             ///< load only names that start so, without it, as in "decoder.layers.0.cross."
  bool allow_missing = false;     ///< leave parameters and buffers alone that the file does not have
  bool allow_unexpected = false;  ///< ignore names in the file that the module does not have
};

/// Every name once, in one of four lists.
struct LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;     ///< in the module, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the module
  std::vector<std::string> misshapen;   ///< in both, with different shapes or types that do not convert
  /// "loaded 8 tensors; missing: a, b; unexpected: c".
  std::string summary() const;
};

/// Loads the parameters and buffers of any module by name, all or nothing: everything is checked before anything changes.
/// Values are copied into the module's own tensors, and so into its types and devices. A name that the module uses twice
/// (shared parameters) may be in the file once. Throws FileError that lists ALL missing, unexpected and misshapen names.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {});

/// The same from a file (see load_tensors).
XATTN_API LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options = {});

/// Writes the parameters and buffers of a module by name; see save_safetensors(path, tensors, metadata).
XATTN_API void save_safetensors(const std::string& path,
                                const torch::nn::Module& module,
                                const std::map<std::string, std::string>& metadata = {});

/// A cross-attention layer found among the tensors of a file.
struct FoundLayer {
  std::string prefix;             ///< in front of "query_linear.weight"; may be empty
  CrossAttentionOptions options;  ///< widths and biases; the number of heads is in no file, so it is 1 here
};

/// The layers spelled as the reference spells them (query_linear, key_linear, value_linear, output_linear), in order of prefix.
XATTN_API std::vector<FoundLayer> find_layers(const NamedTensors& tensors);

}  // namespace xattn
