// SPDX-License-Identifier: Apache-2.0
#include <xattn/torchscript.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include "check_file.h"

namespace xattn {
namespace {

[[noreturn]] void fail(const std::string& path, std::string_view reason) {
  detail::fail_file("torchscript", path,
                    "must be an archive of torch.jit.save (re-save a state dict with safetensors.torch.save_file), but: {}",
                    reason.substr(0, reason.find('\n')));
}

}  // namespace

std::map<std::string, at::Tensor> load_torchscript(const std::string& path) {
  try {
    const auto module = torch::jit::load(path, at::kCPU);
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, tensor] : module.named_parameters()) tensors.emplace(name, tensor.detach());
    for (const auto& [name, tensor] : module.named_buffers()) tensors.emplace(name, tensor.detach());
    return tensors;
  } catch (const c10::Error& error) {
    fail(path, error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(path, error.what());
  }
}

}  // namespace xattn
