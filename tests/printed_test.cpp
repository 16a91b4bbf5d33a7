// SPDX-License-Identifier: Apache-2.0
#include "base/printed.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "files/check_file.h"

namespace xattn::detail {
namespace {

TEST(PrintedTest, LeavesTextsInAnyLanguageUnchanged) {
  for (const std::string text : {"", "model.weight", "größe 日本語 \xf0\x9f\x98\x80", "a \\ b"})
    EXPECT_EQ(one_line(text), text);
  EXPECT_EQ(in_quotes("größe"), "\"größe\"");
}

TEST(PrintedTest, EscapesCharactersThatControlATerminal) {
  EXPECT_EQ(one_line(std::string("\0\t\n\r\x1b[2J\x7f", 9)), R"(\x00\x09\x0a\x0d\x1b[2J\x7f)");
  EXPECT_EQ(one_line("\xc2\x80\xc2\x9b"), R"(\u0080\u009b)") << "C1";
  EXPECT_EQ(one_line("\xe2\x80\xae\xe2\x81\xa6\xd8\x9c\xe2\x80\x8f"), R"(\u202e\u2066\u061c\u200f)") << "bidirectional";
  EXPECT_EQ(one_line("\xe2\x80\xa8\xe2\x80\xa9"), R"(\u2028\u2029)") << "ends of lines";
}

TEST(PrintedTest, EscapesBytesThatAreNotUtf8) {
  EXPECT_EQ(one_line("\x9b\xff"), R"(\x9b\xff)") << "C1 in eight bits";
  EXPECT_EQ(one_line("\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80\xe2\x80"), R"(\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80\xe2\x80)");
}

TEST(PrintedTest, QuotesAsJson) {
  const std::vector<std::string> texts = {"a\"b\\c\b\f\n\r\t", "\x1b[31m\x7f", "\xc2\x9b\xe2\x80\xae", "größe"};
  for (const auto& text : texts) {
    EXPECT_EQ(nlohmann::json::parse(in_quotes(text)).get<std::string>(), text);
    EXPECT_EQ(one_line(in_quotes(text)), in_quotes(text));
  }
  EXPECT_EQ(in_quotes("\x1b\x7f\xc2\x9b"), R"("\u001b\u007f\u009b")");
  EXPECT_EQ(in_quotes("a\xff"), "\"a\xef\xbf\xbd\"");
}

TEST(PrintedTest, ShortensNamesAndSaysHowLongTheyAre) {
  EXPECT_EQ(in_quotes(std::string(kMostOfName, 'x')).size(), kMostOfName + 2);
  EXPECT_EQ(in_quotes(std::string(1 << 20, 'x')), "\"" + std::string(kMostOfName, 'x') + "\" (1048576 bytes)");
  const auto cut = in_quotes("x" + std::string(100, '\n') + std::string("ä") + std::string(1000, 'y'));
  EXPECT_LT(cut.size(), 2 * kMostOfName + 20);
  std::string wide;
  for (size_t i = 0; i < kMostOfName; ++i) wide += "ä";
  EXPECT_EQ(in_quotes("x" + wide).find("\xef\xbf\xbd"), std::string::npos) << "no character is cut in two";
}

TEST(PrintedTest, ShortensMessagesInTheMiddle) {
  const auto line = one_line("begin" + std::string(100'000'000, '\x1b') + "end");
  EXPECT_LT(line.size(), 5 * kMostOfMessage);
  EXPECT_TRUE(line.starts_with("begin") && line.ends_with("end"));
  EXPECT_NE(line.find(" bytes left out) ... "), std::string::npos);
}

TEST(PrintedTest, ListsAHundredNames) {
  std::vector<std::string> names(100, "a");
  EXPECT_EQ(list("missing", {}), "");
  EXPECT_EQ(list("missing", {"a", "b\n"}), "; missing: a, b\\x0a");
  EXPECT_EQ(list("missing", names).find("more"), std::string::npos);
  names.resize(20'000, std::string(100'000, 'b'));
  const auto text = list("missing", names);
  EXPECT_TRUE(text.ends_with(" and 19900 more")) << text;
  EXPECT_LT(text.size(), 1000U);
}

TEST(PrintedTest, JsonStaysWhole) {
  const nlohmann::json json = {{"a\x7f", {"\xe2\x80\xae", std::string(100'000, 'x'), "\xc2\x9b\n"}}, {"größe", 1}};
  const auto printed = printed_json(json.dump(2));
  EXPECT_EQ(nlohmann::json::parse(printed), json);
  EXPECT_EQ(printed.find('\x7f'), std::string::npos);
  EXPECT_EQ(printed.find("\xe2\x80\xae"), std::string::npos);
  EXPECT_EQ(printed.find("\xc2\x9b"), std::string::npos);
  EXPECT_NE(printed.find("größe"), std::string::npos);
}

}  // namespace
}  // namespace xattn::detail
