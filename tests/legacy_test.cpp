// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/checkpoint.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "file_checks.h"
#include "files/readers.h"
#include "pickle_writer.h"
#include "test_util.h"

// Files of torch.save from before PyTorch 1.6.
namespace xattn {
namespace {

using test::data_path;
using test::little_endian;
using test::pickle::dict;
using test::pickle::global;
using test::pickle::integer;
using test::pickle::tensor;
using test::pickle::text;
using test::pickle::tuple;
using test::pickle::whole;

std::string saved(const std::string& name) {
  return data_path("files/" + name);
}

const std::string kLegacyMagic = whole("\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19");
const std::string kLittleEndian = whole(dict(text("little_endian") + "\x88"));

// The persistent id of a storage with items of this class; `view` is None, or the part of the storage that is meant.
std::string legacy_storage(const std::string& type, const std::string& key, int64_t items, const std::string& view = "N") {
  return tuple(text("storage") + global("torch", type) + text(key) + text("cpu") + integer(items) + view) + "Q";
}

using Storages = std::vector<std::pair<std::string, std::string>>;  // keys, and their counts and items

std::string legacy_file(const std::string& object, const Storages& storages, const std::string& machine = kLittleEndian) {
  std::string keys, data;
  for (const auto& [key, bytes] : storages) {
    keys += text(key);
    data += bytes;
  }
  return kLegacyMagic + whole(integer(1001)) + machine + whole(object) + whole("](" + keys + "e") + data;
}

// Floats with their number in front.
std::string float_items(const std::vector<float>& values) {
  return little_endian(values.size(), 8) + std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size());
}

NamedTensors read_all(const std::string& bytes) {
  const auto checkpoint = open_checkpoint(std::as_bytes(std::span(bytes)));
  EXPECT_EQ(checkpoint.format(), FileFormat::state_dict);
  NamedTensors tensors;
  for (const auto& [name, info] : checkpoint.tensors()) tensors[name] = checkpoint.tensor(name);
  return tensors;
}

std::string legacy_refusal(const std::string& bytes, const std::string& reader = "state dict") {
  return test::refusal_by(reader, "x.pt", [&] { detail::read_legacy("x.pt", std::as_bytes(std::span(bytes))); });
}

// ---- Files written by Python ------------------------------------------------------------------------------------------------

TEST(LegacyTest, ReadsTheStateDictOfAModel) {
  EXPECT_EQ(open_checkpoint(saved("legacy.pt")).format(), FileFormat::state_dict);
  test::expect_equal(load_tensors(saved("legacy.pt")), load_tensors(saved("state_dict.safetensors")));
}

TEST(LegacyTest, ReadsTheModelOfACheckpointInOtherProtocols) {
  for (const std::string protocol : {"1", "4"}) {
    const auto path = saved("legacy_protocol_" + protocol + ".pt");
    test::expect_equal(load_tensors(path), load_tensors(saved("state_dict.safetensors")));
    EXPECT_EQ(open_checkpoint(path).metadata(), open_checkpoint(saved("checkpoint.pt")).metadata());
  }
}

TEST(LegacyTest, ReadsViewsOfSharedMemoryAndEveryTypeWithAClassOfStorages) {
  test::expect_equal(load_tensors(saved("legacy_views.pt")), load_tensors(saved("views.safetensors")));
  const auto types = load_tensors(saved("legacy_types.pt")), expected = load_tensors(saved("types.pt"));
  EXPECT_EQ(types.size(), 12U);
  for (const auto& [name, tensor] : types) {
    EXPECT_EQ(tensor.scalar_type(), expected.at(name).scalar_type()) << name;
    EXPECT_TRUE(torch::equal(tensor, expected.at(name))) << name;
  }
}

TEST(LegacyTest, PassesOverObjectsAndListsTensorsThatAreNotRead) {
  const auto legacy = open_checkpoint(saved("legacy_objects.pt")), archive = open_checkpoint(saved("objects.pt"));
  EXPECT_EQ(legacy.unreadable(), archive.unreadable());
  EXPECT_EQ(legacy.metadata(), archive.metadata());
  EXPECT_EQ(legacy.tensors().size(), load_tensors(saved("state_dict.safetensors")).size());
}

// ---- Older forms ------------------------------------------------------------------------------------------------------------

TEST(LegacyTest, ReadsStoragesInTheOrderOfTheirKeysWhateverIsBetweenThem) {
  const auto object = dict(text("a") + tensor(legacy_storage("FloatStorage", "7", 2), {2}, {1}) + text("q") +
                           global("torch._utils", "_rebuild_qtensor") + "(" + legacy_storage("QInt32Storage", "q", 3) + "tR" +
                           text("b") + tensor(legacy_storage("FloatStorage", "9", 1), {1}, {1}));
  const auto bytes = legacy_file(
      object, {{"9", float_items({5})}, {"q", little_endian(3, 8) + std::string(12, 'x')}, {"7", float_items({1, 2})}});
  test::expect_equal(read_all(bytes), {{"a", torch::tensor({1.f, 2.f})}, {"b", torch::tensor({5.f})}});
}

TEST(LegacyTest, ReadsPartsOfStorages) {  // as before PyTorch 0.4
  const auto view = tuple(text("view") + integer(1) + integer(2));
  const auto object = dict(text("a") + tensor(legacy_storage("FloatStorage", "0", 4, view), {2}, {1}) + text("b") +
                           tensor(legacy_storage("FloatStorage", "0", 4), {4}, {1}));
  test::expect_equal(read_all(legacy_file(object, {{"0", float_items({1, 2, 3, 4})}})),
                     {{"a", torch::tensor({2.f, 3.f})}, {"b", torch::tensor({1.f, 2.f, 3.f, 4.f})}});
  for (const auto& [offset, size] : {std::pair(-1, 1), {0, -1}, {5, 0}, {3, 2}}) {
    const auto beyond = tuple(text("view") + integer(offset) + integer(size));
    EXPECT_EQ(legacy_refusal(legacy_file(dict(text("a") + tensor(legacy_storage("FloatStorage", "0", 4, beyond), {1}, {1})),
                                         {{"0", float_items({1, 2, 3, 4})}})),
              "tensor \"a\" lies in a part of storage \"0\", which has 4 items, that is not in it");
  }
}

TEST(LegacyTest, ReadsParametersAndDictsAsPython2WroteThem) {
  const auto floats_2 = legacy_storage("FloatStorage", "0", 2);
  const auto old_tensor = global("torch._utils", "_rebuild_tensor") + "(" + floats_2 + integer(0) + "(K\2t(K\1ttR";
  const auto parameter = global("torch.nn.parameter", "Parameter") + old_tensor + "\x85R(\x88\x89Ntb";
  const auto variable = global("torch.autograd.variable", "Variable") + old_tensor + "\x85R";
  const auto pairs = "](](U\1a" + parameter + "e](U\1b" + variable + "ee";
  const auto object = global("collections", "OrderedDict") + pairs + "\x85R";
  const auto expected = torch::tensor({1.f, 2.f});
  test::expect_equal(read_all(legacy_file(object, {{"0", float_items({1, 2})}})), {{"a", expected}, {"b", expected}});
}

TEST(LegacyTest, ReadsStoragesThatLayOnAGpu) {
  const auto cuda =
      tuple(text("storage") + global("torch.cuda", "FloatStorage") + text("0") + text("cuda:0") + integer(1) + "N") + "Q";
  test::expect_equal(read_all(legacy_file(dict(text("a") + tensor(cuda, {1}, {1})), {{"0", float_items({3})}})),
                     {{"a", torch::tensor({3.f})}});
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

const std::string kLegacyOne = dict(text("a") + tensor(legacy_storage("FloatStorage", "0", 2), {2}, {1}));

TEST(LegacyTest, SaysHowToSaveTheTensorsOfAWholeModule) {
  const auto module = tuple(text("module") + global("__main__", "Net") + text("net.py") + text("class Net")) + "Q)R}b";
  EXPECT_EQ(legacy_refusal(legacy_file(module, {})),
            "holds an object of class __main__.Net, which is not a tensor; if you trust the file, whose code this runs, save "
            "only the tensors, in Python: torch.save(torch.load(PATH, weights_only=False).state_dict(), NEW_PATH)");
}

TEST(LegacyTest, RefusesOtherPicklesVersionsAndMachines) {
  EXPECT_EQ(legacy_refusal(whole(dict(text("a") + "K\1"))),
            "is a pickle, but not of torch.save; pickles of other values are not read");
  EXPECT_EQ(legacy_refusal(kLegacyMagic + whole("K\1")), "must have version 1001");
  EXPECT_EQ(legacy_refusal(kLegacyMagic + whole("N")), "must have version 1001");
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", float_items({1, 2})}}, whole("N"))),
            "must describe its machine by a dict");
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", float_items({1, 2})}}, whole(dict(text("little_endian") + "\x89")))),
            "must be little-endian, but is not");
}

