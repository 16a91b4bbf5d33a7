// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

// HTML pages that need no other file and no network.
namespace examples {

/// The bytes of a file as a URL: "data:TYPE;base64,...".
std::string data_url(std::string_view type, std::string_view bytes);

/// Writes `page` with the data in place of "{{report}}", by `write_file`. No text in the data can end the element that holds it.
void write_page(const std::string& path, std::string page, const nlohmann::ordered_json& data);

}  // namespace examples
