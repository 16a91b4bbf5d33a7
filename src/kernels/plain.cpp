// SPDX-License-Identifier: Apache-2.0
#define XATTN_KERNELS plain
#include "kernels/implementation.h"
