// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace examples {

/// Random numbers from one seed. Copies share their state.
class Random {
 public:
  explicit Random(uint64_t seed) : generator_(at::make_generator<at::CPUGeneratorImpl>(seed)) {}

  /// 0 to n - 1.
  int64_t below(int64_t n) {
    const auto bits = at::check_generator<at::CPUGeneratorImpl>(generator_)->random64();
    return static_cast<int64_t>(bits % static_cast<uint64_t>(n));
  }

  /// True with probability 1/n.
  bool once_in(int64_t n) { return below(n) == 0; }

  template <typename T>
  const T& pick(const std::vector<T>& items) {
    return items.at(static_cast<size_t>(below(static_cast<int64_t>(items.size()))));
  }

  template <typename Items>
  void shuffle(Items& items) {
    for (int64_t i = static_cast<int64_t>(items.size()) - 1; i > 0; --i) {
      std::swap(items.at(static_cast<size_t>(i)), items.at(static_cast<size_t>(below(i + 1))));
    }
  }

  /// For random tensors.
  at::Generator& generator() { return generator_; }

  /// uint8 [N], for `set_state` to continue from here.
  torch::Tensor state() { return generator_.get_state(); }
  void set_state(const torch::Tensor& state) { generator_.set_state(state); }

 private:
  at::Generator generator_;
};

}  // namespace examples
