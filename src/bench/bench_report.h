// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "bench/candidates.h"
#include "bench/measure.h"
#include "programs/shapes.h"

namespace bench {

/// What was measured, as lines of text while it goes on, or as one JSON object at the end.
class Report {
 public:
  Report(bool json, const std::string& device);

  void threads(int count);  ///< what follows runs on so many; measures the peak of the processor
  void row(const shapes::Shape& shape, const std::string& weights);
  void result(const Candidate& candidate, double error, const Times& times);
  void skipped(const std::string& candidate, const std::string& reason);
  void crossover(const nlohmann::ordered_json& cells);
  void regret(const nlohmann::ordered_json& row);  ///< nothing if it is null
  void end() const;

 private:
  bool as_json_, cpu_;
  nlohmann::ordered_json json_, where_;
  shapes::Shape shape_;
  int threads_ = 0;
  double peak_ = 0;  // 1e9 operations a second; 0 if unknown
};

/// Memory that is free on the host, in 1e9 bytes.
double gigabytes_free();

}  // namespace bench
