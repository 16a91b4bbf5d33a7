// SPDX-License-Identifier: Apache-2.0
#include <torch/script.h>
#include <torch/torch.h>
#include <xattn/checkpoint.h>

#include <algorithm>
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
using test::pickle::object;
using test::pickle::text;
using test::pickle::two_zeros;

// An archive of TorchScript whose module is this value.
std::string module_archive(const std::string& value, std::vector<std::pair<std::string, std::string>> more = {}) {
  more.emplace_back("archive/constants.pkl", test::pickle::whole(")"));
  return archive(value, more);
}

NamedTensors load_bytes(const std::string& bytes) {
  const TempDir dir;
  test::write_bytes(dir.file("x.pt"), bytes);
  return load_tensors(dir.file("x.pt"));
}

// The message of the error for a file of these bytes, which must be one line that names it.
std::string torchscript_refusal(const std::string& bytes, const std::string& reader = "torchscript") {
  const TempDir dir;
  test::write_bytes(dir.file("x.pt"), bytes);
  return test::refusal_by(reader, dir.file("x.pt"), [&] { return open_checkpoint(dir.file("x.pt")); });
}

// ---- Reading ----------------------------------------------------------------------------------------------------------------

TEST(TorchScriptTest, ReadsTheReferenceByName) {
  const auto checkpoint = open_checkpoint(data_path("reference.pt"));
  EXPECT_EQ(checkpoint.format(), FileFormat::torchscript);
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& [name, info] : checkpoint.tensors()) shapes[name] = info.shape;
  const std::map<std::string, std::vector<int64_t>> expected = {
      {"query_linear.weight", {16, 8}},   {"query_linear.bias", {16}}, {"key_linear.weight", {16, 12}},
      {"key_linear.bias", {16}},          {"value_linear.bias", {16}}, {"value_linear.weight", {16, 12}},
      {"output_linear.weight", {16, 16}}, {"output_linear.bias", {16}}};
  EXPECT_EQ(shapes, expected);
}

TEST(TorchScriptTest, ReadsALargerModelWithItsPrefixes) {
  const auto tensors = load_tensors(data_path("reference_in_model.pt"));
  EXPECT_EQ(tensors.size(), 11U);
  EXPECT_TRUE(tensors.contains("embedding.weight"));
  EXPECT_TRUE(tensors.contains("fusion.query_linear.weight"));
}

TEST(TorchScriptTest, ReadsTheStateDictOfAScriptedOrTracedModel) {
  const auto expected = load_tensors(data_path("files/state_dict.safetensors"));
  expect_equal(load_tensors(data_path("files/scripted.pt")), expected);
  expect_equal(load_tensors(data_path("files/traced.pt")), expected);
}

TEST(TorchScriptTest, ReadsWhatTorchReads) {
  for (const std::string name : {"reference.pt", "reference_in_model.pt", "files/scripted.pt", "files/traced.pt"}) {
    const auto module = torch::jit::load(data_path(name));
    NamedTensors expected;
    for (const auto& parameter : module.named_parameters()) expected.emplace(parameter.name, parameter.value);
    for (const auto& buffer : module.named_buffers()) expected.emplace(buffer.name, buffer.value);
    for (const auto& [tensor, value] : load_tensors(data_path(name))) {
      ASSERT_TRUE(expected.contains(tensor) || tensor == "layers.1.weight") << tensor;  // shares the weight of layers.0
      if (expected.contains(tensor)) {
        EXPECT_TRUE(torch::equal(expected.at(tensor), value)) << tensor;
      }
      expected.erase(tensor);
    }
    EXPECT_TRUE(expected.empty()) << name;
  }
}

TEST(TorchScriptTest, ReadsParametersAndBuffersWithoutGradients) {
  const TempDir dir;
  torch::jit::Module module("module");
  const auto weight = torch::rand({2, 3}).requires_grad_();
  module.register_parameter("weight", weight, /*is_buffer=*/false);
  module.register_buffer("steps", torch::tensor(7));
  module.save(dir.file("module.pt"));

  const auto tensors = load_tensors(dir.file("module.pt"));
  ASSERT_EQ(tensors.size(), 2U);
  EXPECT_TRUE(torch::equal(tensors.at("weight"), weight));
  EXPECT_FALSE(tensors.at("weight").requires_grad());
  EXPECT_EQ(tensors.at("steps").item<int64_t>(), 7);
}

