// SPDX-License-Identifier: Apache-2.0
#include "cpu/matrix_product.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/linear.h>

#include <algorithm>
#include <optional>

#include "cpu/on_kernels.h"
#include "cpu/packed.h"
#include "cpu/tasks.h"
#include "cpu/thread_pool.h"
#include "cpu/tuning.h"
#include "kernels/kernels.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// Matrices of equal sizes in a tensor; creating a view of each would take longer than a small product. Either the elements of a
// row are consecutive or, if transposed, those of a column.
struct Matrices {
  const float* at(int64_t i, int64_t row, int64_t column) const {
    return data(x) + i / per_group * group_stride + i % per_group * stride + row * row_stride + column * column_stride;
  }

  Tensor x;
  bool transposed;
  int64_t row_stride, column_stride, groups = 1, per_group = 1, group_stride = 0, stride = 0;
};

// The matrices of a tensor [..., rows, columns] of two to four axes.
Matrices matrices_of(const Tensor& given, bool transposed) {
  const auto x = transposed ? given : with_rows(given);
  Matrices all{x, transposed, x.stride(-2), x.stride(-1)};
  if (x.dim() > 2) all.per_group = x.size(-3), all.stride = x.stride(-3);
  if (x.dim() > 3) all.groups = x.size(-4), all.group_stride = x.stride(-4);
  return all;
}

// Whether the right side is packed for m rows of k terms.
bool packs_right_side(int64_t m, int64_t k) {
  return m > kMostRowsUnpacked && k > 0;
}

// Packs `terms` rows of the right side at a time into `packed`.
void multiply_packed(const Product& whole, bool b_is_transposed, bool has_many, float* packed, int64_t terms) {
  const auto& run = kernels();
  const auto stride = whole.b.row_stride;
  auto part = whole;
  for (int64_t first = 0; first < whole.sizes.k; first += terms) {
    const auto* b = static_cast<const float*>(whole.b.data) + first * (b_is_transposed ? 1 : stride);
    part.sizes.k = std::min(terms, whole.sizes.k - first);
    (b_is_transposed ? run.pack_transposed : run.pack)(b, stride, part.sizes.k, part.sizes.n, packed, Storage::float32);
    part.a.data = whole.a.data + first * whole.a.step;
    part.b = run.packed(packed, part.sizes.k);
    multiply_part(part, has_many);
    part.accumulate = true;
    part.bias = nullptr;
  }
}

// result [..., m, n] = a [..., m, k] b [..., k, n] + bias, [n] for all matrices or for each, in their order.
void multiply_all(const Matrices& a, const Matrices& b, const ProductSizes& sizes, const Tensor& bias, const Tensor& result) {
  if (result.numel() == 0) return;
  const auto m = sizes.m, n = sizes.n, k = sizes.k;
  const bool packs = packs_right_side(m, k), has_many = has_many_rows(m, n, k);
  const auto count = a.groups * a.per_group;
  const auto shares = plan_product(count, sizes, has_many, num_threads(), kernels());
  const auto columns = shares.panels * kernels().panel, packed_floats = columns * shares.terms;
  const auto packed = packs ? at::empty({shares.threads, packed_floats}, result.options()) : Tensor();

  const auto run_task = [&](int64_t task, int64_t thread) {
    const auto row = task % shares.row_tasks * shares.rows;
    const auto column = task / shares.row_tasks % shares.column_tasks * columns;
    const auto which = task / (shares.row_tasks * shares.column_tasks);
    if (row >= m || column >= n) return;
    const Product part{.sizes = {std::min(shares.rows, m - row), std::min(columns, n - column), k},
                       .a = {a.at(which, row, 0), a.row_stride, a.transposed ? a.column_stride : 1},
                       .b = kernels().rows(b.at(which, 0, column), b.transposed ? b.column_stride : b.row_stride),
                       .c = {mutable_data(result) + (which * m + row) * n + column, n},
                       .bias = bias.defined() ? data(bias) + (bias.numel() > n ? which * n : 0) + column : nullptr};
    if (packs)
      return multiply_packed(part, b.transposed, has_many, mutable_data(packed) + thread * packed_floats, shares.terms);
    b.transposed ? multiply_transposed(part) : multiply_part(part, /*has_many=*/false);
  };
  run_tasks(count * shares.column_tasks * shares.row_tasks, shares.threads, run_task);
}

