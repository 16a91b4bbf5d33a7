// SPDX-License-Identifier: Apache-2.0
#include <xattn/safetensors.h>

#include <torch/torch.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>

#include "file_checks.h"
#include "files/readers.h"
#include "test_util.h"

namespace xattn {
namespace {

using test::error_of;
using test::TempDir;

std::string file_of(const std::string& header, size_t data_bytes = 0) {
  uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof(length));
  return bytes + header + std::string(data_bytes, '\1');
}

// The header of a file with one tensor, "a".
std::string header_of(const std::string& type, const std::string& shape, const std::string& offsets) {
  return R"({"a":{"dtype":)" + type + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

// The message of the error for a file of these bytes, which must be one line that names it.
std::string safetensors_refusal(const std::string& bytes) {
  return test::refusal_by("safetensors", "broken",
                          [&] { detail::read_safetensors("broken", std::as_bytes(std::span(bytes))); });
}

at::Tensor round_trip(const at::Tensor& tensor) {
  const TempDir dir;
  save_safetensors(dir.file("one.safetensors"), {{"one", tensor}});
  return open_checkpoint(dir.file("one.safetensors")).tensor("one");
}

// ---- Round trips ------------------------------------------------------------------------------------------------------------

TEST(SafetensorsTest, KeepsEveryTypeOfTheFormat) {
  for (auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort, at::kChar, at::kByte,
                    at::kBool, at::kUInt16, at::kUInt32, at::kUInt64, at::kComplexFloat, at::kFloat8_e4m3fn, at::kFloat8_e5m2,
                    at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz, at::kFloat8_e8m0fnu}) {
    const auto tensor = torch::tensor({0, 1, 2, 3, 4, 5}).view({2, 3}).to(type);
    const auto back = round_trip(tensor);
    EXPECT_EQ(back.scalar_type(), type);
    EXPECT_TRUE(torch::equal(back.to(at::kComplexDouble), tensor.to(at::kComplexDouble))) << type;
  }
}

TEST(SafetensorsTest, KeepsScalarsAndEmptyTensors) {
  EXPECT_TRUE(torch::equal(round_trip(torch::tensor(2.5)), torch::tensor(2.5)));
  EXPECT_EQ(round_trip(torch::zeros({0})).sizes(), at::IntArrayRef({0}));
  EXPECT_EQ(round_trip(torch::zeros({3, 0, 2})).sizes(), at::IntArrayRef({3, 0, 2}));
}

TEST(SafetensorsTest, KeepsNaNAndInfinityBitForBit) {
  const auto tensor = torch::tensor({0x7fc12345, 0x7f800000, static_cast<int>(0xff800000)}, at::kInt).view(at::kFloat);
  EXPECT_TRUE(torch::equal(round_trip(tensor).view(at::kInt), tensor.view(at::kInt)));
}

TEST(SafetensorsTest, WritesTheElementsOfAView) {
  const auto base = torch::arange(12.).view({3, 4});
  EXPECT_TRUE(torch::equal(round_trip(base.t()), base.t()));
  EXPECT_TRUE(torch::equal(round_trip(base.slice(1, 1, 4, 2)), base.slice(1, 1, 4, 2)));
  EXPECT_TRUE(torch::equal(round_trip(base[0].expand({5, 4})), base[0].expand({5, 4})));
  const auto complex = torch::complex(base, base + 1);
  EXPECT_TRUE(torch::equal(round_trip(complex.conj()), complex.conj().resolve_conj()));
  EXPECT_TRUE(torch::equal(round_trip(at::imag(complex.conj())), -(base + 1)));
}

TEST(SafetensorsTest, KeepsMetadataAndNamesInAnyLanguage) {
  const TempDir dir;
  const auto path = dir.file("one.safetensors");
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"über \"x\"\n", "日本語\t\\"}};
  save_safetensors(path, {{"größe \"1\"\n", torch::ones({2})}}, metadata);
  const auto file = open_checkpoint(path);
  EXPECT_EQ(file.metadata(), metadata);
  EXPECT_TRUE(torch::equal(file.tensor("größe \"1\"\n"), torch::ones({2})));
}

TEST(SafetensorsTest, KeepsAFileWithoutTensors) {
  const TempDir dir;
  save_safetensors(dir.file("none.safetensors"), NamedTensors{});
  EXPECT_TRUE(open_checkpoint(dir.file("none.safetensors")).tensors().empty());
}