TEST(LegacyTest, RefusesStoragesThatDoNotFit) {
  const std::string cut = "; a download may have been cut off";
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", "1234567"}})), "ends before storage \"0\"" + cut);
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", little_endian(2, 8) + "1234567"}})),
            "has 7 bytes for storage \"0\" of 2 items of 4 bytes" + cut);
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", little_endian(~uint64_t{0}, 8) + "1234567"}})),
            "has 7 bytes for storage \"0\" of -1 items of 4 bytes" + cut);
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", float_items({1})}})),
            "tensor \"a\" lies in storage \"0\" of 2 items of 4 bytes, but its record has 4 bytes");
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {})), "has no storage \"0\"");
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", float_items({1, 2})}, {"1", float_items({1})}})),
            "has the storage \"1\", which no tensor uses");
  EXPECT_EQ(legacy_refusal(legacy_file(kLegacyOne, {{"0", float_items({1, 2})}, {"0", float_items({1, 2})}})),
            "has the storage \"0\" twice");
  EXPECT_EQ(legacy_refusal(legacy_file(dict(text("a") + tensor(legacy_storage("OddStorage", "0", 2), {2}, {1})),
                                       {{"0", float_items({1, 2})}})),
            "has storage \"0\" of class \"OddStorage\", which torch does not have");
  EXPECT_EQ(legacy_refusal(kLegacyMagic + whole(integer(1001)) + kLittleEndian + whole(kLegacyOne) + whole("N")),
            "must have a list of its storages' keys");
  EXPECT_EQ(legacy_refusal(kLegacyMagic + whole(integer(1001)) + kLittleEndian + whole(kLegacyOne) + whole("]K\1a")),
            "must have texts as its storages' keys");
}

TEST(LegacyTest, ThrowsNoOtherErrorWhateverByteIsChangedOrMissing) {
  const auto file = legacy_file(kLegacyOne, {{"0", float_items({1, 2})}});
  const auto read = [](const std::string& bytes) {
    try {
      const auto index = detail::read_legacy("x", std::as_bytes(std::span(bytes)));
      for (const auto& [name, stored] : index.tensors) detail::materialize(stored);
    } catch (const FileError&) {
    }
  };
  for (size_t i = 0; i < file.size(); ++i) {
    read(file.substr(0, i));
    for (int value = 0; value < 256; ++value) {
      auto bytes = file;
      bytes[i] = static_cast<char>(value);
      read(bytes);
    }
  }
}

}  // namespace
}  // namespace xattn
