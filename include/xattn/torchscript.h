// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>

#include <map>
#include <string>

namespace xattn {

/// The parameters and buffers of a TorchScript archive (`torch.jit.save`), by name, on the CPU wherever they were saved.
///
/// Reads through torch::jit::load, which RUNS CODE FROM THE FILE and has no safe mode: give it files that you trust.
/// Throws FileError if the file cannot be read.
XATTN_API std::map<std::string, at::Tensor> load_torchscript(const std::string& path);

}  // namespace xattn
