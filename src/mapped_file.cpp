// SPDX-License-Identifier: Apache-2.0
#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check_file.h"

namespace xattn::detail {
namespace {

constexpr std::string_view kFile = "file";

int64_t nanoseconds(const timespec& time) {
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // A pipe without a writer must not block the opening.
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  check_file(descriptor_ >= 0, kFile, path, "cannot be opened: {}", system_reason());
  try {
    struct stat status = {};
    check_file(fstat(descriptor_, &status) == 0, kFile, path, "cannot be read: {}", system_reason());
    check_file(S_ISREG(status.st_mode), kFile, path, "must be a regular file, but is none");
    changed_ = nanoseconds(status.st_mtim);
    if (status.st_size == 0) return;  // nothing to map
    const auto size = static_cast<size_t>(status.st_size);
    const auto* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor_, 0);
    check_file(data != MAP_FAILED, kFile, path, "cannot be read: {}", system_reason());
    bytes_ = {static_cast<const std::byte*>(data), size};
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  close(descriptor_);
}

void MappedFile::check_unchanged() const {
  struct stat status = {};
  const bool same = fstat(descriptor_, &status) == 0 && static_cast<size_t>(status.st_size) == bytes_.size() &&
                    nanoseconds(status.st_mtim) == changed_;
  check_file(same, kFile, path_, "has changed since it was opened");
}

}  // namespace xattn::detail
