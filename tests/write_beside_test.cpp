// SPDX-License-Identifier: Apache-2.0
#include "files/write_beside.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xattn/file_error.h>

#include <filesystem>
#include <functional>
#include <iterator>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "test_util.h"

namespace {

std::function<void(int descriptor)> on_fsync;

}  // namespace

// Replaces the system's fsync to record its calls: nothing else shows whether data is on disk.
extern "C" int fsync(int descriptor) {
  if (on_fsync) on_fsync(descriptor);
  return static_cast<int>(syscall(SYS_fsync, descriptor));
}

namespace xattn::detail {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::read_bytes;
using test::TempDir;

void write_text(const std::string& path, const std::string& text) {
  write_beside("test", path, [&](std::ostream& out) { out << text; });
}

int64_t files_in(const std::string& folder) {
  return std::distance(fs::directory_iterator(folder), {});
}

mode_t mode_of(const std::string& path) {
  struct stat status = {};
  EXPECT_EQ(stat(path.c_str(), &status), 0);
  return status.st_mode & 07777;
}

TEST(WriteBesideTest, WritesAllBytesAndNoOtherFile) {
  const TempDir dir;
  std::string large;
  for (int i = 0; i < 3'000'000; ++i) large += static_cast<char>(i * 7);
  write_beside("test", dir.file("x"), [&](std::ostream& out) {
    for (const char c : {'a', 'b'}) out.put(c);
    out.write(large.data(), static_cast<std::streamsize>(large.size()));
    out << "end";
  });
  EXPECT_EQ(read_bytes(dir.file("x")), "ab" + large + "end");
  EXPECT_EQ(files_in(dir.path()), 1);
}

TEST(WriteBesideTest, TheFileThatIsReplacedKeepsItsPermissions) {
  const TempDir dir;
  for (const mode_t mode : {0600, 0640, 0644, 0444, 0755}) {
    write_text(dir.file("x"), "old");
    ASSERT_EQ(chmod(dir.file("x").c_str(), mode), 0);
    write_beside("test", dir.file("x"), [&](std::ostream& out) {
      for (const auto& entry : fs::directory_iterator(dir.path())) EXPECT_EQ(mode_of(entry.path()), mode) << "meanwhile";
      out << "new";
    });
    EXPECT_EQ(mode_of(dir.file("x")), mode);
    EXPECT_EQ(read_bytes(dir.file("x")), "new");
    fs::remove(dir.file("x"));
  }
}

TEST(WriteBesideTest, TheFileThatIsReplacedKeepsItsOwner) {
  if (geteuid() != 0) GTEST_SKIP() << "only the superuser may give files away";
  const TempDir dir;
  write_text(dir.file("x"), "old");
  ASSERT_EQ(chown(dir.file("x").c_str(), 12345, 54321), 0);
  write_text(dir.file("x"), "new");
  struct stat status = {};
  ASSERT_EQ(stat(dir.file("x").c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 12345U);
  EXPECT_EQ(status.st_gid, 54321U);
}

TEST(WriteBesideTest, ANewFileFollowsTheUmaskOfTheProcess) {
  const TempDir dir;
  const auto before = umask(027);
  write_text(dir.file("x"), "new");
  umask(before);
  EXPECT_EQ(mode_of(dir.file("x")), 0640U);
}

TEST(WriteBesideTest, ASymbolicLinkStaysOne) {
  const TempDir dir;
  fs::create_directory(dir.file("data"));
  write_text(dir.file("data/x"), "old");
  fs::create_symlink("data/x", dir.file("relative"));
  fs::create_symlink(dir.file("relative"), dir.file("link"));
  write_text(dir.file("link"), "new");
  EXPECT_TRUE(fs::is_symlink(dir.file("link")) && fs::is_symlink(dir.file("relative")));
  EXPECT_EQ(read_bytes(dir.file("data/x")), "new");
  EXPECT_EQ(files_in(dir.file("data")), 1);
  EXPECT_EQ(files_in(dir.path()), 3);

  fs::create_symlink("data/y", dir.file("to_nothing"));
  write_text(dir.file("to_nothing"), "first");
  EXPECT_EQ(read_bytes(dir.file("data/y")), "first");

  fs::create_symlink("a", dir.file("b"));
  fs::create_symlink("b", dir.file("a"));
  EXPECT_EQ(error_of<FileError>([&] { write_text(dir.file("a"), "x"); }),
            "[test] " + dir.file("a") + ": cannot be written: Too many levels of symbolic links");
}

TEST(WriteBesideTest, TheDataIsOnDiskBeforeTheRenameAndTheNameAfterIt) {
  const TempDir dir;
  write_text(dir.file("x"), "old");
  std::vector<std::string> calls;
  on_fsync = [&](int descriptor) {
    struct stat status = {};
    EXPECT_EQ(fstat(descriptor, &status), 0);
    if (S_ISREG(status.st_mode)) {
      EXPECT_EQ(status.st_size, 3) << "all has been handed over";
    }
    calls.push_back((S_ISDIR(status.st_mode) ? "folder, " : "file, ") + read_bytes(dir.file("x")));
  };
  write_text(dir.file("x"), "new");
  on_fsync = nullptr;
  EXPECT_EQ(calls, (std::vector<std::string>{"file, old", "folder, new"}));
}

TEST(WriteBesideTest, WritesNamesOfTheGreatestLengthOfTheSystem) {
  const TempDir dir;
  const auto longest = dir.file(std::string(255, 'n'));
  write_text(longest, "x");
  write_text(longest, "y");
  EXPECT_EQ(read_bytes(longest), "y");
  const auto longer = dir.file(std::string(256, 'n'));
  EXPECT_EQ(error_of<FileError>([&] { write_text(longer, "x"); }),
            "[test] " + longer + ": cannot be written: File name too long");
}

TEST(WriteBesideTest, LeavesNothingBehindWhateverIsThrown) {
  const TempDir dir;
  write_text(dir.file("x"), "old");
  EXPECT_THROW(write_beside("test", dir.file("x"),
                            [&](std::ostream& out) {
                              out << "new";
                              EXPECT_EQ(files_in(dir.path()), 2);
                              throw std::runtime_error("stop");
                            }),
               std::runtime_error);
  EXPECT_EQ(read_bytes(dir.file("x")), "old");
  EXPECT_EQ(files_in(dir.path()), 1);
}

TEST(WriteBesideTest, ChecksBeforehandWithoutChangingAnything) {
  const TempDir dir;
  write_text(dir.file("x"), "old");
  for (const auto& path : {dir.file("x"), dir.file("new"), std::string()}) EXPECT_NO_THROW(check_writable("test", path));
  EXPECT_EQ(read_bytes(dir.file("x")), "old");
  EXPECT_EQ(files_in(dir.path()), 1);
  const auto refused = [](const std::string& path) { return error_of<FileError>([&] { check_writable("test", path); }); };
  EXPECT_EQ(refused(dir.path()), "[test] " + dir.path() + ": exists, but is not a regular file");
  EXPECT_EQ(refused(dir.file("no/x")), "[test] " + dir.file("no/x") + ": cannot be written: No such file or directory");
  EXPECT_EQ(refused(dir.file("x/y")), "[test] " + dir.file("x/y") + ": cannot be written: Not a directory");
  EXPECT_EQ(refused(dir.file("")), "[test] " + dir.file("") + ": cannot be written: Is a directory");
  EXPECT_EQ(refused("/proc/x").substr(0, 33), "[test] /proc/x: cannot be written");
  EXPECT_EQ(files_in(dir.path()), 1);
}

}  // namespace
}  // namespace xattn::detail
