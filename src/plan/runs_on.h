// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>
#include <xattn/plan.h>

namespace xattn::detail {

/// The code that float32 modules run on with this processor and without autocast: `module_kernels` or `libtorch_cpu`. Exported
/// for the programs.
XATTN_API RunsOn modules_run_on();

}  // namespace xattn::detail
