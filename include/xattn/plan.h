// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention_kernel.h>
#include <xattn/export.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

// In which order to multiply, told from sizes alone. Nothing here knows a tensor; every function is pure and takes about a
// microsecond; nothing is read from disk or kept. Symbols are those of attention.h.
namespace xattn {

/// The order of a chain of four matrices. Each head's logits are one chain and its part of the output is another; the softmax
/// between them, P = softmax(S), blocks neither. Every order gives the same result, at another cost.
///
///                            S = Xq Wq Wk' Xk'      Y = P Xv Wv Wo          made ahead, from
enum class Order {
  standard,              ///< (Xq Wq) (Wk' Xk')      (P (Xv Wv)) Wo          projected K and V, from the context
  fold_into_query,       ///< ((Xq Wq) Wk') Xk'      ((P Xv) Wv) Wo          nothing; all of Xq Wq Wk' if the query is constant
  prefold,               ///< (Xq (Wq Wk')) Xk'      (P Xv) (Wv Wo)          the two products of weights
  fold_into_context,     ///< Xq (Wq (Wk' Xk'))      P ((Xv Wv) Wo)          all but Xq and P, from the context
  prefold_into_context,  ///< Xq ((Wq Wk') Xk')      P (Xv (Wv Wo))          the same
};
constexpr int kOrders = 5;

/// "standard", "fold_into_query" ...
XATTN_API std::string_view name_of(Order order);

/// The orders of both chains.
struct Orders {
  Order logits = Order::standard;
  Order values = Order::standard;
  bool operator==(const Orders&) const = default;
};

/// How fast a machine works: what the estimates weigh with. Times are in seconds.
struct XATTN_API Rates {
  double flops = 0;           ///< operations a second in a large product
  double unit_flops = 0;      ///< of as many rows as the processor's unit for matrices takes (Intel AMX); 0 if there is none
  double unit_half_rows = 0;  ///< as `half_rows`, there
  double unit_rows = 0;       ///< from so many rows on
  double memory = 0;          ///< bytes a second from memory
  double cache = 0;           ///< bytes a second where all that a product touches fits into the cache; 0 for those of memory
  double cache_size = 0;      ///< of it, in bytes
  double half_rows = 0;       ///< a product of so many rows (the right side being weights) runs at half of `flops`
  double half_columns = 0;    ///< likewise of so many columns
  double half_depth = 0;      ///< likewise over so many terms
  double start_product = 0;   ///< what each product costs before its first operation
  double start_small = 0;     ///< what each of the many products of a batch costs
  double softmax = 0;         ///< elements a second through scale, mask and softmax
  double fused = 0;           ///< operations a second in the fused attention kernel; 0 if there is none

  /// Of modules on the CPU: built-in values for the processor's instruction set and this number of threads.
  static Rates cpu(int threads);
  /// Of LibTorch's operators on CUDA devices.
  static Rates cuda();
  /// Of this library's own kernels on the CPU, which run in `Frozen`.
  static Rates kernels(int threads);
  /// Those of modules on this machine with the threads that it has now. Takes some seconds; keep what it returns.
  static Rates measure();

  bool operator==(const Rates&) const = default;
};

/// Who chooses: the planner, or the caller.
struct PlanMode {
  bool pinned = false;
  Orders orders = {};               ///< if pinned
  std::optional<Rates> rates = {};  ///< what the planner weighs with; the built-in ones where there are none

