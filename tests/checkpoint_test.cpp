// SPDX-License-Identifier: Apache-2.0
#include <xattn/checkpoint.h>

#include <sys/stat.h>
#include <torch/torch.h>
#include <xattn/safetensors.h>
#include <xattn/state_dict.h>

#include <filesystem>
#include <string>

#include "test_util.h"

namespace xattn {
namespace {

using test::data_path;
using test::error_of;
using test::TempDir;

TEST(CheckpointTest, TellsTheFormatByContentWhateverTheName) {
  const TempDir dir;
  const NamedTensors tensors = {{"a", torch::ones({2})}};
  save_safetensors(dir.file("x.pt"), tensors);
  save_state_dict(dir.file("y.safetensors"), tensors);
  std::filesystem::copy_file(data_path("reference.pt"), dir.file("z.bin"));
  std::filesystem::copy_file(data_path("files/exported.pt2"), dir.file("w.json"));
  EXPECT_EQ(open_checkpoint(dir.file("x.pt")).format(), FileFormat::safetensors);
  EXPECT_EQ(open_checkpoint(dir.file("y.safetensors")).format(), FileFormat::state_dict);
  EXPECT_EQ(open_checkpoint(dir.file("z.bin")).format(), FileFormat::torchscript);
  EXPECT_EQ(open_checkpoint(dir.file("w.json")).format(), FileFormat::pt2);
}

TEST(CheckpointTest, KnowsNamesTypesAndShapesWithoutReadingTensors) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2, 3}, torch::kHalf)}}, {{"step", "7"}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  ASSERT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(checkpoint.tensors().at("a").type, torch::kHalf);
  EXPECT_EQ(checkpoint.tensors().at("a").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(checkpoint.metadata().at("step"), "7");
}

TEST(CheckpointTest, TensorsHaveMemoryOfTheirOwn) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  checkpoint.tensor("a").zero_();
  EXPECT_TRUE(torch::equal(checkpoint.tensor("a"), torch::ones({2})));
}

TEST(CheckpointTest, CopiesOutliveTheFirstAndTheFilesName) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}});
  auto first = std::make_unique<Checkpoint>(open_checkpoint(dir.file("x")));
  const auto second = *first;
  first.reset();
  std::filesystem::remove(dir.file("x"));
  EXPECT_TRUE(torch::equal(second.tensor("a"), torch::ones({2})));
}

TEST(CheckpointTest, OpensAFileLargerThanMemoryAtTheCostOfItsHeader) {
  const TempDir dir;
  const std::string header = R"({"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}})";
  const uint64_t length = header.size();
  test::write_bytes(dir.file("x"), std::string(reinterpret_cast<const char*>(&length), 8) + header);
  std::filesystem::resize_file(dir.file("x"), 8 + length + (uint64_t{1} << 40));  // sparse: takes no disk
  EXPECT_EQ(open_checkpoint(dir.file("x")).tensors().at("a").shape, (std::vector<int64_t>{int64_t{1} << 40}));
}

TEST(CheckpointTest, RefusesWhatIsNoFileToRead) {
  const TempDir dir;
  EXPECT_EQ(error_of<FileError>([] { open_checkpoint("/no/such/file"); }),
            "[file] /no/such/file: cannot be opened: No such file or directory");
  EXPECT_EQ(error_of<FileError>([] { open_checkpoint("/"); }), "[file] /: must be a regular file, but is none");
  ASSERT_EQ(mkfifo(dir.file("pipe").c_str(), 0600), 0);
  EXPECT_EQ(error_of<FileError>([&] { open_checkpoint(dir.file("pipe")); }),
            "[file] " + dir.file("pipe") + ": must be a regular file, but is none");
}

TEST(CheckpointTest, RefusesFilesOfNoKnownFormat) {
  const TempDir dir;
  for (const std::string bytes : {"", "PK", "some text, which is long enough", "\x80\x01"}) {
    test::write_bytes(dir.file("x"), bytes);
    EXPECT_EQ(
        error_of<FileError>([&] { open_checkpoint(dir.file("x")); }),
        "[checkpoint] " + dir.file("x") +
            ": must be a safetensors file, the index.json of a sharded set, or an archive of torch.save, torch.jit.save or "
            "torch.export.save, but is none of these");
  }
}

TEST(CheckpointTest, RefusesFilesFromBeforeTheZipFormatAndSaysHowToSaveThemAnew) {
  const auto path = data_path("files/legacy.pt");
  EXPECT_EQ(error_of<FileError>([&] { open_checkpoint(path); }),
            "[checkpoint] " + path +
                ": was written by torch.save in the form from before PyTorch 1.6, which is not read; save it anew in Python: "
                "torch.save(torch.load(PATH, map_location='cpu'), NEW_PATH)");
}

TEST(CheckpointTest, RefusesATensorThatIsNotThere) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({1})}});
  EXPECT_EQ(error_of<FileError>([&] { open_checkpoint(dir.file("x")).tensor("b\n"); }),
            "[checkpoint] " + dir.file("x") + ": has no tensor \"b\\n\"");
}

TEST(CheckpointTest, RefusesToReadAFileThatHasChangedSinceItWasOpened) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({100})}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  std::filesystem::resize_file(dir.file("x"), 100);
  EXPECT_EQ(error_of<FileError>([&] { checkpoint.tensor("a"); }),
            "[file] " + dir.file("x") + ": has changed since it was opened");
}

TEST(CheckpointTest, TakesTensorsOfAnotherUnderNewNames) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}}, {{"step", "7"}});
  save_state_dict(dir.file("y"), {{"b", torch::zeros({3})}, {"c", torch::zeros({1})}});
  const auto x = open_checkpoint(dir.file("x"));
  const auto both = x.with(open_checkpoint(dir.file("y")), {{"b", "new.b"}});
  EXPECT_EQ(both.tensors().size(), 2U);
  EXPECT_EQ(both.tensors().at("new.b").shape, std::vector<int64_t>{3});
  EXPECT_TRUE(both.tensor("new.b").equal(torch::zeros({3})) && both.tensor("a").equal(torch::ones({2})));
  EXPECT_EQ(both.path(), x.path());
  EXPECT_EQ(both.metadata().at("step"), "7");
  EXPECT_EQ(x.tensors().size(), 1U);

  const auto refusal = [&](const std::string& theirs, const std::string& ours) {
    return error_of<FileError>([&] { x.with(open_checkpoint(dir.file("y")), {{theirs, ours}}); });
  };
  EXPECT_EQ(refusal("d", "d"), "[checkpoint] " + dir.file("y") + ": has no tensor \"d\"");
  EXPECT_EQ(refusal("b", "a"), "[checkpoint] " + dir.file("x") + ": already has a tensor \"a\"");
  std::filesystem::resize_file(dir.file("y"), 10);
  EXPECT_EQ(error_of<FileError>([&] { both.tensor("new.b"); }),
            "[file] " + dir.file("y") + ": has changed since it was opened");
}

}  // namespace
}  // namespace xattn
