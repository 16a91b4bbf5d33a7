// SPDX-License-Identifier: Apache-2.0
#include "files/json.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "files/check_file.h"

namespace xattn::detail {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 2'000'000;
constexpr char kNotJson[] = "is not JSON in UTF-8, at its byte {}";

// Builds the document token by token: Json::parse would keep the last of equal names, and take quadratic time with a callback.
class Builder : public nlohmann::json_sax<Json> {
 public:
  explicit Builder(const FileCheck& check) : check_(check) {}

  Json document;

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(int64_t value) override { return add(value); }
  bool number_unsigned(uint64_t value) override { return add(value); }
  bool number_float(double value, const std::string&) override { return add(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(Json::binary_t&) override { return false; }  // not in JSON
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(std::string& name) override {
    const auto [place, is_new] = open_.back()->emplace(name, nullptr);
    check_(is_new, "has the name {} twice in one object", in_quotes(name));
    value_ = &*place;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception&) override { check_.fail(kNotJson, position); }

 private:
  bool add(Json value) {
    check_(++values_ <= kMaxValues, "has more than {} values", kMaxValues);
    if (!open_.empty() && open_.back()->is_array()) value_ = &open_.back()->emplace_back();
    *value_ = std::move(value);
    return true;
  }

  bool open(Json container) {
    check_(open_.size() < kMaxDepth, "is nested deeper than {} levels", kMaxDepth);
    add(std::move(container));
    open_.push_back(value_);
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  FileCheck check_;
  size_t values_ = 0;
  std::vector<Json*> open_;  // objects and lists, from the outermost
  Json* value_ = &document;  // where the next value goes, unless that is the end of a list
};

}  // namespace

Json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most) {
  const FileCheck check(reader, path);
  check(text.size() <= most, "has {} bytes of JSON, more than the limit of {}", text.size(), most);
  // The parser treats a zero byte as the end and would ignore what follows.
  const auto zero = std::ranges::find(text, std::byte{0});
  check(zero == text.end(), kNotJson, zero - text.begin() + 1);

  Builder builder(check);
  const auto* begin = reinterpret_cast<const char*>(text.data());
  Json::sax_parse(begin, begin + text.size(), &builder);
  return std::move(builder.document);
}

}  // namespace xattn::detail
