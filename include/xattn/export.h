// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Marks what a shared build of the library shows; everything else stays hidden, beside the many symbols that LibTorch exports.
#define XATTN_API __attribute__((visibility("default")))
