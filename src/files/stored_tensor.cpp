// SPDX-License-Identifier: Apache-2.0
#include "files/stored_tensor.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/text.h"

namespace xattn::detail {
std::optional<int64_t> count_elements(const std::vector<int64_t>& shape) {
  if (shape.size() > kMaxAxes) return {};
  int64_t with_ones = 1;  // strides count zeros as ones
  bool empty = false;
  for (const auto size : shape) {
    if (size < 0 || __builtin_mul_overflow(with_ones, std::max<int64_t>(size, 1), &with_ones)) return {};
    empty |= size == 0;
  }
  return empty ? 0 : with_ones;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(shape[axis], 1);
  }
  return strides;
}

std::optional<StoredTensor> view_of(Bytes storage,
                                    at::ScalarType type,
                                    std::vector<int64_t> shape,
                                    std::vector<int64_t> strides,
                                    int64_t offset,
                                    std::string* reason) {
  const auto elements = count_elements(shape);
  const bool sound = elements && strides.size() == shape.size() && offset >= 0 &&
                     std::ranges::all_of(strides, [](int64_t stride) { return stride >= 0; });
  if (!sound) {
    *reason = formatted("has shape [{}], strides [{}] and offset {}, which do not make a tensor", joined(shape),
                        joined(strides), offset);
    return {};
  }
  if (*elements == 0) return StoredTensor{type, std::move(shape), std::move(strides), {}};
  const auto item = static_cast<int64_t>(c10::elementSize(type));
  int64_t last = 0;  // element, from the first one of the view
  bool overflow = false;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    int64_t step = 0;
    overflow |= __builtin_mul_overflow(shape[axis] - 1, strides[axis], &step) || __builtin_add_overflow(last, step, &last);
  }
  int64_t begin = 0;
  int64_t end = 0;  // both in bytes, from the storage's start
  overflow |= __builtin_mul_overflow(offset, item, &begin) || __builtin_add_overflow(offset, last, &end) ||
              __builtin_add_overflow(end, 1, &end) || __builtin_mul_overflow(end, item, &end);
  if (overflow || static_cast<uint64_t>(end) > storage.size()) {
    *reason = formatted("of shape [{}], strides [{}] and offset {} ends beyond its storage of {} bytes", joined(shape),
                        joined(strides), offset, storage.size());
    return {};
  }
  const auto first_byte = static_cast<size_t>(begin);
  return StoredTensor{type, std::move(shape), std::move(strides),
                      storage.subspan(first_byte, static_cast<size_t>(end) - first_byte)};
}

std::optional<int64_t> bytes_of_elements(at::ScalarType type, const std::vector<int64_t>& shape) {
  const auto elements = count_elements(shape);
  int64_t bytes = 0;
  if (!elements || __builtin_mul_overflow(*elements, c10::elementSize(type), &bytes)) return {};
  return bytes;
}

std::optional<at::Tensor> materialize(const StoredTensor& stored) {
  c10::InferenceMode off(false);  // a tensor made in inference mode could never be trained
  if (stored.type == at::kBool) {
    const bool valid = std::ranges::all_of(stored.data, [](std::byte byte) { return byte <= std::byte{1}; });
    if (!valid) return {};
  }
  const auto elements = static_cast<int64_t>(stored.data.size() / c10::elementSize(stored.type));
  auto flat = at::empty({elements}, stored.type);
  if (elements > 0) std::memcpy(flat.data_ptr(), stored.data.data(), stored.data.size());
  const auto view = flat.as_strided(stored.shape, stored.strides);
  return view.numel() <= elements ? view.contiguous() : view;
}

}  // namespace xattn::detail
