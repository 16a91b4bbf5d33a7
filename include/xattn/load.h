// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <xattn/block.h>
#include <xattn/block_layouts.h>
#include <xattn/checkpoint.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/export.h>
#include <xattn/file_error.h>
#include <xattn/layouts.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace xattn {

struct LoadOptions {
  std::string prefix = {};           ///< load only names that start so, without it, as in "decoder.layers.0.cross."
  bool allow_missing = false;        ///< leave parameters and buffers alone that the file does not have
  bool allow_unexpected = false;     ///< ignore names in the file that the module does not have
  std::string layout = {};           ///< of the attention layers (see layouts.h); told from their names if empty
  bool without_input_norms = false;  ///< the caller applies the norms that layers have in front: see `input_norms`
};

/// Every name, without the prefix, in one of five lists.
struct XATTN_API LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;     ///< in the module, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the module
  std::vector<std::string> misshapen;   ///< in both, with other shapes, types that do not convert, or for other options
  /// Under the prefix of a layer or block, but known not to be of it, as the self-attention in front of a block.
  std::vector<std::string> surrounding;
  /// "loaded 8 tensors; missing: a, b; unexpected: c".
  std::string summary() const;
};

/// File and module do not fit: lists missing, unexpected and misshapen names that the options do not allow, up to a hundred of each;
/// `report()` has ALL. Nothing was loaded, not even what `report().loaded` lists.
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
///
/// A CrossAttention or DecoupledCrossAttention anywhere in the module may be spelled in any layout, a CrossAttentionBlock in
/// any block layout. What a layout computes is checked, too: T5's scale of 1; the norms of a block, where they stand if all that
/// is spelled so agrees, gates and glu. Activation and eps are not: nothing in a file tells them. Weights of a float8 type, of
/// any module, are multiplied by the scales beside them (see TensorRecipe). Names under the prefix of a layer or block that its layout does not
/// explain are unexpected: low-rank weights, which Python must merge first, gates, norms and keys that the module does not have. If the module itself is one of
/// these and no prefix is given, the file's only one is taken; a FileError lists them if there are several.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const Checkpoint& checkpoint, const LoadOptions& options = {});

/// The same from a file, opened by `open_checkpoint`.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options = {});

/// The same from tensors in memory.
XATTN_API LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options = {});

/// The one layer of a file that these choose: the layer at `prefix` (with or without its point at the end) if it is given, else
/// the only cross-attention layer, or the only layer that is not told to be self-attention. Throws FileError, listing prefixes,
/// if none or several remain.
XATTN_API FoundLayer choose_layer(const Checkpoint& checkpoint,
                                  const std::optional<std::string>& prefix = {},
                                  const std::string& layout = {});

/// The same for blocks: the one at `prefix` (of the block, not of its attention), else the only one.
XATTN_API FoundBlock choose_block(const Checkpoint& checkpoint,
                                  const std::optional<std::string>& prefix = {},
                                  const std::string& layout = {});

struct LayerOptions {
  std::optional<std::string> prefix = {};  ///< see choose_layer
  std::string layout = {};                 ///< told from names if empty
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file if it is not given
  std::optional<double> qk_norm_eps = {};  ///< from config.json, or that of the layout's family, if it is not given
  AttentionWeights attention_weights = AttentionWeights::mean;
  /// Of the parameters; the widest among the layer's tensors, but at least float16, if it is not given. float64, float32,
  /// bfloat16 or float16.
  std::optional<torch::ScalarType> dtype = {};
  bool allow_unexpected = false;     ///< ignore names under the layer's prefix that its layout does not explain
  bool without_input_norms = false;  ///< the caller applies the norms that the layer has in front: see `input_norms`
};

