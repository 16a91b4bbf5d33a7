// SPDX-License-Identifier: Apache-2.0

// The contents of the page. Pointing is tested by scripts/check_report.sh, which needs a browser.
#include "common/report.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/png.h"
#include "test_util.h"

namespace examples {
namespace {

using nlohmann::json;
using xattn::test::error_of;
using xattn::test::read_bytes;
using xattn::test::TempDir;
using xattn::test::write_bytes;

Example example(bool right, const std::string& title) {
  return {.right = right,
          .title = title,
          .answer = "8",
          .truth = right ? "8" : "3",
          .picture = torch::randint(256, {6, 4, 3}, torch::kUInt8),
          .words = {{"what", torch::tensor({{0.25F, 0.0F}, {0.5F, 0.25F}})}, {",", {}}},
          .map = torch::tensor({{0.125F, 0.125F, 0.75F}})};
}

// A report with every kind of content.
Report full_report() {
  return {.title = "Questions",
          .summary = "All is well.",
          .facts = {{"steps", "300"}, {"seed", "0"}},
          .curves = {{"loss", {10, 20, 30}, {2.5, 0.5, 0.25}}},
          .rates = {{"place", 9, 10}, {"count", 0, 0}},
          .confusion = {{"yes", "no"}, torch::tensor({{7, 1}, {2, 5}})},
          .examples = {example(true, "first"), example(false, "second"), example(true, "third"), example(false, "fourth")}};
}

int64_t count(const std::string& text, const std::string& part) {
  int64_t found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++found;
  }
  return found;
}

std::string decode_base64(const std::string& text) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  EXPECT_EQ(text.size() % 4, 0U);
  std::string bytes;
  unsigned bits = 0;
  int known = 0;
  for (const char c : text.substr(0, text.find('='))) {
    bits = bits << 6 | static_cast<unsigned>(digits.find(c));
    known += 6;
    if (known >= 8) {
      known -= 8;
      bytes += static_cast<char>(bits >> known & 0xff);
    }
  }
  return bytes;
}

class ReportTest : public testing::Test {
 protected:
  std::string page_of(const Report& report) const {
    write_report(path, report);
    return read_bytes(path);
  }

  json data_of(const Report& report) const {
    const auto page = page_of(report);
    const std::string open = R"(<script type="application/json" id="data">)";
    const auto begin = page.find(open) + open.size();
    return json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  }

  std::string error_with(const Report& report) const {
    const auto message = error_of<c10::ValueError>([&] { write_report(path, report); });
    EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
    return message;
  }

  const TempDir dir;
  const std::string path = dir.file("report.html");
};

TEST_F(ReportTest, HoldsTheData) {
  auto data = data_of(full_report());
  auto first = data.at("examples").at(0);
  data.erase("examples");
  EXPECT_EQ(data, json::parse(R"({
    "title": "Questions",
    "summary": "All is well.",
    "facts": [{"name": "steps", "value": "300"}, {"name": "seed", "value": "0"}],
    "curves": [{"name": "loss", "steps": [10.0, 20.0, 30.0], "values": [2.5, 0.5, 0.25]}],
    "rates": [{"name": "place", "right": 9, "total": 10}, {"name": "count", "right": 0, "total": 0}],
    "confusion": {"labels": ["yes", "no"], "counts": [[7, 1], [2, 5]]}
  })"));
  first.erase("picture");
  EXPECT_EQ(first, json::parse(R"({
    "right": false, "title": "second", "answer": "8", "truth": "3",
    "words": [{"text": "what", "map": [[0.25, 0.0], [0.5, 0.25]]}, {"text": ",", "map": null}],
    "map": [[0.125, 0.125, 0.75]]
  })"));
}

TEST_F(ReportTest, HoldsThePictures) {
  for (int64_t width = 1; width < 9; ++width) {  // with and without base64's padding
    Report report;
    report.examples = {example(true, "one")};
    report.examples[0].picture = torch::randint(256, {2, width, 3}, torch::kUInt8);
    const auto picture = data_of(report).at("examples").at(0).at("picture").get<std::string>();
    const std::string prefix = "data:image/png;base64,";
    ASSERT_EQ(picture.find(prefix), 0U);
    const auto png = dir.file("picture.png");
    write_bytes(png, decode_base64(picture.substr(prefix.size())));
    EXPECT_TRUE(read_png(png).equal(report.examples[0].picture));
  }
}

