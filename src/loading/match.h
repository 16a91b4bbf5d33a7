// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <xattn/checkpoint.h>
#include <xattn/load.h>

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "loading/model_config.h"
#include "loading/recipes.h"

// Which tensor of a file belongs to which of a module.
namespace xattn::detail {

struct Match {
  struct Pair {
    std::string name;     ///< in the module
    at::Tensor own;       ///< the module's
    TensorRecipe recipe;  ///< how to make it from the file
  };

  std::string prefix;  ///< with the point at its end if there is one in the file
  NamedTensors state;  ///< parameters and buffers of the module
  std::vector<Pair> pairs;
  LoadReport report;
};

/// The parameters and buffers of a module by name.
NamedTensors state_of(const torch::nn::Module& module);

/// All submodules of this type, the module itself included, by their paths: empty, or ending in a point.
template <class Impl>
std::vector<std::pair<std::string, const Impl*>> modules_of(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, const Impl*>> result;
  if (const auto* self = module.as<Impl>()) result.emplace_back("", self);
  for (const auto& item : module.named_modules("", /*include_self=*/false)) {
    if (const auto* one = item.value()->template as<Impl>()) result.emplace_back(item.key() + ".", one);
  }
  return result;
}

struct MatchRequest {
  std::string_view caller;  ///< begins messages, as `file` does
  const torch::nn::Module& module;
  const std::string& file;
  const LazyTensors& source;                        ///< after renaming
  const std::map<std::string, std::string>& names;  ///< in the file, by those in `source`; empty if they are the same
  const LoadOptions& options;
  const ModelConfig* config = nullptr;  ///< of the file; null to compare nothing with it
};

/// Matches a module with a file; changes nothing. Throws LoadError, with all reasons, as `load_weights` does.
Match match(const MatchRequest& request);

/// Throws LoadError with "[caller] file: reason", in one line.
[[noreturn]] void fail_to_match(std::string_view caller, const std::string& file, const std::string& reason, LoadReport report);

}  // namespace xattn::detail
