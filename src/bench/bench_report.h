// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "bench/block_rows.h"
#include "bench/candidates.h"
#include "bench/measure.h"
#include "programs/shapes.h"

namespace bench {

/// The measurements, printed as text one by one, or as one JSON object at the end.
class BenchReport {
 public:
  BenchReport(bool json, const std::string& device);

  void threads(int count);  ///< sets the number of threads from here on, and measures the processor's peak
  void row(const shapes::Shape& shape, const std::string& weights);
  void row(const BlockRow& row);
  void result(const Candidate& candidate, double error, const Times& times);
  void skipped(const std::string& candidate, const std::string& reason);
  /// kind: "crossover", with a list of cells, or "regret", with a row; see order_times.h.
  void orders(const std::string& kind, const nlohmann::ordered_json& measured);
  void end() const;

 private:
  void begin_row(const std::string& name, const std::string& weights);

  bool as_json_;
  bool cpu_;
  nlohmann::ordered_json json_;
  nlohmann::ordered_json where_;  // fields shared by the results of a row
  double gflop_ = 0;              // the row's operations in the standard order; 0 if they are not counted
  int threads_ = 0;
  double peak_ = 0;  // 1e9 operations a second; 0 if unknown
};

/// Free memory of the host, in 1e9 bytes.
double gigabytes_free();

}  // namespace bench
