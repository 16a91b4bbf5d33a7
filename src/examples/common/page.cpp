// SPDX-License-Identifier: Apache-2.0
#include "common/page.h"

#include <cstddef>
#include <nlohmann/json.hpp>

#include "common/write_file.h"

namespace examples {
namespace {

// RFC 4648.
std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto byte = [bytes](size_t i) { return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0U; };
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto bits = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
    for (const int shift : {18, 12, 6, 0}) text += kDigits[bits >> shift & 63];
  }
  // Digits for bytes after the end become padding.
  const auto padding = text.size() - (bytes.size() * 4 + 2) / 3;
  return text.replace(text.size() - padding, padding, padding, '=');
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (auto at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

}  // namespace

std::string data_url(std::string_view type, std::string_view bytes) {
  return "data:" + std::string(type) + ";base64," + base64(bytes);
}

void write_page(const std::string& path, std::string page, const nlohmann::ordered_json& data) {
  // Invalid UTF-8 becomes U+FFFD. Without "<" no text can end the element that holds the data.
  auto text = data.dump(/*indent=*/-1, ' ', /*ensure_ascii=*/false, nlohmann::ordered_json::error_handler_t::replace);
  replace_all(text, "<", "\\u003c");
  replace_all(page, "{{report}}", text);
  write_file(path, page);
}

}  // namespace examples