TEST(SafetensorsTest, TensorsOutliveTheFileAndCanBeTrained) {
  const TempDir dir;
  save_safetensors(dir.file("one.safetensors"), {{"one", torch::ones({2})}});
  at::Tensor tensor;
  {
    const c10::InferenceMode inference;
    tensor = open_checkpoint(dir.file("one.safetensors")).tensor("one");
  }
  tensor.requires_grad_();
  tensor.sum().backward();
  EXPECT_TRUE(torch::equal(tensor.grad(), torch::ones({2})));
}

TEST(SafetensorsTest, ReadsTensorsInAnyOrderOfTheHeader) {
  const TempDir dir;
  test::write_bytes(dir.file("x"), file_of(R"({"b":{"data_offsets":[1,3],"shape":[2],"dtype":"U8"},)"
                                           R"("a":{"dtype":"I8","shape":[],"data_offsets":[0,1]},"__metadata__":{}}   )",
                                           3));
  const auto file = open_checkpoint(dir.file("x"));
  EXPECT_TRUE(torch::equal(file.tensor("b"), torch::ones({2}, at::kByte)));
  EXPECT_TRUE(torch::equal(file.tensor("a"), torch::ones({}, at::kChar)));
}

// ---- Writing ----------------------------------------------------------------------------------------------------------------

TEST(SafetensorsTest, WritesAsTheOfficialWriterDoes) {
  // Made by: safetensors.torch.save({"b": torch.tensor([1., 2.]), "a": torch.tensor([3.]), "c": torch.tensor([4]),
  //                                  "d": torch.tensor([True])}, {"k": "v"})
  const std::string header =
      R"({"__metadata__":{"k":"v"},"c":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
      R"("a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]},)"
      R"("d":{"dtype":"BOOL","shape":[1],"data_offsets":[20,21]}})";
  const TempDir dir;
  save_safetensors(
      dir.file("x"),
      {{"b", torch::tensor({1.F, 2.F})}, {"a", torch::tensor({3.F})}, {"c", torch::tensor({4})}, {"d", torch::tensor({true})}},
      {{"k", "v"}});
  const auto bytes = test::read_bytes(dir.file("x"));
  EXPECT_EQ(bytes.substr(8, header.size()), header);
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  EXPECT_EQ(length % 8, 0U);
  EXPECT_LT(length - header.size(), 8U);
  EXPECT_EQ(bytes.substr(8 + header.size(), length - header.size()), std::string(length - header.size(), ' '));
  EXPECT_EQ(bytes.size(), 8 + length + 21);
}

TEST(SafetensorsTest, ReplacesTheOldFileOnSuccess) {
  const TempDir dir;
  save_safetensors(dir.file("x"), {{"old", torch::ones({100})}});
  save_safetensors(dir.file("x"), {{"new", torch::ones({1})}});
  EXPECT_EQ(load_tensors(dir.file("x")).count("new"), 1U);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1);
}

TEST(SafetensorsTest, KeepsTheOldFileAndLeavesNoOtherOnFailure) {
  test::expect_old_file_kept_on_full_disk(
      [](const std::string& path, const NamedTensors& tensors) { save_safetensors(path, tensors); });
}

TEST(SafetensorsTest, RefusesToWriteWhatTheFormatCannotHold) {
  const TempDir dir;
  const auto refused = [&](const NamedTensors& tensors, const std::map<std::string, std::string>& metadata = {}) {
    const auto message = error_of<FileError>([&] { save_safetensors(dir.file("x"), tensors, metadata); });
    EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
    return message.substr(std::min(message.size(), ("[safetensors] " + dir.file("x") + ": ").size()));
  };
  EXPECT_EQ(refused({{"a", torch::ones({1}, at::kComplexDouble)}}),
            "tensor \"a\" is complex128, which the format does not have");
  EXPECT_EQ(refused({{"a", at::Tensor()}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"a", torch::ones({1}).to_sparse()}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"a", torch::empty({1}, at::kMeta)}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"__metadata__", torch::ones({1})}}), "a tensor must not have the format's own name \"__metadata__\"");
  EXPECT_EQ(refused({{"\xff", torch::ones({1})}}), "names and metadata must be UTF-8");
  EXPECT_EQ(refused({}, {{"a", "\xff"}}), "names and metadata must be UTF-8");
}

TEST(SafetensorsTest, RefusesTensorsThatAreMadeOtherwiseThanAnnounced) {
  test::expect_only_announced_tensors(
      "safetensors", [](const std::string& path, const LazyTensors& tensors) { save_safetensors(path, tensors); });
}

