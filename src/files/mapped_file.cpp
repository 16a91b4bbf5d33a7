// SPDX-License-Identifier: Apache-2.0
#include "files/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <system_error>

#include "files/check_file.h"

namespace xattn::detail {
namespace {

constexpr std::string_view kFile = "file";

int64_t nanoseconds(const timespec& time) {
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

MappedFile::MappedFile(const std::string& path, uint64_t most) : path_(path) {
  std::error_code error;
  place_ = std::filesystem::absolute(path, error).string();
  // A pipe without a writer must not block the opening.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  check_file(descriptor >= 0, kFile, path, "cannot be opened: {}", system_reason());
  const struct Closed {
    int descriptor;
    ~Closed() { close(descriptor); }
  } closed{descriptor};
  struct stat status = {};
  check_file(fstat(descriptor, &status) == 0, kFile, path, "cannot be read: {}", system_reason());
  check_file(S_ISREG(status.st_mode), kFile, path, "must be a regular file, but is none");
  device_ = status.st_dev;
  number_ = status.st_ino;
  changed_ = nanoseconds(status.st_mtim);
  const auto size = static_cast<size_t>(status.st_size);
  check_file(size <= most, kFile, path, "has {} bytes, more than the limit of {}", size, most);
  if (size == 0) return;  // nothing to map
  const auto* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  check_file(data != MAP_FAILED, kFile, path, "cannot be read: {}", system_reason());
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::check_unchanged() const {
  struct stat status = {};
  if (stat(place_.c_str(), &status) != 0 || status.st_dev != device_ || status.st_ino != number_) return;
  const bool same = static_cast<size_t>(status.st_size) == bytes_.size() && nanoseconds(status.st_mtim) == changed_;
  check_file(same, kFile, path_, "has changed since it was opened");
}

}  // namespace xattn::detail
