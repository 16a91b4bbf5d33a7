// SPDX-License-Identifier: Apache-2.0
#include <xattn/state_dict.h>

#include <torch/torch.h>
#include <xattn/checkpoint.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "file_checks.h"
#include "files/readers.h"
#include "pickle_writer.h"
#include "test_util.h"

namespace xattn {
namespace {

using test::data_path;
using test::error_of;
using test::expect_equal;
using test::TempDir;
using test::pickle::archive;
using test::pickle::dict;
using test::pickle::global;
using test::pickle::integer;
using test::pickle::tensor;
using test::pickle::text;
using test::pickle::two_zeros;

constexpr at::ScalarType kTypes[] = {at::kDouble,        at::kFloat,
                                     at::kHalf,          at::kBFloat16,
                                     at::kLong,          at::kInt,
                                     at::kShort,         at::kChar,
                                     at::kByte,          at::kBool,
                                     at::kUInt64,        at::kUInt32,
                                     at::kUInt16,        at::kComplexHalf,
                                     at::kComplexFloat,  at::kComplexDouble,
                                     at::kFloat8_e4m3fn, at::kFloat8_e4m3fnuz,
                                     at::kFloat8_e5m2,   at::kFloat8_e5m2fnuz,
                                     at::kFloat8_e8m0fnu};

at::Tensor zero_to_five(at::ScalarType type) {
  return torch::arange(6).view({2, 3}).to(type);
}

// A file of these bytes, opened.
Checkpoint opened(const std::string& bytes) {
  const TempDir dir;
  test::write_bytes(dir.file("x.pt"), bytes);
  return open_checkpoint(dir.file("x.pt"));
}

std::vector<std::string> names_in(const std::string& value) {
  const auto checkpoint = opened(archive(value));
  std::vector<std::string> names;
  for (const auto& [name, info] : checkpoint.tensors()) names.push_back(name);
  return names;
}

// The message of the error for a file of these bytes, which must be one line that names it.
std::string state_dict_refusal(const std::string& bytes, const std::string& reader = "state dict") {
  const TempDir dir;
  test::write_bytes(dir.file("x.pt"), bytes);
  return test::refusal_by(reader, dir.file("x.pt"), [&] { return open_checkpoint(dir.file("x.pt")); });
}

std::string refusal_of(const std::string& value, const std::string& reader = "state dict") {
  return state_dict_refusal(archive(value), reader);
}

std::string floats(int64_t elements) {
  return test::pickle::storage("FloatStorage", "0", elements);
}

std::string one(const std::string& tensor) {
  return dict(text("a") + tensor);
}

// ---- Files written by Python ------------------------------------------------------------------------------------------------

TEST(StateDictTest, ReadsTheStateDictOfAModel) {
  const auto checkpoint = open_checkpoint(data_path("files/state_dict.pt"));
  EXPECT_EQ(checkpoint.format(), FileFormat::state_dict);
  EXPECT_TRUE(checkpoint.metadata().empty());
  expect_equal(load_tensors(data_path("files/state_dict.pt")), load_tensors(data_path("files/state_dict.safetensors")));
}

TEST(StateDictTest, ReadsTheModelOfACheckpointWithoutItsOptimizer) {
  const auto checkpoint = open_checkpoint(data_path("files/checkpoint.pt"));
  const std::map<std::string, std::string> metadata = {
      {"epoch", "3"}, {"loss", "0.5"}, {"name", "small"}, {"state_dict_key", "model"}};
  EXPECT_EQ(checkpoint.metadata(), metadata);
  expect_equal(load_tensors(data_path("files/checkpoint.pt")), load_tensors(data_path("files/state_dict.safetensors")));
}

TEST(StateDictTest, ReadsViewsOfSharedMemory) {
  expect_equal(load_tensors(data_path("files/views.pt")), load_tensors(data_path("files/views.safetensors")));
}

TEST(StateDictTest, ReadsEveryType) {
  const auto tensors = load_tensors(data_path("files/types.pt"));
  EXPECT_EQ(tensors.size(), std::size(kTypes));
  for (const auto type : kTypes) {
    const auto& tensor = tensors.at(std::string(c10::getDtypeNames(type).first));
    EXPECT_EQ(tensor.scalar_type(), type);
    EXPECT_TRUE(torch::equal(tensor.to(at::kComplexDouble), zero_to_five(type).to(at::kComplexDouble))) << type;
  }
}

TEST(StateDictTest, SaysHowToConvertFilesThatItDoesNotRead) {
  const auto message = [](const std::string& name) {
    return error_of<FileError>([&] { return open_checkpoint(data_path("files/" + name)); });
  };
  EXPECT_EQ(
      message("module.pt"),
      "[state dict] " + data_path("files/module.pt") +
          ": holds an object of class __main__.SmallModel, which is not a tensor; if you trust the file, whose code this runs, "
          "save only the tensors, in Python: torch.save(torch.load(PATH, weights_only=False).state_dict(), NEW_PATH)");
}

TEST(StateDictTest, PassesOverObjectsOfOtherClasses) {  // an argparse.Namespace, NumPy arrays, a callback, ...
  const auto path = data_path("files/objects.pt");
  const auto checkpoint = open_checkpoint(path);
  const auto expected = load_tensors(data_path("files/state_dict.safetensors"));
  EXPECT_EQ(checkpoint.tensors().size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(torch::equal(checkpoint.tensor(name), tensor)) << name;
  EXPECT_EQ(checkpoint.metadata(), (std::map<std::string, std::string>{{"epoch", "3"}, {"state_dict_key", "model"}}));
}

TEST(StateDictTest, ListsTensorsThatAreNotReadAndRefusesThemWhenAskedFor) {
  const auto path = data_path("files/objects.pt");
  const auto checkpoint = open_checkpoint(path);
  const std::map<std::string, std::string> expected = {{"meta", "it is made by torch._utils._rebuild_meta_tensor_no_storage"},
                                                       {"quantized", "it is made by torch._utils._rebuild_qtensor"},
                                                       {"sparse", "it is made by torch._utils._rebuild_sparse_tensor"}};
  EXPECT_EQ(checkpoint.unreadable(), expected);
  EXPECT_EQ(lazy(checkpoint).unreadable, expected);
  for (const auto& [name, reason] : expected) {
    EXPECT_FALSE(checkpoint.contains(name));
    EXPECT_EQ(error_of<FileError>([&, &name = name] { return checkpoint.tensor(name); }),
              "[checkpoint] " + path + ": tensor \"" + name + "\" is not read: " + reason);
  }
  EXPECT_EQ(error_of<FileError>([&] { return load_tensors(path); }),
            "[checkpoint] " + path + ": tensor \"meta\" is not read: " + expected.at("meta"));
}

// Why tensor "a" of this file is not read.
std::string reason_of(const std::string& tensor) {
  const auto unreadable = opened(archive(one(tensor))).unreadable();
  return unreadable.contains("a") ? unreadable.at("a") : "it is read";
}

TEST(StateDictTest, NamesTheClassThatATensorDependsOn) {
  const auto object = global("torchao.quantization", "Scale") + ")R";
  EXPECT_EQ(reason_of(global("torch._utils", "_rebuild_tensor_v2") + "(" + object + "K\1))tR"),
            "it depends on an object of class torchao.quantization.Scale");
  EXPECT_EQ(reason_of(global("torch._utils", "_rebuild_parameter") + "(" + object + "\x88}tR"),
            "it is made by torchao.quantization.Scale");
  EXPECT_EQ(
      reason_of(global("torch._tensor", "_rebuild_from_type_v2") + "(" + global("torch._utils", "_rebuild_wrapper_subclass") +
                global("torch.distributed.tensor", "DTensor") + ")}" + text("mesh") + object + "stR"),
      "it is made by torch._utils._rebuild_wrapper_subclass");
  EXPECT_EQ(reason_of(global("torch._tensor", "_rebuild_from_type_v2") + "(" + global("torch._utils", "_rebuild_tensor_v2") +
                      object + "(" + floats(2) + integer(0) + "(K\2t(K\1tt}tR"),
            "it is read")
      << "an instance of another class, but whose numbers are a plain tensor's";
}

// ---- Finding the state dict -------------------------------------------------------------------------------------------------

using Names = std::vector<std::string>;

TEST(StateDictTest, TakesTheModelUnderItsUsualKey) {
  for (const std::string key : {"state_dict", "model_state_dict", "model", "module", "net", "weights", "params"}) {
    const auto value = dict(text("average") + one(two_zeros()) + text(key) + dict(text("b") + two_zeros()) + text("other") +
                            one(two_zeros()) + text("step") + two_zeros());
    EXPECT_EQ(names_in(value), Names({"b"})) << key;
    EXPECT_EQ(opened(archive(value)).metadata().at("state_dict_key"), key);
  }
  EXPECT_EQ(names_in(dict(text("model") + one(two_zeros()) + text("state_dict") + dict(text("b") + two_zeros()))),
            Names({"b"}));
}

TEST(StateDictTest, TakesTheOnlyDictThatHoldsTensors) {
  const auto value =
      dict(text("generator") + dict(text("model") + one(two_zeros())) + text("options") + dict(text("x") + "K\1"));
  EXPECT_EQ(names_in(value), Names({"a"}));
  EXPECT_EQ(opened(archive(value)).metadata().at("state_dict_key"), "generator.model");
}

TEST(StateDictTest, JoinsTheNamesOfSeveralDictsByDots) {
  EXPECT_EQ(names_in(dict(text("teacher") + one(two_zeros()) + text("student") + one(two_zeros()))),
            Names({"student.a", "teacher.a"}));
  EXPECT_EQ(names_in(dict(text("x") + two_zeros() + text("y") + dict(text("z") + one(two_zeros())))), Names({"x", "y.z.a"}));
}

TEST(StateDictTest, LeavesOptimizersOut) {
  const auto optimizer = dict(text("state") + dict(integer(0) + one(two_zeros())) + text("param_groups") + "]");
  EXPECT_EQ(names_in(dict(text("optimizer") + optimizer + text("encoder") + one(two_zeros()))), Names({"a"}));
  EXPECT_EQ(refusal_of(optimizer), "holds no tensors by name");
}

TEST(StateDictTest, ReadsTensorsWithTheNamesOfAnOptimizersParts) {
  EXPECT_EQ(names_in(dict(text("state") + two_zeros() + text("param_groups") + two_zeros())), Names({"param_groups", "state"}));
}

TEST(StateDictTest, KeepsTextsAndNumbersAsMetadata) {
  const auto value =
      dict(text("t") + text("x") + text("i") + integer(-3) + text("r") + "G\x3f\xf8" + std::string(6, '\0') + text("b") +
           "\x88" + text("n") + "N" + text("l") + "]" + integer(7) + integer(7) + text("a") + two_zeros());
  const std::map<std::string, std::string> expected = {{"t", "x"}, {"i", "-3"}, {"r", "1.5"}, {"b", "true"}};
  EXPECT_EQ(opened(archive(value)).metadata(), expected);
}

TEST(StateDictTest, IgnoresOtherValues) {
  // A list that holds itself, a large number, a set; keys that are not texts.
  const auto value = dict(text("x") + "]q\1h\1a" + integer(1) + "]" + ")" + ")" + text("y") + global("builtins", "set") +
                          "]\x85R" + text("a") + two_zeros());
  EXPECT_EQ(names_in(value), Names({"a"}));
}

// ---- Writing ----------------------------------------------------------------------------------------------------------------

NamedTensors through_state_dict(const NamedTensors& tensors) {
  const TempDir dir;
  save_state_dict(dir.file("x.pt"), tensors);
  EXPECT_EQ(open_checkpoint(dir.file("x.pt")).format(), FileFormat::state_dict);
  return load_tensors(dir.file("x.pt"));
}

TEST(StateDictTest, KeepsEveryType) {
  NamedTensors tensors;
  for (const auto type : kTypes) tensors.emplace(c10::toString(type), zero_to_five(type));
  const auto back = through_state_dict(tensors);
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(back.at(name).scalar_type(), tensor.scalar_type());
    EXPECT_TRUE(torch::equal(back.at(name).to(at::kComplexDouble), tensor.to(at::kComplexDouble))) << name;
  }
}

TEST(StateDictTest, WritesTheElementsOfAView) {
  const auto base = torch::arange(12.).view({3, 4});
  const auto complex = torch::complex(base, base + 1);
  const auto back = through_state_dict({{"base", base},
                                        {"transposed", base.t()},
                                        {"columns", base.slice(1, 1, 4, 2)},
                                        {"expanded", base[0].expand({5, 4})},
                                        {"conjugate", complex.conj()},
                                        {"negative", at::imag(complex.conj())}});
  expect_equal(back, {{"base", base},
                      {"transposed", base.t()},
                      {"columns", base.slice(1, 1, 4, 2)},
                      {"expanded", base[0].expand({5, 4})},
                      {"conjugate", complex.conj().resolve_conj()},
                      {"negative", -(base + 1)}});
}

TEST(StateDictTest, KeepsScalarsEmptyTensorsAndNamesInAnyLanguage) {
  const NamedTensors tensors = {
      {"größe \"1\"\n", torch::tensor(2.5)}, {"", torch::zeros({3, 0, 2})}, {"日本語", torch::ones({1})}};
  expect_equal(through_state_dict(tensors), tensors);
}

TEST(StateDictTest, KeepsAFileWithoutTensors) {
  EXPECT_TRUE(through_state_dict({}).empty());
}

TEST(StateDictTest, WritesParametersWithoutTheirGradients) {
  const auto back = through_state_dict({{"a", torch::ones({2}).requires_grad_()}});
  EXPECT_FALSE(back.at("a").requires_grad());
}

TEST(StateDictTest, KeepsTheOldFileAndLeavesNoOtherOnFailure) {
  test::expect_old_file_kept_on_full_disk(
      [](const std::string& path, const NamedTensors& tensors) { save_state_dict(path, tensors); });
}

TEST(StateDictTest, RefusesToWriteWhatTheFormatCannotHold) {
  const TempDir dir;
  const auto refused = [&](const NamedTensors& tensors) {
    const auto message = error_of<FileError>([&] { save_state_dict(dir.file("x"), tensors); });
    EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
    return message.substr(std::min(message.size(), ("[state dict] " + dir.file("x") + ": ").size()));
  };
  EXPECT_EQ(refused({{"a", at::Tensor()}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"a", torch::ones({1}).to_sparse()}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"a", torch::empty({1}, at::kMeta)}}), "tensor \"a\" must be dense and have data");
  EXPECT_EQ(refused({{"a", torch::quantize_per_tensor(torch::ones({1}), 1, 0, at::kQInt8)}}),
            "tensor \"a\" is QInt8, which cannot be saved");
  EXPECT_EQ(refused({{"\xff", torch::ones({1})}}), "names must be UTF-8");
}

