// SPDX-License-Identifier: Apache-2.0
#include "files/zip.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

#include "file_checks.h"
#include "test_util.h"
#include "zip_writer.h"

namespace xattn {
namespace {

using detail::ZipFile;
using test::little_endian;
using test::zip_of;

detail::Bytes bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string text_of(detail::Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The message of the error for an archive, which must be one line that names it.
std::string zip_refusal(const std::string& file) {
  return test::refusal_by("zip", "x.zip", [&] { ZipFile("x.zip", bytes_of(file)); });
}

std::string with(std::string file, size_t offset, const std::string& bytes) {
  return file.replace(offset, bytes.size(), bytes);
}

// An archive of one entry: its header is at 0, its name at 30, its data at 33, its entry in the directory at 37, the end at 86.
const std::string kOne = zip_of({{"a/b", "data"}});
constexpr size_t kDirectory = 37;
constexpr size_t kEnd = 86;

// The same with 64 bits for all numbers: `field` is the extra field in the directory.
std::string one_in_64_bits(const std::string& field) {
  auto file = kOne.substr(0, kEnd);
  file = with(file, kDirectory + 20, std::string(8, '\xff'));  // sizes
  file = with(file, kDirectory + 30, little_endian(field.size(), 2));
  file = with(file, kDirectory + 42, std::string(4, '\xff'));  // offset
  file += field;
  const auto end64 = file.size();
  file += "PK\6\6" + little_endian(44, 8) + little_endian(0x2d002d, 4) + std::string(8, '\0') + little_endian(1, 8) +
          little_endian(1, 8) + little_endian(end64 - kDirectory, 8) + little_endian(kDirectory, 8);
  file += "PK\6\7" + std::string(4, '\0') + little_endian(end64, 8) + little_endian(1, 4);
  return file + "PK\5\6" + std::string(4, '\0') + std::string(12, '\xff') + std::string(2, '\0');
}

const std::string kField = little_endian(0xcafe, 2) + little_endian(1, 2) + "x" +  // another field
                           little_endian(1, 2) + little_endian(24, 2) + little_endian(4, 8) + little_endian(4, 8) +
                           little_endian(0, 8);

// ---- Reading ----------------------------------------------------------------------------------------------------------------

TEST(ZipTest, ReadsEntriesInPlace) {
  const auto file = zip_of({{"archive/data.pkl", "pickle"}, {"archive/data/0", ""}, {"archive/data/1", "xyz"}});
  const ZipFile zip("x.zip", bytes_of(file));
  EXPECT_EQ(zip.entries().size(), 3U);
  EXPECT_EQ(zip.folder(), "archive/");
  EXPECT_TRUE(zip.has("data/1"));
  EXPECT_FALSE(zip.has("data/2"));
  EXPECT_EQ(text_of(zip.bytes("data.pkl")), "pickle");
  EXPECT_EQ(text_of(zip.bytes("data/0")), "");
  EXPECT_EQ(text_of(zip.bytes("data/1")), "xyz");
  EXPECT_EQ(reinterpret_cast<const char*>(zip.bytes("data/1").data()), file.data() + file.find("xyz"));
}

TEST(ZipTest, ReadsAnEmptyArchive) {
  const auto file = zip_of({});
  EXPECT_TRUE(ZipFile("x.zip", bytes_of(file)).entries().empty());
}

TEST(ZipTest, HasNoFolderUnlessAllEntriesLieInIt) {
  for (const std::string other : {"b/x", "x", "a"}) {
    const auto file = zip_of({{"a/x", ""}, {other, ""}});
    const ZipFile zip("x.zip", bytes_of(file));
    EXPECT_EQ(zip.folder(), "");
    EXPECT_TRUE(zip.has("a/x"));
  }
}

TEST(ZipTest, ReadsPastAComment) {
  for (const size_t size : {1, 65535}) {
    const auto file = with(kOne, kEnd + 20, little_endian(size, 2)) + std::string(size, 'P');
    EXPECT_EQ(text_of(ZipFile("x.zip", bytes_of(file)).bytes("b")), "data");
  }
}

TEST(ZipTest, ReadsNumbersOf64Bits) {
  const auto file = one_in_64_bits(kField);
  EXPECT_EQ(text_of(ZipFile("x.zip", bytes_of(file)).bytes("b")), "data");
}

TEST(ZipTest, ReadsArchivesOfTorch) {
  for (const std::string name : {"state_dict", "scripted"}) {
    const auto file = test::read_bytes(test::data_path("files/" + name + ".pt"));
    const ZipFile zip(name, bytes_of(file));
    EXPECT_EQ(zip.folder(), name + "/");
    EXPECT_EQ(text_of(zip.bytes("data.pkl")).substr(0, 2), "\x80\x02");
    EXPECT_EQ(text_of(zip.bytes("byteorder")), "little");
  }
}

TEST(ZipTest, RefusesACompressedEntryWhenItIsRead) {
  auto file = with(with(kOne, 8, little_endian(8, 2)), kDirectory + 10, little_endian(8, 2));
  file = with(file, kDirectory + 24, little_endian(1000, 4));  // a larger uncompressed size
  const ZipFile zip("x.zip", bytes_of(file));
  EXPECT_TRUE(zip.has("b"));
  EXPECT_TRUE(zip.entries().at("a/b").compressed);
  EXPECT_EQ(test::error_of<FileError>([&] { zip.bytes("b"); }),
            "[zip] x.zip: entry \"b\" is compressed, and only stored entries are read");
}

TEST(ZipTest, RefusesAMissingEntry) {
  const ZipFile zip("x.zip", bytes_of(kOne));
  EXPECT_EQ(test::error_of<FileError>([&] { zip.bytes("c\n"); }), "[zip] x.zip: has no entry \"c\\n\"");
}

// ---- Errors -----------------------------------------------------------------------------------------------------------------

TEST(ZipTest, RefusesAFileWithoutADirectory) {
  for (const auto& file : {std::string(), kOne.substr(0, kEnd), kOne + "x", std::string(100, 'x')}) {
    EXPECT_EQ(zip_refusal(file), "has no directory at its end; a download may have been cut off");
  }
}

TEST(ZipTest, RefusesADirectoryAtAnotherPlace) {
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 16, little_endian(kDirectory + 1, 4))),
            "has a directory of 49 bytes at 38, but it must end before 86");
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 12, little_endian(0xffff'ffff, 4))),
            "has a directory of 4294967295 bytes at 37, but it must end before 86");
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 16, little_endian(kDirectory - 1, 4))), "has a directory with a damaged entry at 36");
}

