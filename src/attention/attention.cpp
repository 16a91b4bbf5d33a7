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

#include "attention/choose_kernel.h"
#include "attention/gradients.h"
#include "attention/heads.h"
#include "attention/mask_parts.h"
#include "attention/softmax.h"
#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"
#include "cpu/on_kernels.h"

namespace xattn {

using at::Tensor;
using detail::check_type;
using detail::check_value;
using detail::kMinusInfinity;
using detail::name_of;
using detail::RelativeAttention;
using detail::run_on_kernels;
using detail::scale_of;
using detail::shape_of;
using detail::type_of;
using detail::with_rows_filled;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The arguments of one call.
struct AttentionCall {
  const Tensor &q, &k, &v;
  const AttentionOptions& options;
};

void check_inputs(const AttentionCall& call) {
  const auto& [q, k, v, options] = call;
  constexpr auto kCaller = "attention";
  for (const auto& [name, x] : {std::pair("q", &q), {"k", &k}, {"v", &v}}) detail::check_dense(kCaller, name, *x);
  check_value(q.dim() == 4 && q.size(1) >= 1 && q.size(3) >= 1, kCaller, "q must have shape [B, H, Lq, d], but has {}.",
              shape_of(q));
  check_value(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) >= 1 && k.size(3) == q.size(3), kCaller,
              "k must have shape [{}, G, Lk, {}], but has {}.", q.size(0), q.size(3), shape_of(k));
  check_value(q.size(1) % k.size(1) == 0, kCaller, "k must have a number of heads that divides the {} of q, but has {}.",
              q.size(1), k.size(1));
  check_value(v.dim() == 4 && v.sizes().slice(0, 3) == k.sizes().slice(0, 3) && v.size(3) >= 1, kCaller,
              "v must have shape [{}, {}, {}, e], but has {}.", k.size(0), k.size(1), k.size(2), shape_of(v));
  check_type(q.is_floating_point(), kCaller, "q must be of a floating point type, but is {}.", type_of(q));
  detail::check_computed_type(kCaller, "q", q);
  check_type(!q.is_meta(), kCaller, "q must hold numbers, but is on {}.", name_of(q.device()));
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v)}) {
    check_type(x->scalar_type() == q.scalar_type(), kCaller, "{} must be {}, the type of q, but is {}.", name, type_of(q),
               type_of(*x));
    check_type(x->device() == q.device(), kCaller, "{} must be on {}, as q, but is on {}.", name, name_of(q.device()),
               name_of(x->device()));
  }
  check_value(std::isfinite(options.scale.value_or(1)), kCaller, "scale must be finite, but is {}.", options.scale.value_or(1));
  check_value(options.dropout >= 0 && options.dropout <= 1, kCaller, "dropout must lie in [0, 1], but is {}.", options.dropout);
  for (const auto head : options.weight_heads) {
    check_value(head >= 0 && head < q.size(1), kCaller, "weight_heads must be of the {} heads, but name {}.", q.size(1), head);
  }
  detail::check_mask(options.mask, kCaller, q.size(0), q.size(1), q.size(2), k.size(2), q.device());
}

// The definition in plain tensor operations:
//   S = scale * q k'                                             [B, H, Lq, Lk]
//   P = softmax(S + bias, over the keys that the mask allows)    [B, H, Lq, Lk]
//   output = dropout(P) v                                        [B, H, Lq, e]
RelativeAttention define(const AttentionCall& call) {
  const auto& [q, k, v, options] = call;
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), d = q.size(3);
  const auto G = k.size(1), Lk = k.size(2), e = v.size(3);
  // The H/G query heads that share a key/value head are rows of one product.
  const auto rows = (q * scale_of(options, d)).reshape({B, G, H / G * Lq, d});
  const auto products = detail::logits_product(rows, k.transpose(-2, -1)).view({B, H, Lq, Lk});
  const auto type = detail::product_type(q);
  const auto softmax = detail::softmax_over_keys(products, type, options.mask, options.log_sum_exp);
  const auto& weights = softmax.weights;
  const auto dropped = options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights;
  const auto values = detail::matrix_product(dropped.to(v.scalar_type()).reshape({B, G, H / G * Lq, Lk}), v);
  const auto wanted = detail::requested_weights(weights, options, type);
  return {{values.view({B, H, Lq, e}), wanted, softmax.log_sum_exp}, softmax.largest};
}

// The properties of a call that `choose_kernel` reads.
detail::KernelRequest kernel_request(const AttentionCall& call) {
  const auto& [q, k, v, options] = call;
  const bool is_learned = detail::is_learned(options.mask);
  const bool requires_grad = q.requires_grad() || k.requires_grad() || v.requires_grad() || is_learned;
  return {.own_kernels = run_on_kernels({q, k, v}),
          .on_cpu = q.is_cpu(),
          .is_empty = q.numel() == 0 || k.numel() == 0,
          .Lk = k.size(2),
          .equal_head_sizes = q.size(3) == v.size(3),
          .shares_keys = k.size(1) < q.size(1),
          .drops_weights = options.dropout > 0,
          .returns_weights = options.weights != AttentionWeights::none,
          .returns_log_sum_exp = options.log_sum_exp,
          .is_differentiated = at::GradMode::is_enabled() && requires_grad,
          .mask_is_learned = is_learned};
}

