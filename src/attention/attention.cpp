// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "attention/heads.h"
#include "attention/softmax.h"
#include "base/check.h"
#include "base/describe.h"
#include "cpu/matrix_product.h"

namespace xattn {

using at::Tensor;
using detail::attend_on_kernels;
using detail::check_type;
using detail::check_value;
using detail::differentiate_on_kernels;
using detail::kMinusInfinity;
using detail::logits_product;
using detail::matrix_product;
using detail::product_type;
using detail::run_on_kernels;
using detail::shape_of;
using detail::softmax_over_keys;
using detail::type_of;
using detail::wanted_weights;
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
  options.mask.check(kCaller, q.size(0), q.size(1), q.size(2), k.size(2), q.device());
}

double scale_of(const Tensor& q, const AttentionOptions& options) {
  return options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
}

// The definition in plain tensor operations.
AttentionResult define(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Tensor* largest = nullptr) {
  const auto B = q.size(0), H = q.size(1), Lq = q.size(2), d = q.size(3);
  const auto G = k.size(1), Lk = k.size(2), e = v.size(3);
  // The H/G heads that share a key/value head are rows of one product.
  const auto rows = (q * scale_of(q, options)).reshape({B, G, H / G * Lq, d});
  const auto products = logits_product(rows, k.transpose(-2, -1)).view({B, H, Lq, Lk});
  const auto type = product_type(q);
  const auto [weights, log_sum_exp, empty_rows] = softmax_over_keys(products, type, options.mask, options.log_sum_exp, largest);
  const auto dropped = options.dropout > 0 ? at::dropout(weights, options.dropout, /*train=*/true) : weights;
  const auto mixed = matrix_product(dropped.to(v.scalar_type()).reshape({B, G, H / G * Lq, Lk}), v);

  return {mixed.view({B, H, Lq, e}), wanted_weights(weights, options, type), log_sum_exp};
}

// Whether a derivative of the result may be asked for.
bool is_differentiated(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return at::GradMode::is_enabled() &&
         (q.requires_grad() || k.requires_grad() || v.requires_grad() || options.mask.is_learned());
}

// Whether this library's kernels do all that is asked.
bool is_for_kernels(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return run_on_kernels({q, k, v}) && options.dropout == 0 && q.numel() > 0 && k.numel() > 0 &&
         !is_differentiated(q, k, v, options);
}

// Why the fused kernels cannot do what is asked; empty if they can. Depends on sizes and kinds alone, never on values.
std::string refusal_of_fused(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  if (options.weights != AttentionWeights::none) return "attention weights are wanted";
  if (options.dropout > 0) return "dropout is above 0";
  if (q.numel() == 0 || k.numel() == 0) return "an axis is empty";
  if (options.mask.is_learned()) return "the mask's bias asks for its gradient";
  if (q.is_cpu() && q.size(3) != v.size(3) && !run_on_kernels({q, k, v})) {
    return "LibTorch's CPU kernel needs value heads of the size of key heads";
  }
  if (!q.is_cpu() && options.log_sum_exp) return "only the CPU kernel is asked for its log-sum-exp";
  return {};
}

// LibTorch's kernels read rows of consecutive numbers.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// A mask as the fused kernels take it. Empty rows are opened, as in `define`, and closed by the caller.
struct KernelMask {
  bool is_causal;  // by a flag, with which LibTorch scales the -inf of a forbidden key: a scale above 0 keeps it
  bool has_bias = false;
  std::optional<Tensor> additive;

