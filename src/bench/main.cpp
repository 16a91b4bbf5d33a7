// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/torch.h>
#include <torch/version.h>
#include <xattn/version.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "candidates.h"
#include "measure.h"
#include "program.h"

namespace bench {
namespace {

using Json = nlohmann::ordered_json;
using shapes::Shape;
using shapes::Timed;
using torch::Tensor;
using xattn::AttentionWeights;

constexpr auto kFooter = R"(Example: xattn_bench --shape "SD1.5 16x16" --threads 1

Rows are layers of real models (--list names them). Each candidate is compared with the definition in float64 and then timed, all by
turns. `of peak` counts the operations of the standard order: with more than 100 % a candidate needs fewer operations.

--json prints one object:
  machine   {processor, cores, memory_gb, device}
  versions  {runtime: version}
  peaks     {threads: 1e9 operations a second in float32, measured}
  results   list of {row, weights, threads, type, runtime, candidate, error, us, low, high, least, samples}: the largest error against
            float64 relative to the largest element; median, quartiles and least time of a call
  skipped   list of {row, weights, threads, type, runtime, candidate, reason})";

struct Arguments {
  std::vector<std::string> names;
  std::vector<int> threads;
  std::vector<std::string> weights = {"none"};
  std::string device = "cpu";
  double seconds = 1;
  double limit = 0;
  bool json = false;
  bool list = false;
};

AttentionWeights weights_named(const std::string& name) {
  return name == "none" ? AttentionWeights::none : name == "mean" ? AttentionWeights::mean : AttentionWeights::per_head;
}

std::vector<Shape> chosen(const Arguments& arguments) {
  if (arguments.names.empty()) return shapes::all();
  std::vector<Shape> rows;
  for (const auto& name : arguments.names) {
    const auto found = shapes::matching(name);
    if (found.empty()) throw CLI::ValidationError("--shape", "no row is named " + name + "; --list shows the names");
    rows.insert(rows.end(), found.begin(), found.end());
  }
  return rows;
}

// The value behind `key` in a file of lines "key : value" of Linux; empty if there is none.
std::string line_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key)) return line.substr(std::min(line.size(), line.find(':') + 2));
  }
  return {};
}

double gigabytes_available() {
  const auto text = line_of("/proc/meminfo", "MemAvailable");
  return text.empty() ? 1e9 : 1.024e-6 * std::stod(text);
}

// What a candidate holds at a time, at most: `logits` tells whether it has all logits in memory.
double gigabytes_needed(const Shape& s, bool logits, double bytes) {
  const auto inner = static_cast<double>(s.H * std::max(s.d, s.e));
  const auto rows = static_cast<double>(s.B) * (static_cast<double>(s.Lq) * (static_cast<double>(s.Eq + s.Eo) + 3 * inner) +
                                                static_cast<double>(s.Lk) * (static_cast<double>(s.Ek) + 3 * inner));
  const auto weights = 2 * inner * static_cast<double>(s.Eq + 2 * s.Ek + s.Eo);
  const auto maps = logits ? 2.5 * static_cast<double>(s.B * s.H) * static_cast<double>(s.Lq * s.Lk) : 0;
  return 1e-9 * bytes * (rows + weights + maps) * (s.timed == Timed::backward ? 2.5 : 1);
}

double relative_error(const Tensor& found, const Tensor& expected) {
  const auto size = expected.abs().max().item<double>();
  const auto largest = (found.to(at::kDouble) - expected).abs().max().item<double>();
  return size == 0 ? largest : largest / size;
}

