// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/torch.h>
#include <xattn/cross_attention.h>
#include <xattn/load.h>
#include <xattn/mask.h>
#include <xattn/safetensors.h>

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compare.h"
#include "test_util.h"

// Results of PyTorch, in tests/data. scripts/make_fixtures.py writes these files and describes them.
namespace xattn::test {

inline at::ScalarType type_of_name(const std::string& name) {
  static const std::map<std::string, at::ScalarType> types = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  return types.at(name);
}

struct Fixture {
  std::string name;
  NamedTensors tensors;
  std::map<std::string, std::string> metadata;

  bool has(const std::string& tensor) const { return tensors.contains(tensor); }

  /// The metadata of this key; empty if absent.
  std::string about(const std::string& key) const { return metadata.contains(key) ? metadata.at(key) : ""; }

  /// The number of rows of features that an input has, over all batch entries; 0 if it is absent.
  int64_t rows(const std::string& input) const {
    return has(input) ? tensors.at(input).numel() / tensors.at(input).size(-1) : 0;
  }

  /// The types in which the inputs and weights of the file are exact.
  std::vector<at::ScalarType> types() const {
    std::istringstream names(about("dtypes"));
    std::vector<at::ScalarType> all;
    for (std::string type; names >> type;) all.push_back(type_of_name(type));
    return all;
  }

  CrossAttentionOptions options() const {
    const auto json = nlohmann::json::parse(metadata.at("options"));
    const auto optional = [&](const char* key) {
      return json.contains(key) ? std::optional<int64_t>(json[key]) : std::nullopt;
    };
    static const std::map<std::string, NormKind> norms = {
        {"none", NormKind::none}, {"rms", NormKind::rms}, {"layer", NormKind::layer}};
    static const std::map<std::string, NormScope> scopes = {{"per_head", NormScope::per_head},
                                                            {"across_heads", NormScope::across_heads}};
    static const std::map<std::string, AttentionWeights> weights = {
        {"none", AttentionWeights::none}, {"mean", AttentionWeights::mean}, {"per_head", AttentionWeights::per_head}};
    CrossAttentionOptions options(json["dim_query"], json["dim_key"], json["dim_value"], json["dim_output"]);
    options.num_heads(json.value("num_heads", 1))
        .kv_heads(optional("kv_heads"))
        .head_dim(optional("head_dim"))
        .value_head_dim(optional("value_head_dim"))
        .query_bias(json.value("query_bias", true))
        .key_bias(json.value("key_bias", true))
        .value_bias(json.value("value_bias", true))
        .output_bias(json.value("output_bias", true))
        .qk_norm(norms.at(json.value("qk_norm", "none")))
        .qk_norm_scope(scopes.at(json.value("qk_norm_scope", "per_head")))
        .qk_norm_eps(json.value("qk_norm_eps", 1e-6))
        .attention_weights(weights.at(json.value("attention_weights", "mean")));
    if (json.contains("scale")) options.scale(json["scale"].get<double>());
    return options;
  }

  /// A module with the weights of the case: from this file, from a TorchScript file, or from a seed.
  CrossAttention module(const CrossAttentionOptions& options) const {
    const auto source = about("weights");
    if (source == "seed") {
      torch::manual_seed(std::stoll(metadata.at("seed")));
      CrossAttention module(options);
      module->to(at::kDouble);
      return module;
    }
    CrossAttention module(options);
    module->to(at::kDouble);
    if (source.empty()) {
      load_weights(*module, tensors, {.prefix = "weights."});
    } else {
      load_weights(*module, data_path(source), {.prefix = about("prefix")});
    }
    return module;
  }

  /// The mask for all batch entries or for one entry alone. `bias` replaces the file's.
  Mask mask(at::Device device, const at::Tensor& bias = {}, std::optional<int64_t> entry = {}) const {
    const auto part = [&](const std::string& name) {
      const auto tensor = (name == "mask.bias" && bias.defined() ? bias : tensors.at(name)).to(device);
      const bool has_batch_axis = tensor.size(0) > 1 && !(tensor.dim() == 2 && name != "mask.key_padding");
      return entry && has_batch_axis ? tensor.narrow(0, *entry, 1) : tensor;
    };
    Mask mask;
    if (has("mask.key_padding")) mask = mask & Mask::key_padding(part("mask.key_padding"));
    if (has("mask.lengths")) mask = mask & Mask::lengths(part("mask.lengths"), tensors.at("key").size(1));
    if (has("mask.dense")) mask = mask & Mask::dense(part("mask.dense"));
    if (has("mask.bias")) mask = mask & Mask::bias(part("mask.bias"));
    if (about("causal") == "upper_left") mask = mask & Mask::causal(CausalAlignment::upper_left);
    if (about("causal") == "lower_right") mask = mask & Mask::causal(CausalAlignment::lower_right);
    return mask;
  }
};

inline Fixture load_fixture(const std::string& name) {
  const auto file = open_checkpoint(data_path(name + ".safetensors"));
  Fixture fixture{name, {}, file.metadata()};
  for (const auto& [tensor, info] : file.tensors()) fixture.tensors.emplace(tensor, file.tensor(tensor));
  return fixture;
}

}  // namespace xattn::test