  KernelMask(const Mask& mask, const Tensor& q, const Tensor& k, double scale)
      : is_causal(mask.is_causal_only(q.size(2), k.size(2)) && (scale > 0 || run_on_kernels({q, k}))) {
    if (is_causal || mask.is_none()) return;
    const auto Lq = q.size(2), Lk = k.size(2);
    const auto type = q.scalar_type();
    const auto keep = mask.keep(Lq, Lk, q.device());
    auto bias = mask.additive(type);
    has_bias = bias.defined();
    if (!has_bias) bias = at::zeros({}, q.options());
    if (!q.is_cpu()) bias = bias.to(type);  // the kernels there take no other
    const auto all = keep.defined() ? at::where(keep, bias, kMinusInfinity) : bias;
    additive = with_unit_stride(with_rows_filled(all, mask.empty_rows(Lq, Lk, q.device(), type), 0));
  }

  Mask as_mask() const {
    if (is_causal) return Mask::causal(CausalAlignment::upper_left);
    return additive ? Mask::bias(*additive) : Mask();
  }
};

// One call of a fused kernel on the CPU -> output and log-sum-exp.
//
// largest: of the kernels of this library, each row's largest logit, to which its log-sum-exp is then relative; null if not wanted.
std::tuple<Tensor, Tensor> run_on_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const KernelMask& mask, double scale, Tensor* largest = nullptr) {
  if (!run_on_kernels({q, k, v})) {
    return at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask.is_causal, mask.additive, scale);
  }
  const auto result = attend_on_kernels(q, k, v, {.mask = mask.as_mask(), .scale = scale, .log_sum_exp = true}, largest);
  return {result.output, result.log_sum_exp};
}

Tensor run_elsewhere(const Tensor& q, const Tensor& k, const Tensor& v, const KernelMask& mask, double scale) {
  return at::scaled_dot_product_attention(q, k, v, mask.additive, 0.0, mask.is_causal, scale, q.size(1) != k.size(1));
}

