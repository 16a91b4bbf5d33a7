// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bench/bench_layer.h"
#include "bench/bench_report.h"
#include "bench/block_candidates.h"
#include "bench/block_rows.h"
#include "bench/candidates.h"
#include "bench/exact.h"
#include "bench/measure.h"
#include "bench/order_times.h"
#include "plan/runs_on.h"
#include "programs/program.h"
#include "programs/shapes.h"

namespace bench {
namespace {

using shapes::Shape;
using shapes::Timed;
using xattn::AttentionWeights;

constexpr auto kFooter = R"(Examples: xattn_bench --shape "SD1.5 16x16" --threads 1
          xattn_bench blocks --row BLIP

Rows are layers of real models. Every candidate is compared with float64 and then timed; the candidates of a row take turns. The
share of the processor's measured peak counts the operations of the standard order: above 100 %, a candidate needs fewer.

--json prints one object:
  machine    {processor, cores, memory_gb, device}
  versions   {runtime: version}
  peaks      {threads: 1e9 float32 operations a second, measured}
  results    list of {row, weights, threads, type, runtime, candidate, error, us, low, high, p95, least, samples}: the largest
             error relative to the largest element; median, quartiles, 95th percentile and least of the times of a call; with
             `blocks`, the context_bytes of frozen modules that keep contexts
  skipped    list of {row, weights, threads, type, runtime, candidate, reason}
  crossover  {threads: list of {Lq, Lk, chosen, us}}, with --crossover
  regret     {threads: list of {row, chosen, us, best, best_us, left_out}}, with --regret)";

const std::map<std::string, AttentionWeights> kWeights = {
    {"none", AttentionWeights::none}, {"mean", AttentionWeights::mean}, {"per-head", AttentionWeights::per_head}};

struct Arguments {
  std::vector<std::string> names;
  std::vector<int> threads;
  std::vector<std::string> weights = {"none"};
  std::vector<std::string> runtimes = {"xattn", "libtorch"};
  std::string device = "cpu";
  double seconds = 1;
  double limit = 0;
  bool crossover = false;
  bool regret = false;
  bool json = false;
  bool list = false;
  bool check = false;
};

std::vector<Shape> chosen_rows(const Arguments& arguments) {
  std::vector<Shape> rows;
  for (const auto& name : arguments.names) {
    const auto found = shapes::matching(name);
    if (found.empty()) throw program::UsageError("--shape", "no row has " + name + " in its name; --list shows all");
    rows.insert(rows.end(), found.begin(), found.end());
  }
  if (arguments.names.empty()) rows = shapes::all();
  std::erase_if(rows, [&](const Shape& shape) {
    return arguments.limit > 0 && 1e-9 * shapes::count_operations(shape).standard > arguments.limit;
  });
  return rows;
}

// The reason why the row does not fit into memory; empty if it fits.
std::string too_large(const Shape& shape, bool logits, c10::Device device) {
  const auto needed = gigabytes_needed(shape, logits, /*element=*/4);
  const auto free = gigabytes_free();
  if (device.is_cuda() || needed < free) return {};
  return fmt::format("needs {:.1f} GB of memory, and {:.1f} are free", needed, free);
}

// Calls a candidate once and returns its error; returns nothing, with a reason in `absent`, if it cannot run this row.
std::optional<double> try_once(Candidate& candidate, const BenchLayer& layer, const Exact& truth) {
  const auto device = layer.key.device();
  if (candidate.absent.empty() && candidate.holds_logits) candidate.absent = too_large(layer.shape, true, device);
  if (!candidate.absent.empty()) return std::nullopt;
  try {
    return check(candidate, layer, truth);
  } catch (const c10::Error& error) {
    if (device.is_cpu()) throw;
    const std::string message = error.what_without_backtrace();
    candidate.absent = message.substr(0, message.find('\n'));  // a kernel that does not take these sizes
    return std::nullopt;
  }
}

// Leaves out the candidates of other runtimes.
std::vector<Candidate> of_runtimes(std::vector<Candidate> candidates, const Arguments& arguments) {
  std::erase_if(candidates, [&](const Candidate& c) { return std::ranges::count(arguments.runtimes, c.runtime()) == 0; });
  return candidates;
}

void run_row(
    const Shape& shape, const std::string& weights, c10::Device device, const Arguments& arguments, BenchReport& report) {
  report.row(shape, weights);
  if (const auto reason = too_large(shape, weights != "none", device); !reason.empty()) return report.skipped("all", reason);
  const auto type = device.is_cpu() ? at::kFloat : at::kBFloat16;
  const auto layer = make_layer(shape, torch::dtype(type).device(device), kWeights.at(weights));
  const c10::InferenceMode inference(!layer.grad.defined());
  const auto truth = exact(layer);
  std::vector<Candidate> ready;
  std::vector<double> errors;
  for (auto& candidate : of_runtimes(candidates(layer), arguments)) {
    if (const auto error = try_once(candidate, layer, truth)) {
      errors.push_back(*error);
      ready.push_back(std::move(candidate));
    } else {
      report.skipped(candidate.name, candidate.absent);
    }
  }
  std::vector<std::function<void()>> calls;
  for (const auto& candidate : ready) calls.push_back(timed(candidate, layer));
  const auto times = measure(calls, arguments.seconds, [device] {
    if (device.is_cuda()) torch::cuda::synchronize(device.index());
  });
  for (size_t i = 0; i < ready.size(); ++i) report.result(ready[i], errors[i], times[i]);
}

void run_row(const BlockRow& row, const Arguments& arguments, BenchReport& report) {
  report.row(row);
  const auto block = make_block(row);
  const c10::InferenceMode inference;
  const auto truth = exact(block);
  const auto ready = of_runtimes(candidates(block), arguments);
  std::vector<double> errors;
  std::vector<std::function<void()>> calls;
  for (const auto& candidate : ready) {
    const auto what = row.name + ": output of " + candidate.name;
    errors.push_back(compare(what, std::get<0>(candidate.call()), truth, candidate.rounds));
    calls.push_back([&candidate] { candidate.call(); });
  }
  auto times = std::vector<Times>(calls.size());
  if (!arguments.check) times = measure(calls, arguments.seconds, [] {});
  for (size_t i = 0; i < ready.size(); ++i) report.result(ready[i], errors[i], times[i]);
}

void list(const std::vector<Shape>& rows) {
  for (const auto& s : rows) {
    std::cout << fmt::format("{:<50}  B {} H {} Lq {} Lk {}, {} {} -> {}\n", s.name, s.B, s.H, s.Lq, s.Lk, s.Eq, s.Ek, s.Eo);
  }
}

// By default 1 and, where there are several and the device is not a GPU, 2.
std::vector<int> numbers_of_threads(const Arguments& arguments, bool cpu) {
  if (!arguments.threads.empty()) return arguments.threads;
  return cpu && at::get_num_threads() > 1 ? std::vector{1, 2} : std::vector{1};
}

void run_blocks(const Arguments& arguments) {
  std::vector<BlockRow> rows;
  for (const auto& name : arguments.names.empty() ? std::vector<std::string>{""} : arguments.names) {
    const auto found = block_rows(name);
    if (found.empty()) throw program::UsageError("--row", "no row has " + name + " in its name; --list shows all");
    rows.insert(rows.end(), found.begin(), found.end());
  }
  if (arguments.list) {
    for (const auto& row : rows) std::cout << row.name << "\n";
    return;
  }
  BenchReport report(arguments.json, "cpu");
  for (const int count : numbers_of_threads(arguments, true)) {
    program::set_threads(count);
    report.threads(count);
    for (const auto& row : rows) run_row(row, arguments, report);
  }
  report.end();
}

void run(const Arguments& arguments) {
  const auto rows = chosen_rows(arguments);
  if (arguments.list) return list(rows);
  const auto device = program::find_device(arguments.device);
  BenchReport report(arguments.json, arguments.device);
  for (const int count : numbers_of_threads(arguments, device.is_cpu())) {
    program::set_threads(count);
    report.threads(count);
    if (arguments.crossover) {
      report.orders("crossover", measure_crossover(arguments.seconds / 10));
      continue;
    }
    for (const auto& shape : rows) {
      if (arguments.regret) {
        if (too_large(shape, false, device).empty()) report.orders("regret", measure_regret(shape, arguments.seconds));
        continue;
      }
      for (const auto& weights : arguments.weights) {
        const bool wanted = weights == "none" || (shape.maps && shape.timed != Timed::backward);
        if (wanted) run_row(shape, weights, device, arguments, report);
      }
    }
  }
  report.end();
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Arguments arguments;
  program::Program program("xattn_bench", "Times cross attention in several ways, on layers of real models.");
  program.option("--shape", arguments.names, "The row of this name, or all rows whose names contain it; repeatable",
                 {.one_at_a_time = true});
  const auto add_shared_options = [&arguments](program::Command& command) {
    command.option("--threads", arguments.threads, "Numbers of threads; by default 1 and 2", {.range = {{1, 1024}}});
    command.option("--seconds", arguments.seconds, "For each candidate of a row", {.positive = true});
    command.option(
        "--runtime", arguments.runtimes,
        "Whose candidates run. Waiting threads of LibTorch take the processor from the library's for some milliseconds",
        {.one_of = {"xattn", "libtorch"}});
    command.flag("--list", arguments.list, "Print the names of the rows, and nothing else");
    command.flag("--json", arguments.json, "Print JSON, as described below");
  };
  add_shared_options(program);
  program.option("--weights", arguments.weights,
                 "Which attention weights to return; mean and per-head only for rows whose weights someone uses",
                 {.one_of = {"none", "mean", "per-head"}});
  program.option("--device", arguments.device, "cpu, in float32, or cuda or cuda:N, in bfloat16", {.device = true});
  program.option("--limit", arguments.limit, "Leave out rows of more operations, in 1e9; 0 for none", {.not_negative = true});
  program.flag("--crossover", arguments.crossover, "Time pinned orders over a grid of lengths, instead of the rows");
  program.flag("--regret", arguments.regret, "Time every pair of orders of a frozen layer beside the pair that it chooses");
  program.footer(bench::kFooter);
  bool blocks = false;
  auto command = program.subcommand("blocks", "Time whole modules of real models instead: blocks, decoupled layers, stacks.",
                                    [&blocks] { blocks = true; });
  command.option("--row", arguments.names, "The row of this name, or all rows whose names contain it; repeatable",
                 {.one_at_a_time = true});
  add_shared_options(command);
  command.flag("--check", arguments.check, "Compare the candidates with float64, and leave the times 0");
  return program.run(argc, argv, [&] {
    const char* kernels = std::getenv("XATTN_KERNELS");
    if (kernels && !xattn::detail::use_kernels_named(kernels)) {
      throw std::runtime_error(fmt::format("this processor cannot run the kernels for XATTN_KERNELS={}", kernels));
    }
    blocks ? bench::run_blocks(arguments) : bench::run(arguments);
  });
}
