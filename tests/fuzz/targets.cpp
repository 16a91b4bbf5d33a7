// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"

#include <xattn/file_error.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "files/readers.h"
#include "zip_writer.h"

namespace xattn::test {
namespace {

using detail::Bytes;

constexpr size_t kMaxTensorBytes = 1 << 20;  // names may share a storage, and so take more than the file holds

void take_tensors(const detail::Index& index) {
  size_t taken = 0;
  for (const auto& [name, stored] : index.tensors) {
    taken += stored.data.size();
    if (taken > kMaxTensorBytes) return;
    detail::materialize(stored);
  }
}

template <typename Read>
void read_or_refuse(const Read& read) {
  try {
    read();
  } catch (const FileError&) {
  }
}

std::string as_string(Bytes file) {
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

const std::string& storage() {
  static const std::string bytes(64, '\1');
  return bytes;
}

}  // namespace

void fuzz_safetensors(Bytes file) {
  read_or_refuse([&] { take_tensors(detail::read_safetensors("x", file)); });
}

void fuzz_zip(Bytes file) {
  read_or_refuse([&] {
    const detail::ZipFile zip("x", file);
    auto* read = zip.has("constants.pkl") ? detail::read_torchscript
                 : zip.has("data.pkl")    ? detail::read_state_dict
                                          : detail::read_pt2;
    take_tensors(read("x", zip));
  });
}

void fuzz_pickle(Bytes file) {
  std::vector<std::pair<std::string, std::string>> entries{
      {"x/data.pkl", as_string(file)}, {"x/constants.pkl", ""}, {"x/byteorder", "little"}};
  for (const char* name : {"x/data/0", "x/data/1", "x/data/2", "x/data/3"}) entries.emplace_back(name, storage());
  const auto archive = zip_of(entries);
  const detail::ZipFile zip("x", std::as_bytes(std::span(archive)));
  read_or_refuse([&] { take_tensors(detail::read_state_dict("x", zip)); });
  read_or_refuse([&] { take_tensors(detail::read_torchscript("x", zip)); });
}

void fuzz_legacy(Bytes file) {
  read_or_refuse([&] { take_tensors(detail::read_legacy("x", file)); });
}

void fuzz_json(Bytes file) {
  read_or_refuse([&] { detail::read_shard_index("x", file); });
  const auto archive = zip_of({{"x/archive_format", "pt2"},
                               {"x/archive_version", "0"},
                               {"x/byteorder", "little"},
                               {"x/models/model.json", ""},
                               {"x/data/weights/model_weights_config.json", as_string(file)},
                               {"x/data/weights/weight_0", storage()},
                               {"x/data/weights/weight_1", storage()},
                               {"x/data/constants/model_constants_config.json", R"({"config":{}})"}});
  read_or_refuse([&] { take_tensors(detail::read_pt2("x", detail::ZipFile("x", std::as_bytes(std::span(archive))))); });
}

}  // namespace xattn::test
