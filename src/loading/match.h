// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <xattn/checkpoint.h>
#include <xattn/load.h>

#include <map>
#include <string>
#include <string_view>
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
