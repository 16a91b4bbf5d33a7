// SPDX-License-Identifier: Apache-2.0
#include "programs/shapes.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <sstream>
#include <stdexcept>

#include "shapes.csv.h"

namespace shapes {
namespace {

std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> fields;
  std::istringstream stream(line + ';');  // so that an empty last field counts
  for (std::string field; std::getline(stream, field, ';');) fields.push_back(field);
  return fields;
}

template <class Value>
Value choose(const std::string& text, const std::map<std::string, Value>& values) {
  const auto found = values.find(text);
  if (found == values.end()) throw std::logic_error("shapes.csv: unknown word '" + text + "'");
  return found->second;
}

Shape parse(std::map<std::string, std::string> row) {
  const auto number = [&](const char* column) { return static_cast<int64_t>(std::stoll(row.at(column))); };
  Shape shape;
  shape.name = row.at("name");
  shape.timed =
      choose<Timed>(row.at("timed"), {{"forward", Timed::forward}, {"attend", Timed::attend}, {"backward", Timed::backward}});
  shape.learned_query = choose<bool>(row.at("query"), {{"given", false}, {"learned", true}});
  shape.one_context = choose<bool>(row.at("value"), {{"key", true}, {"own", false}});
  shape.B = number("B"), shape.H = number("H"), shape.G = number("G");
  shape.Lq = number("Lq"), shape.Lk = number("Lk"), shape.valid = number("valid");
  shape.Eq = number("Eq"), shape.Ek = number("Ek"), shape.Eo = number("Eo");
  shape.d = number("inner_qk") / shape.H, shape.e = number("inner_v") / shape.H;
  shape.norm = choose<NormOver>(row.at("norm"),
                                {{"-", NormOver::nothing}, {"per_head", NormOver::head}, {"across_heads", NormOver::heads}});
  shape.maps = row.at("maps") != "-" && row.at("maps") != "thrown away";
  shape.from = row.at("from");
  const bool attend = shape.timed == Timed::attend;
  const bool backward = shape.timed == Timed::backward;
  shape.gflop = std::stod(row.at(attend ? "gflop_kept" : "gflop")) * (backward ? 3 : 1);
  std::istringstream(row.at(attend ? "kept" : backward ? "trainable" : "frozen")) >> shape.orders >> shape.times_fewer;
  return shape;
}

std::vector<Shape> read() {
  std::vector<Shape> rows;
  std::vector<std::string> columns;
  std::istringstream stream(kShapesCsv);
  for (std::string line; std::getline(stream, line);) {
    if (line.empty() || line.front() == '#') continue;
    const auto fields = split(line);
    if (columns.empty()) {
      columns = fields;
      continue;
    }
    if (fields.size() != columns.size()) throw std::logic_error("shapes.csv: wrong number of fields in: " + line);
    std::map<std::string, std::string> row;
    for (size_t i = 0; i < fields.size(); ++i) row[columns[i]] = fields[i];
    rows.push_back(parse(row));
  }
  return rows;
}

std::string lower(std::string_view text) {
  std::string result(text);
  std::ranges::transform(result, result.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return result;
}

}  // namespace

const std::vector<Shape>& all() {
  static const auto rows = read();
  return rows;
}

std::vector<Shape> matching(std::string_view text) {
  std::vector<Shape> result;
  for (const auto& shape : all()) {
    if (shape.name == text) return {shape};
    if (lower(shape.name).find(lower(text)) != std::string::npos) result.push_back(shape);
  }
  return result;
}

xattn::PlanRequest plan_request(const Shape& s) {
  xattn::PlanRequest r;
  r.B = s.B, r.H = s.H, r.G = s.G, r.Lq = s.Lq, r.Lk = s.valid;
  r.Eq = s.Eq, r.Ek = r.Ev = s.Ek, r.d = s.d, r.e = s.e, r.Eo = s.Eo;
  r.query_norm = r.key_norm = s.norm != NormOver::nothing;
  r.query_is_constant = s.learned_query;
  r.training = s.timed == Timed::backward;
  if (s.timed == Timed::attend) r.context_rows = xattn::PlanRequest::kKept;
  return r;
}

}  // namespace shapes
