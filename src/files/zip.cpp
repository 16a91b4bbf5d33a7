// SPDX-License-Identifier: Apache-2.0
#include "files/zip.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "base/text.h"
#include "files/check_file.h"

namespace xattn::detail {
namespace {

static_assert(std::endian::native == std::endian::little, "zip archives are little-endian");

constexpr std::string_view kZip = "zip";

// The records by their signatures, with the sizes of their fixed parts.
constexpr std::string_view kLocalHeader = "PK\3\4";
constexpr std::string_view kDirectoryEntry = "PK\1\2";
constexpr std::string_view kEnd = "PK\5\6";
constexpr std::string_view kEnd64 = "PK\6\6";
constexpr std::string_view kEnd64Locator = "PK\6\7";
constexpr size_t kLocalHeaderSize = 30;
constexpr size_t kDirectoryEntrySize = 46;
constexpr size_t kEndSize = 22;
constexpr size_t kEnd64Size = 56;
constexpr size_t kEnd64LocatorSize = 20;

constexpr size_t kMaxComment = 0xffff;
constexpr uint16_t kEncrypted = 1 | 1 << 6 | 1 << 13;  // the data, strongly, or the directory
constexpr uint16_t kStored = 0;                        // the method without compression
constexpr uint16_t kZip64Field = 1;
constexpr uint32_t kIn64 = 0xffff'ffff;  // in place of a number that is in the zip64 field

// A part of the file whose size has been checked.
struct Record {
  Bytes bytes;

  template <typename T>
  T number(size_t offset) const {
    T value = 0;
    std::memcpy(&value, bytes.data() + offset, sizeof(T));
    return value;
  }

  std::string_view text(size_t offset, size_t size) const {
    return {reinterpret_cast<const char*>(bytes.data()) + offset, size};
  }

  bool is(std::string_view signature) const { return text(0, signature.size()) == signature; }
};

struct Directory {
  uint64_t begin = 0;
  uint64_t size = 0;
  uint64_t entries = 0;
  uint64_t limit = 0;  // beginning of the records after it
};

struct DirectoryEntry {
  std::string_view name;
  uint16_t flags = 0;
  uint16_t method = 0;
  uint64_t compressed_size = 0;
  uint64_t size = 0;
  uint64_t offset = 0;  // of the local header
  uint32_t disk = 0;
};

class Parser {
 public:
  Parser(const std::string& path, Bytes file) : check_(kZip, path), file_(file) {}

  std::map<std::string, ZipFile::Entry> entries() const {
    const auto directory = find_directory();
    auto rest = file_.subspan(directory.begin, directory.size);
    std::map<std::string, ZipFile::Entry> entries;
    std::vector<std::pair<uint64_t, uint64_t>> places;
    for (uint64_t i = 0; i < directory.entries; ++i) {
      const auto entry = take_entry(rest);
      const auto data = data_of(entry, directory.begin);
      const auto [_, is_new] = entries.try_emplace(std::string(entry.name), ZipFile::Entry{data, entry.method != kStored});
      check_(is_new, "has two entries {}", in_quotes(entry.name));
      places.emplace_back(entry.offset, data.data() + data.size() - file_.data());
    }
    check_(rest.empty(), "has a directory of {} bytes, but its {} entries end {} bytes before", directory.size,
           directory.entries, rest.size());
    check_apart(places);
    return entries;
  }

 private:
  std::optional<Record> record(uint64_t begin, uint64_t size) const {
    if (begin > file_.size() || size > file_.size() - begin) return {};
    return Record{file_.subspan(begin, size)};
  }

  // The beginning of the end record, which only a comment may follow.
  uint64_t find_end() const {
    for (size_t comment = 0; comment <= kMaxComment && comment + kEndSize <= file_.size(); ++comment) {
      const size_t begin = file_.size() - comment - kEndSize;
      const Record end{file_.subspan(begin)};
      if (end.is(kEnd) && end.number<uint16_t>(20) == comment) return begin;
    }
    check_.fail("has no directory at its end; a download may have been cut off");
  }

  Directory find_directory() const {
    const auto end_begin = find_end();
    const auto end = *record(end_begin, kEndSize);
    const auto locator =
        end_begin < kEnd64LocatorSize ? std::nullopt : record(end_begin - kEnd64LocatorSize, kEnd64LocatorSize);
    Directory directory;
    bool one_disk = false;
    if (locator && locator->is(kEnd64Locator)) {
      const auto end64_begin = locator->number<uint64_t>(8);
      const auto end64 = record(end64_begin, kEnd64Size);
      check_(end64 && end64->is(kEnd64), "has no zip64 end record at {}, where one should be", end64_begin);
      one_disk = end64->number<uint32_t>(16) == 0 && end64->number<uint32_t>(20) == 0 &&
                 end64->number<uint64_t>(24) == end64->number<uint64_t>(32);
      directory = {end64->number<uint64_t>(48), end64->number<uint64_t>(40), end64->number<uint64_t>(32), end64_begin};
    } else {
      one_disk =
          end.number<uint16_t>(4) == 0 && end.number<uint16_t>(6) == 0 && end.number<uint16_t>(8) == end.number<uint16_t>(10);
      directory = {end.number<uint32_t>(16), end.number<uint32_t>(12), end.number<uint16_t>(10), end_begin};
    }
    const auto& [begin, size, entries, limit] = directory;
    check_(one_disk, "must be whole, but is one part of an archive in several");
    check_(begin <= limit && size <= limit - begin, "has a directory of {} bytes at {}, but it must end before {}", size, begin,
           limit);
    check_(entries <= size / kDirectoryEntrySize, "has {} entries in a directory of {} bytes, which is impossible", entries,
           size);
    return directory;
  }

