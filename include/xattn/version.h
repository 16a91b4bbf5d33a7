// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <string>

/// Read by CMakeLists.txt. Follows semantic versioning from 1.0.0 on; before that, a minor release may break compatibility.
#define XATTN_VERSION_MAJOR 0
#define XATTN_VERSION_MINOR 2
#define XATTN_VERSION_PATCH 0

namespace xattn {

/// What runs here. A report of a bug begins with `text`.
struct XATTN_API Version {
  std::string xattn;     ///< "0.2.0": that of the library which was linked; the macros are those of the headers
  std::string commit;    ///< of its sources, or "unknown" if they were not in a git repository of their own
  std::string kernels;   ///< the instruction set of the kernels that this processor runs: "amx", "avx512", "avx2" or "plain"
  std::string libtorch;  ///< that the library was built with

  /// "xattn 0.2.0 (5043690f1c), kernels avx512, LibTorch 2.13.0".
  std::string text() const;
};

/// Thread-safe.
XATTN_API Version version();

}  // namespace xattn