TEST(TorchScriptTest, ReadsAModuleThatCppSaved) {
  const TempDir dir;
  torch::nn::Sequential model(torch::nn::Linear(3, 2), torch::nn::BatchNorm1d(2));
  torch::save(model, dir.file("model.pt"));
  NamedTensors expected;
  for (const auto& parameter : model->named_parameters()) expected.emplace(parameter.key(), parameter.value().detach());
  for (const auto& buffer : model->named_buffers()) expected.emplace(buffer.key(), buffer.value());
  EXPECT_EQ(open_checkpoint(dir.file("model.pt")).format(), FileFormat::torchscript);
  expect_equal(load_tensors(dir.file("model.pt")), expected);
}

TEST(TorchScriptTest, ReadsEveryTypeThatTorchSaves) {
  for (const auto type : {at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kBool, at::kUInt16, at::kUInt64,
                          at::kComplexFloat, at::kFloat8_e4m3fn, at::kFloat8_e8m0fnu}) {
    const TempDir dir;
    torch::jit::Module module("module");
    const auto value = torch::arange(6).view({2, 3}).to(type);
    module.register_buffer("value", value);
    module.save(dir.file("module.pt"));
    const auto back = load_tensors(dir.file("module.pt")).at("value");
    EXPECT_EQ(back.scalar_type(), type);
    EXPECT_TRUE(torch::equal(back.to(at::kComplexDouble), value.to(at::kComplexDouble))) << type;
  }
}

TEST(TorchScriptTest, ReadsAFileSavedOnAGpuIntoTheCpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  const TempDir dir;
  torch::jit::Module module("module");
  module.register_parameter("weight", torch::ones({2}, torch::kCUDA), /*is_buffer=*/false);
  module.save(dir.file("module.pt"));
  EXPECT_TRUE(torch::equal(load_tensors(dir.file("module.pt")).at("weight"), torch::ones({2})));
}

TEST(TorchScriptTest, NamesTensorsByTheModulesThatHoldThem) {
  const auto inner = object(text("weight") + two_zeros());
  const auto tensors = load_bytes(module_archive(object(text("0") + inner + text("layer") + object(text("inner") + inner))));
  EXPECT_EQ(tensors.size(), 2U);
  EXPECT_TRUE(tensors.contains("0.weight"));
  EXPECT_TRUE(tensors.contains("layer.inner.weight"));
}

TEST(TorchScriptTest, ReadsASharedModuleUnderBothOfItsNames) {
  const auto tensors =
      load_bytes(module_archive(object(text("a") + object(text("weight") + two_zeros()) + "q\1" + text("b") + "h\1")));
  EXPECT_EQ(tensors.size(), 2U);
  EXPECT_TRUE(tensors.contains("a.weight"));
  EXPECT_TRUE(tensors.contains("b.weight"));
}

TEST(TorchScriptTest, IgnoresAttributesThatAreNotTensors) {
  const auto lists = text("list") + global("torch.jit._pickle", "build_tensorlist") + "](" + two_zeros() + "e\x85R" +
                     text("dict") + global("torch.jit._pickle", "restore_type_tag") + dict(text("a") + two_zeros()) +
                     text("Dict[str, Tensor]") + "\x86R";
  const auto packed = text("packed") + global("__torch__.torch.classes", "Packed") + ")\x81" + two_zeros() + "\x85" + "b";
  const auto tensors = load_bytes(
      module_archive(object(text("training") + "\x88" + text("weight") + two_zeros() + text("bias") + "N" + lists + packed)));
  EXPECT_EQ(tensors.size(), 1U);
  EXPECT_TRUE(tensors.contains("weight"));
}

