// SPDX-License-Identifier: Apache-2.0
#include <xattn/checkpoint.h>

#include <sys/resource.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>
#include <xattn/safetensors.h>
#include <xattn/state_dict.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "file_checks.h"
#include "pickle_writer.h"
#include "test_util.h"
#include "zip_writer.h"

namespace xattn {
namespace {

using test::data_path;
using test::error_of;
using test::TempDir;

TEST(CheckpointTest, DetectsTheFormatFromTheContentsWhateverTheName) {
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

TEST(CheckpointTest, ListsNamesTypesAndShapesWithoutReadingTensors) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2, 3}, torch::kHalf)}}, {{"step", "7"}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  ASSERT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(checkpoint.tensors().at("a").type, torch::kHalf);
  EXPECT_EQ(checkpoint.tensors().at("a").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(checkpoint.metadata().at("step"), "7");
}

TEST(CheckpointTest, CountsTheBytesOfAnyShapeOrRefusesIt) {
  constexpr int64_t kLong = int64_t{1} << 62;
  EXPECT_EQ(byte_count({at::kDouble, {2, 3}}), 48);
  EXPECT_EQ(byte_count({at::kHalf, {}}), 2);
  EXPECT_EQ(byte_count({at::kDouble, {kLong, 0}}), 0);
  EXPECT_EQ(error_of<c10::ValueError>([&] { byte_count({at::kDouble, {kLong}}); }),
            "[byte_count] info must have a shape whose bytes can be counted, but has [4611686018427387904].");
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
  std::filesystem::resize_file(dir.file("x"), 8 + length + (uint64_t{1} << 40));  // sparse: takes no space on disk
  EXPECT_EQ(open_checkpoint(dir.file("x")).tensors().at("a").shape, (std::vector<int64_t>{int64_t{1} << 40}));
}

TEST(CheckpointTest, RefusesFilesThatCannotBeRead) {
  const TempDir dir;
  EXPECT_EQ(error_of<FileError>([] { return open_checkpoint("/no/such/file"); }),
            "[file] /no/such/file: cannot be opened: No such file or directory");
  ASSERT_EQ(mkfifo(dir.file("pipe").c_str(), 0600), 0);
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(dir.file("pipe")); }),
            "[file] " + dir.file("pipe") + ": must be a regular file, but is not");
}

TEST(CheckpointTest, RefusesFilesOfUnknownFormats) {
  const TempDir dir;
  for (const std::string bytes : {"", "PK", "some text, which is long enough", "\x80\x01"}) {
    test::write_bytes(dir.file("x"), bytes);
    EXPECT_EQ(
        error_of<FileError>([&] { return open_checkpoint(dir.file("x")); }),
        "[checkpoint] " + dir.file("x") +
            ": must be a safetensors file, the index.json of a sharded set, or an archive of torch.save, torch.jit.save or "
            "torch.export.save, but is none of these");
  }
}