// LibTorch's kernels require consecutive numbers in each row.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// A mask in the form that LibTorch's kernels take.
struct LibTorchMask {
  bool is_causal = false;  // by the kernel's flag
  bool has_bias = false;
  std::optional<Tensor> additive = {};  // zeros in rows without keys, whose results the caller fills
};

LibTorchMask libtorch_mask(const Mask& mask, const Tensor& q, const Tensor& k, double scale) {
  const auto Lq = q.size(2), Lk = k.size(2);
  // With the flag, LibTorch also scales the -inf of a forbidden key: a scale of 0 makes it NaN, and one below 0 allows the key.
  if (scale > 0 && detail::is_causal_only(mask, Lq, Lk)) return {.is_causal = true};
  if (mask.is_none()) return {};
  const auto type = q.scalar_type();
  const auto allowed = detail::allowed_keys(mask, Lq, Lk, q.device());
  auto bias = detail::total_bias(mask, Lk, type);
  const bool has_bias = bias.defined();
  if (!has_bias) bias = at::zeros({}, q.options());
  if (!q.is_cpu()) bias = bias.to(type);  // kernels on other devices take no other type
  const auto all = allowed.defined() ? at::where(allowed, bias, kMinusInfinity) : bias;
  const auto opened = with_rows_filled(all, detail::rows_without_keys(mask, Lq, Lk, q.device(), type), 0);
  return {.has_bias = has_bias, .additive = with_unit_stride(opened)};
}

// One call of LibTorch's fused kernel -> output and, on the CPU, the log-sum-exp.
variable_list run_libtorch(const Tensor& q, const Tensor& k, const Tensor& v, const LibTorchMask& mask, double scale) {
  if (q.is_cpu()) {
    const auto [output, log_sum_exp] =
        at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.is_causal, mask.additive, scale);
    return {output, log_sum_exp};
  }
  const bool is_grouped = q.size(1) != k.size(1);
  return {at::scaled_dot_product_attention(q, k, v, mask.additive, 0.0, mask.is_causal, scale, is_grouped)};
}

// A fused kernel with gradients. The kernels have a first derivative only, which comes
//   - from this library's backward pass for its own kernels;
//   - from LibTorch's backward pass for its CPU kernel;
//   - on other devices from the kernel's own graph, which this node holds.
// The definition is differentiated instead if the backward pass is itself recorded, or if the log-sum-exp has a gradient; and
// for LibTorch's kernels under a bias, because they recompute the weights from the log-sum-exp, which loses the number of keys
// beside a bias of -1e9.
struct FusedKernel : torch::autograd::Function<FusedKernel> {
  struct State : torch::CustomClassHolder {
    explicit State(const AttentionOptions& options_) : options(options_) {}
    const AttentionOptions options;
    double scale = 1;
    bool is_own = false;   // this library's kernel
    LibTorchMask mask;     // for LibTorch's kernels
    variable_list inputs;  // of the kernel's own graph: detached q, k, v
    Tensor output;         // of that graph
  };

