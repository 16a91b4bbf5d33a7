// SPDX-License-Identifier: Apache-2.0
#include "files/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <functional>
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
  const FileCheck check(kFile, path);
  std::error_code error;
  place_ = std::filesystem::absolute(path, error).string();
  // Non-blocking, since opening a pipe without a writer would block.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  check(descriptor >= 0, "cannot be opened: {}", system_reason(errno));
  const struct Closed {
    int descriptor;
    ~Closed() { close(descriptor); }
  } closed{descriptor};
  struct stat status = {};
  check(fstat(descriptor, &status) == 0, "cannot be read: {}", system_reason(errno));
  check(S_ISREG(status.st_mode), "must be a regular file, but is not");
  device_ = status.st_dev;
  number_ = status.st_ino;
  changed_ = nanoseconds(status.st_mtim);
  const auto size = static_cast<size_t>(status.st_size);
  check(size <= most, "has {} bytes, more than the limit of {}", size, most);
  if (size == 0) return;  // nothing to map
  const auto* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  check(data != MAP_FAILED, "cannot be read: {}", system_reason(errno));
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::check_unchanged() const {
  struct stat status = {};
  if (stat(place_.c_str(), &status) != 0 || status.st_dev != device_ || status.st_ino != number_) return;
  const bool same = static_cast<size_t>(status.st_size) == bytes_.size() && nanoseconds(status.st_mtim) == changed_;
  FileCheck(kFile, path_)(same, "has changed since it was opened");
}

void MappedFile::release(Bytes part) const {
  const std::less<> before;  // other bytes may lie anywhere
  if (before(part.data(), bytes_.data()) || before(bytes_.data() + bytes_.size(), part.data() + part.size())) return;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto first = static_cast<size_t>(part.data() - bytes_.data());  // the mapping begins with a page
  const auto begin = (first + page - 1) / page * page, end = (first + part.size()) / page * page;
  if (begin < end) madvise(const_cast<std::byte*>(bytes_.data()) + begin, end - begin, MADV_DONTNEED);
}

}  // namespace xattn::detail
