// SPDX-License-Identifier: Apache-2.0
#include "common/report.h"

#include <c10/util/Exception.h>

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "common/png.h"
#include "common/write_file.h"
#include "report.html.h"

namespace examples {
namespace {

using Json = nlohmann::ordered_json;

// RFC 4648.
std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto byte = [bytes](size_t i) { return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0U; };
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto bits = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
    for (const int shift : {18, 12, 6, 0}) text += kDigits[bits >> shift & 63];
  }
  // Digits for bytes after the end become padding.
  const auto padding = text.size() - (bytes.size() * 4 + 2) / 3;
  return text.replace(text.size() - padding, padding, padding, '=');
}

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
          {"picture", "data:image/png;base64," + base64(encode_png(example.picture))},
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

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (auto at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

}  // namespace

void write_report(const std::string& path, const Report& report) {
  // Invalid UTF-8 becomes U+FFFD. Without "<" no text can end the element that holds the data.
  auto data = report_json(report).dump(/*indent=*/-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
  replace_all(data, "<", "\\u003c");
  std::string page = kReportHtml;
  replace_all(page, "{{report}}", data);
  write_file(path, page);
}

}  // namespace examples
