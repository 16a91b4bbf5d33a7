// SPDX-License-Identifier: Apache-2.0

// Sentences from editable files, and words as numbers.
#include "common/grammar.h"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>

#include "test_util.h"

namespace examples {
namespace {

using xattn::test::error_of;

const GrammarRules kRules = {.slots = {{"digit", {"0", "1"}}, {"side", {"left", "right"}}},
                             .kinds = {{"ask", {{"digit", "side"}, {"digit"}}}, {"tell", {{}}}}};

const std::string kText =
    "# a comment\n"
    "slot digit 0: zero\n"
    "slot digit 1: one | the one\n"
    "\n"
    "slot side left: left of\n"
    "slot side right: right of\n"
    "ask: what is {side} the {digit}\n"
    "ask: where is {digit}\n"
    "tell: nothing\n";

std::string error_in(const std::string& text) {
  return error_of<std::runtime_error>([&] { Grammar(text, "g.txt", kRules); });
}

TEST(GrammarTest, SaysAllPhrasesOfAValueAndNoOther) {
  const Grammar grammar(kText, "g.txt", kRules);
  Random random(1);
  std::set<std::string> said;
  for (int i = 0; i < 50; ++i) said.insert(join(grammar.say(grammar.forms("ask").at(0), {/*side=*/1, /*digit=*/1}, random)));
  EXPECT_EQ(said, (std::set<std::string>{"what is right of the one", "what is right of the the one"}));
}

TEST(GrammarTest, KnowsEachWordOncePhrasesFirst) {
  EXPECT_EQ(Grammar(kText, "g.txt", kRules).vocabulary(),
            (Words{"zero", "one", "the", "left", "of", "right", "what", "is", "where", "nothing"}));
}

TEST(GrammarTest, NamesTheLineOfEachMistake) {
  EXPECT_EQ(error_in("ask what is this\n"),
            "g.txt:1: a line must be 'slot NAME VALUE: PHRASE | PHRASE' or 'KIND: FORM', but is 'ask what is this'");
  EXPECT_EQ(error_in("\nslot colour red: red\n"), "g.txt:2: the slot must be one of digit, side, but is 'colour'");
  EXPECT_EQ(error_in("slot digit 7: seven\n"), "g.txt:1: the value of digit must be one of 0, 1, but is '7'");
  EXPECT_EQ(error_in("slot digit 1: one | | two\n"), "g.txt:1: a phrase is empty");
  EXPECT_EQ(error_in("sing: la\n"), "g.txt:1: the kind must be one of ask, tell, but is 'sing'");
  EXPECT_EQ(error_in("tell:\n"), "g.txt:1: the form is empty");
  EXPECT_EQ(error_in("ask: what is {side} it\n"),
            "g.txt:1: a form of ask must have these slots: {digit} {side}, or {digit}; but it has {side}");
}

TEST(GrammarTest, SaysWhatIsMissing) {
  auto without = kText;
  without.replace(without.find("slot digit 0: zero"), 18, "");
  EXPECT_EQ(error_in(without), "g.txt:9: there is no line 'slot digit 0: PHRASE'");
  EXPECT_EQ(error_in(kText.substr(0, kText.find("tell"))), "g.txt:8: there is no line 'tell: FORM'");
}

TEST(GrammarTest, SaysWhichFileCannotBeRead) {
  EXPECT_EQ(error_of<std::runtime_error>([] { read_grammar("/no/such/file", kRules); }),
            "[file] /no/such/file: cannot be opened: No such file or directory");
}

TEST(GrammarTest, RefusesMoreThanItsLimits) {
  std::string words;
  for (int i = 0; i < 33; ++i) words += " w";
  EXPECT_EQ(error_in("tell:" + words + "\n"), "g.txt:1: may have 32 words in a phrase or form, but has 33");
  EXPECT_EQ(error_in("slot digit 0:" + words + "\n"), "g.txt:1: may have 32 words in a phrase or form, but has 33");
  EXPECT_EQ(error_in("tell: " + std::string(101, 'w') + "\n"),
            "g.txt:1: a word may have 100 bytes, but '" + std::string(101, 'w') + "' has 101");
  EXPECT_EQ(error_in(std::string(1'000'001, '\n')), "g.txt:0: has 1000001 bytes, more than the limit of 1000000");
  auto many = kText;
  for (int i = 0; i < 10'000; ++i) many += "tell: w" + std::to_string(i) + "\n";
  EXPECT_EQ(error_in(many), "g.txt:10009: may have 10000 words in all, but has 10010");
  const auto quoted = error_in(std::string(900'000, 'x'));
  EXPECT_LT(quoted.size(), 500U);
}

TEST(GrammarTest, AWordInOneBraceIsAWord) {
  const Grammar grammar(kText + "tell: {nothing\n", "g.txt", kRules);
  EXPECT_EQ(grammar.forms("tell").at(1).words, Words{"{nothing"});
  EXPECT_TRUE(grammar.forms("tell").at(1).slots.empty());
}

TEST(GrammarTest, SplitsWhatAUserTypes) {
  EXPECT_EQ(split("What is left of the Seven?"), (Words{"what", "is", "left", "of", "the", "seven"}));
  EXPECT_EQ(split("a one, and a two."), (Words{"a", "one", ",", "and", "a", "two"}));
  EXPECT_EQ(join({"a", "one", ",", "and"}), "a one, and");
  EXPECT_TRUE(split(" ?! ").empty());
}

TEST(VocabularyTest, EncodesWithEndAndPaddingAndDecodesBack) {
  const Vocabulary vocabulary({"a", "b", "c"});
  EXPECT_EQ(vocabulary.size(), 5);
  const auto numbers = vocabulary.encode({{"b"}, {"a", "c"}});
  EXPECT_TRUE(numbers.equal(torch::tensor({3, 1, 0, 2, 4, 1}, torch::kInt64).view({2, 3})));
  EXPECT_EQ(vocabulary.decode(numbers[0]), Words{"b"});
  EXPECT_EQ(vocabulary.decode(numbers[1]), (Words{"a", "c"}));
}

TEST(VocabularyTest, NamesTheNearestKnownWords) {
  const Vocabulary vocabulary({"seven", "even", "left", "eleven"});
  EXPECT_EQ(error_of<std::runtime_error>([&] { vocabulary.encode({{"left", "sevn"}}); }),
            "the word 'sevn' is not known; the nearest known words are seven, even, left");
}

}  // namespace
}  // namespace examples
