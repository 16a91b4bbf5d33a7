// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <xattn/cross_attention.h>
#include <xattn/export.h>
#include <xattn/file_error.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace xattn {

/// Tensors by their names in a file.
using NamedTensors = std::map<std::string, torch::Tensor>;

enum class FileFormat {
  safetensors,  ///< see safetensors.h
  torchscript,  ///< an archive of torch.jit.save; see torchscript.h: for trusted files only
};

/// What a file is by its content, whatever its name ends in. Throws FileError if it is neither, or cannot be read.
XATTN_API FileFormat detect_format(const std::string& path);

/// All tensors of a file in any of these formats, on the CPU, from wherever they were saved. Throws FileError.
XATTN_API NamedTensors load_tensors(const std::string& path);

struct LoadOptions {
  std::string prefix = {};        ///< load only names that start so, without it, as in "decoder.layers.0.cross."
  bool allow_missing = false;     ///< leave parameters and buffers alone that the file does not have
  bool allow_unexpected = false;  ///< ignore names in the file that the module does not have
};

/// Every name, without the prefix, in one of four lists.
struct XATTN_API LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;     ///< in the module, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the module
  std::vector<std::string> misshapen;   ///< in both, with other shapes, or types that do not convert; each says which
  /// "loaded 8 tensors; missing: a, b; unexpected: c".
  std::string summary() const;
};

/// File and module do not fit: lists ALL missing, unexpected and misshapen names that the options do not allow. Nothing was
/// loaded, not even what `report().loaded` lists.
class XATTN_API LoadError : public FileError {
 public:
  LoadError(const std::string& message, LoadReport report) : FileError(message), report_(std::move(report)) {}
  const LoadReport& report() const { return report_; }

 private:
  LoadReport report_;
};

/// Loads the parameters and buffers of any module by name, all or nothing: everything is checked before anything changes.
/// Values are copied into the module's own tensors, and so into its types and devices. Floating point types convert to each
/// other, complex ones too; every other type must be the module's own. A tensor that the module has under two names (shared
/// parameters) may be in the file under one. Throws LoadError if file and module do not fit.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {});

/// The same from a file (see load_tensors, also for its errors).
XATTN_API LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options = {});

/// Writes the parameters and buffers of a module by name; see save_safetensors(path, tensors, metadata).
XATTN_API void save_safetensors(const std::string& path,
                                const torch::nn::Module& module,
                                const std::map<std::string, std::string>& metadata = {});

/// A cross-attention layer found among the tensors of a file.
struct XATTN_API FoundLayer {
  std::string prefix;             ///< in front of "query_linear.weight"; may be empty
  CrossAttentionOptions options;  ///< widths and biases, with the fewest heads that the widths allow: 1 unless grouped-query

  /// The options with this many heads; weights do not tell how many there were. Throws c10::ValueError, listing the numbers that
  /// are possible, if this one is not.
  CrossAttentionOptions with_heads(int64_t num_heads) const;
};

/// The layers spelled as the reference spells them (query_linear, key_linear, value_linear, output_linear), in order of prefix.
/// Looks at names and shapes only. A layer with query/key norms is left out: no file tells their eps.
XATTN_API std::vector<FoundLayer> find_layers(const NamedTensors& tensors);

}  // namespace xattn
