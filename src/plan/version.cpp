// SPDX-License-Identifier: Apache-2.0
#include <torch/version.h>

#include <xattn/version.h>

#include <string>

#include "base/text.h"
#include "kernels/kernels.h"

namespace xattn {

Version version() {
  return {detail::formatted("{}.{}.{}", XATTN_VERSION_MAJOR, XATTN_VERSION_MINOR, XATTN_VERSION_PATCH), XATTN_COMMIT,
          std::string(detail::name_of(detail::kernels().instruction_set)), TORCH_VERSION};
}

std::string Version::text() const {
  return detail::formatted("xattn {} ({}), kernels {}, LibTorch {}", xattn, commit, kernels, libtorch);
}

}  // namespace xattn
