// SPDX-License-Identifier: Apache-2.0
#include "files/folder.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <system_error>
#include <vector>

#include "files/check_file.h"

namespace xattn::detail {
namespace {

// In the order in which from_pretrained of transformers and diffusers looks for them; then low-rank weights of peft, diffusers.
constexpr std::array kWeights = {"model.safetensors",
                                 "model.safetensors.index.json",
                                 "pytorch_model.bin",
                                 "pytorch_model.bin.index.json",
                                 "diffusion_pytorch_model.safetensors",
                                 "diffusion_pytorch_model.safetensors.index.json",
                                 "diffusion_pytorch_model.bin",
                                 "diffusion_pytorch_model.bin.index.json",
                                 "adapter_model.safetensors",
                                 "adapter_model.bin",
                                 "pytorch_lora_weights.safetensors",
                                 "pytorch_lora_weights.bin"};

}  // namespace

std::string weights_in(const std::string& folder) {
  const FileCheck check("checkpoint", folder);
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    names.push_back(entry->path().filename().string() + (entry->is_directory(ignored) ? "/" : ""));
  }
  check(!error, "cannot be read: {}", error.message());
  const auto* found =
      std::ranges::find_if(kWeights, [&](const char* name) { return std::ranges::find(names, name) != names.end(); });
  if (found != kWeights.end()) return (std::filesystem::path(folder) / *found).string();
  std::ranges::sort(names);
  check.fail("must hold one of {}, but {}{}", joined(kWeights), names.empty() ? "is empty" : "does not",
             list("it holds", names));
}

}  // namespace xattn::detail
