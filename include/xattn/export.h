// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Marks the symbols that a shared build of the library exports; all others stay hidden, because LibTorch exports many already.
#define XATTN_API __attribute__((visibility("default")))
