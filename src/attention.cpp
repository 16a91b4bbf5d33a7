// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "check.h"
#include "product.h"
#include "softmax.h"

namespace xattn {

using at::Tensor;
using detail::check_type;
using detail::check_value;
using detail::matrix_product;
using detail::shape_of;
using detail::softmax_over_keys;
using detail::type_of;
using detail::wanted_weights;
using detail::with_rows_filled;

namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  constexpr auto kCaller = "attention";
  check_value(q.dim() == 4 && q.size(1) >= 1 && q.size(3) >= 1, kCaller, "q must have shape [B, H, Lq, d], but has {}.",
              shape_of(q));
  check_value(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) >= 1 && k.size(3) == q.size(3), kCaller,
              "k must have shape [{}, G, Lk, {}], but has {}.", q.size(0), q.size(3), shape_of(k));
  check_value(q.size(1) % k.size(1) == 0, kCaller, "k must have a number of heads that divides the {} of q, but has {}.",
              q.size(1), k.size(1));
  check_value(v.dim() == 4 && v.sizes().slice(0, 3) == k.sizes().slice(0, 3) && v.size(3) >= 1, kCaller,
              "v must have shape [{}, {}, {}, e], but has {}.", k.size(0), k.size(1), k.size(2), shape_of(v));
  check_type(q.is_floating_point(), kCaller, "q must be of a floating point type, but is {}.", type_of(q));
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v)}) {
    check_type(x->scalar_type() == q.scalar_type(), kCaller, "{} must be {}, the type of q, but is {}.", name, type_of(q),
               type_of(*x));
    check_type(x->device() == q.device(), kCaller, "{} must be on {}, as q, but is on {}.", name, q.device().str(),
               x->device().str());
  }
  check_value(options.dropout >= 0 && options.dropout <= 1, kCaller, "dropout must lie in [0, 1], but is {}.", options.dropout);
  for (const auto head : options.weight_heads) {
    check_value(head >= 0 && head < q.size(1), kCaller, "weight_heads must be of the {} heads, but name {}.", q.size(1), head);
  }
  options.mask.check(kCaller, q.size(0), q.size(1), q.size(2), k.size(2), q.device());
}

double scale_of(const Tensor& q, const AttentionOptions& options) {
  return options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
}

// The definition in plain tensor operations.
AttentionResult define(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), d = q.size(3);
  const auto G = k.size(1), Lk = k.size(2), e = v.size(3);
  // The H/G heads that share a key/value head are rows of one product.
  const auto rows = (q * scale_of(q, options)).reshape({B, G, H / G * Lq, d});
  const auto products = matrix_product(rows, k.transpose(-2, -1)).view({B, H, Lq, Lk});
  const auto [weights, log_sum_exp, empty_rows] = softmax_over_keys(products, options.mask, options.log_sum_exp);
  const auto dropped = options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights;
  const auto mixed = matrix_product(dropped.to(v.scalar_type()).reshape({B, G, H / G * Lq, Lk}), v);

  return {mixed.view({B, H, Lq, e}), wanted_weights(weights, options, products), log_sum_exp};
}

// Why the fused kernels cannot do what is asked; empty if they can. Depends on sizes and kinds alone, never on values.
std::string refusal_of_fused(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  if (options.weights != AttentionWeights::none) return "attention weights are wanted";
  if (options.dropout > 0) return "dropout is above 0";
  if (q.numel() == 0 || k.numel() == 0) return "an axis is empty";
  const auto bias = options.mask.additive();
  if (bias.defined() && bias.requires_grad()) return "the mask's bias asks for its gradient";
  if (q.is_cpu() && q.size(3) != v.size(3)) return "the CPU kernel needs value heads of the size of key heads";
  if (!q.is_cpu() && options.log_sum_exp) return "only the CPU kernel is asked for its log-sum-exp";
  return {};
}