TEST(ZipTest, RefusesAnImpossibleNumberOfEntries) {
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 8, little_endian(0xffff'ffff, 4))),
            "has 65535 entries in a directory of 49 bytes, which is impossible");
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 8, little_endian(0, 4))),
            "has a directory of 49 bytes, but its 0 entries end 49 bytes before");
}

TEST(ZipTest, RefusesAnEntryThatEndsBeyondTheDirectory) {
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 28, little_endian(4, 2))), "has a directory that ends inside its entry at 37");
}

TEST(ZipTest, RefusesEncryption) {
  for (const uint64_t flag : {0x1, 0x40, 0x2000}) {
    EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 8, little_endian(flag, 2))), "entry \"a/b\" is encrypted");
  }
}

TEST(ZipTest, RefusesPartsOfAnArchive) {
  const std::string message = "must be whole, but is one part of an archive in several";
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 4, little_endian(1, 2))), message);
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 6, little_endian(1, 2))), message);
  EXPECT_EQ(zip_refusal(with(kOne, kEnd + 8, little_endian(2, 2))), message);
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 34, little_endian(1, 2))), "entry \"a/b\" is in another part of the archive");
}

TEST(ZipTest, RefusesANameGivenTwice) {
  EXPECT_EQ(zip_refusal(zip_of({{"a", ""}, {"a", ""}})), "has two entries \"a\"");
}

TEST(ZipTest, RefusesAHeaderThatContradictsTheDirectory) {
  EXPECT_EQ(zip_refusal(with(kOne, 30, "x")), "entry \"a/b\" has another name in front of its data");
  EXPECT_EQ(zip_refusal(with(kOne, 26, little_endian(0xffff, 2))), "entry \"a/b\" has another name in front of its data");
  EXPECT_EQ(zip_refusal(with(kOne, 8, little_endian(8, 2))), "entry \"a/b\" has another method in front of its data");
  EXPECT_EQ(zip_refusal(with(kOne, 0, "PK\3\5")), "entry \"a/b\" has no header at 0, where one should be");
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 42, little_endian(1, 4))),
            "entry \"a/b\" has no header at 1, where one should be");
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 42, little_endian(0xffff'fffe, 4))),
            "entry \"a/b\" has no header at 4294967294, where one should be");
}

