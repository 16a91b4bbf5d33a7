// SPDX-License-Identifier: Apache-2.0
#ifdef __x86_64__
#define XATTN_KERNELS avx512
#include "kernels/implementation.h"
#endif