// Calls a candidate once, and compares. Throws if it is wrong.
double check(const Candidate& candidate, const Layer& layer, const Exact& exact) {
  const bool train = layer.grad.defined();
  double error = 0;
  {
    const torch::AutoGradMode grad_mode(train);
    const auto [output, weights] = candidate.call();
    const auto compare = [&](const char* what, const Tensor& found, const Tensor& expected) {
      const auto difference = relative_error(found.detach(), expected.detach());
      // Sums of float32 differ by some 1e-6; a product in TF32 or bfloat16 by 1e-3.
      const auto allowed = layer.key.scalar_type() == at::kFloat ? 1e-4 : 5e-2;
      if (!(difference <= allowed)) {
        throw std::runtime_error(
            fmt::format("{}: {} of {} differs from float64 by {:.1e}", layer.shape.name, what, candidate.name, difference));
      }
      error = std::max(error, difference);
    };
    compare("output", output.index_select(1, exact.places), exact.output);
    if (exact.weights.defined()) compare("weights", weights.index_select(-2, exact.places), exact.weights);
    if (train) {
      const auto grads = torch::autograd::grad({output}, candidate.leaves, {layer.grad}, {}, false, /*allow_unused=*/true);
      for (size_t i = 0; i < candidate.compared; ++i) {
        // The key's bias has no influence, and so rounding errors for a gradient.
        if (candidate.leaves[i].is_same(layer.module->key_linear->bias)) continue;
        compare("a gradient", grads[i].defined() ? grads[i] : torch::zeros_like(candidate.leaves[i]), exact.grads[i]);
      }
    }
  }
  return error;
}

std::function<void()> timed(const Candidate& candidate, const Layer& layer) {
  if (!layer.grad.defined()) return [&candidate] { candidate.call(); };
  return [&candidate, &layer] {
    const auto output = std::get<0>(candidate.call());
    torch::autograd::grad({output}, candidate.leaves, {layer.grad}, {}, false, /*allow_unused=*/true);
  };
}

