// SPDX-License-Identifier: Apache-2.0
#include "bench/bench_report.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/version.h>
#include <xattn/version.h>

#include <cmath>
#include <fstream>
#include <iostream>

namespace bench {
namespace {

using Json = nlohmann::ordered_json;

// The value of `key` in a file of lines "key : value", such as /proc/cpuinfo; empty if there is none.
std::string value_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const auto begin = line.find_first_not_of(" \t", line.find(':') + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return {};
}

// The name with family and model, because on virtual machines the name alone says little.
std::string processor() {
  const auto* const path = "/proc/cpuinfo";
  const auto name = value_of(path, "model name");
  const auto family = value_of(path, "cpu family");
  const auto model = value_of(path, "model\t");
  return family.empty() ? name : fmt::format("{} (family {}, model {})", name, family, model);
}

double gigabytes(const std::string& kibibytes) {
  return kibibytes.empty() ? 1e9 : 1.024e-6 * std::stod(kibibytes);
}

}  // namespace

double gigabytes_free() {
  return gigabytes(value_of("/proc/meminfo", "MemAvailable"));
}

BenchReport::BenchReport(bool json, const std::string& device) : as_json_(json), cpu_(device == "cpu") {
  json_["machine"] = {{"processor", processor()},
                      {"cores", at::get_num_threads()},
                      {"memory_gb", std::round(gigabytes(value_of("/proc/meminfo", "MemTotal")))},
                      {"device", device}};
  json_["versions"] = {{"libtorch", TORCH_VERSION},
                       {"xattn", fmt::format("{}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH)}};
  json_["peaks"] = Json::object();
  json_["results"] = Json::array();
  json_["skipped"] = Json::array();
}

void BenchReport::threads(int count) {
  threads_ = count;
  if (!cpu_) return;
  peak_ = measure_peak(count);
  json_["peaks"][std::to_string(count)] = std::round(10 * peak_) / 10;
  if (!as_json_) std::cout << fmt::format("threads {}: at most {:.0f} GFLOP/s\n", count, peak_);
}

void BenchReport::begin_row(const std::string& name, const std::string& weights) {
  where_ = {{"row", name},
            {"weights", weights},
            {"threads", threads_},
            {"type", cpu_ ? "float32" : "bfloat16"},
            {"runtime", "libtorch"}};
  if (as_json_) {
    std::cerr << fmt::format("libtorch, {} threads, weights {}: {}\n", threads_, weights, name);
  } else {
    std::cout << fmt::format("\n{}; threads {}, weights {}", name, threads_, weights);
  }
}

void BenchReport::row(const shapes::Shape& shape, const std::string& weights) {
  const auto operations = shapes::count_operations(shape);
  gflop_ = 1e-9 * operations.standard;
  begin_row(shape.name, weights);
  if (as_json_) return;
  std::cout << fmt::format("; fewest operations: logits {}, values {}, {:.2f} times fewer than standard\n",
                           name_of(operations.orders.logits), name_of(operations.orders.values), operations.times_fewer);
}

void BenchReport::row(const BlockRow& row) {
  gflop_ = 0;
  begin_row(row.name, "none");
  if (!as_json_) std::cout << "\n";
}

void BenchReport::result(const Candidate& candidate, double error, const Times& times) {
  auto json = where_;
  json.update({{"candidate", candidate.name},
               {"error", error},
               {"us", times.median},
               {"low", times.low},
               {"high", times.high},
               {"p95", times.p95},
               {"least", times.least},
               {"samples", times.samples}});
  if (candidate.context_bytes) json["context_bytes"] = *candidate.context_bytes;
  json_["results"].push_back(json);
  if (as_json_) return;
  const auto rate = 1e6 * gflop_ / times.median;  // 1e9 operations of the standard order a second
  const auto share = peak_ > 0 && gflop_ > 0 ? fmt::format("{:6.0f} % of peak,", 100 * rate / peak_) : "";
  const auto bytes = candidate.context_bytes ? fmt::format(", contexts {} bytes", *candidate.context_bytes) : "";
  std::cout << fmt::format("  {:<16}{:>12.1f} us [{:.1f}, {:.1f}], least {:.1f}, {} samples,{} error {:.0e}{}\n",
                           candidate.name, times.median, times.low, times.high, times.least, times.samples, share, error,
                           bytes);
}

void BenchReport::skipped(const std::string& candidate, const std::string& reason) {
  auto json = where_;
  json.update({{"candidate", candidate}, {"reason", reason}});
  json_["skipped"].push_back(json);
  if (!as_json_) std::cout << fmt::format("  {:<16}  not run: {}\n", candidate, reason);
}

void BenchReport::orders(const std::string& kind, const Json& measured) {
  if (measured.is_null()) return;
  auto& of_threads = json_[kind][std::to_string(threads_)];
  if (measured.is_array()) {
    of_threads = measured;
  } else {
    of_threads.push_back(measured);
  }
  if (as_json_) return;
  for (const auto& line : measured.is_array() ? measured : Json::array({measured})) std::cout << line.dump() << "\n";
}

void BenchReport::end() const {
  if (as_json_) std::cout << json_.dump(1) << "\n";
}

}  // namespace bench
