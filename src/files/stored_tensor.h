// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files/mapped_file.h"

// What the readers of file formats have in common. Each is a function from the bytes of a file to an Index: it looks at headers
// only, checks every number in them against the file, knows no module, and refuses by FileError alone.
namespace xattn::detail {

/// A tensor that lies in a file, uncompressed.
struct StoredTensor {
  at::ScalarType type;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  ///< in elements, not negative
  Bytes data;                    ///< from its first element to the end of the last one; may start at any address
};

/// The tensors of a file by name, and what else it says.
struct Index {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

inline constexpr size_t kMaxAxes = 64;  ///< the limit of most of torch's operators

/// The number of elements of a shape; nothing if they, or the strides of a contiguous tensor of them, cannot be counted, a size
/// is negative, or there are more axes than torch has.
std::optional<int64_t> count_elements(const std::vector<int64_t>& shape);

/// Strides of a contiguous tensor. REQUIRES: the elements can be counted.
std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape);

/// The view of a storage that begins `offset` elements behind its start. If it would not lie in the storage, or its numbers make
/// no sense, `*reason` says why, as in "ends at byte 80, beyond its storage of 40 bytes", and there is no result.
std::optional<StoredTensor> view_of(Bytes storage,
                                    at::ScalarType type,
                                    std::vector<int64_t> shape,
                                    std::vector<int64_t> strides,
                                    int64_t offset,
                                    std::string* reason);

/// The bytes that a tensor shows; those of a view may lie in the file once and be shown many times. Nothing if they cannot be
/// counted.
std::optional<uint64_t> shown_bytes(const StoredTensor& stored);

/// A new tensor with memory of its own, contiguous unless it is a view that shows elements more than once: memory taken is never
/// more than lies in the file. Can be trained. Nothing if a boolean is neither 0 nor 1, which would be undefined behaviour.
std::optional<at::Tensor> materialize(const StoredTensor& stored);

}  // namespace xattn::detail