TEST_F(ReportTest, WrongAnswersComeFirst) {
  const auto data = data_of(full_report());
  std::vector<std::string> titles;
  for (const auto& one : data.at("examples")) {
    titles.push_back(one.at("title"));
  }
  EXPECT_EQ(titles, (std::vector<std::string>{"second", "fourth", "first", "third"}));
}

TEST_F(ReportTest, TextsAreNeverHtml) {
  const std::string evil = "</script><script>alert('1')</script><!-- \"&amp;\" {{report}} \\u003c";
  auto report = full_report();
  report.title = report.summary = report.facts[0].first = report.facts[0].second = evil;
  report.curves[0].name = report.rates[0].name = report.confusion.labels[0] = evil;
  auto& one = report.examples[1];
  one.title = one.answer = one.truth = one.words[0].text = evil;

  const auto page = page_of(report);
  EXPECT_EQ(count(page, "<script"), 2);
  EXPECT_EQ(count(page, "</script"), 2);
  const auto data = data_of(report);
  EXPECT_EQ(data.at("title"), evil);
  EXPECT_EQ(data.at("examples").at(0).at("words").at(0).at("text"), evil);
}

TEST_F(ReportTest, WhatIsNoUtf8IsReplaced) {
  Report report;
  report.title = "caf\xe9";
  EXPECT_EQ(data_of(report).at("title"), "caf\xef\xbf\xbd");
}

TEST_F(ReportTest, NeedsNothingFromOutside) {
  const auto page = page_of(full_report());
  for (const auto* part : {"http:", "https:", "src=", "href=", "url(", "@import", "import(", "fetch(", "{{report}}"}) {
    EXPECT_EQ(page.find(part), std::string::npos) << part;
  }
  EXPECT_NE(page.find("default-src 'none'; img-src data:;"), std::string::npos);
}

TEST_F(ReportTest, SameReportGivesTheSameBytes) {
  const auto report = full_report();
  EXPECT_EQ(page_of(report), page_of(report));
}

TEST_F(ReportTest, AllPartsMayBeMissing) {
  const auto data = data_of(Report());
  EXPECT_TRUE(data.at("confusion").is_null());
  EXPECT_TRUE(data.at("examples").empty());
}

TEST_F(ReportTest, NanIsAGapInACurveAndNoAttentionInAMap) {
  Report report;
  report.curves = {{"loss", {1, 2}, {0.5, NAN}}};
  report.examples = {example(false, "diverged")};
  report.examples[0].map = torch::tensor({{NAN, 1.0F}});
  const auto data = data_of(report);
  EXPECT_EQ(data.at("curves").at(0).at("values"), json::parse("[0.5, null]"));
  EXPECT_EQ(data.at("examples").at(0).at("map"), json::parse("[[0.0, 1.0]]"));
}

TEST_F(ReportTest, RefusesWrongTensorsByName) {
  auto report = full_report();
  report.examples[2].picture = torch::zeros({4, 5, 3});
  EXPECT_EQ(error_with(report), "[encode_png] picture must be uint8 [height, width, 3], but is Float [4, 5, 3].");

  report = full_report();
  report.examples[2].words[0].map = torch::ones({36});
  EXPECT_EQ(error_with(report), "[write_report] map must be float [rows, columns], but is Float [36].");

  report = full_report();
  report.confusion.counts = torch::zeros({2, 3}, torch::kInt64);
  EXPECT_EQ(error_with(report), "[write_report] counts of 2 labels must be int64 [2, 2], but are Long [2, 3].");

  report = full_report();
  report.curves[0].values.pop_back();
  EXPECT_EQ(error_with(report), "[write_report] the curve \"loss\" must have as many steps as values, but has 3 and 2.");
}

TEST_F(ReportTest, SaysWhichFileCannotBeWritten) {
  const auto lost = dir.file("no/such/folder.html");
  EXPECT_EQ(error_of<std::runtime_error>([&] { write_report(lost, full_report()); }),
            "[output] " + lost + ": cannot be written: No such file or directory");
}

}  // namespace
}  // namespace examples
