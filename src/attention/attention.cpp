// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attend.h"
#include "attention/choose_kernel.h"
#include "attention/gradients.h"
#include "attention/heads.h"
#include "attention/mask_parts.h"
#include "attention/softmax.h"
#include "base/check.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"

namespace xattn {

using at::Tensor;
using detail::check_type;
using detail::check_value;
using detail::kMinusInfinity;
using detail::LogSumExpBase;
using detail::RelativeAttention;
using detail::run_on_kernels;
using detail::scale_of;
using detail::shape_of;
using detail::type_of;
using detail::with_rows_filled;

namespace {

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
  check_type(!q.is_meta(), kCaller, "q must hold numbers, but is on {}.", q.device().str());
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v)}) {
    check_type(x->scalar_type() == q.scalar_type(), kCaller, "{} must be {}, the type of q, but is {}.", name, type_of(q),
               type_of(*x));
    check_type(x->device() == q.device(), kCaller, "{} must be on {}, as q, but is on {}.", name, q.device().str(),
               x->device().str());
  }
  check_value(std::isfinite(options.scale.value_or(1)), kCaller, "scale must be finite, but is {}.", options.scale.value_or(1));
  check_value(options.dropout >= 0 && options.dropout <= 1, kCaller, "dropout must lie in [0, 1], but is {}.", options.dropout);
  for (const auto head : options.weight_heads) {
    check_value(head >= 0 && head < q.size(1), kCaller, "weight_heads must be of the {} heads, but name {}.", q.size(1), head);
  }
  detail::check_mask(options.mask, kCaller, q.size(0), q.size(1), q.size(2), k.size(2), q.device());
}

// The definition in plain tensor operations:
//   S = scale * q k'                                        [B, H, Lq, Lk]
//   P = softmax(S + bias, over the keys that the mask allows)
//   output = dropout(P) v                                   [B, H, Lq, e]
RelativeAttention define(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, LogSumExpBase base) {
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), d = q.size(3);
  const auto G = k.size(1), Lk = k.size(2), e = v.size(3);
  // The H/G query heads that share a key/value head are rows of one product.
  const auto rows = (q * scale_of(options, d)).reshape({B, G, H / G * Lq, d});
  const auto products = detail::logits_product(rows, k.transpose(-2, -1)).view({B, H, Lq, Lk});
  const auto type = detail::product_type(q);
  const auto log_sum_exp = options.log_sum_exp ? std::optional(base) : std::nullopt;
  const auto softmax = detail::softmax_over_keys(products, type, options.mask, log_sum_exp);
  const auto& weights = softmax.weights;
  const auto dropped = options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights;
  const auto values = detail::matrix_product(dropped.to(v.scalar_type()).reshape({B, G, H / G * Lq, Lk}), v);
  const auto wanted = detail::wanted_weights(weights, options, type);
  return {{values.view({B, H, Lq, e}), wanted, softmax.log_sum_exp}, softmax.largest};
}

// What `choose_kernel` decides by.
detail::KernelRequest kernel_request(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const bool is_learned = detail::is_learned(options.mask);
  const bool requires_grad = q.requires_grad() || k.requires_grad() || v.requires_grad() || is_learned;
  return {.own_kernels = run_on_kernels({q, k, v}),
          .on_cpu = q.is_cpu(),
          .is_empty = q.numel() == 0 || k.numel() == 0,
          .Lk = k.size(2),
          .equal_head_sizes = q.size(3) == v.size(3),
          .drops_weights = options.dropout > 0,
          .returns_weights = options.weights != AttentionWeights::none,
          .returns_log_sum_exp = options.log_sum_exp,
          .is_differentiated = at::GradMode::is_enabled() && requires_grad,
          .mask_is_learned = is_learned};
}

// LibTorch's kernels read rows of consecutive numbers.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// A mask in the form that a fused kernel takes. Rows without keys are open in it, and the caller fills their results.
struct KernelMask {
  bool is_causal;  // by the kernel's flag. LibTorch scales the -inf of a forbidden key, so its kernels need a scale above 0
  bool has_bias = false;
  std::optional<Tensor> additive;

  KernelMask(const Mask& mask, const Tensor& q, const Tensor& k, double scale, AttentionKernel kernel)
      : is_causal(detail::is_causal_only(mask, q.size(2), k.size(2)) && (scale > 0 || detail::is_own(kernel))) {
    if (is_causal || mask.is_none()) return;
    const auto Lq = q.size(2), Lk = k.size(2);
    const auto type = q.scalar_type();
    const auto allowed = detail::allowed_keys(mask, Lq, Lk, q.device());
    auto bias = detail::total_bias(mask, type);
    has_bias = bias.defined();
    if (!has_bias) bias = at::zeros({}, q.options());
    if (!q.is_cpu()) bias = bias.to(type);  // the kernels there take no other
    const auto all = allowed.defined() ? at::where(allowed, bias, kMinusInfinity) : bias;
    additive = with_unit_stride(with_rows_filled(all, detail::rows_without_keys(mask, Lq, Lk, q.device(), type), 0));
  }

