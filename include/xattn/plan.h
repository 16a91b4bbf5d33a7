// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention_kernel.h>
#include <xattn/export.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

// Chooses the order of multiplication from sizes and rates alone. Every function but Rates::measure is pure and may be called
// by several threads; a plan takes about a microsecond. Symbols are those of attention.h.
namespace xattn {

/// The order of a chain of four matrices. Each head's logits are one chain and its part of the output is another; the softmax
/// between them, P = softmax(S), does not constrain either. All orders give the same result, at different costs.
///
///                         S = Xq Wq Wk' Xk'      Y = P Xv Wv Wo          computed ahead, from
enum class Order {
  standard,           ///< (Xq Wq) (Wk' Xk')      (P (Xv Wv)) Wo          projected K and V, from the context
  fold_into_query,    ///< ((Xq Wq) Wk') Xk'      ((P Xv) Wv) Wo          nothing; all of Xq Wq Wk' if the query is constant
  prefold,            ///< (Xq (Wq Wk')) Xk'      (P Xv) (Wv Wo)          the two products of weights
  fold_into_context,  ///< Xq (Wq (Wk' Xk'))      P ((Xv Wv) Wo)          all but Xq and P, from the context
};
constexpr int kOrders = 4;

/// "standard", "fold_into_query" ...
XATTN_API std::string_view name_of(Order order);

/// The orders of both chains.
struct Orders {
  Order logits = Order::standard;
  Order values = Order::standard;
  bool operator==(const Orders&) const = default;
};

/// The speed of a machine, from which costs are estimated. Times are in seconds.
struct XATTN_API Rates {
  double flops = 0;           ///< operations a second in a large product
  double unit_flops = 0;      ///< the same on the processor's matrix unit (Intel AMX); 0 if there is none
  double unit_half_rows = 0;  ///< `half_rows` on the matrix unit
  double unit_rows = 0;       ///< fewest rows of a product that runs there
  double memory = 0;          ///< bytes a second from memory
  double cache = 0;           ///< bytes a second if all operands of a product fit into the cache; 0 means `memory`
  double cache_size = 0;      ///< bytes
  double half_rows = 0;       ///< a product of this many rows runs at half of `flops`
  double half_columns = 0;    ///< the same for columns
  double half_depth = 0;      ///< the same for terms of each sum
  double start_product = 0;   ///< seconds that each product takes before its first operation
  double start_small = 0;     ///< the same for each product of a batch
  double softmax = 0;         ///< elements a second through scale, mask and softmax
  double fused = 0;           ///< operations a second in the fused attention kernel; 0 if there is none

  /// Built-in values for modules on the CPU, for the processor's instruction set and this number of threads.
  static Rates cpu(int threads);
  /// Built-in values for LibTorch's operators on CUDA devices.
  static Rates cuda();
  /// Built-in values for the kernels that `Frozen` runs on the CPU.
  static Rates kernels(int threads);
  /// Values for modules, measured on this machine with the current number of threads. This takes seconds: keep the result.
  static Rates measure();

  bool operator==(const Rates&) const = default;
};

/// Whether the planner or the caller chooses the orders.
struct PlanMode {
  bool pinned = false;
  Orders orders = {};               ///< if pinned
  std::optional<Rates> rates = {};  ///< for the planner; without a value the built-in ones

  static const PlanMode automatic;  ///< the cheapest legal orders
  static const PlanMode standard;   ///< always those of the reference
  /// Always these orders.
  static constexpr PlanMode pin(Orders orders) { return {true, orders, {}}; }
  /// The cheapest legal orders by these rates, such as those of `Rates::measure()`.
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

/// Everything that a plan depends on.
struct PlanRequest {
  int64_t B = 1, H = 1, G = 1;     ///< batch, heads, key/value heads
  int64_t Lq = 1, Lk = 1;          ///< query rows of one call, context length
  int64_t Eq = 1, Ek = 1, Ev = 1;  ///< features of query, key, value
  int64_t d = 1, e = 1, Eo = 1;    ///< features of a query/key head, of a value head, of the output
  int64_t element = 4;             ///< bytes of a number
  int64_t stored_element = 0;      ///< the same in weights, and in projected and folded contexts; 0: as `element`

  bool query_norm = false;          ///< projected queries are normalised
  bool key_norm = false;            ///< projected keys are normalised
  bool bias_kv = false;             ///< a key and a value that bypass the projections
  bool query_is_constant = false;   ///< a learned query: its products with weights are computed once and cost nothing
  bool weights_are_frozen = false;  ///< products of weights cost nothing
  bool sums_heads = false;          ///< heads of several contexts or ranks are added before the one output projection
  bool sums_ranks = false;          ///< heads of several ranks are merged by their log-sum-exps
  bool shares_context = false;      ///< keys and values stay the caller's tensors, as given
  bool context_grows = false;       ///< keys will be appended to the context
  bool training = false;            ///< a backward pass follows, with twice as many products
  bool returns_weights = false;     ///< attention weights are returned
  bool drops_weights = false;       ///< dropout is above 0
  bool mask_is_learned = false;     ///< the mask's bias requires a gradient; no other property of a mask changes the kernel

  RunsOn runs_on = RunsOn::module_kernels;  ///< must match `rates`
  std::optional<Orders> pinned = {};        ///< used instead of the cheapest

  /// Query rows of one batch entry that attend to the context over all calls, counted as at least Lq. A call is charged the
  /// share Lq / context_rows of the context's products; with kKept, for a context that has been made, none.
  int64_t context_rows = 0;
  static constexpr int64_t kKept = -1;

  Rates rates = {};
};

/// The cost of one order of one chain in a call, including the backward pass in training.
struct OrderCost {
  Order order = Order::standard;
  double operations = 0;
  double bytes = 0;  ///< read and written: each operand and result once for each product
  double seconds = 0;
  std::string_view illegal = {};  ///< why it cannot be chosen; empty if it can
};

struct Plan {
  Orders orders;
  double operations = 0;
  double bytes = 0;
  double seconds = 0;
  AttentionKernel kernel = AttentionKernel::tensor_operations;
  std::string_view kernel_reason = {};    ///< why this kernel runs
  std::array<OrderCost, kOrders> logits;  ///< costs of all orders, in the order of the enum
  std::array<OrderCost, kOrders> values;
};

/// Why this order is illegal for the chain of the logits; empty if it is legal. Anything other than a fixed matrix between a
/// projection and the dot product forces that projection to be multiplied first.
XATTN_API std::string_view illegal_for_logits(Order order, const PlanRequest& request);
/// The same for the chain of the values.
XATTN_API std::string_view illegal_for_values(Order order, const PlanRequest& request);

/// Whether the products Wq Wk' of all heads are no larger than Wq and Wk. Only then can they save time, and only then are they
/// computed ahead.
XATTN_API bool logits_product_pays(const PlanRequest& request);
/// The same for Wv Wo.
XATTN_API bool values_product_pays(const PlanRequest& request);

/// The pinned orders, or the cheapest legal ones; the reference's if an axis is empty. Throws c10::ValueError for invalid
/// sizes, and if no order is legal.
XATTN_API Plan make_plan(const PlanRequest& request);

/// The cost of these orders, legal or not.
XATTN_API Plan cost_of(const Orders& orders, const PlanRequest& request);

/// All orders with their costs, the choice, why others are illegal, and the attention kernel, as lines of text.
XATTN_API std::string explain(const PlanRequest& request);

}  // namespace xattn
