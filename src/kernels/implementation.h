// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/activation.h"
#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "kernels/product_transposed.h"
#include "kernels/row_norm.h"
#include "kernels/row_softmax.h"
#include "kernels/tile_product.h"

// Each instruction set has a source that includes this file.
namespace xattn::detail::XATTN_KERNELS {

extern const Kernels kKernels;
const Kernels kKernels = {
    .instruction_set = InstructionSet::XATTN_KERNELS,
    .is_vectorised = kIsVectorised,
    .panel = kPanel,
    .tile_rows = kTileRows,
    .block_rows = kHeight,
    .many_block_rows = kHeight,
    .flops = kFlops,
    .flops_of_modules = kFlopsOfModules,
    .product = product,
    .product_of_many_rows = product,
    .product_transposed = product_transposed,
    .pack = pack,
    .pack_transposed = pack_transposed,
    .softmax = softmax,
    .normalise = normalise,
    .activate = activate,
};

}  // namespace xattn::detail::XATTN_KERNELS
