// SPDX-License-Identifier: Apache-2.0
#include "cpu/elementwise.h"

#include <ATen/TensorIterator.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>

#include "cpu/huge_pages.h"
#include "cpu/on_kernels.h"
#include "cpu/packed.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

struct TwoUsesFunction : torch::autograd::Function<TwoUsesFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const Tensor& x) {
    return {x.view(x.sizes()), x.view(x.sizes())};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    auto& a = grads[0];
    auto& b = grads[1];
    if (!a.defined() || !b.defined()) return {a.defined() ? a : b};
    const bool plain = run_on_kernels({a, b}) && a.is_contiguous() && b.is_contiguous();
    if (at::GradMode::is_enabled() || !plain) return {a + b};
    const bool is_ours = a.use_count() == 1 && a.storage().use_count() == 1;  // as the autograd engine decides
    const auto sum = is_ours ? a : at::empty(a.sizes(), a.options());
    each_part(a.numel(), kOperationsOfAnAddition,
              [x = data(a), y = data(b), z = mutable_data(sum)](int64_t begin, int64_t end) {
                for (auto i = begin; i < end; ++i) z[i] = x[i] + y[i];
              });
    return {sum};
  }
};

// Copies `rows` times n numbers of type T. strides, in bytes: of the numbers and of the rows, each of `to` before `from`.
template <class T>
void copy_numbers(char** to_and_from, const int64_t* strides, int64_t n, int64_t rows) {
  constexpr int64_t kSize = sizeof(T);
  for (int64_t row = 0; row < rows; ++row) {
    auto* to = to_and_from[0] + row * strides[2];
    const auto* from = to_and_from[1] + row * strides[3];
    if (strides[0] == kSize && strides[1] == kSize) {
      std::memcpy(to, from, static_cast<size_t>(n * kSize));
    } else {
      for (int64_t i = 0; i < n; ++i, to += strides[0], from += strides[1]) std::memcpy(to, from, kSize);
    }
  }
}

}  // namespace

Tensor engine::open_gate(const Tensor& gate, int64_t features) {
  return gate.defined() ? gate.tanh().expand({features}).contiguous() : gate;
}

void engine::add_rows(const float* x, const Tensor& gate, const float* branch, float* y, int64_t n, int64_t features) {
  if (!gate.defined()) {
    for (int64_t i = 0; i < n * features; ++i) y[i] = x[i] + branch[i];
    return;
  }
  const auto* factor = data(gate);
  for (int64_t row = 0; row < n; ++row, x += features, branch += features, y += features) {
    for (int64_t i = 0; i < features; ++i) y[i] = x[i] + factor[i] * branch[i];
  }
}

Tensor zeros(at::IntArrayRef sizes, at::ScalarType type) {
  auto x = in_huge_pages(at::empty(sizes, type));
  const auto bytes = static_cast<int64_t>(x.nbytes());
  each_part(bytes, kOperationsOfAnAddition / 4, [to = static_cast<char*>(x.mutable_data_ptr())](int64_t begin, int64_t end) {
    std::fill(to + begin, to + end, char{0});
  });
  return x;
}

void copy_to(const Tensor& from, const Tensor& to) {
  const auto bytes = static_cast<int64_t>(from.element_size());
  if (!from.is_cpu() || !to.is_cpu() || (bytes != 4 && bytes != 2)) {
    to.copy_(from);
    return;
  }
  const auto iterator = at::TensorIteratorConfig()
                            .set_check_mem_overlap(false)
                            .resize_outputs(false)
                            .add_output(to)
                            .add_const_input(from)
                            .build();
  each_part(iterator.numel(), kOperationsOfAnAddition, [&iterator, bytes](int64_t begin, int64_t end) {
    iterator.serial_for_each(bytes == 4 ? copy_numbers<uint32_t> : copy_numbers<uint16_t>, {begin, end});
  });
}

Tensor scaled(const Tensor& x, double factor) {
  if (!run_on_kernels({x}) || is_recorded({x}) || !x.is_non_overlapping_and_dense()) return x * factor;
  const auto result = at::empty_like(x);  // with the strides of x
  const auto f = static_cast<float>(factor);
  each_part(x.numel(), kOperationsOfAnAddition, [f, from = data(x), to = mutable_data(result)](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) to[i] = f * from[i];
  });
  return result;
}

Tensor contiguous(const Tensor& x) {
  if (x.is_contiguous() || !run_on_kernels({x}) || is_recorded({x})) return x.contiguous();
  const auto result = in_huge_pages(at::empty(x.sizes(), x.options()));
  copy_to(x, result);
  return result;
}

Tensor added(const Tensor& x, const Tensor& y, double factor) {
  const bool alike = x.sizes() == y.sizes() && x.strides() == y.strides() && x.is_non_overlapping_and_dense();
  if (!alike || !run_on_kernels({x, y}) || is_recorded({x, y})) return x.add(y, factor);
  const auto sum = at::empty_like(x);
  const auto f = static_cast<float>(factor);
  each_part(x.numel(), kOperationsOfAnAddition,
            [f, x = data(x), y = data(y), to = mutable_data(sum)](int64_t begin, int64_t end) {
              for (auto i = begin; i < end; ++i) to[i] = x[i] + f * y[i];
            });
  return sum;
}

Tensor added(const Tensor& x, const Tensor& branch, const Tensor& gate) {
  if (!gate.defined()) return added(x, branch);
  const bool contiguous = x.is_contiguous() && branch.is_contiguous();
  if (!contiguous || !run_on_kernels({x, branch, gate}) || is_recorded({x, branch, gate})) {
    return x + (gate.tanh() * branch).to(branch.scalar_type());
  }
  const auto features = x.size(-1);
  const auto factors = open_gate(gate, features), sum = at::empty_like(x);
  each_part(x.numel() / features, kOperationsOfAnAddition * features, [&](int64_t begin, int64_t end) {
    const auto first = begin * features;
    add_rows(data(x) + first, factors, data(branch) + first, mutable_data(sum) + first, end - begin, features);
  });
  return sum;
}

std::pair<Tensor, Tensor> for_two_uses(const Tensor& x) {
  if (!at::GradMode::is_enabled() || !x.requires_grad() || !run_on_kernels({x})) return {x, x};
  const auto uses = TwoUsesFunction::apply(x);
  return {uses[0], uses[1]};
}

}  // namespace xattn::detail