TEST(TorchScriptTest, ReadsAModuleWithoutTensors) {
  EXPECT_TRUE(load_bytes(module_archive(object(text("training") + "\x88"))).empty());
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(TorchScriptTest, RefusesAFrozenModule) {
  EXPECT_EQ(
      error_of<FileError>([] { return open_checkpoint(data_path("files/frozen.pt")); }),
      "[torchscript] " + data_path("files/frozen.pt") +
          ": has no parameters, but constants without names, as torch.jit.freeze makes them; save the module before it is "
          "frozen");
}

TEST(TorchScriptTest, RefusesAnythingButAModule) {
  EXPECT_EQ(torchscript_refusal(module_archive(two_zeros())), "must hold a module, but holds something else");
}

TEST(TorchScriptTest, RefusesATensorOutsideTheFile) {
  const auto storage = test::pickle::storage("FloatStorage", "0", 2);
  EXPECT_EQ(
      torchscript_refusal(module_archive(object(text("x") + object(text("a") + test::pickle::tensor(storage, {3}, {1}))))),
      "tensor \"x.a\" of shape [3], strides [1] and offset 0 ends beyond its storage of 8 bytes");
}

TEST(TorchScriptTest, RefusesModulesThatHoldThemselves) {
  const auto self = global("__torch__", "Module") + ")\x81q\1" + dict(text("a") + two_zeros() + text("x") + "h\1") + "b";
  EXPECT_EQ(torchscript_refusal(module_archive(self)), "must not hold a dict or a module that holds itself");
}

TEST(TorchScriptTest, RefusesASmallFileThatNamesTensorsWithoutEnd) {
  auto value = object(text("a") + two_zeros()) + "q\1";
  for (int i = 0; i < 40; ++i) value = value + "0" + object(text("x") + "h\1" + text("y") + "h\1") + "q\1";
  EXPECT_TRUE(torchscript_refusal(module_archive(value)).starts_with("expands to far more than a pickle of "));
}

TEST(TorchScriptTest, RefusesNumbersOfTheOtherByteOrder) {
  EXPECT_EQ(torchscript_refusal(module_archive(object(text("a") + two_zeros()), {{"archive/byteorder", "big"}})),
            "must be little-endian, but gives its byte order as \"big\"");
}

TEST(TorchScriptTest, RefusesAMissingFile) {
  EXPECT_EQ(error_of<FileError>([] { return open_checkpoint("/no/such/file"); }),
            "[file] /no/such/file: cannot be opened: No such file or directory");
}

TEST(TorchScriptTest, RefusesATruncatedArchive) {
  const auto bytes = test::read_bytes(data_path("reference.pt"));
  EXPECT_EQ(torchscript_refusal(bytes.substr(0, bytes.size() / 2), "zip"),
            "has no directory at its end; a download may have been cut off");
}

TEST(TorchScriptTest, RefusesOneTensorWithoutAName) {
  const auto bytes = torch::jit::pickle_save(torch::ones({2}));
  EXPECT_EQ(
      torchscript_refusal(std::string(bytes.begin(), bytes.end()), "state dict"),
      "must hold a dict of tensors by name, but holds one tensor; save it so in Python: torch.save({'NAME': tensor}, PATH)");
}

TEST(TorchScriptTest, RefusesBytesOfAnotherKind) {
  EXPECT_EQ(torchscript_refusal("these are\nno weights\n", "checkpoint"),
            "must be a safetensors file, the index.json of a sharded set, or an archive of torch.save, torch.jit.save or "
            "torch.export.save, but is none of these");
}

TEST(TorchScriptTest, ThrowsNoOtherErrorWhateverByteIsChanged) {
  const auto whole = module_archive(object(text("x") + object(text("a") + two_zeros())));
  for (size_t i = 0; i < whole.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      auto bytes = whole;
      bytes[i] = static_cast<char>(value);
      try {
        detail::read_torchscript("x", detail::ZipFile("x", std::as_bytes(std::span(bytes))));
      } catch (const FileError&) {
      }
    }
  }
}

}  // namespace
}  // namespace xattn
