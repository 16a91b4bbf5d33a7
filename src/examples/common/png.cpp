// SPDX-License-Identifier: Apache-2.0
#include "common/png.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <png.h>

#include <cstdint>
#include <stdexcept>

#include "common/write_file.h"
#include "files/mapped_file.h"

namespace examples {
namespace {

constexpr int64_t kMaxPixels = 64'000'000;  // 192 MB as a tensor
constexpr uint64_t kMaxBytes = 1 << 29;     // of the file: as many pixels of 16 bits in four channels, uncompressed

// libpng's simplified interface, which keeps its errors in `message`.
struct Image : png_image {
  Image() : png_image{} { version = PNG_IMAGE_VERSION; }
  ~Image() { png_image_free(this); }
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;
};

}  // namespace

torch::Tensor read_png(const std::string& path) {
  const auto fail = [&path](const std::string& reason) {
    throw std::runtime_error(fmt::format("cannot read {}: {}", path, reason));
  };
  const xattn::detail::MappedFile file(path, kMaxBytes);
  Image image;
  if (!png_image_begin_read_from_memory(&image, file.bytes().data(), file.bytes().size())) {
    fail(image.message);
  }
  const auto height = static_cast<int64_t>(image.height);
  const auto width = static_cast<int64_t>(image.width);
  if (height * width > kMaxPixels) {
    fail(fmt::format("it has {} x {} pixels, more than {} million", width, height, kMaxPixels / 1'000'000));
  }
  image.format = PNG_FORMAT_RGB;
  image.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // otherwise libpng takes 16 bits for linear light
  const png_color white = {255, 255, 255};
  const auto pixels = at::empty({height, width, 3}, torch::kUInt8);
  if (!png_image_finish_read(&image, &white, pixels.mutable_data_ptr(), /*row_stride=*/0, /*colormap=*/nullptr)) {
    fail(image.message);
  }
  return pixels;
}

std::string encode_png(const torch::Tensor& picture) {
  TORCH_CHECK_VALUE(picture.scalar_type() == torch::kUInt8 && picture.dim() == 3 && picture.size(2) == 3 && picture.numel() > 0,
                    "[encode_png] picture must be uint8 [height, width, 3], but is ", picture.scalar_type(), " ",
                    picture.sizes(), ".");
  const auto pixels = picture.cpu().contiguous();
  Image image;
  image.format = PNG_FORMAT_RGB;
  image.height = static_cast<png_uint_32>(pixels.size(0));
  image.width = static_cast<png_uint_32>(pixels.size(1));
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
  std::string bytes(size, '\0');
  if (!png_image_write_to_memory(&image, bytes.data(), &size, /*convert_to_8_bit=*/0, pixels.const_data_ptr(), /*row_stride=*/0,
                                 /*colormap=*/nullptr)) {
    throw std::runtime_error(fmt::format("cannot make a PNG: {}", image.message));
  }
  bytes.resize(size);
  return bytes;
}

void write_png(const std::string& path, const torch::Tensor& picture) {
  write_file(path, encode_png(picture));
}

}  // namespace examples