TEST(StateDictTest, RefusesTensorsThatAreMadeOtherwiseThanAnnounced) {
  test::expect_only_announced_tensors(
      "state dict", [](const std::string& path, const LazyTensors& tensors) { save_state_dict(path, tensors); });
}

TEST(StateDictTest, RefusesPathsThatCannotBeWritten) {
  const TempDir dir;
  const auto refused = [](const std::string& path) {
    return error_of<FileError>([&] { save_state_dict(path, {{"a", torch::ones({1})}}); });
  };
  EXPECT_EQ(refused(dir.file("no/x")), "[state dict] " + dir.file("no/x") + ": cannot be written: No such file or directory");
  EXPECT_EQ(refused(dir.path()), "[state dict] " + dir.path() + ": exists, but is not a regular file");
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(StateDictTest, RefusesAnythingButADictOfTensors) {
  const std::string cure = "; save it so in Python: torch.save({'NAME': tensor}, PATH)";
  EXPECT_EQ(refusal_of(two_zeros()), "must hold a dict of tensors by name, but holds one tensor" + cure);
  EXPECT_EQ(refusal_of("](" + two_zeros() + "e"), "must hold a dict of tensors by name, but holds something else" + cure);
  EXPECT_EQ(refusal_of(dict(text("a") + "](" + two_zeros() + "e")), "holds no tensors by name");
}

TEST(StateDictTest, RefusesAnObjectInPlaceOfTensorsByTheNameOfItsClass) {
  const auto message = [](const std::string& name, const std::string& part) {
    return "holds an object of class " + name +
           ", which is not a tensor; if you trust the file, whose code this runs, save only the tensors, in Python: "
           "torch.save(torch.load(PATH, weights_only=False)" +
           part + ".state_dict(), NEW_PATH)";
  };
  const auto model = global("__main__", "Net") + ")\x81}b", args = global("argparse", "Namespace") + ")\x81}b";
  EXPECT_EQ(refusal_of(model), message("__main__.Net", ""));
  EXPECT_EQ(refusal_of(dict(text("args") + args + text("model") + model)), message("__main__.Net", "['model']"));
  EXPECT_EQ(refusal_of(dict(text("epoch") + "K\1" + text("args") + args)), message("argparse.Namespace", "['args']"));
  EXPECT_EQ(refusal_of(global("a\x1b[1m", "b") + ")R"), message("a\\x1b[1m.b", ""));
}

TEST(StateDictTest, RefusesTensorsWhoseNamesAreNotTexts) {
  EXPECT_EQ(refusal_of(dict(integer(0) + two_zeros())), "must name its tensors by texts, but has another key after \"\"");
  EXPECT_EQ(refusal_of(dict(text("x") + dict(integer(0) + two_zeros()) + text("y") + two_zeros())),
            "must name its tensors by texts, but has another key after \"x.\"");
}

TEST(StateDictTest, RefusesANameGivenTwice) {
  EXPECT_EQ(refusal_of(dict(text("a") + two_zeros() + text("a") + two_zeros())), "has the name \"a\" twice");
  const auto sparse = global("torch._utils", "_rebuild_sparse_tensor") + ")R";
  EXPECT_EQ(refusal_of(dict(text("a") + two_zeros() + text("a") + sparse)), "has the name \"a\" twice");
  EXPECT_EQ(refusal_of(dict(text("a") + sparse + text("a") + two_zeros())), "has the name \"a\" twice");
  EXPECT_EQ(refusal_of(dict(text("a.b") + two_zeros() + text("a") + dict(text("b") + two_zeros()))),
            "has the name \"a.b\" twice");
}

TEST(StateDictTest, RefusesTensorsBeyondTheirStorage) {
  const std::string end = " ends beyond its storage of 8 bytes";
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {3}, {1}))), "tensor \"a\" of shape [3], strides [1] and offset 0" + end);
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {2}, {2}))), "tensor \"a\" of shape [2], strides [2] and offset 0" + end);
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {2}, {1}, 1))), "tensor \"a\" of shape [2], strides [1] and offset 1" + end);
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {2}, {INT64_MAX}))),
            "tensor \"a\" of shape [2], strides [9223372036854775807] and offset 0" + end);
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {1}, {1}, INT64_MAX))),
            "tensor \"a\" of shape [1], strides [1] and offset 9223372036854775807" + end);
}

