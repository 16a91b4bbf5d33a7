// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <torch/nn/modules/linear.h>
#include <xattn/export.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace xattn {

/// A torch::nn::Linear for inference, with packed weights: for a few rows the time is that of reading the weights once, which
/// decides in the projection to a large vocabulary.
///
///   xattn::FrozenLinear to_words(*decoder->to_words, at::kBFloat16);
///   auto logits = to_words.forward(hidden);
///
/// In float32 on the CPU it runs on this library's own kernels; elsewhere on LibTorch's operators. Calls record no gradients.
/// A row has the same bits for any number of threads and any contents of the other rows; on a processor with a matrix unit they
/// may change with the number of rows. Immutable: any number of threads may share one without locks. Copies share storage.
class XATTN_API FrozenLinear {
 public:
  /// An empty one, to be assigned to: any other use throws c10::ValueError.
  FrozenLinear() = default;

  /// A copy of the layer's parameters. storage: float32 (the default), or bfloat16 for half the memory, as
  /// FreezeOptions::storage. Throws c10::ValueError for another storage, and for bfloat16 where the kernels do not run.
  explicit FrozenLinear(const torch::nn::LinearImpl& linear, std::optional<at::ScalarType> storage = {});

  /// x [..., in] -> [..., out]. Throws c10::ValueError or c10::TypeError unless x has that shape and the weight's type and
  /// device.
  at::Tensor forward(const at::Tensor& x) const;

  /// Rows of the weight, as torch.nn.functional.embedding: indices [...] of an integer type, in [0, out) -> [..., in]. A model
  /// that reads and predicts tokens by the same weight then has it in memory once. In bfloat16 storage the rows are rounded.
  /// Throws c10::TypeError or c10::ValueError for other indices; on another device than the CPU only their type is checked.
  at::Tensor embedding(const at::Tensor& indices) const;

  int64_t in_features() const;
  int64_t out_features() const;

  /// Size in memory, in bytes.
  int64_t bytes() const;

  /// Whether calls run on this library's own kernels.
  bool uses_kernels() const;

 private:
  struct State;
  const State& state() const;
  std::shared_ptr<const State> state_;
};

}  // namespace xattn