TEST(CheckpointTest, NamesOtherFilesForWhatTheyAre) {
  const auto refusal = [](const std::string& bytes) {
    return test::refusal_by("checkpoint", "x", [&] { return open_checkpoint(std::as_bytes(std::span(bytes)), {}, "x"); });
  };
  EXPECT_EQ(refusal("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
            "is a pointer of Git LFS to a file that was not fetched; run git lfs pull");
  for (const std::string page : {"<!DOCTYPE html><html>", "\n  <html lang=\"en\">", "<!doctype HTML>"}) {
    EXPECT_EQ(refusal(page), "is a web page; the download needs another address, or a login");
  }
  EXPECT_EQ(refusal("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>"),
            "is an XML document, perhaps a server's error; the download needs another address");
  EXPECT_EQ(refusal(std::string("GGUF\3\0\0\0{\0\0\0\0\0\0\0", 16)),
            "is a GGUF file, whose quantized weights are not read; take the model's safetensors");
  EXPECT_TRUE(refusal("\x89HDF\r\n\x1a\n").starts_with("is an HDF5 file"));
  EXPECT_TRUE(refusal("\x93NUMPY\1").starts_with("is a NumPy array"));
  std::string tar(512, '\0');
  tar.replace(257, 5, "ustar");
  EXPECT_EQ(refusal(tar),
            "is a tar archive, as the first versions of PyTorch wrote them, which is not read; save it again in Python: "
            "torch.save(torch.load(PATH, map_location='cpu', weights_only=False), NEW_PATH)");
}

TEST(CheckpointTest, ReadsEveryFormatFromMemoryWithoutACopy) {
  for (const std::string name :
       {"files/state_dict.safetensors", "files/state_dict.pt", "files/legacy.pt", "files/scripted.pt", "files/exported.pt2"}) {
    const auto expected = open_checkpoint(data_path(name));
    auto bytes = test::read_bytes(data_path(name));
    const auto checkpoint = open_checkpoint(std::as_bytes(std::span(bytes)), {}, "my file");
    EXPECT_EQ(checkpoint.path(), "my file");
    EXPECT_TRUE(checkpoint.files().empty());
    EXPECT_EQ(checkpoint.format(), expected.format());
    EXPECT_EQ(checkpoint.metadata(), expected.metadata());
    ASSERT_EQ(checkpoint.tensors().size(), expected.tensors().size());
    for (const auto& [tensor, info] : expected.tensors()) {
      EXPECT_TRUE(torch::equal(checkpoint.tensor(tensor), expected.tensor(tensor))) << name << ", " << tensor;
    }
  }
  // A change of the bytes is seen, because nothing was copied.
  auto bytes = test::read_bytes(data_path("files/state_dict.safetensors"));
  const auto checkpoint = open_checkpoint(std::as_bytes(std::span(bytes)));
  const auto before = checkpoint.tensor("first.weight");
  std::fill(bytes.end() - 500, bytes.end(), '\0');
  EXPECT_FALSE(torch::equal(checkpoint.tensor("first.weight"), before));
}

TEST(CheckpointTest, KeepsTheOwnerOfItsBytes) {
  auto owner = std::make_shared<const std::string>(test::read_bytes(data_path("files/state_dict.pt")));
  const std::weak_ptr<const std::string> alive = owner;
  {
    const TempDir dir;
    save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}});
    const auto first = open_checkpoint(std::as_bytes(std::span(*owner)), owner);
    const auto both = open_checkpoint(dir.file("x")).with(first, {{"first.bias", "b"}});
    owner.reset();
    EXPECT_EQ(both.tensor("b").sizes(), at::IntArrayRef({2}));
    EXPECT_FALSE(alive.expired());
  }
  EXPECT_TRUE(alive.expired());
}

TEST(CheckpointTest, RefusesTheIndexOfASetInMemory) {
  const std::string index = R"({"weight_map":{"a":"x.safetensors"}})";
  EXPECT_EQ(
      error_of<FileError>([&] { return open_checkpoint(std::as_bytes(std::span(index))); }),
      "[checkpoint] file in memory: must be one file, but is the index of a sharded set, which names others; open the index "
      "by its path");
}

TEST(CheckpointTest, ListsUnreadableTensorsOfShards) {
  const TempDir dir;
  std::filesystem::copy_file(data_path("files/objects.pt"), dir.file("x.bin"));
  test::write_bytes(dir.file("index.json"), R"({"weight_map":{"first.bias":"x.bin","sparse":"x.bin"}})");
  const auto checkpoint = open_checkpoint(dir.file("index.json"));
  EXPECT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(checkpoint.unreadable().at("sparse"), "it is made by torch._utils._rebuild_sparse_tensor");
  EXPECT_EQ(error_of<FileError>([&] { checkpoint.with(checkpoint, {{"sparse", "other"}}); }),
            "[checkpoint] " + dir.file("index.json") +
                ": tensor \"sparse\" is not read: it is made by torch._utils._rebuild_sparse_tensor");
}

TEST(CheckpointTest, RefusesAMissingTensor) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({1})}});
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(dir.file("x")).tensor("b\n"); }),
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

// A state dict of the tensors that these parts of a pickle build.
Checkpoint opened_pickle(const TempDir& dir, const std::vector<std::pair<std::string, std::string>>& tensors) {
  std::string items;
  for (const auto& [name, tensor] : tensors) items += test::pickle::text(name) + tensor;
  test::write_bytes(dir.file("x.pt"), test::pickle::archive(test::pickle::dict(items)));
  return open_checkpoint(dir.file("x.pt"));
}

TEST(CheckpointTest, RefusesViewsLargerThanTheFile) {
  const TempDir dir;
  const auto storage = test::pickle::storage("FloatStorage", "0", 2);
  const auto expect_refused = [&](const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                                  const std::string& text) {
    const auto message =
        error_of<FileError>([&] { opened_pickle(dir, {{"a", test::pickle::tensor(storage, shape, strides)}}); });
    EXPECT_EQ(message, "[checkpoint] " + dir.file("x.pt") + ": tensor \"a\" of shape " + text + " has more bytes than the " +
                           std::to_string(std::filesystem::file_size(dir.file("x.pt"))) +
                           " of the whole file; save it again in Python as TENSOR.clone(), or as what it repeats");
  };
  expect_refused({int64_t{1} << 40, 1}, {0, 1}, "[1099511627776, 1]");
  expect_refused({16384, 16384}, {0, 0}, "[16384, 16384]");
  expect_refused({int64_t{1} << 62}, {0}, "[4611686018427387904]");

  const auto few = opened_pickle(dir, {{"a", test::pickle::tensor(storage, {5, 2}, {0, 1})}});
  EXPECT_EQ(few.tensor("a").sizes(), at::IntArrayRef({5, 2}));
}

