// SPDX-License-Identifier: Apache-2.0
#include <xattn/torchscript.h>

#include <torch/script.h>
#include <torch/torch.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "test_util.h"

namespace xattn {
namespace {

using test::data_path;
using test::error_of;
using test::TempDir;

// What is said about a file, after its name; must be one line.
std::string refusal(const std::string& path) {
  const auto message = error_of<FileError>([&] { load_torchscript(path); });
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  const auto start = "[torchscript] " + path +
                     ": must be an archive of torch.jit.save (re-save a state dict with safetensors.torch.save_file), but: ";
  EXPECT_TRUE(message.starts_with(start)) << message;
  return message.substr(std::min(message.size(), start.size()));
}

TEST(TorchScriptTest, ReadsTheReferenceByName) {
  const auto tensors = load_torchscript(data_path("reference.pt"));
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& [name, tensor] : tensors) shapes[name] = tensor.sizes().vec();
  const std::map<std::string, std::vector<int64_t>> expected = {
      {"query_linear.weight", {16, 8}},   {"query_linear.bias", {16}}, {"key_linear.weight", {16, 12}},
      {"key_linear.bias", {16}},          {"value_linear.bias", {16}}, {"value_linear.weight", {16, 12}},
      {"output_linear.weight", {16, 16}}, {"output_linear.bias", {16}}};
  EXPECT_EQ(shapes, expected);
}

TEST(TorchScriptTest, ReadsALargerModelWithItsPrefixes) {
  const auto tensors = load_torchscript(data_path("reference_in_model.pt"));
  EXPECT_EQ(tensors.size(), 11U);
  EXPECT_TRUE(tensors.contains("embedding.weight"));
  EXPECT_TRUE(tensors.contains("fusion.query_linear.weight"));
}

TEST(TorchScriptTest, ReadsParametersAndBuffersWithoutGradients) {
  const TempDir dir;
  torch::jit::Module module("module");
  const auto weight = torch::rand({2, 3}).requires_grad_();
  module.register_parameter("weight", weight, /*is_buffer=*/false);
  module.register_buffer("steps", torch::tensor(7));
  module.save(dir.file("module.pt"));

  const auto tensors = load_torchscript(dir.file("module.pt"));
  ASSERT_EQ(tensors.size(), 2U);
  EXPECT_TRUE(torch::equal(tensors.at("weight"), weight));
  EXPECT_FALSE(tensors.at("weight").requires_grad());
  EXPECT_EQ(tensors.at("steps").item<int64_t>(), 7);
}

TEST(TorchScriptTest, ReadsAFileSavedOnAGpuIntoTheCpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  const TempDir dir;
  torch::jit::Module module("module");
  module.register_parameter("weight", torch::ones({2}, torch::kCUDA), /*is_buffer=*/false);
  module.save(dir.file("module.pt"));
  EXPECT_TRUE(torch::equal(load_torchscript(dir.file("module.pt")).at("weight"), torch::ones({2})));
}

TEST(TorchScriptTest, RefusesAFileThatIsNotThere) {
  EXPECT_NE(refusal("/no/such/file").find("/no/such/file"), std::string::npos);
}

TEST(TorchScriptTest, RefusesAnArchiveThatIsCutOff) {
  const TempDir dir;
  const auto bytes = test::read_bytes(data_path("reference.pt"));
  test::write_bytes(dir.file("half.pt"), bytes.substr(0, bytes.size() / 2));
  EXPECT_NE(refusal(dir.file("half.pt")), "");
}

TEST(TorchScriptTest, RefusesAnArchiveOfAnotherKind) {
  const TempDir dir;
  const auto bytes =
      torch::jit::pickle_save(torch::ones({2}));  // a zip archive with a pickle, like that of Python's torch.save
  test::write_bytes(dir.file("pickle.pt"), std::string(bytes.begin(), bytes.end()));
  EXPECT_NE(refusal(dir.file("pickle.pt")).find("constants.pkl"), std::string::npos);
}

TEST(TorchScriptTest, RefusesBytesOfAnotherKind) {
  const TempDir dir;
  test::write_bytes(dir.file("text.pt"), "these are\nno weights\n");
  EXPECT_NE(refusal(dir.file("text.pt")), "");
}

}  // namespace
}  // namespace xattn