TEST(ZipTest, RefusesDataOutsideOfTheFile) {
  const auto sizes = [](uint64_t size) { return little_endian(size, 4) + little_endian(size, 4); };
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 20, sizes(5))),
            "entry \"a/b\" has 5 bytes at 33, but must end before the directory at 37");
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 20, sizes(0xffff'fffe))),
            "entry \"a/b\" has 4294967294 bytes at 33, but must end before the directory at 37");
  EXPECT_EQ(zip_refusal(with(kOne, 28, little_endian(0xffff, 2))),
            "entry \"a/b\" has 4 bytes at 65568, but must end before the directory at 37");
}

TEST(ZipTest, RefusesAStoredEntryOfTwoSizes) {
  EXPECT_EQ(zip_refusal(with(kOne, kDirectory + 24, little_endian(1000, 4))),
            "entry \"a/b\" is stored as 4 bytes, but should have 1000 when extracted");
}

TEST(ZipTest, RefusesEntriesThatOverlap) {
  // The data of "a" contains another entry with its header, "b", as in a zip bomb.
  const auto inner = zip_of({{"b", "data"}}).substr(0, 35);
  const auto file = zip_of({{"a", inner}, {"b", "data"}});
  const auto directory_of_b = file.rfind("PK\1\2");
  EXPECT_EQ(zip_refusal(with(file, directory_of_b + 42, little_endian(31, 4))),
            "has an entry that begins at 31, inside another that ends at 66");
}

TEST(ZipTest, RefusesDamageToNumbersOf64Bits) {
  const std::string lacks = "entry \"a/b\" lacks a size or an offset of 64 bits";
  EXPECT_EQ(zip_refusal(one_in_64_bits("")), lacks);
  EXPECT_EQ(zip_refusal(one_in_64_bits(kField.substr(0, kField.size() - 1))), lacks);
  EXPECT_EQ(zip_refusal(one_in_64_bits(with(kField, 7, little_endian(16, 2)))), lacks);
  EXPECT_EQ(zip_refusal(one_in_64_bits(with(kField, 25, std::string(8, '\xff')))),
            "entry \"a/b\" has no header at 18446744073709551615, where one should be");

  const auto file = one_in_64_bits(kField);
  const auto end64 = file.find("PK\6\6");
  const auto locator = file.find("PK\6\7");
  EXPECT_EQ(zip_refusal(with(file, end64, "x")), fmt::format("has no zip64 end record at {}, where one should be", end64));
  EXPECT_EQ(zip_refusal(with(file, locator + 8, std::string(8, '\xff'))),
            "has no zip64 end record at 18446744073709551615, where one should be");
  EXPECT_EQ(
      zip_refusal(with(file, end64 + 48, std::string(8, '\xff'))),
      fmt::format("has a directory of {} bytes at 18446744073709551615, but it must end before {}", end64 - kDirectory, end64));
  EXPECT_EQ(
      zip_refusal(with(file, end64 + 24, std::string(16, '\xff'))),
      fmt::format("has 18446744073709551615 entries in a directory of {} bytes, which is impossible", end64 - kDirectory));
  EXPECT_EQ(zip_refusal(with(file, end64 + 16, little_endian(1, 4))),
            "must be whole, but is one part of an archive in several");
}

TEST(ZipTest, ThrowsNoOtherErrorWhateverByteIsChanged) {
  for (const auto& whole : {kOne, one_in_64_bits(kField)}) {
    for (size_t i = 0; i < whole.size(); ++i) {
      for (const char value : {'\0', '\1', '\x7f', '\xff'}) {
        const auto file = with(whole, i, std::string(1, value));
        try {
          const ZipFile zip("x.zip", bytes_of(file));
          for (const auto& [name, entry] : zip.entries()) EXPECT_LE(entry.bytes.size(), file.size());
        } catch (const FileError&) {
        }
      }
      EXPECT_NE(zip_refusal(whole.substr(0, i)), "");
    }
  }
}

}  // namespace
}  // namespace xattn
