// SPDX-License-Identifier: Apache-2.0
#include "files/pickle.h"

#include <gtest/gtest.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "file_checks.h"
#include "pickle_writer.h"
#include "test_util.h"

namespace xattn {
namespace {

using detail::Pickle;
using detail::PickleNames;
using test::little_endian;
using test::pickle::global;
using test::pickle::text;
using test::pickle::whole;
using Kind = Pickle::Kind;

constexpr auto kStateDict = PickleNames::state_dict;
constexpr auto kTorchScript = PickleNames::torchscript;

// The texts of a pickle lie in `bytes`.
Pickle read(const std::string& bytes, PickleNames names = kStateDict) {
  return detail::read_pickle("x.pt", std::as_bytes(std::span(bytes)), names);
}

Pickle read(std::string&& bytes, PickleNames names = kStateDict) = delete;

// The message of the error for a pickle of these instructions, which must be one line that names its file.
std::string pickle_refusal(const std::string& instructions, PickleNames names = kStateDict) {
  const auto bytes = whole(instructions);
  return test::refusal_by("pickle", "x.pt", [&] { read(bytes, names); });
}

// Values in Python's notation, as far as the tests need it.
std::string show(const Pickle& pickle, Pickle::Id id) {
  const auto items = [&](const char* begin, const char* end) {
    std::string all;
    for (const auto item : pickle.items(id)) all += (all.empty() ? "" : " ") + show(pickle, item);
    return begin + all + end;
  };
  switch (pickle.kind(id)) {
    case Kind::none: return "None";
    case Kind::boolean: return pickle.integer(id) != 0 ? "True" : "False";
    case Kind::integer: return std::to_string(pickle.integer(id));
    case Kind::real: return std::to_string(pickle.real(id));
    case Kind::text: return "'" + std::string(pickle.text(id)) + "'";
    case Kind::tuple: return items("(", ")");
    case Kind::list: return items("[", "]");
    case Kind::dict: return items("{", "}");
    case Kind::global: return "global " + std::string(pickle.text(id));
    case Kind::storage: return items("storage(", ")");
    case Kind::tensor: return items("tensor(", ")");
    case Kind::other_tensor: return "other tensor " + std::string(pickle.text(id));
    case Kind::object: return items("object(", ")");
    case Kind::foreign: return "foreign " + std::string(pickle.text(id));
    case Kind::other: return "other";
  }
  return "";
}

std::string shown(const std::string& instructions, PickleNames names = kStateDict) {
  const auto bytes = whole(instructions);
  const auto pickle = read(bytes, names);
  return show(pickle, pickle.root);
}

// ---- Reading ----------------------------------------------------------------------------------------------------------------

TEST(PickleTest, ReadsNumbersOfEachLength) {
  EXPECT_EQ(shown("N"), "None");
  EXPECT_EQ(shown("\x88"), "True");
  EXPECT_EQ(shown("\x89"), "False");
  EXPECT_EQ(shown("K\xff"), "255");
  EXPECT_EQ(shown("M\xff\xff"), "65535");
  EXPECT_EQ(shown("J\xff\xff\xff\xff"), "-1");
  EXPECT_EQ(shown(std::string("\x8a\0", 2)), "0");
  EXPECT_EQ(shown("\x8a\1\x80"), "-128");
  EXPECT_EQ(shown("\x8a\2\xff" + std::string(1, '\0')), "255");
  EXPECT_EQ(shown(test::pickle::integer(std::numeric_limits<int64_t>::min())), "-9223372036854775808");
  EXPECT_EQ(shown("\x8b" + little_endian(3, 4) + "\xfe\xff\xff"), "-2");
  EXPECT_EQ(shown("\x8a\x09" + std::string(9, '\1')), "other");  // more than 64 bits
  EXPECT_EQ(shown("G\x3f\xe0" + std::string(6, '\0')), "0.500000");
}

TEST(PickleTest, ReadsTextsOfEachLength) {
  EXPECT_EQ(shown(text("größe")), "'größe'");
  EXPECT_EQ(shown("\x8c\3abc"), "'abc'");
  EXPECT_EQ(shown("\x8d" + little_endian(3, 8) + "abc"), "'abc'");
  EXPECT_EQ(shown("U\3abc"), "'abc'");
  EXPECT_EQ(shown("T" + little_endian(3, 4) + "abc"), "'abc'");
  EXPECT_EQ(shown(text("")), "''");
}

TEST(PickleTest, ReadsTuplesListsAndDicts) {
  EXPECT_EQ(shown(")"), "()");
  EXPECT_EQ(shown("N\x85"), "(None)");
  EXPECT_EQ(shown("K\1N\x86"), "(1 None)");
  EXPECT_EQ(shown("K\1K\2K\3\x87"), "(1 2 3)");
  EXPECT_EQ(shown("(K\1K\2K\3K\4t"), "(1 2 3 4)");
  EXPECT_EQ(shown("(t"), "()");
  EXPECT_EQ(shown("]"), "[]");
  EXPECT_EQ(shown("]K\1a(K\2K\3e"), "[1 2 3]");
  EXPECT_EQ(shown("(K\1K\2l"), "[1 2]");
  EXPECT_EQ(shown("}"), "{}");
  EXPECT_EQ(shown("}K\1K\2s(K\3K\4K\5K\6u"), "{1 2 3 4 5 6}");
  EXPECT_EQ(shown("(K\1K\2d"), "{1 2}");
}

TEST(PickleTest, ReadsListsThatGrowInTurn) {
  // Two lists that grow in turn: both move again and again.
  std::string instructions = "](]";
  std::string expected;
  for (int i = 0; i < 100; ++i) {
    instructions += "K" + std::string(1, static_cast<char>(i)) + "a";
    if (i % 10 == 0) instructions += "]K\1aa";
    expected += (i == 0 ? "" : " ") + std::to_string(i) + (i % 10 == 0 ? " [1]" : "");
  }
  EXPECT_EQ(shown(instructions + "e"), "[[" + expected + "]]");
}

TEST(PickleTest, SkipsValuesThatNoReaderNeeds) {
  EXPECT_EQ(shown("C\3abc"), "other");
  EXPECT_EQ(shown("B" + little_endian(3, 4) + "abc"), "other");
  EXPECT_EQ(shown("\x8e" + little_endian(3, 8) + "abc"), "other");
  EXPECT_EQ(shown("\x96" + little_endian(3, 8) + "abc"), "other");
  EXPECT_EQ(shown("\x8f(K\1K\2\x90"), "other");
  EXPECT_EQ(shown("(K\1K\2\x91"), "other");
  for (const auto& [module, name] : std::vector<std::pair<std::string, std::string>>{{"torch", "Size"},
                                                                                     {"torch", "device"},
                                                                                     {"torch.serialization", "_get_layout"},
                                                                                     {"_codecs", "encode"},
                                                                                     {"collections", "Counter"},
                                                                                     {"builtins", "bytearray"},
                                                                                     {"builtins", "set"},
                                                                                     {"__builtin__", "complex"}}) {
    EXPECT_EQ(shown(global(module, name) + "(K\1tR"), "other") << name;
  }
}

TEST(PickleTest, ReadsFramesAndDiscardedValues) {
  EXPECT_EQ(shown("\x95" + little_endian(2, 8) + "K\1"), "1");
  EXPECT_EQ(shown("K\1K\2"
                  "0"),
            "1");
  EXPECT_EQ(shown("K\1(0"), "1");
  EXPECT_EQ(shown("K\1(K\2K\3"
                  "1"),
            "1");
  EXPECT_EQ(shown("K\1"
                  "2\x86"),
            "(1 1)");
}

TEST(PickleTest, SharesMemoizedValues) {
  EXPECT_EQ(shown("]q\5h\5\x86"), "([] [])");
  EXPECT_EQ(shown("]r\1" + std::string(3, '\0') + "j\1" + std::string(3, '\0') + "\x86"), "([] [])");
  const auto bytes = whole("]\x94h" + std::string(1, '\0') + "K\1a\x86");
  const auto pickle = read(bytes);
  EXPECT_EQ(show(pickle, pickle.root), "([1] [1])");
  EXPECT_EQ(pickle.items(pickle.root)[0], pickle.items(pickle.root)[1]);
}

TEST(PickleTest, ReadsAListThatHoldsItself) {
  const auto bytes = whole("]\x94h" + std::string(1, '\0') + "a");
  const auto pickle = read(bytes);
  ASSERT_EQ(pickle.items(pickle.root).size(), 1U);
  EXPECT_EQ(pickle.items(pickle.root)[0], pickle.root);
}

TEST(PickleTest, ReadsAMillionLevels) {
  const int levels = 1'000'000;
  const auto bytes = whole(std::string(levels, ']') + std::string(levels - 1, 'a'));
  const auto pickle = read(bytes);
  EXPECT_EQ(pickle.items(pickle.root).size(), 1U);
}

TEST(PickleTest, TakesMemoryInProportionToThePickle) {
  // A tuple of two of a tuple of two ...: 2^60 values, if they were copied.
  std::string doubled = "K\1";
  for (int i = 0; i < 60; ++i) doubled += "2\x86";
  const auto bytes = whole(doubled);
  const auto pickle = read(bytes);
  EXPECT_LT(pickle.nodes.size(), 100U);
  EXPECT_LT(pickle.pool.size(), 300U);
}

TEST(PickleTest, ReadsTensorsAsRecords) {
  const auto storage = test::pickle::storage("FloatStorage", "0", 2);
  EXPECT_EQ(shown(storage), "storage('storage' global FloatStorage '0' 'cpu' 2)");
  const auto tensor = test::pickle::two_zeros();
  const std::string record = "tensor(storage('storage' global FloatStorage '0' 'cpu' 2) 0 (2) (1) False {})";
  EXPECT_EQ(shown(tensor), record);
  EXPECT_EQ(shown(global("torch._utils", "_rebuild_parameter") + "(" + tensor + "\x88}tR"), record);
  EXPECT_EQ(shown(global("torch._utils", "_rebuild_parameter_with_state") + "(" + tensor + "\x88}}tR"), record);
  EXPECT_EQ(shown(global("torch._tensor", "_rebuild_from_type_v2") + "(" + global("torch._utils", "_rebuild_tensor_v2") +
                  global("torch", "Tensor") + "(K\1K\2t}tR"),
            "tensor(1 2)");
  EXPECT_EQ(shown(global("torch._utils", "_rebuild_tensor") + "(K\1K\2tR"), "tensor(1 2)");
  EXPECT_EQ(shown(global("torch.nn.parameter", "Parameter") + tensor + "\x85R(\x88Ntb"), record);
  EXPECT_EQ(shown(global("torch.nn.parameter", "Parameter") + tensor + "\x88\x86\x81"), record);
  EXPECT_EQ(shown(global("torch._utils", "_rebuild_sparse_tensor") + ")R"), "other tensor torch._utils._rebuild_sparse_tensor");
  EXPECT_EQ(shown(global("torch._tensor", "_rebuild_from_type_v2") + "(" + global("torchao", "make") +
                  global("torchao", "Int4") + "(K\1t}tR"),
            "other tensor torchao.make");
  EXPECT_EQ(shown(global("torch._utils", "_rebuild_parameter") + "(" + global("torchao", "Int4") + ")R\x88}tR"),
            "other tensor torchao.Int4");
}

TEST(PickleTest, ReadsNamesFromTheStack) {
  EXPECT_EQ(shown("\x8c\5torch\x8c\7"
                  "float32\x93"),
            "global float32");
  EXPECT_EQ(shown("\x8c\x0b"
                  "collections\x8c\x0bOrderedDict\x93)R"),
            "{}");
}

TEST(PickleTest, ReadsNumbersTextsAndCallsOfTheFirstProtocols) {
  EXPECT_EQ(shown("I-12\n"), "-12");
  EXPECT_EQ(shown("I00\n"), "False");
  EXPECT_EQ(shown("I01\n"), "True");
  EXPECT_EQ(shown("L-9223372036854775808L\n"), "-9223372036854775808");
  EXPECT_EQ(shown("L7\n"), "7");
  EXPECT_EQ(shown("L119547037146038801333356L\n"), "other");
  EXPECT_EQ(shown("F0.5\n"), "0.500000");
  EXPECT_EQ(shown("F-1e3\n"), "-1000.000000");
  EXPECT_EQ(shown("S'abc'\n"), "'abc'");
  EXPECT_EQ(shown("S\"it's\"\n"), "'it's'");
  EXPECT_EQ(shown("S'a\\n\\t\\r\\\\\\'\\\"\\x41'\n"), "'a\n\t\r\\'\"A'");
  EXPECT_EQ(shown("Vabc\n"), "'abc'");
  EXPECT_EQ(shown("Vgr\xf6\xdf\x65\n"), "'größe'");
  EXPECT_EQ(shown("V\\u65e5\\U0001f600\\u000a\n"), "'日😀\n'");
  EXPECT_EQ(shown("(lp5\ng5\nI1\na"), "[1]");
  EXPECT_EQ(shown("(K\1icollections\nOrderedDict\n"), "{}");
  EXPECT_EQ(shown("(iargparse\nNamespace\n"), "foreign argparse.Namespace");
  EXPECT_EQ(shown("(" + global("argparse", "Namespace") + "K\1o"), "foreign argparse.Namespace");
}

TEST(PickleTest, ReadsDictsMadeOfPairs) {
  const auto dict = global("collections", "OrderedDict");
  EXPECT_EQ(shown(dict + "](](K\1K\2eK\3K\4\x86"
                         "e\x85R"),
            "{1 2 3 4}");
  EXPECT_EQ(shown(dict + "]\x85R"), "{}");
  EXPECT_EQ(shown(global("collections", "defaultdict") + global("builtins", "list") + "\x85RK\1K\2s"), "{1 2}");
  // One list given again and again would take more and more memory.
  std::string again = "](";
  for (int i = 0; i < 100; ++i) again += ")2\x86";
  again += "eq\1";
  for (int i = 0; i < 100; ++i) again += dict + "h\1\x85R";
  EXPECT_TRUE(pickle_refusal(again).starts_with("must have ")) << pickle_refusal(again);
}

TEST(PickleTest, IgnoresTheAttributesOfADict) {
  EXPECT_EQ(shown(global("collections", "OrderedDict") + ")R}" + text("_metadata") + "Nsb"), "{}");
}

TEST(PickleTest, ReadsObjectsOfTorchScriptAsRecords) {
  EXPECT_EQ(shown(test::pickle::object(text("a") + "K\1"), kTorchScript), "object({'a' 1})");
  EXPECT_EQ(shown(global("__torch__.Packed", "Params") + ")\x81K\1\x85"
                                                         "b",
                  kTorchScript),
            "object((1))");
  EXPECT_EQ(shown(global("__torch__", "Color") + "(K\1tR", kTorchScript), "other");  // an enumeration
  for (const std::string builder : {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"}) {
    EXPECT_EQ(shown(global("torch.jit._pickle", builder) + "](K\1K\2e\x85R", kTorchScript), "[1 2]");
  }
  EXPECT_EQ(shown(global("torch.jit._pickle", "restore_type_tag") + "]" + text("List[str]") + "\x86R", kTorchScript), "[]");
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(PickleTest, ReadsObjectsOfOtherClassesAsRecordsWithoutContents) {
  EXPECT_EQ(shown(global("__main__", "Model") + ")\x81"), "foreign __main__.Model");
  EXPECT_EQ(shown(global("__main__", "Model") + ")\x81}" + text("a") + "K\1sb"), "foreign __main__.Model");
  EXPECT_EQ(shown(global("__main__", "Model") + "K\1\x85}\x92"), "foreign __main__.Model");
  EXPECT_EQ(shown(global("os", "system") + text("true") + "\x85R"), "foreign os.system");
  EXPECT_EQ(shown("\x8c\2os\x8c\6system\x93"), "foreign os.system");
  EXPECT_EQ(shown(global("torch", "nn.Linear")), "foreign torch.nn.Linear");
  EXPECT_EQ(shown(global("torch", "Generator") + ")R"), "foreign torch.Generator");
  EXPECT_EQ(shown(global("torch._utils", "_import_dotted_name")), "foreign torch._utils._import_dotted_name");
  EXPECT_EQ(shown(global("collections", "deque") + ")RK\1a(K\2K\3e"), "foreign collections.deque") << "items are left out";
  EXPECT_EQ(shown(global("lib", "AttributeDict") + ")\x81K\1K\2s(K\3K\4u"), "foreign lib.AttributeDict");
  EXPECT_EQ(shown(global("builtins", "getattr") + "(" + global("a", "B") + text("c") + "tR)R"), "foreign builtins.getattr");
  EXPECT_EQ(shown("(" + text("module") + global("a", "Net") + "NNtQ"), "foreign a.Net") << "a class with its source";
}

TEST(PickleTest, RefusesUnknownInstructions) {
  EXPECT_EQ(pickle_refusal("\x97"), "has the instruction 0x97 at byte 2, which is not read");  // a buffer outside of it
  EXPECT_EQ(pickle_refusal("N\xff"), "has the instruction 0xff at byte 3, which is not read");
  EXPECT_EQ(pickle_refusal("\x82\1"), "has the instruction 0x82 at byte 2, which is not read");  // a class by number
}

TEST(PickleTest, RefusesATruncatedPickle) {
  const auto instructions = text("abc") + test::pickle::two_zeros() + "G" + std::string(8, 'x') + "C\1x\x86\x86";
  const auto bytes = whole(instructions);
  for (size_t size = 0; size < bytes.size(); ++size) {
    const auto part = bytes.substr(0, size);
    const auto message = test::error_of<FileError>([&] { read(part); });
    EXPECT_TRUE(message.starts_with("[pickle] x.pt: ends inside the instruction at byte ")) << message;
  }
  EXPECT_EQ(pickle_refusal("X" + little_endian(0xffff'ffff, 4)), "ends inside the instruction at byte 2");
  EXPECT_EQ(pickle_refusal("\x8d" + little_endian(~uint64_t{0}, 8)), "ends inside the instruction at byte 2");
  EXPECT_EQ(pickle_refusal("cos"), "ends inside the instruction at byte 2");
}

TEST(PickleTest, RefusesAPickleOverTheLimit) {
  const std::string bytes((size_t{1} << 26) + 1, 'N');
  EXPECT_EQ(test::error_of<FileError>([&] { read(bytes); }), "[pickle] x.pt: has 67108865 bytes, over the limit of 67108864");
}

TEST(PickleTest, RefusesInstructionsWithoutTheirValues) {
  const std::string at = " for the instruction at byte ";
  EXPECT_EQ(pickle_refusal(""), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("0"), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("2"), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("q\1"), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("K\1(2"), "must have a value" + at + "5");  // the value below the mark is out of reach
  EXPECT_EQ(pickle_refusal("K\1(\x85"), "must have more values" + at + "5");
  EXPECT_EQ(pickle_refusal("K\1\x86"), "must have more values" + at + "4");
  EXPECT_EQ(pickle_refusal("K\1a"), "must have more values" + at + "4");
  EXPECT_EQ(pickle_refusal("(K\1e"), "must have more values" + at + "5");
  EXPECT_EQ(pickle_refusal("t"), "must have a mark" + at + "2");
  EXPECT_EQ(pickle_refusal("]K\1e"), "must have a mark" + at + "5");
  EXPECT_EQ(pickle_refusal("b"), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("Q"), "must have a value" + at + "2");
  EXPECT_EQ(pickle_refusal("R"), "must have a value" + at + "2");
}

TEST(PickleTest, RefusesInstructionsOnOtherKindsOfValues) {
  const std::string at = " for the instruction at byte ";
  EXPECT_EQ(pickle_refusal("}K\1a"), "must have a list" + at + "5");
  EXPECT_EQ(pickle_refusal(")K\1a"), "must have a list" + at + "5");
  EXPECT_EQ(pickle_refusal("]K\1K\2s"), "must have a dict" + at + "7");
  EXPECT_EQ(pickle_refusal("}(K\1u"), "must have a value for each key" + at + "6");
  EXPECT_EQ(pickle_refusal("(K\1d"), "must have a value for each key" + at + "5");
  EXPECT_EQ(pickle_refusal("K\1K\2\x93"), "must have two texts" + at + "6");
  EXPECT_EQ(pickle_refusal("K\1)R"), "must have a class and a tuple" + at + "5");
  EXPECT_EQ(pickle_refusal(global("torch", "Size") + "]R"), "must have a class and a tuple" + at + "15");
  EXPECT_EQ(pickle_refusal(global("collections", "OrderedDict") + "]K\1a\x85R"), "must have pairs" + at + "32");
  EXPECT_EQ(pickle_refusal("I1x\n"), "must have an integer" + at + "2");
  EXPECT_EQ(pickle_refusal("Fx\n"), "must have a number" + at + "2");
  EXPECT_EQ(pickle_refusal("gx\n"), "must have a number" + at + "2");
  EXPECT_EQ(pickle_refusal("Sabc\n"), "must have a text in quotes" + at + "2");
  EXPECT_EQ(pickle_refusal("S'\\'\n"), "must have a character behind a backslash" + at + "2");
  EXPECT_EQ(pickle_refusal("S'\\q'\n"), "must have an escape that Python writes" + at + "2");
  EXPECT_EQ(pickle_refusal("V\\u12\n"), "must have hexadecimal digits" + at + "2");
  EXPECT_EQ(pickle_refusal("(o"), "must have a class" + at + "3");
  EXPECT_EQ(pickle_refusal("P('storage', 0)\n"),
            "has a text in place of a storage, as torch.save with protocol 0 writes it: PyTorch cannot read it");
  EXPECT_EQ(pickle_refusal(global("torch._utils", "_rebuild_parameter") + ")R"), "must have an argument" + at + "36");
  EXPECT_EQ(pickle_refusal(global("torch._tensor", "_rebuild_from_type_v2") + ")R"),
            "must have a tensor with attributes" + at + "40");
  EXPECT_EQ(pickle_refusal("K\1Nb"), "must have something that has a state" + at + "5");
  EXPECT_EQ(pickle_refusal(test::pickle::object("") + "}b", kTorchScript), "must have an object without a state" + at + "27");
  EXPECT_EQ(pickle_refusal("K\1Q"), "must have a storage's class, key, device and size" + at + "4");
  EXPECT_EQ(pickle_refusal("(" + text("module") + "NNNNtQ"), "must have a storage's class, key, device and size" + at + "19");
}

TEST(PickleTest, RefusesNestedCallsOfTensorsWithAttributes) {
  // Each would be unpacked by the call around it, without end.
  const auto function = global("torch._tensor", "_rebuild_from_type_v2");
  EXPECT_EQ(pickle_refusal(function + "(" + function + "N)NtR"),
            "must have a tensor with attributes for the instruction at byte 81");
}

TEST(PickleTest, RefusesUnusedNumbersOfTheMemo) {
  const std::string at = " for the instruction at byte ";
  EXPECT_EQ(pickle_refusal("h\1"), "must have a value kept under its number" + at + "2");
  EXPECT_EQ(pickle_refusal("Nq\2h\1"), "must have a value kept under its number" + at + "5");
  EXPECT_EQ(pickle_refusal("j\xff\xff\xff\xff"), "must have a value kept under its number" + at + "2");
  EXPECT_EQ(pickle_refusal("Nr\xff\xff\xff\xff"), "must have a smaller number" + at + "3");
}

TEST(PickleTest, ThrowsNoOtherErrorWhateverByteIsChanged) {
  const auto whole_dict = whole(test::pickle::dict(text("a") + test::pickle::two_zeros()) + "0" +
                                test::pickle::object(text("a") + "](K\1K\2e" + text("b") + "K\1K\2\x86"));
  for (size_t i = 0; i < whole_dict.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      auto bytes = whole_dict;
      bytes[i] = static_cast<char>(value);
      try {
        EXPECT_LE(read(bytes, kTorchScript).nodes.size(), bytes.size() + 10);
      } catch (const FileError&) {
      }
    }
  }
}

}  // namespace
}  // namespace xattn
