// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <xattn/file_error.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "files/mapped_file.h"

namespace examples {

/// A JSON object in a file, such as a config.json. All errors are xattn::FileError and name the file.
class JsonFile {
 public:
  /// Reads the file NAME in a folder; empty if there is none.
  JsonFile(const std::string& folder, const std::string& name) : path_((std::filesystem::path(folder) / name).string()) {
    if (!std::filesystem::exists(path_)) return;
    const xattn::detail::MappedFile file(path_);
    try {
      json_ = nlohmann::json::parse(xattn::detail::as_text(file.bytes()));
    } catch (const nlohmann::json::exception& error) {
      check(false, error.what());
    }
    check(json_.is_object(), "it must hold an object, but does not");
  }

  explicit operator bool() const { return !json_.is_null(); }
  const std::string& path() const { return path_; }

  /// Calls read(json) with the whole object, unless the file is empty. `what` begins the message of an error in it.
  template <class Read>
  void read(const Read& read, const std::string& what = "") const {
    try {
      if (*this) read(json_);
    } catch (const nlohmann::json::exception& error) {
      check(false, what + error.what());
    }
  }

  /// Sets `value` to the one with this name; leaves it as it is if there is none, or null.
  template <class T>
  void get(const std::string& name, T& value) const {
    const auto set = [&](const nlohmann::json& json) {
      if (const auto found = json.find(name); found != json.end() && !found->is_null()) found->get_to(value);
    };
    read(set, name + ": ");
  }

  /// Throws unless `ok`.
  void check(bool ok, const std::string& expectation) const {
    if (!ok) throw xattn::FileError(fmt::format("{}: {}", path_, expectation));
  }

 private:
  std::string path_;
  nlohmann::json json_;
};

}  // namespace examples