TEST(StateDictTest, RefusesInvalidShapesAndStrides) {
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {-1}, {1}))),
            "tensor \"a\" has shape [-1], strides [1] and offset 0, which do not make a tensor");
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {1}, {-1}))),
            "tensor \"a\" has shape [1], strides [-1] and offset 0, which do not make a tensor");
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {1}, {1}, -1))),
            "tensor \"a\" has shape [1], strides [1] and offset -1, which do not make a tensor");
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {1, 1}, {1}))),
            "tensor \"a\" has shape [1, 1], strides [1] and offset 0, which do not make a tensor");
  EXPECT_EQ(refusal_of(one(tensor(floats(2), {INT64_MAX, INT64_MAX}, {0, 0}))),
            "tensor \"a\" has shape [9223372036854775807, 9223372036854775807], strides [0, 0] and offset 0, which do not make "
            "a tensor");
}

TEST(StateDictTest, RefusesStoragesOfAnotherSizeThanTheirRecords) {
  for (const int64_t elements : {-1, 0, 1, 3}) {
    EXPECT_EQ(
        refusal_of(one(tensor(floats(elements), {1}, {1}))),
        "tensor \"a\" lies in storage \"0\" of " + std::to_string(elements) + " items of 4 bytes, but its record has 8 bytes");
  }
  EXPECT_EQ(refusal_of(one(tensor(floats(INT64_MAX), {1}, {1}))),
            "tensor \"a\" lies in storage \"0\" of 9223372036854775807 items of 4 bytes, but its record has 8 bytes");
  EXPECT_EQ(refusal_of(one(tensor(test::pickle::storage("FloatStorage", "1", 2), {2}, {1})), "zip"), "has no entry \"data/1\"");
}

