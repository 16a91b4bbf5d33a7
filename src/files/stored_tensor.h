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

// Shared by the readers of file formats. Each is a function from the bytes of a file to an Index: it reads headers only, checks
// every number in them against the file, and throws no error other than FileError.
namespace xattn::detail {

/// A tensor that lies in a file, uncompressed.
struct StoredTensor {
  at::ScalarType type;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  ///< in elements, not negative
  Bytes data;                    ///< from its first element to the end of the last one; may start at any address
};

/// The tensors of a file by name, and its metadata.
struct Index {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata = {};
  std::map<std::string, std::string> unreadable = {};  ///< tensors that are sound but not read, with what they are
};

inline constexpr size_t kMaxAxes = 64;  ///< the limit of most of torch's operators

/// The number of elements of a shape; nothing if this number or a contiguous stride overflows, a size is negative, or there are
/// more axes than torch allows.
std::optional<int64_t> count_elements(const std::vector<int64_t>& shape);

/// Strides of a contiguous tensor. REQUIRES: count_elements returns a number.
std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape);

/// The view of a storage that begins `offset` elements after its start. If the view does not lie in the storage, or is not
/// valid, returns nothing and sets `*reason`, as in "ends at byte 80, beyond its storage of 40 bytes".
std::optional<StoredTensor> view_of(Bytes storage,
                                    at::ScalarType type,
                                    std::vector<int64_t> shape,
                                    std::vector<int64_t> strides,
                                    int64_t offset,
                                    std::string* reason);

/// The size of all elements of a tensor of this shape, in bytes. Nothing if the number overflows, or if count_elements does.
std::optional<int64_t> bytes_of_elements(at::ScalarType type, const std::vector<int64_t>& shape);

/// A new tensor with memory of its own, contiguous unless it is a view that repeats elements: it never takes more memory than
/// its data in the file. It can be trained. Nothing if a boolean is neither 0 nor 1, which would be undefined behaviour.
std::optional<at::Tensor> materialize(const StoredTensor& stored);

}  // namespace xattn::detail
