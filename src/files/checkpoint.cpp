// SPDX-License-Identifier: Apache-2.0
#include <xattn/checkpoint.h>

#include <algorithm>
#include <array>
#include <exception>
#include <filesystem>
#include <iterator>
#include <mutex>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "files/check_file.h"
#include "files/folder.h"
#include "files/mapped_file.h"
#include "files/readers.h"
#include "files/stored_tensor.h"

namespace xattn {

struct Checkpoint::Contents {
  struct Reads {
    std::mutex mutex;
    std::set<std::string> names;
  };

  std::string path;
  FileFormat format = FileFormat::safetensors;
  std::vector<std::shared_ptr<const detail::MappedFile>> files;
  std::vector<std::shared_ptr<const void>> owners;  // of bytes that are no files
  detail::Index index;
  std::map<std::string, TensorInfo> infos;
  std::shared_ptr<Reads> reads = std::make_shared<Reads>();  // the tensors that were read
};

namespace {

using detail::Bytes;
using detail::FileCheck;
using detail::in_quotes;
using detail::Index;
using detail::MappedFile;
using detail::StoredTensor;

FileCheck check_of(const std::string& path) {
  return {"checkpoint", path};
}

// A length of eight bytes, then a JSON object.
bool is_safetensors(std::string_view bytes) {
  return bytes.size() > 8 && bytes[8] == '{';
}

// Before zip archives, torch.save wrote pickles: of protocol 2 or later, or of a long number in digits.
bool is_legacy(std::string_view bytes) {
  const bool has_protocol = bytes.size() > 2 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5;
  return has_protocol || bytes.starts_with("L119547037146038801333356");
}

// What a file is that people take for weights, and what to do about it; nothing if it is none of these.
std::optional<std::string_view> name_of_other_file(std::string_view bytes) {
  struct Other {
    std::string_view beginning;  // in lower case
    std::string_view what;
  };
  constexpr std::array kOthers{
      Other{"version https://git-lfs.github.com/", "is a pointer of Git LFS to a file that was not fetched; run git lfs pull"},
      Other{"<!doctype html", "is a web page; the download needs another address, or a login"},
      Other{"<html", "is a web page; the download needs another address, or a login"},
      Other{"<?xml", "is an XML document, perhaps a server's error; the download needs another address"},
      Other{"gguf", "is a GGUF file, whose quantized weights are not read; take the model's safetensors"},
      Other{"\x89hdf", "is an HDF5 file, as Keras writes them, which is not read; save the tensors as safetensors in Python"},
      Other{"\x93numpy", "is a NumPy array, which is not read; save it as safetensors in Python"},
  };
  const auto first = std::min(bytes.find_first_not_of(" \t\r\n"), bytes.size());
  std::string beginning(bytes.substr(first, 64));
  std::ranges::transform(beginning, beginning.begin(),
                         [](char c) { return 'A' <= c && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  const auto* other = std::ranges::find_if(kOthers, [&](const Other& one) { return beginning.starts_with(one.beginning); });
  return other == kOthers.end() ? std::nullopt : std::optional(other->what);
}

bool is_tar(std::string_view bytes) {
  return bytes.size() > 262 && bytes.substr(257, 5) == "ustar";
}

// JSON may begin with white space.
bool is_json(std::string_view bytes) {
  const auto first = bytes.find_first_not_of(" \t\r\n");
  return first != std::string_view::npos && bytes[first] == '{' && !(is_safetensors(bytes) && bytes[7] == '\0');
}

std::pair<FileFormat, Index> read_format(const std::string& path, Bytes file) {
  const auto bytes = detail::as_text(file);
  if (bytes.starts_with("PK\3\4") || bytes.starts_with("PK\5\6")) {
    const detail::ZipFile zip(path, file);
    if (zip.has("constants.pkl")) return {FileFormat::torchscript, read_torchscript(path, zip)};
    if (zip.has("data.pkl")) return {FileFormat::state_dict, read_state_dict(path, zip)};
    return {FileFormat::pt2, read_pt2(path, zip)};
  }
  if (const auto other = name_of_other_file(bytes)) check_of(path).fail("{}", *other);
  if (is_safetensors(bytes)) return {FileFormat::safetensors, detail::read_safetensors(path, file)};
  if (is_legacy(bytes)) return {FileFormat::state_dict, detail::read_legacy(path, file)};
  check_of(path)(!is_tar(bytes),
                 "is a tar archive, as the first versions of PyTorch wrote them, which is not read; save it again in Python: "
                 "torch.save(torch.load(PATH, map_location='cpu', weights_only=False), NEW_PATH)");
  check_of(path).fail(
      "must be a safetensors file, the index.json of a sharded set, or an archive of torch.save, torch.jit.save or "
      "torch.export.save, but is none of these");
}

// Limits the memory that tensors take by the size of the file: a view may repeat an element any number of times, and any number
// of names may share a storage.
void check_amount(const std::string& path, const Index& index, uint64_t file_bytes) {
  constexpr uint64_t kMostShown = 32;  // layers may share their weights, each under its own names
  const auto check = check_of(path);
  uint64_t all = 0;
  for (const auto& [name, stored] : index.tensors) {
    const auto bytes = detail::bytes_of_elements(stored.type, stored.shape);  // a view may repeat those in the file
    check(bytes && static_cast<uint64_t>(*bytes) <= file_bytes,
          "tensor {} of shape [{}] has more bytes than the {} of the whole file; save it again in Python as "
          "TENSOR.clone(), or as what it repeats",
          in_quotes(name), detail::joined(stored.shape), file_bytes);
    check(!__builtin_add_overflow(all, *bytes, &all) && all / kMostShown <= file_bytes,
          "names tensors of more than {} times its {} bytes, which share their storages", kMostShown, file_bytes);
  }
}

std::pair<FileFormat, Index> read_file(const std::string& path, Bytes file) {
  auto read = read_format(path, file);
  check_amount(path, read.second, file.size());
  return read;
}

// Opens the shards of an index and adds the tensors that the index assigns to them.
void read_shards(Checkpoint::Contents& contents, const detail::ShardIndex& shards) {
  const auto check = check_of(contents.path);
  const auto folder = std::filesystem::path(contents.path).parent_path();
  std::map<std::string, Index> opened;
  for (const auto& [name, file_name] : shards.file_of) {
    auto shard = opened.find(file_name);
    if (shard == opened.end()) {
      const auto path = (folder / file_name).string();
      contents.files.push_back(std::make_shared<MappedFile>(path));
      auto [format, index] = read_file(path, contents.files.back()->bytes());
      const bool same = opened.empty() || format == contents.format;
      check(same && (format == FileFormat::safetensors || format == FileFormat::state_dict),
            "must name shards that are all safetensors or all state dicts, but {} is {}", in_quotes(file_name),
            to_string(format));
      contents.format = format;
      shard = opened.emplace(file_name, std::move(index)).first;
    }
    const auto& [tensors, metadata, unreadable] = shard->second;
    const auto tensor = tensors.find(name);
    const auto reason = unreadable.find(name);
    check(tensor != tensors.end() || reason != unreadable.end(), "says that {} is in {}, but it is not there", in_quotes(name),
          in_quotes(file_name));
    if (tensor != tensors.end()) {
      contents.index.tensors.emplace(name, tensor->second);
    } else {
      contents.index.unreadable.emplace(name, reason->second);
    }
  }
  contents.index.metadata = shards.metadata;
}

const StoredTensor& find(const Checkpoint::Contents& contents, const std::string& name) {
  const auto reason = contents.index.unreadable.find(name);
  check_of(contents.path)(reason == contents.index.unreadable.end(), "tensor {} is not read: {}", in_quotes(name),
                          reason == contents.index.unreadable.end() ? "" : reason->second);
  const auto found = contents.index.tensors.find(name);
  check_of(contents.path)(found != contents.index.tensors.end(), "has no tensor {}", in_quotes(name));
  return found->second;
}

// Fills in what follows from the index.
Checkpoint finished(std::shared_ptr<Checkpoint::Contents> contents) {
  for (const auto& [name, stored] : contents->index.tensors) {
    contents->infos.emplace(name, TensorInfo{stored.type, stored.shape});
  }
  return Checkpoint(std::move(contents));
}

}  // namespace

std::string to_string(FileFormat format) {
  return std::array{"safetensors", "state dict", "torchscript", "pt2"}.at(static_cast<size_t>(format));
}

Checkpoint open_checkpoint(const std::string& path) {
  auto contents = std::make_shared<Checkpoint::Contents>();
  std::error_code ignored;
  contents->path = std::filesystem::is_directory(path, ignored) ? detail::weights_in(path) : path;
  contents->files.push_back(std::make_shared<MappedFile>(contents->path));
  const auto file = contents->files.front()->bytes();
  if (is_json(detail::as_text(file))) {
    read_shards(*contents, detail::read_shard_index(contents->path, file));
  } else {
    std::tie(contents->format, contents->index) = read_file(contents->path, file);
  }
  return finished(std::move(contents));
}

Checkpoint open_checkpoint(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, const std::string& name) {
  check_of(name)(!is_json(detail::as_text(bytes)),
                 "must be one file, but is the index of a sharded set, which names others; open the index by its path");
  auto contents = std::make_shared<Checkpoint::Contents>();
  contents->path = name;
  if (owner) contents->owners.push_back(std::move(owner));
  std::tie(contents->format, contents->index) = read_file(name, bytes);
  return finished(std::move(contents));
}

Checkpoint::Checkpoint(std::shared_ptr<const Contents> contents) : contents_(std::move(contents)) {}

const std::string& Checkpoint::path() const {
  return contents_->path;
}

std::vector<std::string> Checkpoint::files() const {
  std::vector<std::string> paths;
  for (const auto& file : contents_->files) paths.push_back(file->path());
  return paths;
}

FileFormat Checkpoint::format() const {
  return contents_->format;
}

const std::map<std::string, TensorInfo>& Checkpoint::tensors() const {
  return contents_->infos;
}

const std::map<std::string, std::string>& Checkpoint::unreadable() const {
  return contents_->index.unreadable;
}

const std::map<std::string, std::string>& Checkpoint::metadata() const {
  return contents_->index.metadata;
}

at::Tensor Checkpoint::tensor(const std::string& name) const {
  const auto& stored = find(*contents_, name);
  for (const auto& file : contents_->files) file->check_unchanged();
  const auto check = check_of(path());
  std::optional<at::Tensor> tensor;
  try {
    tensor = detail::materialize(stored);
  } catch (const std::exception&) {  // std::bad_alloc, or c10::Error thrown by LibTorch's allocator
    check.fail("tensor {} of {} bytes does not fit into memory", in_quotes(name), stored.data.size());
  }
  // The tensor is a copy. Without this, a model would be in memory twice while it is loaded.
  for (const auto& file : contents_->files) file->release(stored.data);
  check(tensor.has_value(), "tensor {} of type bool holds a byte other than 0 and 1", in_quotes(name));
  const std::lock_guard lock(contents_->reads->mutex);
  contents_->reads->names.insert(name);
  return *std::move(tensor);
}

std::vector<std::string> Checkpoint::unread() const {
  std::vector<std::string> names;
  const std::lock_guard lock(contents_->reads->mutex);
  for (const auto& [name, info] : contents_->infos) {
    if (!contents_->reads->names.contains(name)) names.push_back(name);
  }
  for (const auto& [name, reason] : contents_->index.unreadable) names.push_back(name);
  std::ranges::sort(names);
  return names;
}

Checkpoint Checkpoint::with(const Checkpoint& other, const std::map<std::string, std::string>& names) const {
  auto contents = std::make_shared<Contents>(*contents_);
  contents->reads = std::make_shared<Contents::Reads>();
  std::ranges::copy(other.contents_->files, std::back_inserter(contents->files));
  std::ranges::copy(other.contents_->owners, std::back_inserter(contents->owners));
  for (const auto& [theirs, ours] : names) {
    const bool is_new = !contents->index.unreadable.contains(ours) &&
                        contents->index.tensors.emplace(ours, find(*other.contents_, theirs)).second;
    check_of(path())(is_new, "already has a tensor {}", in_quotes(ours));
    contents->infos.emplace(ours, other.tensors().at(theirs));
  }
  return Checkpoint(std::move(contents));
}

int64_t byte_count(const TensorInfo& info) {
  const auto bytes = detail::bytes_of_elements(info.type, info.shape);
  detail::check_value(bytes.has_value(), "byte_count", "info must have a shape whose bytes can be counted, but has [{}].",
                      detail::joined(info.shape));
  return *bytes;
}

LazyTensors lazy(NamedTensors tensors) {
  LazyTensors result;
  for (const auto& [name, tensor] : tensors) {
    detail::check_value(tensor.defined(), "lazy", "tensor {} must be defined, but is not.", in_quotes(name));
    result.infos.emplace(name, TensorInfo{tensor.scalar_type(), tensor.sizes().vec()});
  }
  result.make = [tensors = std::move(tensors)](const std::string& name) {
    const auto tensor = tensors.find(name);
    detail::check_value(tensor != tensors.end(), "lazy", "name must be one of the tensors', but is {}.", in_quotes(name));
    return tensor->second;
  };
  return result;
}

LazyTensors lazy(const Checkpoint& checkpoint) {
  return {checkpoint.tensors(), [checkpoint](const std::string& name) { return checkpoint.tensor(name); },
          checkpoint.unreadable()};
}

NamedTensors load_tensors(const std::string& path) {
  const auto checkpoint = open_checkpoint(path);
  NamedTensors tensors;
  for (const auto& [name, reason] : checkpoint.unreadable()) checkpoint.tensor(name);  // throws
  for (const auto& [name, info] : checkpoint.tensors()) tensors.emplace(name, checkpoint.tensor(name));
  return tensors;
}

}  // namespace xattn
