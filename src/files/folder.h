// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace xattn::detail {

/// The path of the file of weights in a folder of Hugging Face or diffusers: see `open_checkpoint`. Throws FileError, listing
/// what the folder holds, if there is none.
std::string weights_in(const std::string& folder);

}  // namespace xattn::detail