TEST(CheckpointTest, RefusesManyNamesOfOneStorage) {
  const TempDir dir;
  constexpr int64_t kElements = 50'000;
  const auto file_of = [&](int names) {
    const auto storage = test::pickle::storage("FloatStorage", "0", kElements);
    std::string items;
    for (int i = 0; i < names; ++i) {
      items += test::pickle::text("a" + std::to_string(i)) + test::pickle::tensor(storage, {kElements}, {1});
    }
    test::write_bytes(dir.file("x.pt"), test::zip_of({{"x/data.pkl", test::pickle::whole(test::pickle::dict(items))},
                                                      {"x/data/0", std::string(kElements * 4, '\0')}}));
    return dir.file("x.pt");
  };
  EXPECT_EQ(load_tensors(file_of(24)).size(), 24U) << "layers that share their weights";
  const auto path = file_of(3000);
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(path); }),
            "[checkpoint] " + path + ": names tensors of more than 32 times its " +
                std::to_string(std::filesystem::file_size(path)) + " bytes, which share their storages");
}

TEST(CheckpointTest, ReadsASetOfMoreFilesThanAProcessMayOpen) {
  const TempDir dir;
  std::string map;
  for (int i = 0; i < 100; ++i) {
    const auto name = std::to_string(i);
    save_safetensors(dir.file(name), NamedTensors{{"t" + name, torch::full({2}, i)}});
    map += (map.empty() ? "\"t" : ",\"t") + name + "\":\"" + name + "\"";
  }
  test::write_bytes(dir.file("index.json"), R"({"weight_map":{)" + map + "}}");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few{64, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  NamedTensors tensors;
  EXPECT_NO_THROW(tensors = load_tensors(dir.file("index.json")));
  setrlimit(RLIMIT_NOFILE, &before);
  ASSERT_EQ(tensors.size(), 100U);
  EXPECT_TRUE(tensors.at("t99").equal(torch::full({2}, 99)));
}

TEST(CheckpointTest, ReadsTheOldFileAfterItWasReplaced) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({100})}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  save_safetensors(dir.file("x"), NamedTensors{{"b", torch::zeros({1})}});
  EXPECT_TRUE(checkpoint.tensor("a").equal(torch::ones({100})));
}

// KB of the file's mapping that are in this process's memory.
int64_t resident(const std::string& path) {
  std::ifstream maps("/proc/self/smaps");
  int64_t sum = 0;
  bool ours = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find(" kB") == std::string::npos) ours = line.ends_with(path);
    if (ours && line.starts_with("Rss:")) sum += std::stoll(line.substr(4));
  }
  return sum;
}

TEST(CheckpointTest, WhatWasReadOfAFileIsInMemoryOnce) {
  const TempDir dir;
  const auto path = dir.file("x.safetensors");
  const auto a = torch::rand({1024, 1024}), b = torch::rand({1024, 1025});
  save_safetensors(path, NamedTensors{{"a", a}, {"b", b}});
  const auto checkpoint = open_checkpoint(path);
  EXPECT_TRUE(checkpoint.tensor("a").equal(a));
  EXPECT_TRUE(checkpoint.tensor("b").equal(b));
  EXPECT_LT(resident(path), 256);
  EXPECT_TRUE(checkpoint.tensor("a").equal(a)) << "a second time";
}

TEST(CheckpointTest, NamesTheTensorThatDoesNotFitIntoMemory) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers map more than any limit, and end the process";
#endif
  const TempDir dir;
  constexpr uint64_t kBytes = uint64_t{8} << 30;
  const std::string header = R"({"a":{"dtype":"U8","shape":[8589934592],"data_offsets":[0,8589934592]}})";
  const uint64_t length = header.size();
  test::write_bytes(dir.file("x"), std::string(reinterpret_cast<const char*>(&length), 8) + header);
  std::filesystem::resize_file(dir.file("x"), 8 + length + kBytes);  // sparse: takes no space on disk
  const auto checkpoint = open_checkpoint(dir.file("x"));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  uint64_t pages = 0;  // mapped by the process
  std::ifstream("/proc/self/statm") >> pages;
  const rlimit tight{pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) + kBytes / 2, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
  std::string message;
  try {
    checkpoint.tensor("a");
  } catch (const std::exception& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_AS, &before);
  EXPECT_EQ(message, "[checkpoint] " + dir.file("x") + ": tensor \"a\" of 8589934592 bytes does not fit into memory");
}

// ---- Folders ----------------------------------------------------------------------------------------------------------------

