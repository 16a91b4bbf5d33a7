// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"
#include "pack.h"
#include "product.h"
#include "softmax.h"

// Included by one source for each instruction set.
#define XATTN_NAME_OF(x) #x
#define XATTN_NAME(x) XATTN_NAME_OF(x)

namespace xattn::detail::XATTN_KERNELS {

extern const Kernels kKernels;
const Kernels kKernels = {
    .name = XATTN_NAME(XATTN_KERNELS),
    .panel = kPanel,
    .product = product,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .softmax = softmax,
};

}  // namespace xattn::detail::XATTN_KERNELS
