// SPDX-License-Identifier: Apache-2.0
#include "common/report.h"

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/page.h"
#include "common/png.h"
#include "report.html.h"

namespace examples {
namespace {

using Json = nlohmann::ordered_json;

// table [rows, columns] of Ts -> a list of rows.
template <typename T>
Json rows_of(const torch::Tensor& table) {
  const auto plain = table.contiguous();
  const auto columns = plain.size(1);
  auto rows = Json::array();
  for (int64_t i = 0; i < plain.size(0); ++i) {
    const auto* row = plain.const_data_ptr<T>() + i * columns;
    rows.push_back(std::vector<T>(row, row + columns));
  }
  return rows;
}

Json map_json(const torch::Tensor& map) {
  if (!map.defined()) return nullptr;
  TORCH_CHECK_VALUE(map.is_floating_point() && map.dim() == 2 && map.numel() > 0,
                    "[write_report] map must be float [rows, columns], but is ", map.scalar_type(), " ", map.sizes(), ".");
  constexpr auto kPrecision = 1e6;  // finer than visible, and keeps the page small
  const auto weights = map.detach().to(torch::kCPU, torch::kFloat64).nan_to_num(/*nan=*/0);
  return rows_of<double>((weights * kPrecision).round() / kPrecision);
}

Json confusion_json(const Confusion& confusion) {
  const auto& [labels, counts] = confusion;
  if (labels.empty()) return nullptr;
  const auto n = static_cast<int64_t>(labels.size());
  TORCH_CHECK_VALUE(counts.scalar_type() == torch::kInt64 && counts.sizes() == torch::IntArrayRef({n, n}),
                    "[write_report] counts of ", n, " labels must be int64 [", n, ", ", n, "], but are ",
                    counts.scalar_type(), " ", counts.sizes(), ".");
  return {{"labels", labels}, {"counts", rows_of<int64_t>(counts.cpu())}};
}

Json example_json(const Example& example) {
  auto words = Json::array();
  for (const auto& word : example.words) words.push_back({{"text", word.text}, {"map", map_json(word.map)}});
  return {{"right", example.right},
          {"title", example.title},
          {"answer", example.answer},
          {"truth", example.truth},
          {"picture", data_url("image/png", encode_png(example.picture))},
          {"words", words},
          {"map", map_json(example.map)}};
}

Json report_json(const Report& report) {
  auto facts = Json::array();
  for (const auto& [name, value] : report.facts) facts.push_back({{"name", name}, {"value", value}});
  auto curves = Json::array();
  for (const auto& [name, steps, values] : report.curves) {
    TORCH_CHECK_VALUE(steps.size() == values.size(), "[write_report] the curve \"", name,
                      "\" must have as many steps as values, but has ", steps.size(), " and ", values.size(), ".");
    curves.push_back({{"name", name}, {"steps", steps}, {"values", values}});
  }
  auto rates = Json::array();
  for (const auto& [name, right, total] : report.rates) {
    rates.push_back({{"name", name}, {"right", right}, {"total", total}});
  }
  auto shown = Json::array();
  for (const bool right : {false, true}) {
    for (const auto& example : report.examples) {
      if (example.right == right) shown.push_back(example_json(example));
    }
  }
  return {{"title", report.title}, {"summary", report.summary},
          {"facts", facts},        {"curves", curves},
          {"rates", rates},        {"confusion", confusion_json(report.confusion)},
          {"examples", shown}};
}

}  // namespace

void write_report(const std::string& path, const Report& report) {
  write_page(path, kReportHtml, report_json(report));
}

}  // namespace examples