  Mask as_mask() const {
    if (is_causal) return Mask::causal(CausalAlignment::upper_left);
    return additive ? Mask::bias(*additive) : Mask();
  }
};

// One call of LibTorch's fused kernel -> output and, on the CPU, the log-sum-exp.
std::tuple<Tensor, Tensor> run_libtorch(
    const Tensor& q, const Tensor& k, const Tensor& v, const KernelMask& mask, double scale) {
  if (q.is_cpu()) {
    return at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.is_causal, mask.additive, scale);
  }
  const bool is_grouped = q.size(1) != k.size(1);
  return {at::scaled_dot_product_attention(q, k, v, mask.additive, 0.0, mask.is_causal, scale, is_grouped), {}};
}

// A fused kernel with gradients. The kernels have a first derivative only, which comes
//   - from this library's backward pass for its own kernels;
//   - from LibTorch's backward pass for its CPU kernel;
//   - from the kernel's own graph, which this node holds and differentiates, on other devices.
// The definition is differentiated in their place if the backward pass is itself recorded, or if the log-sum-exp has a gradient; and
// for LibTorch's kernels under a bias, because their backward passes compute the weights from a log-sum-exp that beside a bias of
// -1e9 has lost the number of keys.
struct FusedKernel : torch::autograd::Function<FusedKernel> {
  struct State : torch::CustomClassHolder {
    State(const AttentionOptions& options_, AttentionKernel kernel_, const Tensor& q, const Tensor& k)
        : options(options_), kernel(kernel_), scale(scale_of(options, q.size(3))), mask(options.mask, q, k, scale, kernel) {}
    const AttentionOptions options;
    const AttentionKernel kernel;
    const double scale;
    const KernelMask mask;
    std::vector<Tensor> inputs;  // of the kernel's own graph: detached q, k, v
    Tensor output;               // of that graph
  };

  // -> output, log-sum-exp on the CPU, and what it is relative to from own kernels
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const Tensor& q,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const AttentionOptions& options,
                                                AttentionKernel kernel) {
    auto state = c10::make_intrusive<State>(options, kernel, q, k);
    const auto& mask = state->mask;
    ctx->set_materialize_grads(false);
    torch::autograd::variable_list results, saved = {q, k, v};
    if (detail::is_own(kernel)) {
      const AttentionOptions how{.mask = mask.as_mask(), .scale = state->scale, .log_sum_exp = true};
      const auto [result, largest] = detail::attend_on_kernels_by_largest(q, k, v, how);
      ctx->mark_non_differentiable({largest});
      results = {result.output, result.log_sum_exp, largest};
    } else if (q.is_cpu()) {
      const auto [output, log_sum_exp] = run_libtorch(q, k, v, mask, state->scale);
      results = {output, log_sum_exp};
    } else if (mask.has_bias) {
      results = {std::get<0>(run_libtorch(q, k, v, mask, state->scale))};
    } else {
      for (const auto& x : {q, k, v}) state->inputs.push_back(x.detach().requires_grad_(x.requires_grad()));
      const at::AutoGradMode record(true);
      state->output = std::get<0>(run_libtorch(state->inputs[0], state->inputs[1], state->inputs[2], mask, state->scale));
      results = {state->output.detach()};
    }
    if (q.is_cpu()) saved.insert(saved.end(), results.begin(), results.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return results;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto state = c10::static_intrusive_pointer_cast<State>(ctx->saved_data["state"].toCapsule());
    const auto saved = ctx->get_saved_variables();  // throws if they were freed, or changed in place since
    const auto &q = saved[0], &k = saved[1], &v = saved[2];
    const Tensor grad = grads[0];
    torch::autograd::variable_list result(5);  // q, k, v, options, kernel
    const bool log_sum_exp_has_grad = grads.size() > 1 && grads[1].defined();
    const bool own = detail::is_own(state->kernel);
    if (at::GradMode::is_enabled() || log_sum_exp_has_grad) {
      differentiate_definition(*state, {q, k, v}, grads, result);
    } else if (own && run_on_kernels({q, k, v, grad})) {
      const auto gradients = detail::differentiate_on_kernels({.q = q,
                                                               .k = k,
                                                               .v = v,
                                                               .output = saved[3],
                                                               .log_sum_exp = saved[4],
                                                               .largest = saved[5],
                                                               .output_grad = grad,
                                                               .mask = state->mask.as_mask(),
                                                               .scale = state->scale,
                                                               .wants_q = ctx->needs_input_grad(0),
                                                               .wants_k = ctx->needs_input_grad(1),
                                                               .wants_v = ctx->needs_input_grad(2)});
      result = {gradients.q, gradients.k, gradients.v, {}, {}};
    } else if (own || state->mask.has_bias) {
      differentiate_definition(*state, {q, k, v}, grads, result);
    } else if (q.is_cpu()) {
      std::tie(result[0], result[1], result[2]) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad, q, k, v, saved[3], saved[4], 0.0, state->mask.is_causal, state->mask.additive, state->scale);
    } else {
      differentiate({state->output}, state->inputs, grads, /*recorded=*/false, result);
    }
    return result;
  }

 private:
  static void differentiate_definition(const State& state,
                                       const torch::autograd::variable_list& saved,
                                       const torch::autograd::variable_list& grads,
                                       torch::autograd::variable_list& result) {
    const bool recorded = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    auto inputs = saved;
    for (auto& x : inputs) {  // distinct tensors even if one was given twice: autograd then adds up its gradients
      x = recorded ? x.view_as(x) : x.detach().requires_grad_(x.requires_grad());
    }
    const auto defined = define(inputs[0], inputs[1], inputs[2], state.options, LogSumExpBase::zero).result;
    differentiate({defined.output, defined.log_sum_exp}, inputs, grads, recorded, result);
  }

  static void differentiate(const torch::autograd::variable_list& outputs,
                            const torch::autograd::variable_list& inputs,
                            const torch::autograd::variable_list& grads,
                            bool recorded,
                            torch::autograd::variable_list& result) {
    torch::autograd::variable_list asked, given, of;
    for (const auto& x : inputs) {
      if (x.requires_grad()) asked.push_back(x);
    }
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;  // the log-sum-exp does not depend on v
      given.push_back(grads[i]);
      of.push_back(outputs[i]);
    }
    torch::autograd::variable_list found(asked.size());
    if (!of.empty()) {
      found = torch::autograd::grad(of, asked, given, /*retain_graph=*/true, /*create_graph=*/recorded, /*allow_unused=*/true);
    }
    for (size_t i = 0, next = 0; i < inputs.size(); ++i) {
      if (!inputs[i].requires_grad()) continue;
      result[i] = found[next].defined() ? found[next] : at::zeros_like(inputs[i]);
      ++next;
    }
  }
};

