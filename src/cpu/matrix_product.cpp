// SPDX-License-Identifier: Apache-2.0
#include "cpu/matrix_product.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/functional/linear.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "cpu/packed.h"
#include "kernels/kernels.h"

namespace xattn::detail {

using at::Tensor;
using engine::kOperationsOfATask;
using engine::with_rows;

namespace {

constexpr int64_t kPackedBytes = 1 << 19;      // of a right side at a time: what a core's cache holds beside the left one,
constexpr int64_t kNearBytes = 1 << 20;        // if that has no more bytes than these
constexpr int64_t kMorePackedBytes = 4 << 20;  // else: the left side comes from memory for each time anew
constexpr int64_t kPackedRows = 1024;          // of a right side: those of a block that a product goes through at once
constexpr int64_t kRowsOfATile = 14;

thread_local int operators_only = 0;  // the number of `OperatorsOnly` that live in this thread

bool runs_on_kernels(const Tensor& x) {
  return x.defined() && x.is_cpu() && x.scalar_type() == at::kFloat && x.layout() == at::kStrided && !x.is_neg() &&
         !at::isTensorSubclassLike(x) && !x._fw_grad(/*level=*/0).defined();
}

int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The matrices of a tensor [..., rows, columns] of two to four axes: a view of it would take longer than a small product.
struct Matrices {
  explicit Matrices(const Tensor& x) : data(x.const_data_ptr<float>()), row_stride(x.stride(-2)), column_stride(x.stride(-1)) {
    if (x.dim() > 2) per_group = x.size(-3), stride = x.stride(-3);
    if (x.dim() > 3) groups = x.size(-4), group_stride = x.stride(-4);
  }
  int64_t count() const { return groups * per_group; }
  const float* at(int64_t i) const { return data + i / per_group * group_stride + i % per_group * stride; }

  const float* data;
  int64_t groups = 1, per_group = 1, group_stride = 0, stride = 0, row_stride, column_stride;
};

// Part of a product: rows and columns of one of its matrices.
struct Part {
  const float* a;
  int64_t a_stride, a_step;
  const float* b;
  int64_t b_stride;
  bool b_is_transposed, has_many_rows;
  const float* bias;
  float* c;
  int64_t c_stride;
  int64_t m, n, k;
};

// packed: room for `rows` of its right side, of which some are packed after the others; null if it stays as it is.
void multiply_block(const Part& p, float* packed, int64_t rows) {
  const auto& run = kernels();
  Product product{.m = p.m,
                  .n = p.n,
                  .k = p.k,
                  .a = p.a,
                  .a_stride = p.a_stride,
                  .a_step = p.a_step,
                  .b = {p.b, p.b_stride, run.panel},
                  .c = p.c,
                  .c_stride = p.c_stride,
                  .bias = p.bias};
  if (!packed || p.k == 0) return p.b_is_transposed ? run.product_transposed(product) : run.product(product);
  for (int64_t first = 0; first < p.k; first += rows) {
    product.k = std::min(rows, p.k - first);
    product.a = p.a + first * p.a_step;
    (p.b_is_transposed ? run.pack_transposed : run.pack)(p.b + first * (p.b_is_transposed ? 1 : p.b_stride), p.b_stride,
                                                         product.k, p.n, packed);
    product.b = run.packed(packed, product.k);
    product.accumulate = first > 0;
    if (first > 0) product.bias = nullptr;
    (p.has_many_rows ? run.product_of_many_rows : run.product)(product);
  }
}

// a [..., m, k] b [..., k, n] + bias [n].
Tensor compute(const Tensor& left, const Tensor& right, const Tensor& bias) {
  const bool is_packed = left.size(-2) > kFewRows;
  const bool by_columns = is_packed && left.stride(-2) == 1 && left.size(-1) > 1 && left.stride(-1) > 1;
  const auto a_rows = by_columns ? left : with_rows(left);
  const bool is_transposed = right.size(-2) > 1 && right.stride(-2) == 1 && right.size(-1) > 1;
  const auto b_rows = is_transposed ? right : with_rows(right);
  const Matrices a(a_rows), b(b_rows);
  const auto m = left.size(-2), k = left.size(-1), n = right.size(-1), panel = kernels().panel;
  auto sizes = left.sizes().vec();
  sizes.back() = n;
  const auto result = at::empty(sizes, left.options());
  if (result.numel() == 0) return result;

  // Tasks are columns, of which each packs its own; where these are not enough for all threads, rows besides.
  const auto batches = a.count(), panels = divided_up(n, panel);
  const auto operations = 2 * batches * m * n * k;
  const auto threads =
      at::in_parallel_region() ? 1 : std::clamp<int64_t>(operations / kOperationsOfATask, 1, at::get_num_threads());
  const bool has_many = has_many_rows(m, n, k);
  const auto packed_bytes = 4 * m * k <= kNearBytes && !has_many ? kPackedBytes : kMorePackedBytes;
  const auto packed_rows = divided_up(k, std::max<int64_t>(1, divided_up(k, kPackedRows)));
  auto of_columns = divided_up(panels, std::max<int64_t>(1, packed_bytes / (4 * panel * std::max<int64_t>(1, packed_rows))));
  if (batches % threads != 0) of_columns = std::min(panels, divided_up(of_columns, threads) * threads);
  const auto of_rows = std::min(divided_up(m, kRowsOfATile), divided_up(threads, batches * of_columns));
  const auto task_panels = divided_up(panels, of_columns), task_rows = divided_up(m, of_rows);
  const auto scratch = is_packed ? at::empty({threads, task_panels * panel * packed_rows}, result.options()) : Tensor();

  const auto run_task = [&](int64_t task, int64_t thread) {
    const auto batch = task / (of_columns * of_rows), first = task / of_rows % of_columns * task_panels * panel;
    const auto top = task % of_rows * task_rows;
    if (first >= n || top >= m) return;
    multiply_block({.a = a.at(batch) + top * a.row_stride,
                    .a_stride = a.row_stride,
                    .a_step = by_columns ? a.column_stride : 1,
                    .b = b.at(batch) + first * b.column_stride,
                    .b_stride = is_transposed ? b.column_stride : b.row_stride,
                    .b_is_transposed = is_transposed,
                    .has_many_rows = has_many,
                    .bias = bias.defined() ? bias.const_data_ptr<float>() + first : nullptr,
                    .c = result.mutable_data_ptr<float>() + batch * m * n + top * n + first,
                    .c_stride = n,
                    .m = std::min(task_rows, m - top),
                    .n = std::min(task_panels * panel, n - first),
                    .k = k},
                   is_packed ? scratch.mutable_data_ptr<float>() + thread * scratch.stride(0) : nullptr, packed_rows);
  };
  const auto tasks = batches * of_columns * of_rows;
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) run_task(task, 0);
  } else {
    at::parallel_for(0, tasks, divided_up(tasks, threads), [&](int64_t begin, int64_t end) {
      for (auto task = begin; task < end; ++task) run_task(task, at::get_thread_num());
    });
  }
  return result;
}

