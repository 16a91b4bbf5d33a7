// SPDX-License-Identifier: Apache-2.0
#include "files/write_beside.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <ostream>
#include <random>
#include <streambuf>
#include <system_error>
#include <utility>
#include <vector>

#include "files/check_file.h"

namespace xattn::detail {
namespace {

class Descriptor {
 public:
  Descriptor() = default;
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }

  /// Returns false, with errno set, if the number stands for a failure.
  bool open(int number) {
    number_ = number;
    return number_ >= 0;
  }

  /// Returns false, with errno set, if the system reports only now that something was not written.
  bool close() { return number_ < 0 || ::close(std::exchange(number_, -1)) == 0; }

 private:
  int number_ = -1;
};

// A buffered stream into a descriptor.
class Buffer : public std::streambuf {
 public:
  explicit Buffer(int descriptor) : descriptor_(descriptor), bytes_(size_t{1} << 20) { clear(); }

  int error() const { return error_; }

 protected:
  int_type overflow(int_type c) override {
    if (!flush()) return traits_type::eof();
    if (c != traits_type::eof()) sputc(traits_type::to_char_type(c));
    return traits_type::not_eof(c);
  }

  std::streamsize xsputn(const char* bytes, std::streamsize size) override {
    if (size == 0) return 0;  // the data of an empty tensor may be null
    if (size < epptr() - pptr()) {
      std::memcpy(pptr(), bytes, static_cast<size_t>(size));
      pbump(static_cast<int>(size));
      return size;
    }
    return flush() && write(bytes, size) ? size : 0;
  }

  int sync() override { return flush() ? 0 : -1; }

 private:
  void clear() { setp(bytes_.data(), bytes_.data() + bytes_.size()); }

  bool flush() {
    const bool written = write(pbase(), pptr() - pbase());
    clear();
    return written;
  }

  bool write(const char* bytes, std::streamsize size) {
    constexpr std::streamsize kMostAtOnce = 1 << 30;  // the system writes a little less than 2 GB
    while (size > 0 && error_ == 0) {
      const auto written = ::write(descriptor_, bytes, static_cast<size_t>(std::min(size, kMostAtOnce)));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) error_ = errno;
      bytes += std::max<ssize_t>(written, 0);
      size -= std::max<ssize_t>(written, 0);
    }
    return error_ == 0;
  }

  int descriptor_;
  int error_ = 0;
  std::vector<char> bytes_;
};

// Whether everything written is on disk, or the file system has no disk to flush to.
bool synced(int descriptor) {
  int result = 0;
  do {
    result = fsync(descriptor);
  } while (result != 0 && errno == EINTR);
  return result == 0 || errno == EINVAL || errno == EROFS || errno == ENOTSUP || errno == EBADF;
}

// A new file in the folder of another, which it can replace; removed by the destructor unless it did.
class NewFile {
 public:
  NewFile(std::string_view reader, const std::string& path) : check_(reader, path) {
    const auto place = behind_links(path);
    name_ = place.filename().string();
    check(!name_.empty() && name_ != "." && name_ != "..", EISDIR);
    const auto folder = place.has_parent_path() ? place.parent_path().string() : std::string(".");
    // A folder that may not be listed may still be writable.
    const bool listed = folder_.open(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    check(listed || (errno == EACCES && folder_.open(open(folder.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC))));

    struct stat there = {};
    const bool exists = fstatat(folder_.number(), name_.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0;
    check(exists || errno == ENOENT);
    check_(!exists || S_ISREG(there.st_mode), "exists, but is not a regular file");
    create(exists ? S_IRUSR | S_IWUSR : 0666);
    if (exists) keep_permissions(there);
  }

  ~NewFile() {
    if (!beside_.empty()) unlinkat(folder_.number(), beside_.c_str(), 0);
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  int descriptor() const { return file_.number(); }

  void replace() {
    check(synced(file_.number()));
    check(file_.close());
    check(renameat(folder_.number(), beside_.c_str(), folder_.number(), name_.c_str()) == 0);
    beside_.clear();
    check(synced(folder_.number()));
  }

  void check(bool ok, int error) const { check_(ok, "cannot be written: {}", system_reason(error)); }
  void check(bool ok) const { check(ok, errno); }  // REQUIRES: errno has the reason unless ok

 private:
  // The path with symbolic links resolved.
  std::filesystem::path behind_links(const std::string& path) const {
    constexpr int kMostLinks = 40;  // as in Linux
    std::filesystem::path place(path);
    std::error_code error;
    for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(place, error)); ++links) {
      check(links < kMostLinks, ELOOP);
      const auto target = std::filesystem::read_symlink(place, error);
      check(!error, error.value());
      place = place.parent_path() / target;
    }
    return place;
  }

  // Creates the new file under an unused name that is short even if the file's own name is long.
  void create(mode_t mode) {
    constexpr int kAttempts = 100;
    constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    std::random_device random;
    for (int i = 0; i < kAttempts; ++i) {
      const auto name = formatted(".{:08x}{:08x}.tmp", random(), random());
      if (file_.open(openat(folder_.number(), name.c_str(), kFlags, mode))) {
        beside_ = name;
        return;
      }
      check(errno == EEXIST);
    }
    check(false, EEXIST);
  }

  // If the system does not allow this, only the owner may access the new file, which the old permissions allowed too.
  void keep_permissions(const struct stat& old) const {
    struct stat made = {};
    bool owned = fstat(file_.number(), &made) == 0;
    if (owned && (made.st_uid != old.st_uid || made.st_gid != old.st_gid)) {
      owned = fchown(file_.number(), old.st_uid, old.st_gid) == 0;
    }
    constexpr mode_t kAll = 07777;
    constexpr mode_t kOwnersAlone = S_IRWXU;
    const bool kept = fchmod(file_.number(), old.st_mode & (owned ? kAll : kOwnersAlone)) == 0;
    static_cast<void>(kept);
  }

  FileCheck check_;
  std::string name_;
  std::string beside_;  // its name until it replaces the other
  Descriptor folder_;
  Descriptor file_;
};

}  // namespace

void write_beside(std::string_view reader, const std::string& path, const std::function<void(std::ostream&)>& write) {
  NewFile file(reader, path);
  Buffer buffer(file.descriptor());
  std::ostream out(&buffer);
  write(out);
  out.flush();
  file.check(out.good() && buffer.error() == 0, buffer.error());
  file.replace();
}

void check_writable(std::string_view reader, const std::string& path) {
  if (!path.empty()) NewFile(reader, path);
}

}  // namespace xattn::detail