// One call of the chosen fused kernel.
RelativeAttention fuse(const Tensor& q,
                       const Tensor& k,
                       const Tensor& v,
                       const AttentionOptions& options,
                       AttentionKernel kernel,
                       bool is_differentiated,
                       LogSumExpBase base) {
  const auto rows = with_unit_stride(q), keys = with_unit_stride(k), values = with_unit_stride(v);
  Tensor output, log_sum_exp, largest;
  if (is_differentiated) {
    const auto results = FusedKernel::apply(rows, keys, values, options, kernel);
    output = results[0];
    if (results.size() > 1) log_sum_exp = results[1];
    if (results.size() > 2) largest = results[2];
  } else {
    const auto scale = scale_of(options, q.size(3));
    std::tie(output, log_sum_exp) =
        run_libtorch(rows, keys, values, KernelMask(options.mask, rows, keys, scale, kernel), scale);
  }
  // [B|1, H|1, Lq|1, 1]
  const auto empty_rows = detail::rows_without_keys(options.mask, q.size(2), k.size(2), q.device(), q.scalar_type());
  RelativeAttention attended;
  attended.result.output = with_rows_filled(output, empty_rows, 0);
  if (!options.log_sum_exp) return attended;
  if (base == LogSumExpBase::largest_logit) {
    attended.largest = largest.defined() ? largest : at::zeros_like(log_sum_exp);
  } else if (largest.defined()) {
    log_sum_exp = log_sum_exp + largest;
  }
  const auto rows_to_fill = empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows;
  attended.result.log_sum_exp = with_rows_filled(log_sum_exp, rows_to_fill, kMinusInfinity);
  return attended;
}

RelativeAttention attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, LogSumExpBase base) {
  if (options.path == AttentionPath::definition) return define(q, k, v, options, base);
  const auto request = kernel_request(q, k, v, options);
  const auto [kernel, reason] = detail::choose_kernel(request);
  if (kernel == AttentionKernel::tensor_operations) {
    check_value(options.path != AttentionPath::fused, "attention", "path must not be fused here, because {}.", reason);
    return define(q, k, v, options, base);
  }
  if (!detail::is_own(kernel) || request.is_differentiated) {
    return fuse(q, k, v, options, kernel, request.is_differentiated, base);
  }
  if (base == LogSumExpBase::largest_logit) return detail::attend_on_kernels_by_largest(q, k, v, options);
  return {detail::attend_on_kernels(q, k, v, options), {}};
}

}  // namespace

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  check_inputs(q, k, v, options);
  return attend(q, k, v, options, LogSumExpBase::zero).result;
}

AttentionResult detail::attend_checked(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return xattn::attend(q, k, v, options, LogSumExpBase::zero).result;
}

RelativeAttention detail::attention_by_largest(const Tensor& q,
                                               const Tensor& k,
                                               const Tensor& v,
                                               const AttentionOptions& options) {
  check_inputs(q, k, v, options);
  auto how = options;
  // LibTorch's kernels return only the log-sum-exp itself, which a bias may have made inexact.
  if (has_bias(options.mask) && !run_on_kernels({q, k, v})) how.path = AttentionPath::definition;
  return xattn::attend(q, k, v, how, LogSumExpBase::largest_logit);
}

}  // namespace xattn