// a [..., m, k] b [..., k, n] + bias, as multiply_all.
Tensor compute(const Tensor& left, const Tensor& right, const Tensor& bias) {
  const auto m = left.size(-2), k = left.size(-1), n = right.size(-1);
  auto sizes = left.sizes().vec();
  sizes.back() = n;
  const auto result = at::empty(sizes, left.options());
  const bool left_is_transposed = packs_right_side(m, k) && k > 1 && left.stride(-2) == 1 && left.stride(-1) > 1;
  multiply_all(matrices_of(left, left_is_transposed), matrices_of(right, k > 1 && n > 1 && right.stride(-2) == 1), {m, n, k},
               bias, result);
  return result;
}

// The gradients are computed by `matrix_product` and are therefore differentiable too.
struct MatrixProductFunction : torch::autograd::Function<MatrixProductFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context,
                        const Tensor& a,
                        const Tensor& b,
                        const std::optional<Tensor>& bias) {
    context->save_for_backward({a, b});
    context->saved_data["has_bias"] = bias.has_value();
    return compute(a, b, bias.value_or(Tensor()));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &a = saved[0], &b = saved[1], &grad = grads[0];
    torch::autograd::variable_list result(3);
    if (!grad.defined()) return result;
    if (context->needs_input_grad(0)) result[0] = matrix_product(grad, b.transpose(-2, -1));
    if (context->needs_input_grad(1)) {  // with the layout of b
      result[1] = b.stride(-1) == 1 ? matrix_product(a.transpose(-2, -1), grad)
                                    : matrix_product(grad.transpose(-2, -1), a).transpose(-2, -1);
    }
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2)) {  // the sum of all rows
      const auto rows = grad.flatten(0, -2);
      result[2] = matrix_product(at::ones({1, rows.size(0)}, rows.options()), rows).squeeze(0);
    }
    return result;
  }
};

Tensor multiply_and_add(const Tensor& a, const Tensor& b, const Tensor& bias) {
  if (is_recorded({a, b, bias})) {
    return MatrixProductFunction::apply(a, b, bias.defined() ? std::optional(bias) : std::nullopt);
  }
  return compute(a, b, bias);
}

}  // namespace

Tensor matrix_product(const Tensor& a, const Tensor& b) {
  return run_on_kernels({a, b}) ? multiply_and_add(a, b, {}) : at::matmul(a, b);
}

Tensor matrix_product(const Tensor& a, const Tensor& b, const Tensor& bias) {
  if (!bias.defined()) return matrix_product(a, b);
  const bool in_one = run_on_kernels({a, b, bias}) && bias.is_contiguous() && !is_recorded({a, b, bias});
  return in_one ? compute(a, b, bias) : matrix_product(a, b) + bias;
}

at::ScalarType product_type(const Tensor& x) {
  const auto device = x.device().type();
  if (x.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(device)) return x.scalar_type();
  return at::autocast::get_autocast_dtype(device);
}

Tensor logits_product(const Tensor& a, const Tensor& b) {
  return logits_product(a, b, {});
}

Tensor logits_product(const Tensor& a, const Tensor& b, const Tensor& bias) {
  if (product_type(a) != at::kHalf) return matrix_product(a, b, bias);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto logits = matrix_product(a.to(at::kFloat), b.to(at::kFloat));
  return bias.defined() ? logits + bias : logits;
}

Tensor project(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const bool bias_fits = !bias.defined() || bias.is_contiguous();
  if (!bias_fits || !run_on_kernels({x, weight, bias.defined() ? bias : weight}))
    return torch::nn::functional::linear(x, weight, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  if (!is_recorded({x, weight, bias}) && x.is_contiguous() && weight.is_contiguous()) {  // without views, for small calls
    const auto result = at::empty(sizes, x.options());
    const auto m = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), k = x.size(-1), n = weight.size(0);
    multiply_all({x, /*transposed=*/false, k, 1}, {weight, /*transposed=*/true, 1, k}, {m, n, k}, bias, result);
    return result;
  }
  return multiply_and_add(x.reshape({-1, x.size(-1)}), weight.t(), bias).view(sizes);
}

}  // namespace xattn::detail