class Report {
 public:
  explicit Report(const Arguments& arguments) : arguments_(arguments) {
    const auto device = arguments.device == "cpu" ? std::string("cpu") : arguments.device;
    json_["machine"] = {{"processor", line_of("/proc/cpuinfo", "model name")},
                        {"cores", at::get_num_threads()},
                        {"memory_gb", std::round(1.024e-6 * std::stod("0" + line_of("/proc/meminfo", "MemTotal")))},
                        {"device", device}};
    json_["versions"] = {{"libtorch", TORCH_VERSION},
                         {"xattn", fmt::format("{}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH)}};
    json_["peaks"] = Json::object();
    json_["results"] = Json::array();
    json_["skipped"] = Json::array();
  }

  void peak(int threads) {
    peak_ = arguments_.device == "cpu" ? measure_peak(threads) : 0;
    if (peak_ > 0) json_["peaks"][std::to_string(threads)] = std::round(10 * peak_) / 10;
    if (!arguments_.json && peak_ > 0) std::cout << fmt::format("{} threads: {:.0f} GFLOP/s at most\n", threads, peak_);
  }

  void row(const Shape& s, const std::string& weights, int threads) {
    where_ = {{"row", s.name},
              {"weights", weights},
              {"threads", threads},
              {"type", arguments_.device == "cpu" ? "float32" : "bfloat16"}};
    if (!arguments_.json) {
      std::cout << fmt::format("\n{} (weights {}, {} threads; fewest operations: {}, 1/{:.2f})\n", s.name, weights, threads,
                               s.orders, s.times_fewer);
    } else {
      std::cerr << fmt::format("{}, weights {}, {} threads\n", s.name, weights, threads);
    }
  }

  void result(const Shape& s, const Candidate& candidate, double error, const Times& times) {
    auto json = where_;
    json.update({{"runtime", "libtorch"},
                 {"candidate", candidate.name},
                 {"error", error},
                 {"us", times.median},
                 {"low", times.low},
                 {"high", times.high},
                 {"least", times.least},
                 {"samples", times.samples}});
    json_["results"].push_back(json);
    if (arguments_.json) return;
    const auto share = peak_ > 0 ? fmt::format("{:5.0f} % of peak", 1e5 * s.gflop / (times.median * 1e-3) / peak_ * 1e0) : "";
    std::cout << fmt::format("  {:<16}{:>12.1f} us  [{:.1f}, {:.1f}], least {:.1f}, {} samples{}, error {:.1e}\n",
                             candidate.name, times.median, times.low, times.high, times.least, times.samples, share, error);
  }

  void skipped(const std::string& candidate, const std::string& reason) {
    auto json = where_;
    json.update({{"runtime", "libtorch"}, {"candidate", candidate}, {"reason", reason}});
    json_["skipped"].push_back(json);
    if (!arguments_.json) std::cout << fmt::format("  {:<16}  not run: {}\n", candidate, reason);
  }

  void end() const {
    if (arguments_.json) std::cout << json_.dump(1) << "\n";
  }

 private:
  const Arguments& arguments_;
  Json json_, where_;
  double peak_ = 0;
};

void run_row(const Shape& shape, const std::string& weights, const Arguments& arguments, Report& report) {
  const c10::Device device(arguments.device);
  const auto type = device.is_cpu() ? at::kFloat : at::kBFloat16;
  const double bytes = device.is_cpu() ? 4 : 2;
  const auto available = device.is_cpu() ? gigabytes_available() : 1e9;
  if (const auto needed = gigabytes_needed(shape, weights != "none", bytes); needed > available) {
    report.skipped("all", fmt::format("it needs {:.1f} GB, and {:.1f} GB are free", needed, available));
    return;
  }
  const auto layer = make_layer(shape, torch::dtype(type).device(device), weights_named(weights));
  const auto truth = exact(layer);
  const c10::InferenceMode inference(!layer.grad.defined());
  std::vector<Candidate> ready;
  std::vector<double> errors;
  for (auto& candidate : candidates(layer)) {
    const bool logits = candidate.name == "eager" || candidate.name == "mha" || candidate.name == "folded";
    if (const auto needed = gigabytes_needed(shape, logits, bytes); needed > available) {
      candidate.absent = fmt::format("it needs {:.1f} GB, and {:.1f} GB are free", needed, available);
    }
    try {
      if (candidate.absent.empty()) {
        errors.push_back(check(candidate, layer, truth));
        ready.push_back(std::move(candidate));
        continue;
      }
    } catch (const c10::Error& error) {
      if (device.is_cpu()) throw;
      candidate.absent = error.what_without_backtrace();  // a backend that does not take these sizes
      candidate.absent = candidate.absent.substr(0, candidate.absent.find('\n'));
    }
    report.skipped(candidate.name, candidate.absent);
  }
  std::vector<std::function<void()>> calls;
  for (const auto& candidate : ready) calls.push_back(timed(candidate, layer));
  const auto times = measure(calls, arguments.seconds, [&] {
    if (device.is_cuda()) torch::cuda::synchronize(device.index());
  });
  for (size_t i = 0; i < ready.size(); ++i) report.result(shape, ready[i], errors[i], times[i]);
}

void list() {
  for (const auto& s : shapes::all()) {
    std::cout << fmt::format("{:<50}  B {} H {} Lq {} Lk {}, {} {} -> {}\n", s.name, s.B, s.H, s.Lq, s.Lk, s.Eq, s.Ek, s.Eo);
  }
}

void run(const Arguments& arguments) {
  if (arguments.list) return list();
  const auto rows = chosen(arguments);
  program::find_device(arguments.device);
  Report report(arguments);
  auto threads = arguments.threads;
  if (threads.empty()) threads = at::get_num_threads() > 1 ? std::vector{1, 2} : std::vector{1};
  for (const int count : threads) {
    at::set_num_threads(count);
    report.peak(count);
    for (const auto& shape : rows) {
      if (arguments.limit > 0 && shape.gflop > arguments.limit) continue;
      for (const auto& weights : arguments.weights) {
        if (weights != "none" && shape.timed == Timed::backward) continue;
        report.row(shape, weights, count);
        run_row(shape, weights, arguments, report);
      }
    }
  }
  report.end();
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Arguments arguments;
  CLI::App program("Times cross attention in several ways, on layers of real models.", "xattn_bench");
  program.add_option("--shape", arguments.names, "Row by its name, or all with this in their names; repeatable");
  program.add_option("--threads", arguments.threads, "Numbers of threads; 1 and 2 if not given")->check(CLI::Range(1, 1024));
  program.add_option("--weights", arguments.weights, "Which attention weights to return")
      ->check(CLI::IsMember({"none", "mean", "per-head"}))
      ->capture_default_str();
  program.add_option("--device", arguments.device, "cpu in float32, cuda or cuda:N in bfloat16")
      ->check(program::check_device_name, "DEVICE")
      ->capture_default_str();
  program.add_option("--seconds", arguments.seconds, "Time for each candidate of a row")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  program.add_option("--limit", arguments.limit, "Leave out rows of more thousand million operations; 0 for none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  program.add_flag("--list", arguments.list, "Name all rows, and do nothing");
  program.add_flag("--json", arguments.json, "Print JSON, as described below");
  program.footer(bench::kFooter);
  return program::run(program, argc, argv, [&] { bench::run(arguments); });
}
