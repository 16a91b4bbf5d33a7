// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <map>
#include <span>
#include <string>

#include "file_checks.h"
#include "files/readers.h"
#include "test_util.h"

namespace xattn::detail {
namespace {

ShardIndex read_index(const std::string& json) {
  return read_shard_index("index.json", std::as_bytes(std::span(json)));
}

// The message of the error for an index of these bytes, without the part that names the file.
std::string shards_refusal(const std::string& json) {
  return test::refusal_by("shards", "index.json", [&] { read_index(json); });
}

// An index of one tensor in this file, given as JSON.
std::string index_of(const std::string& file) {
  return R"({"weight_map":{"a":)" + file + "}}";
}

using Texts = std::map<std::string, std::string>;

TEST(ShardsTest, ReadsTheFileOfEachTensorAndTheMetadata) {
  const auto index = read_index(R"({
    "metadata": {"total_size": 409600, "format": "pt", "über": ["x", {"y": null}]},
    "weight_map": {
      "decoder.weight": "model-00002-of-00002.safetensors",
      "encoder.weight": "model-00001-of-00002.safetensors",
      "größe \"1\"\n": "modell ü.bin"
    }
  })");
  EXPECT_EQ(index.file_of, (Texts{{"decoder.weight", "model-00002-of-00002.safetensors"},
                                  {"encoder.weight", "model-00001-of-00002.safetensors"},
                                  {"größe \"1\"\n", "modell ü.bin"}}));
  EXPECT_EQ(index.metadata, (Texts{{"total_size", "409600"}, {"format", "pt"}, {"über", R"(["x",{"y":null}])"}}));
}

TEST(ShardsTest, NeedsNoMetadata) {
  const auto index = read_index(index_of("\"x.safetensors\""));
  EXPECT_EQ(index.file_of, (Texts{{"a", "x.safetensors"}}));
  EXPECT_TRUE(index.metadata.empty());
  EXPECT_TRUE(read_index(R"({"weight_map":{}})").file_of.empty());
}

TEST(ShardsTest, RefusesOtherJsonFiles) {
  const std::string expected =
      "must be the index of a sharded set, an object with the file of each tensor as weight_map, but has no weight_map";
  EXPECT_EQ(shards_refusal(R"({"architectures": ["BertModel"], "hidden_size": 768})"), expected);
  for (const std::string json : {"{}", "[]", "null", "1", "\"weight_map\"", "[{\"weight_map\":{}}]"}) {
    EXPECT_EQ(shards_refusal(json), expected) << json;
  }
}

TEST(ShardsTest, RefusesAWeightMapThatIsNotAnObject) {
  for (const std::string map : {"null", "[]", "\"x\"", "1"}) {
    EXPECT_EQ(shards_refusal("{\"weight_map\":" + map + "}"), "weight_map must be an object") << map;
  }
}

TEST(ShardsTest, RefusesAFileThatIsNotAString) {
  for (const std::string file : {"null", "1", "[\"x\"]", "{\"file\":\"x\"}", "true"}) {
    EXPECT_EQ(shards_refusal(index_of(file)), "the file of tensor \"a\" must be a string") << file;
  }
}

TEST(ShardsTest, RefusesFilesInOtherFolders) {
  for (const std::string file : {"\"\"", "\".\"", "\"..\"", "\"../x\"", "\"/etc/passwd\"", "\"shards/x\"", R"("..\\x")",
                                 R"("x.safetensors\u0000.txt")", "\"x/\""}) {
    EXPECT_EQ(shards_refusal(index_of(file)),
              "the file of tensor \"a\" must be a plain name in the same folder, but is " + file);
  }
}

TEST(ShardsTest, RefusesMetadataThatIsNotAnObject) {
  EXPECT_EQ(shards_refusal(R"({"weight_map":{},"metadata":[]})"), "metadata must be an object");
  EXPECT_EQ(shards_refusal(R"({"weight_map":{},"metadata":null})"), "metadata must be an object");
}

TEST(ShardsTest, RefusesANameGivenTwice) {
  EXPECT_EQ(shards_refusal(R"({"weight_map":{"a":"x","b":"x","a":"y"}})"), "has the name \"a\" twice in one object");
  EXPECT_EQ(shards_refusal(R"({"weight_map":{"a":"x","\u0061":"y"}})"), "has the name \"a\" twice in one object");
  EXPECT_EQ(shards_refusal(R"({"weight_map":{},"weight_map":{}})"), "has the name \"weight_map\" twice in one object");
  EXPECT_EQ(shards_refusal(R"({"weight_map":{},"metadata":{"l":[{"k":1,"k":2}]}})"), "has the name \"k\" twice in one object");
}

TEST(ShardsTest, AcceptsTheSameNameInOtherObjects) {
  EXPECT_EQ(read_index(R"({"weight_map":{"a":"x"},"metadata":{"a":{"a":1},"b":[{"a":1},{"a":2}]}})").metadata,
            (Texts{{"a", R"({"a":1})"}, {"b", R"([{"a":1},{"a":2}])"}}));
}

TEST(ShardsTest, RefusesInvalidJson) {
  EXPECT_EQ(shards_refusal(""), "is not JSON in UTF-8, at its byte 1");
  EXPECT_EQ(shards_refusal("{\"weight_map\""), "is not JSON in UTF-8, at its byte 14");
  EXPECT_EQ(shards_refusal("{}x"), "is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(shards_refusal("{}{}"), "is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(shards_refusal("{/**/}"), "is not JSON in UTF-8, at its byte 2");
  EXPECT_EQ(shards_refusal("{\"a\":NaN}"), "is not JSON in UTF-8, at its byte 6");
  EXPECT_EQ(shards_refusal("{\"a\":1e999}"), "is not JSON in UTF-8, at its byte 10");
  EXPECT_EQ(shards_refusal(std::string("{}\0garbage", 10)), "is not JSON in UTF-8, at its byte 3");
}

TEST(ShardsTest, RefusesInvalidUtf8) {
  EXPECT_EQ(shards_refusal("{\"\xff\":1}"), "is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(shards_refusal("{\"\xc0\xaf\":1}"), "is not JSON in UTF-8, at its byte 3");
  EXPECT_EQ(shards_refusal("{\"\\ud800\":1}"), "is not JSON in UTF-8, at its byte 9");
}

TEST(ShardsTest, RefusesDeepNesting) {
  const auto nested = [](size_t lists) { return std::string(lists, '[') + std::string(lists, ']'); };
  EXPECT_EQ(shards_refusal(nested(33)), "is nested deeper than 32 levels");
  EXPECT_EQ(read_index(R"({"weight_map":{},"metadata":{"a":)" + nested(30) + "}}").metadata.at("a"), nested(30));
  EXPECT_EQ(shards_refusal(std::string(1'000'000, '[')), "is nested deeper than 32 levels");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_EQ(shards_refusal(objects), "is nested deeper than 32 levels");
}

TEST(ShardsTest, RefusesMoreJsonThanTheLimit) {
  EXPECT_EQ(shards_refusal(std::string(100'000'001, ' ')), "has 100000001 bytes of JSON, more than the limit of 100000000");
}

TEST(ShardsTest, RefusesMoreValuesThanTheLimit) {
  std::string lists = "[]";
  for (int i = 0; i < 2'000'000; ++i) lists += ",[]";
  EXPECT_EQ(shards_refusal("[" + lists + "]"), "has more than 2000000 values");
}

TEST(ShardsTest, TakesTimeInProportionToTheIndex) {
  std::string lists = "0";
  for (int i = 0; i < 200'000; ++i) lists += ",{}";
  EXPECT_EQ(read_index(R"({"weight_map":{},"metadata":{"a":[)" + lists + "]}}").metadata.at("a"), "[" + lists + "]");
}

TEST(ShardsTest, KeepsMessagesOnOneLineWhateverTheNames) {
  EXPECT_EQ(shards_refusal("{\"weight_map\":{\"\\n\\u001b[31m\x7f\":1}}"),
            "the file of tensor \"\\n\\u001b[31m\\u007f\" must be a string");
}

}  // namespace
}  // namespace xattn::detail