TEST(StateDictTest, DoesNotReadUnknownTypes) {
  EXPECT_EQ(reason_of(tensor(test::pickle::storage("QInt8Storage", "0", 8), {2}, {1})),
            "it is of type \"QInt8Storage\" in \"QInt8Storage\"");
  EXPECT_EQ(reason_of(tensor(test::pickle::storage("UntypedStorage", "0", 8), {2}, {1})),
            "it is of type \"UntypedStorage\" in \"UntypedStorage\"");
}

TEST(StateDictTest, DoesNotReadTensorsOfOtherKinds) {
  for (const std::string function : {"_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_meta_tensor_no_storage"}) {
    EXPECT_EQ(reason_of(global("torch._utils", function) + ")R"), "it is made by torch._utils." + function);
  }
}

TEST(StateDictTest, RefusesRecordsThatAreNotTensors) {
  const auto rebuild = global("torch._utils", "_rebuild_tensor_v2");
  const std::string message = "tensor \"a\" must have a storage, an offset, a shape and strides";
  EXPECT_EQ(refusal_of(one(rebuild + ")R")), message);
  EXPECT_EQ(refusal_of(one(rebuild + "(K\1K\1))tR")), message);
  EXPECT_EQ(refusal_of(one(rebuild + "(" + floats(2) + "N))tR")), message);
  EXPECT_EQ(refusal_of(one(rebuild + "(" + floats(2) + "K\1])tR")), message);
  EXPECT_EQ(refusal_of(one(rebuild + "(" + floats(2) + "K\1(Nt)tR")), "tensor \"a\" must have a shape and strides of integers");
}

