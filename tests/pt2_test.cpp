// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/equal.h>
#include <ATen/ops/view_as_real.h>
#include <gtest/gtest.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "file_checks.h"
#include "files/mapped_file.h"
#include "files/readers.h"
#include "test_util.h"
#include "zip_writer.h"

namespace xattn::detail {
namespace {

using test::data_path;
using test::error_of;
using Records = std::map<std::string, std::string>;

constexpr char kWeights[] = "data/weights/model_weights_config.json";
constexpr char kConstants[] = "data/constants/model_constants_config.json";
constexpr char kNoArchive[] =
    "must be an archive of torch.save, torch.jit.save or torch.export.save, but is a zip file without data.pkl and without "
    "archive_format pt2";

// The description of a tensor of two floats in a storage of four. Each test changes one field.
struct Fields {
  std::string path_name = "\"weight_0\"";
  std::string use_pickle = "false";
  std::string dtype = "7";
  std::string sizes = R"([{"as_int":2}])";
  std::string strides = R"([{"as_int":1}])";
  std::string storage_offset = R"({"as_int":1})";
  std::string layout = "7";

  std::string json() const {
    return R"({"path_name":)" + path_name + R"(,"is_param":true,"use_pickle":)" + use_pickle + R"(,"tensor_meta":{"dtype":)" +
           dtype + R"(,"sizes":)" + sizes + R"(,"requires_grad":true,"device":{"type":"cuda","index":0},"strides":)" + strides +
           R"(,"storage_offset":)" + storage_offset + R"(,"layout":)" + layout + "}}";
  }
};

std::string config_of(const std::string& entries) {
  return "{\"config\":{" + entries + "}}";
}

Records archive(const std::string& weights, const std::string& constants = config_of("")) {
  return {{"archive_format", "pt2"},
          {"archive_version", "0"},
          {"byteorder", "little"},
          {"models/model.json", "not read"},
          {"data/weights/weight_0", std::string(16, '\1')},
          {"data/constants/tensor_0", std::string(16, '\2')},
          {kWeights, weights},
          {kConstants, constants}};
}

Records archive_with(const Fields& fields) {
  return archive(config_of("\"a\":" + fields.json()));
}

Index read_archive(const std::string& bytes) {
  auto index = read_pt2("x.pt2", ZipFile("x.pt2", std::as_bytes(std::span(bytes))));
  for (auto& [name, stored] : index.tensors) stored.data = {};  // would dangle
  return index;
}

Index read_archive(const Records& records) {
  std::vector<std::pair<std::string, std::string>> entries;
  for (const auto& [name, bytes] : records) entries.emplace_back("x/" + name, bytes);
  return read_archive(test::zip_of(entries));
}

// The message of the error for an archive, without the part that names the file.
template <typename Archive>
std::string pt2_refusal(const Archive& archive) {
  return test::refusal_by("pt2", "x.pt2", [&] { read_archive(archive); });
}

std::map<std::string, at::Tensor> tensors_of(const Index& index) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, stored] : index.tensors) tensors.emplace(name, materialize(stored).value());
  return tensors;
}

// ---- Reading ----------------------------------------------------------------------------------------------------------------

// Files of scripts/make_fixtures.py, with what PyTorch reads from them.
class Pt2FixtureTest : public testing::TestWithParam<std::string> {};

