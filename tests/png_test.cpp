// SPDX-License-Identifier: Apache-2.0
#include "common/png.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <png.h>
#include <torch/utils.h>

#include <cstdio>
#include <filesystem>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "test_util.h"

namespace examples {
namespace {

using xattn::test::error_of;
using xattn::test::read_bytes;
using xattn::test::TempDir;
using xattn::test::write_bytes;

// A kind of PNG that libpng can write and `write_png` does not.
struct Kind {
  int color_type;
  int bit_depth;
  int width;
  int height;
};

// Writes only the given rows, so that a file may claim more than it has. Palettes have the colours blue and yellow.
void write_kind(const std::string& path, const Kind& kind, std::vector<std::vector<png_byte>> rows) {
  auto* file = std::fopen(path.c_str(), "wb");
  auto* png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  auto* info = png_create_info_struct(png);
  png_init_io(png, file);
  png_set_IHDR(png, info, kind.width, kind.height, kind.bit_depth, kind.color_type, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_BASE, PNG_FILTER_TYPE_BASE);
  const png_color palette[] = {{0, 0, 255}, {255, 255, 0}};
  if (kind.color_type == PNG_COLOR_TYPE_PALETTE) {
    png_set_PLTE(png, info, palette, 2);
  }
  png_set_compression_level(png, 0);  // otherwise rows may stay buffered until the end
  png_write_info(png, info);
  for (auto& row : rows) {
    png_write_row(png, row.data());
  }
  if (rows.size() == static_cast<size_t>(kind.height)) {
    png_write_end(png, info);
  }
  png_destroy_write_struct(&png, &info);
  std::fclose(file);
}

using Colors = std::vector<std::vector<int>>;

// The colours of a picture of one row.
Colors colors(const torch::Tensor& picture) {
  EXPECT_EQ(picture.scalar_type(), torch::kUInt8);
  EXPECT_EQ(picture.size(0), 1);
  Colors result;
  for (int64_t x = 0; x < picture.size(1); ++x) {
    const auto pixel = picture[0][x];
    result.push_back({pixel[0].item<int>(), pixel[1].item<int>(), pixel[2].item<int>()});
  }
  return result;
}

class PngTest : public testing::Test {
 protected:
  std::string error_of_reading() const {
    return error_of<std::runtime_error>([this] { read_png(path); });
  }

  const TempDir dir;
  const std::string path = dir.file("picture.png");
};

TEST_F(PngTest, ReadsBackWhatItWrote) {
  for (const auto& [height, width] : {std::pair{1, 1}, {7, 5}, {64, 100}}) {
    const auto picture = torch::randint(256, {height, width, 3}, torch::kUInt8);
    write_png(path, picture);
    EXPECT_TRUE(read_png(path).equal(picture));
    EXPECT_EQ(read_bytes(path), encode_png(picture));
  }
}

TEST_F(PngTest, TakesPicturesWithAnyStrides) {
  const auto planes = torch::randint(256, {3, 4, 6}, torch::kUInt8);
  write_png(path, planes.permute({1, 2, 0}));
  EXPECT_TRUE(read_png(path).equal(planes.permute({1, 2, 0})));
}

TEST_F(PngTest, ReadsGrey) {
  write_kind(path, {PNG_COLOR_TYPE_GRAY, 8, 3, 1}, {{0, 100, 255}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{0, 0, 0}, {100, 100, 100}, {255, 255, 255}}));
  write_kind(path, {PNG_COLOR_TYPE_GRAY, 1, 3, 1}, {{0b01000000}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{0, 0, 0}, {255, 255, 255}, {0, 0, 0}}));
}

TEST_F(PngTest, ReadsPalettes) {
  write_kind(path, {PNG_COLOR_TYPE_PALETTE, 1, 2, 1}, {{0b01000000}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{0, 0, 255}, {255, 255, 0}}));
}