TEST(StateDictTest, DoesNotReadConjugateViews) {
  EXPECT_EQ(reason_of(global("torch._utils", "_rebuild_tensor_v2") + "(" + floats(2) + "K\1))NN" + dict(text("conj") + "\x88") +
                      "tR"),
            "it is a conjugate or negative view");
}

TEST(StateDictTest, RefusesNumbersOfTheOtherByteOrder) {
  EXPECT_EQ(state_dict_refusal(archive(one(two_zeros()), {{"archive/byteorder", "big"}})),
            "must be little-endian, but gives its byte order as \"big\"");
}

TEST(StateDictTest, RefusesDictsThatHoldThemselvesOrNestDeep) {
  EXPECT_EQ(refusal_of("}q\1(" + text("x") + "h\1u"), "must not hold a dict or a module that holds itself");
  const auto nested = [](int levels) {
    auto value = one(two_zeros());
    for (int i = 0; i < levels; ++i) value = dict(text("x") + value + text("y") + two_zeros());
    return value;
  };
  EXPECT_EQ(names_in(nested(100)).size(), 101U);
  EXPECT_EQ(refusal_of(nested(101)), "nests deeper than 100 levels");
  EXPECT_EQ(refusal_of(nested(1000)), "nests deeper than 100 levels");
}

