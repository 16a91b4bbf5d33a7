// SPDX-License-Identifier: Apache-2.0
#ifdef __AMX_BF16__
#define XATTN_KERNELS amx
#include "kernels/product_in_parts.h"

namespace xattn::detail::amx {

void product(const Product& p) {
  product_in_parts(p);
}

void product_bfloat16(const ProductOf<Bfloat16>& p) {
  product_in_parts(p);
}

}  // namespace xattn::detail::amx
#endif
