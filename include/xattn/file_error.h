// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <stdexcept>

namespace xattn {

/// Thrown for a file that cannot be read or written, is invalid, or does not fit the module that it is loaded into. `what()` is
/// one line that names the file, the expectation and what was found.
class XATTN_API FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace xattn