TEST(StateDictTest, RefusesASmallFileThatNamesTensorsWithoutEnd) {
  // Each dict holds the one before it twice: 2^40 names.
  auto value = one(two_zeros()) + "q\1";
  for (int i = 0; i < 40; ++i) value = value + "0" + "}(" + text("x") + "h\1" + text("y") + "h\1uq\1";
  EXPECT_TRUE(refusal_of(value).starts_with("expands to far more than a pickle of ")) << refusal_of(value);
  // A long name in front of each of many short ones.
  std::string items = text("b") + two_zeros() + "q\1";
  for (int i = 0; i < 20000; ++i) items += text(std::to_string(i)) + "h\1";
  const auto behind = dict(text(std::string(100'000, 'x')) + dict(items) + text("y") + two_zeros());
  EXPECT_TRUE(refusal_of(behind).starts_with("expands to far more than a pickle of ")) << refusal_of(behind);
}

TEST(StateDictTest, ThrowsNoOtherErrorWhateverByteIsChanged) {
  const auto whole = archive(dict(text("model") + one(two_zeros()) + text("k") + text("v")));
  for (size_t i = 0; i < whole.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      auto bytes = whole;
      bytes[i] = static_cast<char>(value);
      try {
        const auto index = detail::read_state_dict("x", detail::ZipFile("x", std::as_bytes(std::span(bytes))));
        for (const auto& [name, stored] : index.tensors) detail::materialize(stored);
      } catch (const FileError&) {
      }
    }
  }
}

}  // namespace
}  // namespace xattn