TEST_F(PngTest, LaysTransparencyOverWhite) {
  write_kind(path, {PNG_COLOR_TYPE_RGB_ALPHA, 8, 2, 1}, {{10, 20, 30, 0, 10, 20, 30, 255}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{255, 255, 255}, {10, 20, 30}}));
  write_kind(path, {PNG_COLOR_TYPE_GRAY_ALPHA, 8, 2, 1}, {{10, 0, 10, 255}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{255, 255, 255}, {10, 10, 10}}));
}

TEST_F(PngTest, SixteenBitsBecomeTheirUpperEight) {
  write_kind(path, {PNG_COLOR_TYPE_GRAY, 16, 2, 1}, {{0x40, 0x40, 0x80, 0x80}});
  EXPECT_EQ(colors(read_png(path)), (Colors{{0x40, 0x40, 0x40}, {0x80, 0x80, 0x80}}));
}

TEST_F(PngTest, RefusesAMissingFile) {
  EXPECT_EQ(error_of_reading(), "[file] " + path + ": cannot be opened: No such file or directory");
}

TEST_F(PngTest, RefusesWhatIsNoPng) {
  write_bytes(path, "P6 1 1 255 and so on");
  EXPECT_EQ(error_of_reading(), "cannot read " + path + ": Not a PNG file");
  write_bytes(path, "");
  EXPECT_EQ(error_of_reading().find("cannot read " + path + ": "), 0U);
}

TEST_F(PngTest, RefusesATruncatedFile) {
  const auto bytes = encode_png(torch::randint(256, {16, 16, 3}, torch::kUInt8));
  constexpr size_t kEnd = 12;  // bytes of the last chunk, which is empty
  for (size_t size = 1; size < bytes.size() - kEnd; size += 37) {
    write_bytes(path, bytes.substr(0, size));
    EXPECT_EQ(error_of_reading().find("cannot read " + path + ": "), 0U) << size;
  }
}

TEST_F(PngTest, RefusesADamagedFile) {
  auto bytes = encode_png(torch::randint(256, {16, 16, 3}, torch::kUInt8));
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(path, bytes);
  EXPECT_EQ(error_of_reading().find("cannot read " + path + ": "), 0U);
}

TEST_F(PngTest, RefusesMorePixelsThanItWants) {
  write_kind(path, {PNG_COLOR_TYPE_GRAY, 8, 8001, 8000}, {100, std::vector<png_byte>(8001)});
  EXPECT_EQ(error_of_reading(), "cannot read " + path + ": it has 8001 x 8000 pixels, more than 64 million");
}

TEST_F(PngTest, RefusesWhatIsNoPicture) {
  EXPECT_EQ(error_of<c10::ValueError>([] { encode_png(torch::zeros({4, 5, 3})); }),
            "[encode_png] picture must be uint8 [height, width, 3], but is Float [4, 5, 3].");
  error_of<c10::ValueError>([] { encode_png(torch::zeros({4, 5}, torch::kUInt8)); });
  error_of<c10::ValueError>([] { encode_png(torch::zeros({0, 5, 3}, torch::kUInt8)); });
  error_of<c10::ValueError>([] { encode_png(torch::Tensor()); });
}

TEST_F(PngTest, WritesAllOrNothing) {
  const auto picture = torch::zeros({2, 2, 3}, torch::kUInt8);
  const auto lost = dir.file("no/such/folder.png");
  EXPECT_EQ(error_of<std::runtime_error>([&] { write_png(lost, picture); }),
            "[output] " + lost + ": cannot be written: No such file or directory");
  EXPECT_EQ(error_of<std::runtime_error>([&] { write_png(dir.path(), picture); }),
            "[output] " + dir.path() + ": exists, but is not a regular file");
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));

  write_bytes(path, "what was there before");
  write_png(path, picture);
  EXPECT_TRUE(read_png(path).equal(picture));
  const std::filesystem::directory_iterator files(dir.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
}

}  // namespace
}  // namespace examples
