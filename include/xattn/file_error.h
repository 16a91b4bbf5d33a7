// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <stdexcept>

namespace xattn {

/// A file that cannot be read or written, is not what it claims to be, or does not fit the module it was to be loaded into.
/// `what()` is one line that names the file, the expectation and what came.
class XATTN_API FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace xattn