// Its gradients are products of the same kind, and so have gradients themselves.
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
    if (context->needs_input_grad(1)) {  // laid out as b is
      result[1] = b.stride(-1) == 1 ? matrix_product(a.transpose(-2, -1), grad)
                                    : matrix_product(grad.transpose(-2, -1), a).transpose(-2, -1);
    }
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2)) result[2] = grad.flatten(0, -2).sum(0);
    return result;
  }
};

Tensor multiply_and_add(const Tensor& a, const Tensor& b, const Tensor& bias) {
  const auto requires_grad = [](const Tensor& x) { return x.defined() && x.requires_grad(); };
  if (at::GradMode::is_enabled() && (requires_grad(a) || requires_grad(b) || requires_grad(bias))) {
    return MatrixProductFunction::apply(a, b, bias.defined() ? std::optional(bias) : std::nullopt);
  }
  return compute(a, b, bias);
}

}  // namespace

OperatorsOnly::OperatorsOnly() {
  ++operators_only;
}

OperatorsOnly::~OperatorsOnly() {
  --operators_only;
}

bool OperatorsOnly::is_active() {
  return operators_only > 0;
}

bool run_on_kernels(std::initializer_list<Tensor> all) {
  static const bool kHasVectors = std::string_view(kernels().name) != "plain";
  return kHasVectors && !OperatorsOnly::is_active() && std::ranges::all_of(all, runs_on_kernels) &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

Tensor matrix_product(const Tensor& a, const Tensor& b) {
  return run_on_kernels({a, b}) ? multiply_and_add(a, b, {}) : at::matmul(a, b);
}

at::ScalarType product_type(const Tensor& x) {
  const auto device = x.device().type();
  if (x.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(device)) return x.scalar_type();
  return at::autocast::get_autocast_dtype(device);
}

Tensor logits_product(const Tensor& a, const Tensor& b) {
  if (product_type(a) != at::kHalf) return matrix_product(a, b);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return matrix_product(a.to(at::kFloat), b.to(at::kFloat));
}

Tensor project(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const bool bias_fits = !bias.defined() || (runs_on_kernels(bias) && bias.is_contiguous());
  if (!bias_fits || !run_on_kernels({x, weight})) return torch::nn::functional::linear(x, weight, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return multiply_and_add(x.reshape({-1, x.size(-1)}), weight.t(), bias).view(sizes);
}

}  // namespace xattn::detail
