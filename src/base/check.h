// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>

#include <string_view>
#include <utility>

#include "base/text.h"

// Checks of arguments. All messages have one form, "[caller] argument must be ..., but is ....", and are thrown as torch's
// typed errors. Their what() is this one line: unlike TORCH_CHECK, they take no backtrace, which it would append.
namespace xattn::detail {

/// Throws c10::ValueError with "[caller] message" unless `ok`. The message is formatted, and functions among its
/// arguments are called, only if it is thrown.
template <typename... Args>
void check_value(bool ok, std::string_view caller, Format<Args...> format, Args&&... args) {
  if (!ok) throw c10::ValueError(formatted("[{}] {}", caller, formatted(format, std::forward<Args>(args)...)));
}

/// The same for types and devices: throws c10::TypeError.
template <typename... Args>
void check_type(bool ok, std::string_view caller, Format<Args...> format, Args&&... args) {
  if (!ok) throw c10::TypeError(formatted("[{}] {}", caller, formatted(format, std::forward<Args>(args)...)));
}

}  // namespace xattn::detail
