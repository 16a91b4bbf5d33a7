// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>
#include <xattn/plan.h>

#include <string_view>

namespace xattn::detail {

/// The code that float32 modules run on with this processor and without autocast: `module_kernels` or `libtorch_cpu`. Exported
/// for the programs.
XATTN_API RunsOn modules_run_on();

/// Runs on the kernels of another instruction set than the fastest: "amx", "avx512", "avx2" or "plain". For the tests and the
/// benchmark, which pass the environment's XATTN_KERNELS before anything else; the library itself reads no environment. Returns
/// false if this processor cannot run them. Throws std::invalid_argument for other names.
XATTN_API bool use_kernels_named(std::string_view name);

}  // namespace xattn::detail
