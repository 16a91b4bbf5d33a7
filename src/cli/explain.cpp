// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/plan.h>

#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "attention/choose_kernel.h"
#include "cli/cli.h"
#include "plan/runs_on.h"
#include "programs/program.h"
#include "programs/shapes.h"

namespace xattn::cli {
namespace {

constexpr auto kExplainFooter = R"(Example: xattn explain 1,12,1,1500,768,768,768 --frozen
         xattn explain --shape "SD1.5 16x16" --reuse 12800

--json prints one object:
  logits, values  list of {order, operations, bytes, seconds, illegal}, in the order of the library's enum; illegal is null or
                  the reason
  chosen          {logits, values, operations, bytes, seconds, kernel, reason}: the kernel of the attention itself, and the reason
                  for it
  standard        the same for the standard order
  fused           whether the chosen kernel is a fused one

Kernels:
  tensor_operations             plain tensor operations: all logits in memory
  heads                         this library's: one head at a time, logits in the cache, weights from the same pass
  heads_in_parts                the same, one part of a long context at a time
  chain                         this library's, in frozen layers: the whole chain for a few rows at a time
  fused_cpu                     LibTorch's, on the CPU
  scaled_dot_product_attention  LibTorch's, on a GPU
A mask does not change the kernel unless it has a learned bias.)";

const std::map<std::string, int64_t> kBytesOf = {{"float64", 8}, {"float32", 4}, {"float16", 2}, {"bfloat16", 2}};

struct ExplainArguments {
  std::vector<int64_t> sizes;
  std::string shape;
  std::optional<int64_t> kv_heads;
  std::optional<int64_t> reuse;
  std::string type = "float32";
  std::string weights = "none";
  bool qk_norm = false;
  bool frozen = false;
  bool training = false;
  bool dropout = false;
  bool learned_bias = false;
  bool cuda = false;
  bool json = false;
  int threads = at::get_num_threads();
};

// B,H,Lq,Lk,Eq,Ek,INNER_QK[,INNER_V[,EO]]
PlanRequest request_of(const std::vector<int64_t>& sizes) {
  const auto H = sizes[1];
  const auto inner_qk = sizes[6];
  const auto inner_v = sizes.size() > 7 ? sizes[7] : inner_qk;
  if (H < 1 || inner_qk % H != 0 || inner_v % H != 0) {
    throw program::UsageError(
        "SIZES", fmt::format("INNER_QK and INNER_V must be multiples of H, but are {} and {} for {}", inner_qk, inner_v, H));
  }
  return {.B = sizes[0],
          .H = H,
          .G = H,
          .Lq = sizes[2],
          .Lk = sizes[3],
          .Eq = sizes[4],
          .Ek = sizes[5],
          .Ev = sizes[5],
          .d = inner_qk / H,
          .e = inner_v / H,
          .Eo = sizes.size() > 8 ? sizes[8] : inner_v};
}

PlanRequest request_of(const ExplainArguments& arguments) {
  if (arguments.sizes.empty() == arguments.shape.empty()) {
    throw program::UsageError("expected either sizes or --shape, but " +
                              std::string(arguments.shape.empty() ? "none" : "both") + " came");
  }
  PlanRequest request;
  if (arguments.shape.empty()) {
    request = request_of(arguments.sizes);
  } else {
    const auto rows = shapes::matching(arguments.shape);
    std::vector<std::string> names;
    for (const auto& row : rows.empty() ? shapes::all() : rows) names.push_back(row.name);
    if (rows.size() != 1) {
      throw program::UsageError("--shape",
                                fmt::format("must name one row of {}, but is '{}'", fmt::join(names, "; "), arguments.shape));
    }
    request = shapes::plan_request(rows.front());
  }
  if (arguments.kv_heads) request.G = *arguments.kv_heads;
  if (arguments.qk_norm) request.query_norm = request.key_norm = true;
  if (arguments.reuse) request.context_rows = *arguments.reuse;
  request.element = kBytesOf.at(arguments.type);
  request.weights_are_frozen = arguments.frozen;
  request.training = !arguments.frozen && (arguments.training || arguments.learned_bias || request.training);
  request.returns_weights = arguments.weights != "none";
  request.drops_weights = arguments.dropout;
  request.mask_is_learned = arguments.learned_bias;
  request.runs_on = arguments.cuda                ? RunsOn::libtorch_cuda
                    : arguments.type != "float32" ? RunsOn::libtorch_cpu
                    : arguments.frozen            ? RunsOn::frozen_kernels
                                                  : detail::modules_run_on();
  request.rates = arguments.cuda                              ? Rates::cuda()
                  : request.runs_on == RunsOn::frozen_kernels ? Rates::kernels(arguments.threads)
                                                              : Rates::cpu(arguments.threads);
  return request;
}

nlohmann::ordered_json as_json(const Plan& plan) {
  return {{"logits", name_of(plan.orders.logits)},
          {"values", name_of(plan.orders.values)},
          {"operations", plan.operations},
          {"bytes", plan.bytes},
          {"seconds", plan.seconds},
          {"kernel", name_of(plan.kernel)},
          {"reason", plan.kernel_reason}};
}

void print_json(const PlanRequest& request) {
  const auto plan = make_plan(request);
  nlohmann::ordered_json json;
  const auto add = [&json](const char* name, const auto& costs) {
    for (const auto& cost : costs) {
      json[name].push_back(
          {{"order", name_of(cost.order)},
           {"operations", cost.operations},
           {"bytes", cost.bytes},
           {"seconds", cost.seconds},
           {"illegal", cost.illegal.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(cost.illegal)}});
    }
  };
  add("logits", plan.logits);
  add("values", plan.values);
  json["chosen"] = as_json(plan);
  json["standard"] = as_json(cost_of(Orders{}, request));
  json["fused"] = detail::is_fused(plan.kernel);
  std::cout << json.dump(2) << '\n';
}

}  // namespace