/// A CrossAttention of a file's widths, biases, norms and scale, with its weights. The number of heads is never among the
/// weights: it comes from the options, from a norm of each head, or from a config.json beside the file; else a FileError lists
/// those that are possible. What config.json says of the scale is computed (query_pre_attn_scalar of Gemma, the switches of
/// GPT-2), or refused (soft caps of logits).
///
/// Whatever else stands under the layer's prefix may change what it computes: a FileError names what the layout does not
/// explain, norms in front of the projections, added contexts, tensors of sizes that do not fit together, and weights of types
/// without arithmetic, as quantized ones.
XATTN_API CrossAttention cross_attention_from(const Checkpoint& checkpoint, const LayerOptions& options = {});

/// The same with the contexts that the file's layer has beside its first (IP-Adapters, Wan's image-to-video models), each added
/// with this scale. Throws FileError if it has none.
XATTN_API DecoupledCrossAttention decoupled_cross_attention_from(const Checkpoint& checkpoint,
                                                                 const LayerOptions& options = {},
                                                                 double scale = 1);

/// A Stable Diffusion U-Net and an IP-Adapter's own file as one, as diffusers spells them once it has loaded both: every
/// cross-attention layer has the adapter's projections as an added context. The file calls them "ip_adapter.1.to_k_ip.weight",
/// with an odd number for each cross-attention layer in the order of down blocks, up blocks, mid block. `places` says it for
/// layers that these numbers do not tell, as of a file with one layer: prefixes of layers in the base, and in the adapter.
/// Throws FileError, listing names, unless each of the layers has its projections and, without `places`, these are all that the
/// adapter has.
///
///   auto unet = xattn::with_ip_adapter(xattn::open_checkpoint("unet/diffusion_pytorch_model.safetensors"),
///                                      xattn::open_checkpoint("ip-adapter_sd15.safetensors"));
XATTN_API Checkpoint with_ip_adapter(const Checkpoint& base,
                                     const Checkpoint& adapter,
                                     const std::map<std::string, std::string>& places = {});

struct BlockOptionsFromFile {
  std::optional<std::string> prefix = {};  ///< see choose_block
  std::string layout = {};                 ///< of the attention; told from names if empty
  std::optional<int64_t> num_heads = {};   ///< from config.json beside the file, as the next three, if it is not given
  std::optional<NormPlacement> norm_placement = {};
  std::optional<Activation> activation = {};
  std::optional<double> norm_eps = {};     ///< that of the block layout's family if neither tells
  std::optional<double> qk_norm_eps = {};  ///< see LayerOptions
  AttentionWeights attention_weights = AttentionWeights::mean;
  std::optional<torch::ScalarType> dtype = {};  ///< see LayerOptions
  bool allow_unexpected = false;                ///< likewise, under the block's prefix
};

/// A CrossAttentionBlock of a file's widths, norms, gates and feed-forward branch, with its weights. What these do not tell
/// comes from the options, from a config.json beside the file, or from the family if all that is spelled so agrees; else a
/// FileError says what to give: BART has its norms after, Whisper before, with the same names. What is refused is as for
/// `cross_attention_from`.
///
///   auto block = xattn::cross_attention_block_from(xattn::open_checkpoint("whisper/model.safetensors"),
///                                                  {.prefix = "model.decoder.layers.0."});
XATTN_API CrossAttentionBlock cross_attention_block_from(const Checkpoint& checkpoint,
                                                         const BlockOptionsFromFile& options = {});

/// The norms that a layer has of its own in front of its projections (Flamingo, Perceiver), which a CrossAttention has not: of
/// the query and of the context, the identity where there is none. `cross_attention_from` refuses such a layer unless its
/// options say `without_input_norms`.
XATTN_API std::pair<Norm, Norm> input_norms(const Checkpoint& checkpoint, const FoundLayer& layer);

/// Writes the parameters and buffers of a module by name; see save_safetensors(path, tensors, metadata).
XATTN_API void save_safetensors(const std::string& path,
                                const torch::nn::Module& module,
                                const std::map<std::string, std::string>& metadata = {});

}  // namespace xattn
