// SPDX-License-Identifier: Apache-2.0
#include "files/json.h"

#include <gtest/gtest.h>
#include <xattn/file_error.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "test_util.h"

namespace xattn::test {
namespace {

using detail::Json;

Json read(std::string_view text) {
  return detail::parse_json("json", "x", std::as_bytes(std::span(text)));
}

std::string refusal(std::string_view text) {
  return error_of<FileError>([text] { read(text); });
}

TEST(JsonTest, FindsValuesByTheirPlaces) {
  const auto json = read(R"( {"a": {"b": [1, {"c": "x"}, null]}, "d": true, "": 2} )");
  EXPECT_EQ(json.find("a/b/1/c")->as<std::string>(), "x");
  EXPECT_EQ(json.find("d")->as<bool>(), true);
  EXPECT_EQ(json.find("")->object(), json.object());
  EXPECT_EQ(json.find("a/b/0")->as<int64_t>(), 1);
  EXPECT_EQ(json.find("a/b")->list()->size(), 3);
  for (const auto* place : {"e", "a/c", "a/b/3", "a/b/-1", "a/b/x", "d/e", "a/b/1/c/d"})
    EXPECT_EQ(json.find(place), nullptr) << place;
}

TEST(JsonTest, GivesAValueOfItsOwnKindAlone) {
  const auto json = read(R"([true, 1, "1", null, 1.5])");
  const auto& all = *json.list();
  EXPECT_FALSE(all[0].as<int64_t>() || all[0].as<std::string>() || all[2].as<double>() || all[3].as<bool>() ||
               all[4].as<int64_t>());
  EXPECT_EQ(all[1].as<double>(), 1);
  EXPECT_EQ(all[4].as<double>(), 1.5);
}

TEST(JsonTest, KeepsIntegersOfEverySizeAndRefusesWhatDoesNotFit) {
  const auto signed_ = [](const std::string& text) { return detail::json_number<int64_t>(text); };
  const auto unsigned_ = [](const std::string& text) { return detail::json_number<uint64_t>(text); };
  EXPECT_EQ(signed_("-9223372036854775808"), INT64_MIN);
  EXPECT_EQ(signed_("9223372036854775808"), std::nullopt);
  EXPECT_EQ(unsigned_("18446744073709551615"), UINT64_MAX);
  for (const auto* text : {"18446744073709551616", "-1", "-0", "1.0", "1e2"}) EXPECT_EQ(unsigned_(text), std::nullopt) << text;
  EXPECT_EQ(detail::json_number<double>("1e-999"), 0);
  EXPECT_EQ(refusal("[-1e999]"), "[json] x: is not JSON in UTF-8, at its byte 7");
}

TEST(JsonTest, TellsNumbersThatAreTooLargeFromThoseThatAreTooSmall) {
  const std::string zeros(400, '0'), nines(400, '9');
  for (const auto& text : {"0." + zeros + "1", "1e-" + nines, "-0." + zeros + "1e50", "1" + zeros + "e-999"}) {
    EXPECT_EQ(detail::json_number<double>(text), 0) << text;
    EXPECT_EQ(read("[" + text + "]").find("0")->as<double>(), 0) << text;
  }
  for (const auto& text : {"1" + zeros, "1" + zeros + "e-1", "-1" + zeros + ".5E-50", "1e" + nines, "0." + zeros + "1e+999"}) {
    EXPECT_EQ(detail::json_number<double>(text), std::nullopt) << text;
    EXPECT_TRUE(refusal("[" + text + "]").starts_with("[json] x: is not JSON in UTF-8")) << text;
  }
}

TEST(JsonTest, WritesStringsThatAnotherParserReads) {
  std::string all;
  for (char c = 1; c > 0 && c < 127; ++c) all += c;
  all += "\x7f \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80";
  EXPECT_EQ(nlohmann::json::parse(detail::json_string(all).value()), all);
  EXPECT_EQ(read(detail::json_string(all).value()).as<std::string>(), all);
  for (const auto* text : {"\xff", "\xc0\xaf", "\xed\xa0\x80", "\xc3"}) EXPECT_EQ(detail::json_string(text), std::nullopt);
}

// Changes documents byte by byte: both accept the same ones and read the same values.
TEST(JsonTest, AcceptsAndReadsWhatAnotherParserDoes) {
  const std::vector<std::string> documents = {
      R"({"a":[1,-2,3.25e+2,0,-0.5E-3],"b":{"c":null,"d":[true,false]},"e":"x\n\u00e9\ud83d\ude00\/"})",
      "[\"\xc3\xa9\xe2\x82\xac\", {} ,[ ] , 18446744073709551616, 1e308, 1e-320]", R"("\u0000\"\\")", " 12 ", "\xef\xbb\xbf{}"};
  constexpr std::string_view kBytes = "{}[]\",:.+-0123456789eEu\\/ntrfalsd \n\t\x01\x7f\xc3\xa9\xed\xa0\xff";
  std::mt19937 random(0);
  const auto below = [&random](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  int accepted = 0, refused = 0;
  for (int i = 0; i < 40000; ++i) {
    auto text = documents[below(documents.size())];
    for (auto changes = below(3); changes > 0 && !text.empty(); --changes) {
      const auto at = below(text.size());
      switch (below(3)) {
        case 0: text[at] = kBytes[below(kBytes.size())]; break;
        case 1: text.insert(at, 1, kBytes[below(kBytes.size())]); break;
        default: text.erase(at, 1);
      }
    }
    const auto other = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    std::optional<Json> ours;
    try {
      ours = read(text);
    } catch (const FileError& error) {
      if (std::string_view(error.what()).find("twice") != std::string_view::npos) continue;  // which the other allows
    }
    ASSERT_EQ(ours.has_value(), !other.is_discarded()) << text;
    ++(ours ? accepted : refused);
    ASSERT_TRUE(!ours || nlohmann::json::parse(ours->text()) == other) << text;
  }
  EXPECT_GT(accepted, 5000);
  EXPECT_GT(refused, 5000);
}

}  // namespace
}  // namespace xattn::test
