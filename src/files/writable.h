// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>

#include <string>
#include <string_view>

#include "base/check.h"
#include "base/describe.h"
#include "files/check_file.h"

// Shared by the writers of file formats.
namespace xattn::detail {

/// Tensors for a writer. Throws FileError for a tensor that is not dense or has no data.
inline LazyTensors writable(std::string_view reader, const std::string& path, const NamedTensors& tensors) {
  const FileCheck check(reader, path);
  for (const auto& [name, tensor] : tensors) {
    const bool dense = tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta();
    check(dense, "tensor {} must be dense and have data", in_quotes(name));
  }
  return lazy(tensors);
}

/// The tensor of this name on the CPU, contiguous, and neither a conjugate nor a negative view: memory holds its values. Throws
/// c10::ValueError unless it has the type and shape that `tensors` announce.
inline at::Tensor made(std::string_view writer, const LazyTensors& tensors, const std::string& name) {
  const auto& [type, shape] = tensors.infos.at(name);
  const auto tensor = tensors.make(name);
  check_value(tensor.defined() && tensor.scalar_type() == type && tensor.sizes() == shape, writer,
              "tensor {} must be made as announced, {} [{}], but is {} {}.", in_quotes(name), c10::getDtypeNames(type).first,
              joined(shape), type_of(tensor), shape_of(tensor));
  return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
}

}  // namespace xattn::detail
