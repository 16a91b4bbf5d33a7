// SPDX-License-Identifier: Apache-2.0
#include "fuzz/targets.h"

#include <unistd.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/printed.h"
#include "files/json.h"
#include "files/readers.h"
#include "zip_writer.h"

namespace xattn::test {
namespace {

using detail::Bytes;

void must(bool ok, const char* what) {
  if (!ok) throw std::logic_error(what);
}

// Returns whether the call throws no FileError; the message of one must be a line that a terminal can show.
template <typename Call>
bool accepts(const Call& call) {
  try {
    call();
  } catch (const FileError& error) {
    const std::string_view message = error.what();
    must(message.starts_with('[') && message.size() <= 5 * detail::kMostOfMessage,
         "A message must name its reader and be short.");
    const bool is_line = std::ranges::none_of(message, [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; });
    must(is_line, "A message must be one line without controls.");
    return false;
  }
  return true;
}

Bytes bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

const std::string& storage() {
  static const std::string bytes(64, '\1');
  return bytes;
}

// Whether the tensor can be read; it must be as it is described.
bool is_read(const LazyTensors& all, const std::string& name, const TensorInfo& info) {
  return accepts([&] {
    const auto tensor = all.make(name);
    const bool same = tensor.sizes() == info.shape && tensor.scalar_type() == info.type;
    must(same && static_cast<size_t>(byte_count(info)) == tensor.nbytes(), "A tensor must be as it is described.");
    must(lazy({{name, tensor}}).make(name).is_same(tensor), "A tensor in memory must be given as it is.");
  });
}

bool has_tensor(const Checkpoint& file, const std::string& name) {
  return accepts([&] { file.tensor(name); });
}

// Whether a copy of the tensor `name` can be added as `new_name`.
bool can_add(const Checkpoint& file, const std::string& name, const std::string& new_name) {
  return accepts([&] { file.with(file, {{name, new_name}}); });
}

// Does with a file what programs do.
void use(const Checkpoint& file) {
  must(!to_string(file.format()).empty(), "Each format must have a name.");
  for (const auto& [key, value] : file.metadata()) detail::in_quotes(value);
  auto left_out = file.unreadable().size();
  const auto all = lazy(file);
  for (const auto& [name, info] : all.infos) left_out += is_read(all, name, info) ? 0 : 1;
  must(file.unread().size() == left_out, "The tensors that were refused, and no others, must count as unread.");
  for (const auto& [name, reason] : all.unreadable) must(!has_tensor(file, name), "Unreadable tensors must be refused.");
  if (all.infos.empty()) return;
  const auto& name = all.infos.begin()->first;
  const auto copy = "a copy of " + name;
  must(!can_add(file, name, name), "A name that is taken must be refused.");
  must(can_add(file, name, copy) != (all.infos.contains(copy) || all.unreadable.contains(copy)), "Any other must be accepted.");
}

// A folder that exists while one input runs.
class Folder {
 public:
  Folder() : path_((std::filesystem::temp_directory_path() / "xattn_fuzz_XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("There must be a place for files.");
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::string& path() const { return path_; }

  // Adds "NAME\nBYTES" or, for a folder, "NAME/"; nothing if the name is not that of a file in this folder.
  void add(std::string_view file) const {
    const auto line = std::min(file.find('\n'), file.size());
    auto name = file.substr(0, line);
    const bool is_folder = name.ends_with('/');
    if (is_folder) name.remove_suffix(1);
    if (name.empty() || name.size() > 100 || name == "." || name == "..") return;
    if (name.find_first_of(std::string_view("/\0", 2)) != std::string_view::npos) return;
    const auto place = path_ + "/" + std::string(name);
    std::error_code ignored;
    if (is_folder) {
      std::filesystem::create_directory(place, ignored);
    } else {
      std::ofstream(place, std::ios::binary) << file.substr(std::min(line + 1, file.size()));
    }
  }

 private:
  std::string path_;
};

}  // namespace

void fuzz_file(Bytes file) {
  accepts([&] { use(open_checkpoint(file)); });
}

void fuzz_pickle(Bytes file) {
  std::vector<std::pair<std::string, std::string>> entries{{"x/data.pkl", std::string(detail::as_text(file))},
                                                           {"x/byteorder", "little"}};
  for (const char* name : {"x/data/0", "x/data/1", "x/data/2", "x/data/3"}) entries.emplace_back(name, storage());
  fuzz_file(bytes_of(zip_of(entries)));
  entries.emplace_back("x/constants.pkl", "");
  fuzz_file(bytes_of(zip_of(entries)));
}

void fuzz_json(Bytes text) {
  accepts([&] {
    const auto written = detail::parse_json("json", "x", text).text();
    must(detail::parse_json("json", "x", bytes_of(written)).text() == written, "JSON must be read as it is written.");
  });
  accepts([&] { detail::read_shard_index("x", text); });
  fuzz_file(bytes_of(zip_of({{"x/archive_format", "pt2"},
                             {"x/archive_version", "0"},
                             {"x/byteorder", "little"},
                             {"x/models/model.json", ""},
                             {"x/data/weights/model_weights_config.json", std::string(detail::as_text(text))},
                             {"x/data/weights/weight_0", storage()},
                             {"x/data/weights/weight_1", storage()},
                             {"x/data/constants/model_constants_config.json", R"({"config":{}})"}})));
}

void fuzz_folder(Bytes files) {
  constexpr std::string_view kStart = "\n=== ";
  constexpr int kMostFiles = 8;
  const Folder folder;
  auto rest = detail::as_text(files);
  for (int i = 0; i < kMostFiles && rest.starts_with(kStart); ++i) {
    rest.remove_prefix(kStart.size());
    const auto end = std::min(rest.find(kStart), rest.size());
    folder.add(rest.substr(0, end));
    rest.remove_prefix(end);
  }
  accepts([&] {
    const auto file = open_checkpoint(folder.path());
    use(file);
    accepts([&] { load_tensors(folder.path()); });
    for (const auto& name : file.files()) std::ofstream(name, std::ios::app) << "more";
    for (const auto& [name, info] : file.tensors()) {
      must(!has_tensor(file, name), "A file that has changed must be refused.");
    }
  });
}

}  // namespace xattn::test