void add_explain(program::Command& xattn) {
  const auto arguments = std::make_shared<ExplainArguments>();
  auto command = xattn.subcommand(
      "explain", "Shows in which order a layer would multiply, the cost of every order, and the reasons.", [arguments] {
        const auto request = request_of(*arguments);
        if (arguments->json) return print_json(request);
        std::cout << explain(request);
      });
  std::vector<std::string> types;
  for (const auto& [name, bytes] : kBytesOf) types.push_back(name);
  command.footer(kExplainFooter);
  command.option("SIZES", arguments->sizes, "B,H,Lq,Lk,Eq,Ek,INNER_QK[,INNER_V[,EO]]: see attention.h for the symbols",
                 {.list = {{7, 9}}});
  command.option("--shape", arguments->shape, "a layer of a real model, by its name in src/bench/shapes.csv, or a part of it");
  command.option("--kv-heads", arguments->kv_heads, "key/value heads; by default H", {.positive = true});
  command.flag("--qk-norm", arguments->qk_norm, "projected queries and keys are normalised");
  command.flag("--frozen", arguments->frozen,
               "of a frozen layer: products of weights are made ahead, and this library's kernels run");
  command.flag("--training", arguments->training, "a backward pass follows", {.excludes = "--frozen"});
  command.flag("--dropout", arguments->dropout, "attention weights are dropped", {.excludes = "--frozen"});
  command.flag("--learned-bias", arguments->learned_bias, "the mask has a bias with a gradient; implies --training",
               {.excludes = "--frozen"});
  command.option("--weights", arguments->weights, "attention weights to return", {.one_of = {"none", "mean", "per-head"}});
  command.option("--type", arguments->type, "of inputs and weights", {.one_of = types});
  command.option("--reuse", arguments->reuse, "query rows that the context serves in all, over every call", {.positive = true});
  command.option("--threads", arguments->threads, "threads on the CPU", {.positive = true});
  command.flag("--cuda", arguments->cuda, "on a GPU");
  command.flag("--json", arguments->json, "print one JSON object");
}

}  // namespace xattn::cli