TEST_P(Pt2FixtureTest, ReadsTheTensorsThatPyTorchReads) {
  const MappedFile file(data_path("files/" + GetParam() + ".pt2"));
  const MappedFile expected_file(data_path("files/" + GetParam() + ".safetensors"));
  const auto tensors = tensors_of(read_pt2("x", ZipFile("x", file.bytes())));
  const auto expected = tensors_of(read_safetensors("y", expected_file.bytes()));
  EXPECT_EQ(tensors.size(), expected.size());
  for (const auto& [name, wanted] : expected) {
    ASSERT_TRUE(tensors.contains(name)) << name;
    auto tensor = tensors.at(name);
    if (tensor.is_complex()) tensor = at::view_as_real(tensor.to(at::kComplexDouble));
    EXPECT_EQ(tensor.scalar_type(), wanted.scalar_type()) << name;
    EXPECT_TRUE(at::equal(tensor.flatten().view(at::kByte), wanted.flatten().view(at::kByte))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Files, Pt2FixtureTest, testing::Values("exported", "exported_types"), [](const auto& file) {
  return file.param;
});

TEST(Pt2Test, GivesEachTypeItsName) {
  const MappedFile file(data_path("files/exported_types.pt2"));
  const auto index = read_pt2("x", ZipFile("x", file.bytes()));
  EXPECT_EQ(index.tensors.size(), 22U);
  for (const auto& [name, stored] : index.tensors) {
    const auto type = name == "scalar" ? "float32" : name.substr(3);
    EXPECT_EQ(c10::getDtypeNames(stored.type).first, type);
  }
}

TEST(Pt2Test, KeepsViewsOfOneStorage) {
  const MappedFile file(data_path("files/exported.pt2"));
  const auto index = read_pt2("x", ZipFile("x", file.bytes()));
  const auto& tensors = index.tensors;
  EXPECT_EQ(tensors.at("unembedding.weight").data.data(), tensors.at("embedding.weight").data.data());
  EXPECT_EQ(tensors.at("end").data.data() - tensors.at("middle").data.data(), 2 * 4);
  EXPECT_EQ(tensors.at("expanded").data.size(), 2U * 4U);
  EXPECT_EQ(tensors.at("transposed").strides, (std::vector<int64_t>{1, 3}));
}

TEST(Pt2Test, ReadsWeightsAndConstants) {
  const auto index = read_archive(archive(config_of("\"a\":" + Fields().json()),
                                          config_of("\"b\":" + Fields{.path_name = "\"tensor_0\"", .dtype = "12"}.json())));
  EXPECT_EQ(index.tensors.size(), 2U);
  EXPECT_EQ(index.tensors.at("a").type, at::kFloat);
  EXPECT_EQ(index.tensors.at("b").type, at::kBool);
  EXPECT_EQ(index.tensors.at("b").shape, std::vector<int64_t>{2});
}

TEST(Pt2Test, ReadsAModelOfAnotherName) {
  auto records = archive_with({});
  for (const auto& [from, to] : Records{{"models/model.json", "models/a.b.json"},
                                        {kWeights, "data/weights/a.b_weights_config.json"},
                                        {kConstants, "data/constants/a.b_constants_config.json"}}) {
    auto record = records.extract(from);
    record.key() = to;
    records.insert(std::move(record));
  }
  EXPECT_TRUE(read_archive(records).tensors.contains("a"));
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(Pt2Test, RefusesOtherZipFiles) {
  EXPECT_EQ(pt2_refusal(Records{}), kNoArchive);
  EXPECT_EQ(pt2_refusal(Records{{"word/document.xml", "<xml/>"}}), kNoArchive);
  EXPECT_EQ(pt2_refusal(test::zip_of({{"a", ""}, {"b/c", ""}})), kNoArchive);
  auto records = archive_with({});
  records["archive_format"] = "pt3";
  EXPECT_EQ(pt2_refusal(records), kNoArchive);
}

TEST(Pt2Test, RefusesPickledWeightsOfOlderVersions) {
  const std::string cure =
      " pickled, as older versions of PyTorch wrote them, and pickles are not run; save it again in Python: "
      "torch.save(torch.export.load(PATH).state_dict, NEW_PATH)";
  EXPECT_EQ(pt2_refusal(
                test::zip_of({{"version", "8.8"}, {"serialized_exported_program.json", ""}, {"serialized_state_dict.pt", ""}})),
            "its weights are" + cure);
  auto records = archive_with({});
  records["data/weights/model.pt"] = "";
  EXPECT_EQ(pt2_refusal(records), "its weights are" + cure);
  records = archive_with({});
  records["data/constants/model.pt"] = "";
  EXPECT_EQ(pt2_refusal(records), "its constants are" + cure);
}

// Why tensor "a" of this archive is not read.
std::string reason_of(const Fields& fields) {
  const auto index = read_archive(archive_with(fields));
  EXPECT_FALSE(index.tensors.contains("a"));
  return index.unreadable.at("a");
}

TEST(Pt2Test, DoesNotReadPickledTensorsButTheOthers) {
  EXPECT_EQ(reason_of({.use_pickle = "true"}),
            "it is pickled, as objects and tensors of classes of their own are, and pickles are not run; save plain tensors in "
            "Python: torch.save({NAME: TENSOR, ...}, NEW_PATH)");
  const Fields pickled{.use_pickle = "true"};
  const auto index = read_archive(archive(config_of("\"a\":" + pickled.json() + ",\"b\":" + Fields().json())));
  EXPECT_EQ(index.tensors.size(), 1U);
  EXPECT_EQ(index.unreadable.size(), 1U);
}

TEST(Pt2Test, NamesPackagesOfAOTInductor) {
  const std::string message =
      "is a package compiled by AOTInductor, whose weights have no names; save the program before it is compiled, in Python: "
      "torch.export.save(PROGRAM, NEW_PATH)";
  EXPECT_EQ(pt2_refusal(test::zip_of({{"x/archive_format", "pt2"},
                                      {"x/archive_version", "0"},
                                      {"x/byteorder", "little"},
                                      {"x/data/aotinductor/model/c.wrapper.so", "ELF"}})),
            message);
  EXPECT_EQ(pt2_refusal(test::zip_of({{"data/aotinductor/model/a.cpp", ""}, {"version", "3"}})), message);
}

TEST(Pt2Test, RefusesOtherVersionsAndByteOrders) {
  auto records = archive_with({});
  records["archive_version"] = "1";
  EXPECT_EQ(pt2_refusal(records), "must have archive_version 0");
  records = archive_with({});
  records["byteorder"] = "big";
  EXPECT_EQ(pt2_refusal(records), "must have byteorder little");
  records.erase("byteorder");
  EXPECT_EQ(pt2_refusal(records), "must have byteorder little");
}

TEST(Pt2Test, RefusesAnyNumberOfModelsButOne) {
  auto records = archive_with({});
  records["models/other.json"] = "";
  EXPECT_EQ(pt2_refusal(records), "must have one model, models/NAME.json, but has 2");
  records.erase("models/model.json");
  records.erase("models/other.json");
  EXPECT_EQ(pt2_refusal(records), "must have one model, models/NAME.json, but has 0");
  records["models/"] = "";
  records["models.json"] = "";
  records["models/json"] = "";
  EXPECT_EQ(pt2_refusal(records), "must have one model, models/NAME.json, but has 0");
}

TEST(Pt2Test, RefusesAnArchiveWithoutConfigs) {
  for (const std::string config : {kWeights, kConstants}) {
    auto records = archive_with({});
    records.erase(config);
    EXPECT_EQ(pt2_refusal(records), "has no \"" + config + "\"");
  }
}

TEST(Pt2Test, RefusesAConfigThatIsNotJson) {
  EXPECT_EQ(error_of<FileError>([] { read_archive(archive("{\"config\":{")); }),
            "[pt2] x.pt2: data/weights/model_weights_config.json: is not JSON in UTF-8, at its byte 12");
}

TEST(Pt2Test, RefusesAConfigThatIsNotAnObject) {
  for (const std::string config : {"{}", "[]", "1", "{\"config\":[]}", "{\"config\":null}"}) {
    EXPECT_EQ(pt2_refusal(archive(config)), "\"data/weights/model_weights_config.json\" must have config, an object") << config;
  }
}

TEST(Pt2Test, RefusesATensorThatIsNotAnObject) {
  for (const std::string entry : {"null", "[]", "1", "\"x\"", "{}"}) {
    EXPECT_EQ(pt2_refusal(archive(config_of("\"a\":" + entry))), "tensor \"a\" must have use_pickle, true or false") << entry;
  }
}

TEST(Pt2Test, RefusesFieldsOfOtherKinds) {
  EXPECT_EQ(pt2_refusal(archive_with({.path_name = "null"})), "tensor \"a\" must have path_name, a string");
  EXPECT_EQ(pt2_refusal(archive_with({.use_pickle = "0"})), "tensor \"a\" must have use_pickle, true or false");
  for (const std::string number : {"-1", "7.0", "\"7\"", "null", "true", "{}", "18446744073709551616"}) {
    EXPECT_EQ(pt2_refusal(archive_with({.dtype = number})), "tensor \"a\" must have tensor_meta/dtype, a non-negative integer");
    EXPECT_EQ(pt2_refusal(archive_with({.layout = number})),
              "tensor \"a\" must have tensor_meta/layout, a non-negative integer");
    EXPECT_EQ(pt2_refusal(archive_with({.sizes = "[{\"as_int\":" + number + "}]"})),
              "tensor \"a\" must have tensor_meta/sizes/0/as_int, a non-negative integer");
    EXPECT_EQ(pt2_refusal(archive_with({.strides = "[{\"as_int\":" + number + "}]"})),
              "tensor \"a\" must have tensor_meta/strides/0/as_int, a non-negative integer");
    EXPECT_EQ(pt2_refusal(archive_with({.storage_offset = "{\"as_int\":" + number + "}"})),
              "tensor \"a\" must have tensor_meta/storage_offset/as_int, a non-negative integer");
  }
  EXPECT_EQ(pt2_refusal(archive_with({.sizes = "{}"})), "tensor \"a\" must have tensor_meta/sizes, a list");
  EXPECT_EQ(pt2_refusal(archive_with({.strides = "2"})), "tensor \"a\" must have tensor_meta/strides, a list");
}

TEST(Pt2Test, RefusesSizesThatAreSymbols) {
  EXPECT_EQ(pt2_refusal(archive_with({.sizes = R"([{"as_int":2},{"as_expr":{"expr_str":"s0","hint":null}}])"})),
            "tensor \"a\" must have tensor_meta/sizes/1/as_int, a non-negative integer");
}

TEST(Pt2Test, RefusesATensorWithoutMeta) {
  EXPECT_EQ(pt2_refusal(archive(config_of(R"("a":{"path_name":"weight_0","use_pickle":false,"tensor_meta":null})"))),
            "tensor \"a\" must have tensor_meta/layout, a non-negative integer");
}

TEST(Pt2Test, DoesNotReadTypesThatPyTorchDoesNotHave) {
  for (const std::string number : {"0", "14", "27", "36", "18446744073709551615"}) {
    EXPECT_EQ(reason_of({.dtype = number}), "it has dtype " + number + ", which is not one of PyTorch's type numbers");
  }
}

TEST(Pt2Test, DoesNotReadTensorsThatAreNotStrided) {
  EXPECT_EQ(reason_of({.layout = "1"}), "it has layout 1, not 7, strided");
}

TEST(Pt2Test, RefusesMissingRecords) {
  for (const std::string record : {"weight_1", "", "../constants/tensor_0", "/etc/passwd"}) {
    EXPECT_EQ(pt2_refusal(archive_with({.path_name = "\"" + record + "\""})),
              "tensor \"a\" should be in \"data/weights/" + record + "\", which is not there");
  }
}

TEST(Pt2Test, RefusesTensorsThatEndBeyondTheirStorage) {
  EXPECT_EQ(pt2_refusal(archive_with({.storage_offset = R"({"as_int":3})"})),
            "tensor \"a\" of shape [2], strides [1] and offset 3 ends beyond its storage of 16 bytes");
  EXPECT_EQ(pt2_refusal(archive_with({.strides = R"([{"as_int":3}])"})),
            "tensor \"a\" of shape [2], strides [3] and offset 1 ends beyond its storage of 16 bytes");
  EXPECT_EQ(pt2_refusal(archive_with({.storage_offset = R"({"as_int":9223372036854775807})"})),
            "tensor \"a\" of shape [2], strides [1] and offset 9223372036854775807 ends beyond its storage of 16 bytes");
  EXPECT_EQ(pt2_refusal(archive_with({.dtype = "11", .storage_offset = R"({"as_int":0})"})),
            "tensor \"a\" of shape [2], strides [1] and offset 0 ends beyond its storage of 16 bytes");
}

TEST(Pt2Test, RefusesInvalidShapesAndStrides) {
  EXPECT_EQ(pt2_refusal(archive_with({.strides = "[]"})),
            "tensor \"a\" has shape [2], strides [] and offset 1, which do not make a tensor");
  EXPECT_EQ(pt2_refusal(archive_with({.sizes = R"([{"as_int":18446744073709551615}])"})),
            "tensor \"a\" has shape [-1], strides [1] and offset 1, which do not make a tensor");
}

TEST(Pt2Test, RefusesANameGivenTwice) {
  const auto one = "\"a\":" + Fields().json();
  EXPECT_EQ(error_of<FileError>([&] { read_archive(archive(config_of(one + "," + one))); }),
            "[pt2] x.pt2: data/weights/model_weights_config.json: has the name \"a\" twice in one object");
  EXPECT_EQ(pt2_refusal(archive(config_of(one), config_of("\"a\":" + Fields{.path_name = "\"tensor_0\""}.json()))),
            "has the tensor \"a\" twice, in weights and in constants");
}

TEST(Pt2Test, KeepsMessagesOnOneLineWhateverTheNames) {
  EXPECT_EQ(pt2_refusal(archive(config_of("\"\\n\\u001b[31m\x7f\":1"))),
            "tensor \"\\n\\u001b[31m\\u007f\" must have use_pickle, true or false");
}

}  // namespace
}  // namespace xattn::detail