TEST(SafetensorsTest, RefusesPathsThatCannotBeWritten) {
  const TempDir dir;
  const auto refused = [](const std::string& path) {
    return error_of<FileError>([&] { save_safetensors(path, {{"a", torch::ones({1})}}); });
  };
  EXPECT_EQ(refused(dir.file("no/x")), "[safetensors] " + dir.file("no/x") + ": cannot be written: No such file or directory");
  EXPECT_EQ(refused(dir.path()), "[safetensors] " + dir.path() + ": exists, but is not a regular file");
  EXPECT_EQ(refused("/dev/null"), "[safetensors] /dev/null: exists, but is not a regular file");
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(SafetensorsTest, RefusesAFileShorterThanItsHeaderLength) {
  EXPECT_EQ(safetensors_refusal(""), "must begin with a header length of 8 bytes, but has 0 bytes");
  EXPECT_EQ(safetensors_refusal("1234567"), "must begin with a header length of 8 bytes, but has 7 bytes");
}

TEST(SafetensorsTest, RefusesATruncatedHeader) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[1]", "[0,4]"), 4).substr(0, 40)),
            "header length 54 exceeds the file's 40 bytes; a download may have been cut off");
  EXPECT_EQ(safetensors_refusal(std::string(8, '\xff')),
            "header length 18446744073709551615 exceeds the file's 8 bytes; a download may have been cut off");
}

TEST(SafetensorsTest, RefusesAHeaderOverTheLimit) {
  const TempDir dir;
  const uint64_t length = 100'000'001;
  test::write_bytes(dir.file("x"), std::string(reinterpret_cast<const char*>(&length), 8));
  std::filesystem::resize_file(dir.file("x"), length + 8);  // sparse: takes no space on disk
  const detail::MappedFile file(dir.file("x"));
  EXPECT_EQ(error_of<FileError>([&] { detail::read_safetensors(dir.file("x"), file.bytes()); }),
            "[safetensors] " + dir.file("x") + ": header length 100000001 exceeds the format's limit of 100000000");
}

TEST(SafetensorsTest, RefusesAHeaderThatIsNotAnObject) {
  EXPECT_EQ(safetensors_refusal(file_of("")), "header must begin with '{'");
  EXPECT_EQ(safetensors_refusal(file_of("[]")), "header must begin with '{'");
  EXPECT_EQ(safetensors_refusal(file_of(" {}")), "header must begin with '{'");
  EXPECT_EQ(safetensors_refusal(file_of("\xef\xbb\xbf{}")), "header must begin with '{'");
}

TEST(SafetensorsTest, RefusesAHeaderThatIsNotJson) {
  EXPECT_EQ(safetensors_refusal(file_of("{\"a\"")), "header is not JSON in UTF-8, at its byte 5");
  EXPECT_EQ(safetensors_refusal(file_of("{}x")), "header is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(safetensors_refusal(file_of("{}{}")), "header is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(safetensors_refusal(file_of("{,}")), "header is not JSON in UTF-8, at its byte 2");
  EXPECT_EQ(safetensors_refusal(file_of("{/**/}")), "header is not JSON in UTF-8, at its byte 2");
}

TEST(SafetensorsTest, RefusesAHeaderThatIsNotUtf8) {
  EXPECT_EQ(safetensors_refusal(file_of("{\"\xff\":{}}")), "header is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(safetensors_refusal(file_of("{\"\xc0\xaf\":{}}")), "header is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(safetensors_refusal(file_of("{\"\\ud800\":{}}")), "header is not JSON in UTF-8, at its byte 9");
}

TEST(SafetensorsTest, RefusesZeroBytesInTheHeader) {
  EXPECT_EQ(safetensors_refusal(file_of(std::string("{}\0garbage", 10))), "header is not JSON in UTF-8, at its byte 3");
}

TEST(SafetensorsTest, RefusesDeepNesting) {
  EXPECT_EQ(safetensors_refusal(file_of("{\"a\":" + std::string(1'000'000, '['))), "the value of \"a\" must be an object");
  std::string objects = "{";
  for (int i = 0; i < 100'000; ++i) objects += "\"shape\":{";
  EXPECT_EQ(safetensors_refusal(file_of(objects)),
            "shape of tensor \"shape\" must be a list of at most 64 non-negative integers");
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", "[[1]]", "[0,1]"), 1)),
            "shape of tensor \"a\" must be a list of at most 64 non-negative integers");
}