// The names in their order of preference.
const std::vector<std::string> kNamesInFolders = {"model.safetensors",
                                                  "model.safetensors.index.json",
                                                  "pytorch_model.bin",
                                                  "pytorch_model.bin.index.json",
                                                  "diffusion_pytorch_model.safetensors",
                                                  "diffusion_pytorch_model.safetensors.index.json",
                                                  "diffusion_pytorch_model.bin",
                                                  "diffusion_pytorch_model.bin.index.json",
                                                  "adapter_model.safetensors",
                                                  "adapter_model.bin",
                                                  "pytorch_lora_weights.safetensors",
                                                  "pytorch_lora_weights.bin"};

TEST(CheckpointTest, OpensTheFirstFileOfWeightsInAFolder) {
  const TempDir dir;
  save_safetensors(dir.file("shard-00001-of-00001"), NamedTensors{{"a", torch::ones({1})}});
  test::write_bytes(dir.file("config.json"), "{}");
  for (auto name = kNamesInFolders.rbegin(); name != kNamesInFolders.rend(); ++name) {
    if (name->ends_with(".json")) {
      test::write_bytes(dir.file(*name), R"({"weight_map":{"a":"shard-00001-of-00001"}})");
    } else if (name->ends_with(".bin")) {
      save_state_dict(dir.file(*name), {{"a", torch::ones({1})}});
    } else {
      save_safetensors(dir.file(*name), NamedTensors{{"a", torch::ones({1})}});
    }
    for (const auto& folder : {dir.path(), dir.path() + "/"}) {
      const auto checkpoint = open_checkpoint(folder);
      EXPECT_EQ(checkpoint.path(), dir.file(*name));
      EXPECT_EQ(checkpoint.format(), name->ends_with(".bin") ? FileFormat::state_dict : FileFormat::safetensors);
      EXPECT_TRUE(checkpoint.tensor("a").equal(torch::ones({1})));
    }
  }
}

TEST(CheckpointTest, ListsWhatAFolderWithoutWeightsHolds) {
  const TempDir dir;
  std::string names;
  for (const auto& name : kNamesInFolders) names += (names.empty() ? "" : ", ") + name;
  const auto start = "[checkpoint] " + dir.path() + ": must hold one of " + names + ", but ";
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(dir.path()); }), start + "is empty");
  std::filesystem::create_directory(dir.file("unet"));
  test::write_bytes(dir.file("model.fp16.safetensors"), "");
  test::write_bytes(dir.file("model_index.json"), "{}");
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(dir.path()); }),
            start + "does not; it holds: model.fp16.safetensors, model_index.json, unet/");
}

TEST(CheckpointTest, NamesTheFileThatItTakesInAFolderIfItCannotBeRead) {
  const TempDir dir;
  std::filesystem::create_symlink("nowhere", dir.file("model.safetensors"));
  save_state_dict(dir.file("pytorch_model.bin"), {{"a", torch::ones({1})}});
  EXPECT_EQ(error_of<FileError>([&] { return open_checkpoint(dir.path()); }),
            "[file] " + dir.file("model.safetensors") + ": cannot be opened: No such file or directory");
}

// ---- Tensors ----------------------------------------------------------------------------------------------------------------

TEST(CheckpointTest, ListsTheTensorsThatNoCopyHasReadYet) {
  const TempDir dir;
  save_safetensors(dir.file("x"), NamedTensors{{"a", torch::ones({2})}, {"b", torch::ones({1})}, {"c", torch::ones({1})}});
  const auto checkpoint = open_checkpoint(dir.file("x"));
  const auto copy = checkpoint;
  EXPECT_EQ(checkpoint.unread(), (std::vector<std::string>{"a", "b", "c"}));
  copy.tensor("b");
  lazy(checkpoint).make("a");
  EXPECT_EQ(checkpoint.unread(), std::vector<std::string>{"c"});
  EXPECT_EQ(copy.unread(), std::vector<std::string>{"c"});
  EXPECT_EQ(copy.with(checkpoint, {{"a", "d"}}).unread(), (std::vector<std::string>{"a", "b", "c", "d"}));
  copy.tensor("c");
  EXPECT_TRUE(checkpoint.unread().empty());
  EXPECT_EQ(open_checkpoint(dir.file("x")).unread().size(), 3U);
}

TEST(CheckpointTest, LazyTensorsNameAMissingTensor) {
  const auto tensors = lazy(NamedTensors{{"a", torch::ones({1})}});
  EXPECT_EQ(error_of<c10::ValueError>([&] { tensors.make("b"); }), "[lazy] name must be one of the tensors', but is \"b\".");
}

TEST(CheckpointTest, AddsTensorsOfAnotherFileUnderNewNames) {
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