  // Takes the next entry off the front of the directory.
  DirectoryEntry take_entry(Bytes& rest) const {
    const Record fixed{rest};
    check_(rest.size() >= kDirectoryEntrySize && fixed.is(kDirectoryEntry), "has a directory with a damaged entry at {}",
           rest.data() - file_.data());
    const size_t name_size = fixed.number<uint16_t>(28);
    const size_t extra_size = fixed.number<uint16_t>(30);
    const size_t comment_size = fixed.number<uint16_t>(32);
    const size_t size = kDirectoryEntrySize + name_size + extra_size + comment_size;
    check_(size <= rest.size(), "has a directory that ends inside its entry at {}", rest.data() - file_.data());
    DirectoryEntry entry{fixed.text(kDirectoryEntrySize, name_size),
                         fixed.number<uint16_t>(8),
                         fixed.number<uint16_t>(10),
                         fixed.number<uint32_t>(20),
                         fixed.number<uint32_t>(24),
                         fixed.number<uint32_t>(42),
                         fixed.number<uint16_t>(34)};
    read_zip64(rest.subspan(kDirectoryEntrySize + name_size, extra_size), entry);
    check_((entry.flags & kEncrypted) == 0, "entry {} is encrypted", in_quotes(entry.name));
    check_(entry.disk == 0, "entry {} is in another part of the archive", in_quotes(entry.name));
    check_(entry.method != kStored || entry.size == entry.compressed_size,
           "entry {} is stored as {} bytes, but should have {} when extracted", in_quotes(entry.name), entry.compressed_size,
           entry.size);
    rest = rest.subspan(size);
    return entry;
  }

  // Numbers that do not fit their place are in an extra field, which holds only these, in this order.
  void read_zip64(Bytes extra, DirectoryEntry& entry) const {
    auto field = find_field(extra, kZip64Field);
    for (auto* number : {&entry.size, &entry.compressed_size, &entry.offset}) {
      if (*number != kIn64) continue;
      check_(field.size() >= sizeof(uint64_t), "entry {} lacks a size or an offset of 64 bits", in_quotes(entry.name));
      *number = Record{field}.number<uint64_t>(0);
      field = field.subspan(sizeof(uint64_t));
    }
  }

  // An extra field is a tag, a size and that many bytes. Empty if there is none of this tag.
  static Bytes find_field(Bytes extra, uint16_t tag) {
    while (extra.size() >= 4) {
      const Record field{extra};
      const size_t size = std::min<size_t>(field.number<uint16_t>(2), extra.size() - 4);
      if (field.number<uint16_t>(0) == tag) return extra.subspan(4, size);
      extra = extra.subspan(4 + size);
    }
    return {};
  }

  // The bytes of an entry, which follow a header of their own. Its sizes are ignored: writers may leave them open.
  Bytes data_of(const DirectoryEntry& entry, uint64_t directory) const {
    const auto header = record(entry.offset, kLocalHeaderSize);
    check_(header && header->is(kLocalHeader), "entry {} has no header at {}, where one should be", in_quotes(entry.name),
           entry.offset);
    const size_t name_size = header->number<uint16_t>(26);
    const size_t extra_size = header->number<uint16_t>(28);
    const auto name_begin = entry.offset + kLocalHeaderSize;
    const auto name = record(name_begin, name_size);
    check_(name && name->text(0, name_size) == entry.name, "entry {} has another name in front of its data",
           in_quotes(entry.name));
    check_(header->number<uint16_t>(8) == entry.method, "entry {} has another method in front of its data",
           in_quotes(entry.name));
    const auto begin = name_begin + name_size + extra_size;
    check_(begin <= directory && entry.compressed_size <= directory - begin,
           "entry {} has {} bytes at {}, but must end before the directory at {}", in_quotes(entry.name), entry.compressed_size,
           begin, directory);
    return file_.subspan(begin, entry.compressed_size);
  }

  // Checks that entries, from their headers to their ends, do not overlap.
  void check_apart(std::vector<std::pair<uint64_t, uint64_t>> places) const {
    std::ranges::sort(places);
    uint64_t last_end = 0;
    for (const auto& [begin, end] : places) {
      check_(begin >= last_end, "has an entry that begins at {}, inside another that ends at {}", begin, last_end);
      last_end = end;
    }
  }

  FileCheck check_;
  Bytes file_;
};

// The part up to the first slash, if all names have it in common.
std::string common_folder(const std::map<std::string, ZipFile::Entry>& entries) {
  if (entries.empty()) return "";
  const auto& first = entries.begin()->first;
  const auto folder = first.substr(0, first.find('/') + 1);
  const bool common = std::ranges::all_of(entries, [&](const auto& entry) { return entry.first.starts_with(folder); });
  return common ? folder : "";
}

}  // namespace

ZipFile::ZipFile(const std::string& path, Bytes file)
    : path_(path), entries_(Parser(path, file).entries()), folder_(common_folder(entries_)) {}

bool ZipFile::has(std::string_view name) const {
  return entries_.contains(folder_ + std::string(name));
}

Bytes ZipFile::bytes(std::string_view name) const {
  const auto entry = entries_.find(folder_ + std::string(name));
  const FileCheck check(kZip, path_);
  check(entry != entries_.end(), "has no entry {}", in_quotes(name));
  check(!entry->second.compressed, "entry {} is compressed, and only stored entries are read", in_quotes(name));
  return entry->second.bytes;
}

}  // namespace xattn::detail
