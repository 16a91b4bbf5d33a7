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

Shape parse(const std::map<std::string, std::string>& row) {
  const auto number = [&](const std::string& column) { return static_cast<int64_t>(std::stoll(row.at(column))); };
  const auto maps = row.at("maps");
  return {.name = row.at("name"),
          .timed = choose<Timed>(row.at("timed"),
                                 {{"forward", Timed::forward}, {"attend", Timed::attend}, {"backward", Timed::backward}}),
          .learned_query = choose<bool>(row.at("query"), {{"given", false}, {"learned", true}}),
          .one_context = choose<bool>(row.at("value"), {{"key", true}, {"own", false}}),
          .B = number("B"),
          .H = number("H"),
          .G = number("G"),
          .Lq = number("Lq"),
          .Lk = number("Lk"),
          .valid = number("valid"),
          .Eq = number("Eq"),
          .Ek = number("Ek"),
          .Eo = number("Eo"),
          .d = number("inner_qk") / number("H"),
          .e = number("inner_v") / number("H"),
          .norm = choose<NormOver>(row.at("norm"),
                                   {{"-", NormOver::nothing}, {"per_head", NormOver::head}, {"across_heads", NormOver::heads}}),
          .maps = maps != "-" && maps != "thrown away"};
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
  const bool has_norm = s.norm != NormOver::nothing;
  return {.B = s.B,
          .H = s.H,
          .G = s.G,
          .Lq = s.Lq,
          .Lk = s.valid,
          .Eq = s.Eq,
          .Ek = s.Ek,
          .Ev = s.Ek,
          .d = s.d,
          .e = s.e,
          .Eo = s.Eo,
          .query_norm = has_norm,
          .key_norm = has_norm,
          .query_is_constant = s.learned_query,
          .training = s.timed == Timed::backward,
          .context_rows = s.timed == Timed::attend ? xattn::PlanRequest::kKept : 0};
}

Operations count_operations(const Shape& shape) {
  auto request = plan_request(shape);
  request.weights_are_frozen = !request.training;
  request.rates = {.flops = 1e9, .memory = 1e18, .softmax = 1e18};  // only operations cost time
  const auto fewest = make_plan(request);
  request.query_is_constant = false;
  const auto over_real_keys = cost_of({}, request).operations;
  request.Lk = shape.Lk;
  return {
      .standard = cost_of({}, request).operations, .orders = fewest.orders, .times_fewer = over_real_keys / fewest.operations};
}

}  // namespace shapes
