// SPDX-License-Identifier: Apache-2.0
#include "common/pretrained.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "files/mapped_file.h"

namespace examples {
namespace {

torch::Tensor read_bytes(const std::string& path) {
  const xattn::detail::MappedFile file(path);
  const auto content = file.bytes();
  auto bytes = torch::empty(static_cast<int64_t>(content.size()), torch::kUInt8);
  std::ranges::copy(xattn::detail::as_text(content), bytes.mutable_data_ptr<uint8_t>());
  return bytes;
}

// The tensor may come from any checkpoint.
torch::Tensor plain_bytes(const torch::Tensor& bytes, const std::string& name) {
  if (bytes.scalar_type() != torch::kUInt8 || bytes.dim() != 1) {
    throw std::runtime_error(
        fmt::format("{}: must be uint8 [N], but is {} {}", name, c10::getDtypeNames(bytes.scalar_type()).first, bytes.sizes()));
  }
  return bytes.contiguous();  // it may be an expanded view
}

torch::jit::Module load_module(const torch::Tensor& bytes, const std::string& name, torch::jit::ExtraFilesMap& extra_files) {
  std::istringstream in({reinterpret_cast<const char*>(bytes.const_data_ptr<uint8_t>()), static_cast<size_t>(bytes.numel())});
  try {
    return torch::jit::load(in, torch::kCPU, extra_files);
  } catch (const std::exception&) {
    throw std::runtime_error(fmt::format("{}: must be a TorchScript module, as torch.jit.save writes it", name));
  }
}

}  // namespace

PretrainedImpl::PretrainedImpl(const std::string& path) : PretrainedImpl(read_bytes(path), path) {}

PretrainedImpl::PretrainedImpl(const torch::Tensor& bytes, std::string name)
    : bytes_(plain_bytes(bytes, name)), name_(std::move(name)) {
  torch::jit::ExtraFilesMap none;
  module_ = load_module(bytes_, name_, none);
  module_.eval();
}

torch::Tensor PretrainedImpl::forward(const torch::Tensor& x) {
  const torch::NoGradGuard no_grad;
  module_.to(x.device());
  try {
    return module_.forward({x}).toTensor();
  } catch (const std::exception& error) {
    const std::string reason = error.what();
    throw std::runtime_error(fmt::format("{}: must make one tensor of one tensor {}, but does not: {}", name_, x.sizes(),
                                         reason.substr(0, reason.find('\n'))));
  }
}

std::string PretrainedImpl::extra_file(const std::string& name) const {
  torch::jit::ExtraFilesMap files = {{name, ""}};
  load_module(bytes_, name_, files);
  return files.at(name);
}

}  // namespace examples
