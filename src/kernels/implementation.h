// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "kernels/product_transposed.h"
#include "kernels/row_softmax.h"
#include "kernels/tile_product.h"

// Included by one source for each instruction set.
#define XATTN_NAME_OF(x) #x
#define XATTN_NAME(x) XATTN_NAME_OF(x)

namespace xattn::detail::XATTN_KERNELS {

extern const Kernels kKernels;
const Kernels kKernels = {
    .name = XATTN_NAME(XATTN_KERNELS),
    .panel = kPanel,
    .product = product<float>,
    .product_bfloat16 = product<Bfloat16>,
    .product_of_many_rows = product<float>,
    .product_of_many_rows_bfloat16 = product<Bfloat16>,
    .product_transposed = product_transposed<float>,
    .product_transposed_bfloat16 = product_transposed<Bfloat16>,
    .pack = pack<float>,
    .pack_bfloat16 = pack<Bfloat16>,
    .pack_transposed = pack_transposed<float>,
    .pack_transposed_bfloat16 = pack_transposed<Bfloat16>,
    .softmax = softmax,
};

}  // namespace xattn::detail::XATTN_KERNELS
