// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_options.h>
#include <xattn/checkpoint.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "files/check_file.h"
#include "files/json.h"
#include "loading/block_layouts.h"
#include "loading/choose.h"
#include "loading/layouts.h"

namespace xattn::detail {

/// Where a name of a layout may stand in a config: "name", "text_config/name", "decoder/name", or the one place that it gives.
std::vector<std::string> places_of(std::string name);

/// The name in a file's metadata under which this library writes the number of heads of its own layer with this prefix.
inline std::string heads_key(const std::string& prefix) {
  return prefix + "num_heads";
}

/// The config.json beside a file of weights, which may be absent: properties of layers and blocks that the weights do not show.
class ModelConfig {
 public:
  /// Reads it as the weights are read: throws FileError unless it is a regular file of JSON, of at most 8 MB.
  explicit ModelConfig(const Checkpoint& checkpoint);

  const FileCheck& check() const { return check_; }
  const std::map<std::string, TensorInfo>& tensors() const { return *tensors_; }  ///< of the checkpoint
  const Json& json() const { return json_; }

  /// The object whose name, without "_config", begins the first component of the prefix that has one; null if there is none.
  const Json* part_of(const std::string& prefix) const;
  std::optional<std::string> class_name() const;  ///< of diffusers

  /// All values of type T under these names; see Layout for where they are looked up. If a component of the prefix names a part
  /// of the config, as "vision_model.encoder.layers.0." names "vision_config", that part comes first, and then only the top.
  template <class T>
  std::vector<T> all(const std::vector<std::string>& names, const std::string& prefix = {}) const;

  template <class T>
  std::optional<T> first(const std::vector<std::string>& names, const std::string& prefix = {}) const {
    const auto values = all<T>(names, prefix);
    return values.empty() ? std::nullopt : std::optional(values.front());
  }

  /// The number of heads that the file itself has for a layer of layout `reference`. Throws FileError if it is no number.
  std::optional<int64_t> heads_in_metadata(const FoundLayer& layer) const;

  /// The number of heads of a layer, by the file's metadata, or by the first of these names that config.json has.
  std::optional<int64_t> num_heads(const FoundLayer& layer, const std::vector<std::string>& names) const;
  /// By its name in the layout, else by the class of diffusers.
  std::optional<double> qk_norm_eps(const FoundLayer& layer) const;
  std::optional<int64_t> max_distance() const;                                   ///< of relative positions
  std::optional<double> scale(const FoundLayer& layer, int64_t head_dim) const;  ///< of the logits

  /// By the layout, else by the type of the model.
  std::optional<NormPlacement> norm_placement(const BlockLayout& layout) const;
  /// By config.json, else by the layout. Throws FileError if config.json names an unknown one.
  std::optional<Activation> activation(const FoundBlock& block) const;

  // For a comparison with a module that exists: the values that config.json may mean for this part of the model, the likeliest
  // first. None if it says nothing of it.

  /// The value in the part of the config that the prefix names; else all under the first name that has one, in every part if
  /// the prefix does not say which.
  template <class T>
  std::vector<T> possible(const std::vector<std::string>& names, const std::string& prefix) const;
  std::vector<int64_t> possible_num_heads(const FoundLayer& layer, const std::vector<std::string>& names) const;
  std::vector<double> possible_qk_norm_eps(const FoundLayer& layer) const;
  std::vector<std::string> possible_activations(
      const FoundBlock& block) const;  ///< as Activation's, or as config.json spells it

 private:
  std::optional<double> eps_of_class(const FoundLayer& layer) const;
  std::vector<std::string> names_of_heads(const FoundLayer& layer, std::vector<std::string> names) const;

  FileCheck check_;
  const std::map<std::string, TensorInfo>* tensors_;
  const std::map<std::string, std::string>* metadata_;
  Json json_;
};

inline constexpr std::string_view kActivations = "relu, gelu, gelu_tanh, silu";

}  // namespace xattn::detail