  static const PlanMode automatic;  ///< the cheapest that is legal
  static const PlanMode standard;   ///< the reference's, always
  /// These, always.
  static constexpr PlanMode pin(Orders orders) { return {true, orders, {}}; }
  /// The cheapest that is legal, by these rates, as `Rates::measure()` gives them.
  static constexpr PlanMode by(const Rates& rates) { return {false, {}, rates}; }
  bool operator==(const PlanMode&) const = default;
};
inline constexpr PlanMode PlanMode::automatic = {};
inline constexpr PlanMode PlanMode::standard = PlanMode::pin({});

/// The code that a layer runs on.
enum class RunsOn {
  module_kernels,  ///< this library's kernels, in a module: float32 on the CPU, with AVX2 or AVX-512 and without autocast
  frozen_kernels,  ///< this library's kernels for the whole chain: a `Frozen` in float32 on the CPU
  libtorch_cpu,    ///< LibTorch's operators on the CPU
  libtorch_cuda,   ///< LibTorch's operators on other devices
};

/// All that a plan depends on.
struct PlanRequest {
  int64_t B = 1, H = 1, G = 1;     ///< batch, heads, key/value heads
  int64_t Lq = 1, Lk = 1;          ///< query rows of one call, context length
  int64_t Eq = 1, Ek = 1, Ev = 1;  ///< features of query, key, value
  int64_t d = 1, e = 1, Eo = 1;    ///< features of a query/key head, of a value head, of the output
  int64_t element = 4;             ///< bytes of a number

  bool query_norm = false;          ///< projected queries are normalised
  bool key_norm = false;            ///< projected keys are
  bool free_key = false;            ///< a key and a value that bypass the projections (bias_kv)
  bool query_is_constant = false;   ///< a learned query: what is made of it and of weights alone costs nothing
  bool weights_are_frozen = false;  ///< products of weights cost nothing
  bool training = false;            ///< a backward pass follows, of as many products twice over
  bool gives_weights = false;       ///< attention weights are wanted
  bool drops_weights = false;       ///< dropout is above 0
  bool mask_is_learned = false;     ///< the mask's bias asks for its gradient. No other kind of mask changes the kernel

  RunsOn runs_on = RunsOn::module_kernels;  ///< with `rates` to match
  std::optional<Orders> pinned = {};        ///< in place of the cheapest

  /// Query rows of one batch entry that the context serves in all, over every call; those of this call if it is not more. What
  /// is made of the context is charged by the share of this call. kKept if it has been made already.
  int64_t context_rows = 0;
  static constexpr int64_t kKept = -1;

  Rates rates = {};
};

/// What one order of one chain costs a call, in training with its backward pass.
struct OrderCost {
  Order order = Order::standard;
  double operations = 0;
  double bytes = 0;  ///< read and written, each operand and result once a product
  double seconds = 0;
  std::string_view illegal = {};  ///< why it cannot be chosen; empty if it can
};

struct Plan {
  Orders orders;
  double operations = 0;
  double bytes = 0;
  double seconds = 0;
  AttentionKernel kernel = AttentionKernel::tensor_operations;
  std::string_view kernel_reason = {};    ///< why this one
  std::array<OrderCost, kOrders> logits;  ///< of every order, in the order of the enum
  std::array<OrderCost, kOrders> values;
};

/// Why this order cannot be taken for the chain of the logits; empty if it can. What comes between a projection and the dot
/// product other than one fixed matrix pins that projection to the first place.
XATTN_API std::string_view illegal_for_logits(Order order, const PlanRequest& request);
/// The same for the chain of the values.
XATTN_API std::string_view illegal_for_values(Order order, const PlanRequest& request);

/// Whether the products Wq Wk' of all heads are no larger than Wq and Wk: they can pay only there, and are made ahead only there.
XATTN_API bool logits_product_pays(const PlanRequest& request);
/// The same of Wv Wo.
XATTN_API bool values_product_pays(const PlanRequest& request);

/// The pinned orders, or the cheapest legal ones; those of the reference where an axis is empty. Throws c10::ValueError for sizes
/// that cannot be.
XATTN_API Plan make_plan(const PlanRequest& request);

/// The cost of these orders, legal or not.
XATTN_API Plan cost_of(const Orders& orders, const PlanRequest& request);

/// All orders with their costs, the choice, what speaks against the others, and the attention kernel, as lines of text.
XATTN_API std::string explain(const PlanRequest& request);

}  // namespace xattn
