// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention.h>
#include <xattn/checkpoint.h>

#include <cstdint>
#include <optional>
#include <string>

#include "programs/program.h"

// One attention layer of a file, run on inputs from another: shared by `run` and `verify`.
namespace xattn::cli {

/// The choice of the layer, and how to run it.
struct LayerArguments {
  std::optional<std::string> prefix;
  std::string layout;
  std::optional<int64_t> heads;
  std::optional<double> qk_norm_eps;
  bool allow_unexpected = false;
  double ip_scale = 1;
  std::string ip_adapter;
  std::string ip_prefix;
  std::string device = program::default_device();
  std::optional<int> threads;
};

void add_layer_options(program::Command& command, LayerArguments& arguments);

/// The inputs as `run --help` describes them.
extern const char* const kInputsHelp;

struct LayerResults {
  at::Tensor output;   ///< [B, Lq, Eo]
  at::Tensor weights;  ///< as requested; undefined for none
};

/// Runs the layer in the type of the query. `fixture`: the inputs may also hold the expected results. Throws FileError, naming
/// the file, for inputs that do not fit.
LayerResults run_layer(const std::string& file,
                       const std::string& inputs,
                       const LayerArguments& arguments,
                       AttentionWeights weights,
                       bool fixture);

}  // namespace xattn::cli