// Kernels read rows of consecutive numbers.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// One call of a fused kernel. Empty rows are opened, as in `define`, and closed by the caller.
std::tuple<Tensor, Tensor> call_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto Lq = q.size(2), Lk = k.size(2);
  const bool is_causal = options.mask.is_causal_only(Lq, Lk);
  std::optional<Tensor> additive;
  if (!is_causal && !options.mask.is_none()) {
    const auto keep = options.mask.keep(Lq, Lk, q.device());
    auto bias = options.mask.additive();
    if (!bias.defined()) bias = at::zeros({}, q.options());
    const auto mask = keep.defined() ? at::where(keep, bias.to(q.scalar_type()), kMinusInfinity) : bias.to(q.scalar_type());
    additive = with_unit_stride(with_rows_filled(mask, options.mask.empty_rows(Lq, Lk, q.device()), 0));
  }
  if (q.is_cpu()) {
    return at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, additive, scale_of(q, options));
  }
  const bool grouped = q.size(1) != k.size(1);
  return {at::scaled_dot_product_attention(q, k, v, additive, 0.0, is_causal, scale_of(q, options), grouped), Tensor()};
}

// The fused kernels have a first derivative only. This node holds a kernel's own graph and differentiates that; when its backward
// pass is itself recorded, it differentiates the definition instead.
struct FusedKernel : torch::autograd::Function<FusedKernel> {
  struct Graph : torch::CustomClassHolder {
    AttentionOptions options;
    std::vector<Tensor> inputs;  // detached q, k, v
    Tensor output;
  };

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const Tensor& q,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const AttentionOptions& options) {
    auto graph = c10::make_intrusive<Graph>();
    graph->options = options;
    for (const auto& x : {q, k, v}) graph->inputs.push_back(x.detach().requires_grad_(x.requires_grad()));
    Tensor log_sum_exp;
    {
      const at::AutoGradMode record(true);
      std::tie(graph->output, log_sum_exp) = call_kernel(graph->inputs[0], graph->inputs[1], graph->inputs[2], options);
    }
    const auto output = graph->output.detach();
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["graph"] = c10::IValue::make_capsule(std::move(graph));
    ctx->set_materialize_grads(false);
    if (!log_sum_exp.defined()) return {output};
    return {output, log_sum_exp.detach()};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto graph = c10::static_intrusive_pointer_cast<Graph>(ctx->saved_data["graph"].toCapsule());
    const bool recorded = at::GradMode::is_enabled();
    const bool with_log_sum_exp = grads.size() > 1 && grads[1].defined();  // of which the kernels know no derivative
    const auto saved = ctx->get_saved_variables();  // throws if they were freed, or changed in place since
    const auto& inputs = recorded ? saved : graph->inputs;
    torch::autograd::variable_list outputs = {graph->output};
    if (recorded || with_log_sum_exp) {
      const at::AutoGradMode record(true);
      const auto defined = define(inputs[0], inputs[1], inputs[2], graph->options);
      outputs = {defined.output, defined.log_sum_exp};
    }
    torch::autograd::variable_list asked;
    for (const auto& x : inputs) {
      if (x.requires_grad()) asked.push_back(x);
    }
    torch::autograd::variable_list given, of;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      given.push_back(grads[i]);
      of.push_back(outputs[i]);
    }
    const auto found = torch::autograd::grad(of, asked, given, /*retain_graph=*/true, /*create_graph=*/recorded);
    torch::autograd::variable_list result(4);  // q, k, v, options
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].requires_grad()) result[i] = found[next++];
    }
    return result;
  }
};

AttentionResult fuse(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto rows = with_unit_stride(q), keys = with_unit_stride(k), values = with_unit_stride(v);
  const bool differentiate = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  Tensor output, log_sum_exp;
  if (differentiate) {
    const auto both = FusedKernel::apply(rows, keys, values, options);
    output = both.front();
    if (both.size() > 1) log_sum_exp = both.back();
  } else {
    std::tie(output, log_sum_exp) = call_kernel(rows, keys, values, options);
  }
  const auto empty_rows = options.mask.empty_rows(q.size(2), k.size(2), q.device());  // [B|1, H|1, Lq|1, 1]
  AttentionResult result;
  result.output = with_rows_filled(output, empty_rows, 0);
  if (options.log_sum_exp) {
    result.log_sum_exp =
        with_rows_filled(log_sum_exp, empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows, kMinusInfinity);
  }
  return result;
}

}  // namespace

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  check_inputs(q, k, v, options);
  if (options.path == AttentionPath::definition) return define(q, k, v, options);
  const auto refusal = refusal_of_fused(q, k, v, options);
  check_value(options.path != AttentionPath::fused || refusal.empty(), "attention", "path must not be fused here, because {}.",
              refusal);
  return refusal.empty() ? fuse(q, k, v, options) : define(q, k, v, options);
}

}  // namespace xattn