TEST(SafetensorsTest, RefusesANameGivenTwice) {
  const std::string empty = R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  EXPECT_EQ(safetensors_refusal(file_of("{\"a\":" + empty + ",\"a\":" + empty + "}")), "has the name \"a\" twice");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":)" + empty + R"(,"\u0061":)" + empty + "}")), "has the name \"a\" twice");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"__metadata__":{},"__metadata__":{}})")), "has the name \"__metadata__\" twice");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"__metadata__":{"k":"1","k":"2"}})")), "has the metadata \"k\" twice");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","dtype":"U8"}})")), "tensor \"a\" has dtype twice");
}

TEST(SafetensorsTest, RefusesATensorThatIsNotAnObject) {
  for (const std::string value : {"1", "-1", "0.5", "null", "true", "\"x\"", "[]"}) {
    EXPECT_EQ(safetensors_refusal(file_of("{\"a\":" + value + "}")), "the value of \"a\" must be an object");
  }
}

TEST(SafetensorsTest, RefusesMetadataThatIsNotAString) {
  for (const std::string value : {"1", "-1", "0.5", "null", "true", "{}", "[]"}) {
    EXPECT_EQ(safetensors_refusal(file_of("{\"__metadata__\":{\"k\":" + value + "}}")), "metadata \"k\" must be a string");
  }
  EXPECT_EQ(safetensors_refusal(file_of("{\"__metadata__\":3}")), "the value of \"__metadata__\" must be an object");
}

TEST(SafetensorsTest, RefusesATensorWithoutOneOfItsFields) {
  const std::string mould = "tensor \"a\" must have dtype, shape and data_offsets, but lacks ";
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{}})")), mould + "dtype");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","data_offsets":[0,0]}})")), mould + "shape");
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","shape":[0]}})")), mould + "data_offsets");
}

TEST(SafetensorsTest, RefusesATensorWithAForeignField) {
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","strides":[1]}})")),
            "tensor \"a\" must have dtype, shape and data_offsets only, but has \"strides\"");
}

TEST(SafetensorsTest, ListsTensorsOfOtherTypesAndReadsTheOthers) {
  const auto file = file_of(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]},)"
                            R"("b":{"dtype":"F6_E3M2","shape":[2,2],"data_offsets":[2,5]},)"
                            R"("c":{"dtype":"U8","shape":[2],"data_offsets":[5,7]},)"
                            R"("d":{"dtype":"F128","shape":[1],"data_offsets":[7,23]},)"
                            R"("e":{"dtype":"","shape":[1],"data_offsets":[23,39]}})",
                            39);
  const auto checkpoint = open_checkpoint(std::as_bytes(std::span(file)));
  EXPECT_TRUE(checkpoint.tensor("c").equal(torch::ones({2}, at::kByte)));
  EXPECT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(checkpoint.unreadable(),
            (std::map<std::string, std::string>{{"a", "it is of dtype \"F4\", which torch does not have"},
                                                {"b", "it is of dtype \"F6_E3M2\", which torch does not have"},
                                                {"d", "it is of dtype \"F128\", which torch does not have"},
                                                {"e", "it is of dtype \"\", which torch does not have"}}));
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F4\"", "[3]", "[0,3]"), 3)),
            "tensor \"a\" of type F4 and shape [3] takes 2 bytes, but its data_offsets [0, 3] hold 3");
}

TEST(SafetensorsTest, TakesNullForNoMetadata) {
  const auto file = file_of(R"({"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1);
  const auto checkpoint = open_checkpoint(std::as_bytes(std::span(file)));
  EXPECT_TRUE(checkpoint.metadata().empty());
  EXPECT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(safetensors_refusal(file_of(R"({"__metadata__":null,"__metadata__":{}})")), "has the name \"__metadata__\" twice");
}

TEST(SafetensorsTest, RefusesATypeThatIsNoText) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("3", "[0]", "[0,0]"))), "dtype of tensor \"a\" must be a string");
  EXPECT_EQ(safetensors_refusal(file_of(header_of("[]", "[0]", "[0,0]"))), "dtype of tensor \"a\" must be a string");
}

TEST(SafetensorsTest, RefusesAShapeThatIsNotAListOfSizes) {
  std::string many = "[1";
  for (int i = 0; i < 64; ++i) many += ",1";
  for (const std::string& shape :
       {std::string("[-1]"), std::string("[1.0]"), std::string("[1e2]"), std::string("[\"1\"]"), std::string("[null]"),
        std::string("[18446744073709551616]"), std::string("1"), std::string("\"1\""), std::string("{}"), many + "]"}) {
    EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", shape, "[0,1]"), 1)),
              "shape of tensor \"a\" must be a list of at most 64 non-negative integers")
        << shape;
  }
}