  // -> output; on the CPU also the log-sum-exp; from this library's kernel also the largest logit, to which it is relative
  static variable_list forward(
      AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, bool is_own) {
    auto state = c10::make_intrusive<State>(options);
    state->scale = scale_of(options, q.size(3));
    state->is_own = is_own;
    if (!is_own) state->mask = libtorch_mask(options.mask, q, k, state->scale);
    ctx->set_materialize_grads(false);
    variable_list results, saved = {q, k, v};
    if (is_own) {
      const AttentionOptions how{.mask = options.mask, .scale = state->scale, .log_sum_exp = true};
      const auto [result, largest] = detail::attend_on_kernels(q, k, v, how);
      ctx->mark_non_differentiable({largest});
      results = {result.output, result.log_sum_exp, largest};
    } else if (q.is_cpu() || state->mask.has_bias) {
      results = run_libtorch(q, k, v, state->mask, state->scale);
    } else {
      auto& inputs = state->inputs;
      for (const auto& x : saved) inputs.push_back(x.detach().requires_grad_(x.requires_grad()));
      const at::AutoGradMode record(true);
      state->output = run_libtorch(inputs[0], inputs[1], inputs[2], state->mask, state->scale)[0];
      results = {state->output.detach()};
    }
    if (q.is_cpu()) saved.insert(saved.end(), results.begin(), results.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto state = c10::static_intrusive_pointer_cast<State>(ctx->saved_data["state"].toCapsule());
    const auto saved = ctx->get_saved_variables();  // throws if they were freed, or have been changed in place
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &grad = grads[0];
    const auto& mask = state->mask;
    const bool log_sum_exp_has_grad = grads.size() > 1 && grads[1].defined();
    variable_list result(5);  // q, k, v, options, is_own
    const bool by_kernels = !at::GradMode::is_enabled() && !log_sum_exp_has_grad;
    if (by_kernels && state->is_own && run_on_kernels({q, k, v, grad})) {
      const auto gradients = detail::differentiate_on_kernels({.q = q,
                                                               .k = k,
                                                               .v = v,
                                                               .output = saved[3],
                                                               .log_sum_exp = saved[4],
                                                               .largest = saved[5],
                                                               .output_grad = grad,
                                                               .mask = state->options.mask,
                                                               .scale = state->scale,
                                                               .wants_q = ctx->needs_input_grad(0),
                                                               .wants_k = ctx->needs_input_grad(1),
                                                               .wants_v = ctx->needs_input_grad(2)});
      result = {gradients.q, gradients.k, gradients.v, {}, {}};
    } else if (!by_kernels || state->is_own || mask.has_bias) {
      differentiate_definition(*state, {q, k, v}, grads, result);
    } else if (q.is_cpu()) {
      std::tie(result[0], result[1], result[2]) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad, q, k, v, saved[3], saved[4], 0.0, mask.is_causal, mask.additive, state->scale);
    } else {
      differentiate({state->output}, state->inputs, grads, /*recorded=*/false, result);
    }
    return result;
  }

 private:
  static void differentiate_definition(const State& state,
                                       variable_list inputs,
                                       const variable_list& grads,
                                       variable_list& result) {
    const bool recorded = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    for (auto& x : inputs) {  // distinct tensors even if one was passed twice: autograd then adds up its gradients
      x = recorded ? x.view_as(x) : x.detach().requires_grad_(x.requires_grad());
    }
    const auto [output, weights, log_sum_exp] = define({inputs[0], inputs[1], inputs[2], state.options}).result;
    differentiate({output, log_sum_exp}, inputs, grads, recorded, result);
  }

  static void differentiate(const variable_list& outputs,
                            const variable_list& inputs,
                            const variable_list& grads,
                            bool recorded,
                            variable_list& result) {
    variable_list asked, given, of;
    for (const auto& x : inputs) {
      if (x.requires_grad()) asked.push_back(x);
    }
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;  // the log-sum-exp does not depend on v
      given.push_back(grads[i]);
      of.push_back(outputs[i]);
    }
    variable_list found(asked.size());
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

// Calls a fused kernel: through FusedKernel if it is differentiated, otherwise LibTorch's directly.
RelativeAttention fuse(const AttentionCall& call, const detail::KernelRequest& request) {
  const auto& [given_q, given_k, given_v, options] = call;
  const auto q = with_unit_stride(given_q), k = with_unit_stride(given_k), v = with_unit_stride(given_v);
  const auto scale = scale_of(options, q.size(3));
  auto results = request.is_differentiated ? FusedKernel::apply(q, k, v, options, request.own_kernels)
                                           : run_libtorch(q, k, v, libtorch_mask(options.mask, q, k, scale), scale);
  results.resize(3);  // results that the kernel does not return stay undefined
  const auto &output = results[0], &log_sum_exp = results[1], &largest = results[2];

  const auto empty_rows = detail::rows_without_keys(options.mask, q.size(2), k.size(2), q.device(), q.scalar_type());
  RelativeAttention attended;
  attended.result.output = with_rows_filled(output, empty_rows, 0);
  if (!options.log_sum_exp) return attended;
  attended.largest = largest.defined() ? largest : at::zeros_like(log_sum_exp);
  const auto rows = empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows;
  attended.result.log_sum_exp = with_rows_filled(log_sum_exp, rows, kMinusInfinity);
  return attended;
}

RelativeAttention attend(const AttentionCall& call) {
  const auto& [q, k, v, options] = call;
  if (options.path == AttentionPath::definition) return define(call);
  const auto request = kernel_request(call);
  const auto [kernel, reason] = detail::choose_kernel(request);
  if (kernel == AttentionKernel::tensor_operations) {
    check_value(options.path != AttentionPath::fused, "attention", "path must not be fused here, because {}.", reason);
    return define(call);
  }
  if (!detail::is_own(kernel) || request.is_differentiated) return fuse(call, request);
  return detail::attend_on_kernels(q, k, v, options);
}

}  // namespace

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  check_inputs({q, k, v, options});
  if (const auto type = detail::product_type(q); type != q.scalar_type()) {  // autocast's, which not all kernels know
    return attention(q.to(type), k.to(type), v.to(type), options);
  }
  return detail::absolute(attend({q, k, v, options}));
}

RelativeAttention detail::attend_unchecked(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return xattn::attend({q, k, v, options});
}

}  // namespace xattn