// The fused kernels have a first derivative only. On the CPU it is computed by whose kernel has computed the output; elsewhere this
// node holds a kernel's own graph and differentiates that. When the backward pass is itself recorded, or gets a gradient of the
// log-sum-exp, it differentiates the definition instead; so it does for LibTorch's kernels under a bias, as their backward passes
// compute weights from a log-sum-exp, which beside a bias of -1e9 has lost the number of keys.
struct FusedKernel : torch::autograd::Function<FusedKernel> {
  struct State : torch::CustomClassHolder {
    State(const AttentionOptions& o, KernelMask m) : options(o), mask(std::move(m)) {}
    AttentionOptions options;
    KernelMask mask;
    std::vector<Tensor> inputs;  // of a kernel's own graph: detached q, k, v
    Tensor output;
  };

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const Tensor& q,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const AttentionOptions& options) {
    const auto scale = scale_of(q, options);
    auto state = c10::make_intrusive<State>(options, KernelMask(options.mask, q, k, scale));
    ctx->set_materialize_grads(false);
    torch::autograd::variable_list results;
    if (q.is_cpu()) {
      Tensor largest;
      const auto [output, log_sum_exp] = run_on_cpu(q, k, v, state->mask, scale, &largest);
      ctx->save_for_backward({q, k, v, output, log_sum_exp, largest});
      results = {output, log_sum_exp};
      if (largest.defined()) {
        ctx->mark_non_differentiable({largest});
        results.push_back(largest);
      }
    } else if (state->mask.has_bias) {
      ctx->save_for_backward({q, k, v});
      results = {run_elsewhere(q, k, v, state->mask, scale)};
    } else {
      for (const auto& x : {q, k, v}) state->inputs.push_back(x.detach().requires_grad_(x.requires_grad()));
      const at::AutoGradMode record(true);
      state->output = run_elsewhere(state->inputs[0], state->inputs[1], state->inputs[2], state->mask, scale);
      ctx->save_for_backward({q, k, v});
      results = {state->output.detach()};
    }
    ctx->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return results;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto state = c10::static_intrusive_pointer_cast<State>(ctx->saved_data["state"].toCapsule());
    const auto saved = ctx->get_saved_variables();  // throws if they were freed, or changed in place since
    const auto &q = saved[0], &k = saved[1], &v = saved[2];
    torch::autograd::variable_list result(4);  // q, k, v, options
    const bool own = saved.size() > 3 && saved[5].defined();
    if (at::GradMode::is_enabled() || (grads.size() > 1 && grads[1].defined())) {
      differentiate_definition(*state, {q, k, v}, grads, result);
    } else if (own && run_on_kernels({q, k, v, grads[0]})) {
      const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
      const AttentionOptions how{.mask = state->mask.as_mask(), .scale = scale_of(q, state->options)};
      const auto gradients = differentiate_on_kernels(q, k, v, {saved[3], {}, saved[4]}, saved[5], grads[0], how, wanted);
      result = {gradients.q, gradients.k, gradients.v, {}};
    } else if (own || state->mask.has_bias) {
      differentiate_definition(*state, {q, k, v}, grads, result);
    } else if (saved.size() > 3) {
      std::tie(result[0], result[1], result[2]) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grads[0], q, k, v, saved[3], saved[4], 0.0, state->mask.is_causal, state->mask.additive, scale_of(q, state->options));
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
    for (auto& x : inputs) {  // each a tensor of its own, where one was given twice: its gradients are for autograd to add up
      x = recorded ? x.view_as(x) : x.detach().requires_grad_(x.requires_grad());
    }
    const auto defined = define(inputs[0], inputs[1], inputs[2], state.options);
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

AttentionResult fuse(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Tensor* largest = nullptr) {
  const auto rows = with_unit_stride(q), keys = with_unit_stride(k), values = with_unit_stride(v);
  Tensor output, log_sum_exp, largest_of_rows;
  if (is_differentiated(q, k, v, options)) {
    const auto results = FusedKernel::apply(rows, keys, values, options);
    output = results[0];
    if (results.size() > 1) log_sum_exp = results[1];
    if (results.size() > 2) largest_of_rows = results[2];
  } else {
    const auto scale = scale_of(q, options);
    const KernelMask mask(options.mask, rows, keys, scale);
    if (q.is_cpu()) {
      std::tie(output, log_sum_exp) = run_on_cpu(rows, keys, values, mask, scale);
    } else {
      output = run_elsewhere(rows, keys, values, mask, scale);
    }
  }
  // [B|1, H|1, Lq|1, 1]
  const auto empty_rows = options.mask.empty_rows(q.size(2), k.size(2), q.device(), q.scalar_type());
  AttentionResult result;
  result.output = with_rows_filled(output, empty_rows, 0);
  if (options.log_sum_exp) {
    if (largest) {
      *largest = largest_of_rows.defined() ? largest_of_rows : at::zeros_like(log_sum_exp);
    } else if (largest_of_rows.defined()) {
      log_sum_exp = log_sum_exp + largest_of_rows;
    }
    result.log_sum_exp =
        with_rows_filled(log_sum_exp, empty_rows.defined() ? empty_rows.squeeze(-1) : empty_rows, kMinusInfinity);
  }
  return result;
}

AttentionResult run(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Tensor* largest = nullptr) {
  check_inputs(q, k, v, options);
  if (options.path == AttentionPath::definition) return define(q, k, v, options, largest);
  if (is_for_kernels(q, k, v, options)) return attend_on_kernels(q, k, v, options, largest);
  const auto refusal = refusal_of_fused(q, k, v, options);
  check_value(options.path != AttentionPath::fused || refusal.empty(), "attention", "path must not be fused here, because {}.",
              refusal);
  return refusal.empty() ? fuse(q, k, v, options, largest) : define(q, k, v, options, largest);
}

}  // namespace

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return run(q, k, v, options);
}

AttentionResult detail::attention_by_largest(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Tensor* largest) {
  auto how = options;
  // LibTorch's kernels return the log-sum-exp alone, which a bias may have made inexact.
  if (options.mask.has_bias() && !run_on_kernels({q, k, v})) how.path = AttentionPath::definition;
  return run(q, k, v, how, largest);
}

}  // namespace xattn