TEST(SafetensorsTest, RefusesOffsetsThatAreNotAPair) {
  for (const std::string offsets : {"[]", "[0]", "[0,1,2]", "[0,-1]", "[0,1.5]", "0", "{}"}) {
    EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", "[1]", offsets), 1)),
              "data_offsets of tensor \"a\" must be a list of two non-negative integers")
        << offsets;
  }
}

TEST(SafetensorsTest, RefusesATensorThatEndsBeforeItBegins) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", "[1]", "[1,0]"), 1)),
            "tensor \"a\" ends at 0 before it begins at 1");
}

TEST(SafetensorsTest, RefusesTruncatedData) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[2]", "[0,8]"), 7)),
            "tensor \"a\" ends at 8, beyond the file's 7 bytes of data; a download may have been cut off");
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[2]", "[0,18446744073709551615]"), 8)),
            "tensor \"a\" ends at 18446744073709551615, beyond the file's 8 bytes of data; a download may have been cut off");
}

TEST(SafetensorsTest, RefusesAShapeOfAnotherSizeThanTheData) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[2, 3]", "[0,20]"), 20)),
            "tensor \"a\" of type F32 and shape [2, 3] takes 24 bytes, but its data_offsets [0, 20] hold 20");
}

TEST(SafetensorsTest, RefusesAShapeThatOverflows) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[4294967296, 4294967296]", "[0,0]"))),
            "shape [4294967296, 4294967296] of tensor \"a\" has too many elements to count");
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"F32\"", "[0, 4294967296, 4294967296]", "[0,0]"))),
            "shape [0, 4294967296, 4294967296] of tensor \"a\" has too many elements to count");
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", "[18446744073709551615]", "[0,0]"))),
            "shape [18446744073709551615] of tensor \"a\" has too many elements to count");
}

TEST(SafetensorsTest, RefusesTensorsThatOverlap) {
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                        R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                                        3)),
            "tensor \"b\" begins at 1, inside another that ends at 2");
}

TEST(SafetensorsTest, RefusesHolesBetweenTensors) {
  EXPECT_EQ(safetensors_refusal(file_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                        R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                                        3)),
            "tensor \"b\" begins at 2, but the one before it ends at 1");
}

TEST(SafetensorsTest, RefusesBytesAfterTheLastTensor) {
  EXPECT_EQ(safetensors_refusal(file_of(header_of("\"U8\"", "[1]", "[0,1]"), 5)),
            "has 5 bytes of data, but its tensors end at 1");
  EXPECT_EQ(safetensors_refusal(file_of("{}", 1)), "has 1 bytes of data, but its tensors end at 0");
}

TEST(SafetensorsTest, RefusesBytesThatAreNotBooleans) {
  const TempDir dir;
  auto bytes = file_of(header_of("\"BOOL\"", "[2]", "[0,2]"), 2);
  bytes.back() = 2;
  test::write_bytes(dir.file("x"), bytes);
  const auto file = open_checkpoint(dir.file("x"));
  EXPECT_EQ(error_of<FileError>([&] { file.tensor("a"); }),
            "[checkpoint] " + dir.file("x") + ": tensor \"a\" of type bool holds a byte other than 0 and 1");
}

TEST(SafetensorsTest, KeepsMessagesOnOneLineWhateverTheNames) {
  EXPECT_EQ(safetensors_refusal(file_of("{\"\\n\\u001b[31m\x7f\":1}")),
            "the value of \"\\n\\u001b[31m\\u007f\" must be an object");
}

// Damages every byte of a good file in turn: each result is either read or rejected, and nothing else happens.
TEST(SafetensorsTest, SurvivesADamagedByteAnywhere) {
  const TempDir dir;
  save_safetensors(dir.file("x"), {{"a", torch::ones({2, 2})}, {"b", torch::ones({3}, at::kBool)}}, {{"k", "v"}});
  const auto good = test::read_bytes(dir.file("x"));
  int refused = 0;
  for (size_t i = 0; i < good.size(); ++i) {
    for (const char damage : {'\x00', '\x7f', '\xff', '"', '}', '9'}) {
      auto bytes = good;
      bytes[i] = damage;
      test::write_bytes(dir.file("y"), bytes);
      try {
        load_tensors(dir.file("y"));
      } catch (const FileError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace xattn
