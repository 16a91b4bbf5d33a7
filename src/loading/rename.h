// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/checkpoint.h>
#include <xattn/load.h>

#include <map>
#include <string>

// Names of a file, rewritten by rules: see RenameRules.
namespace xattn::detail {

/// The file's name of each tensor, by its new one. Throws c10::ValueError for a pattern that is not a regular expression, and
/// FileError, "[caller] file: ...", if a rule matches no name, two tensors get one name, or a name is longer than 1,000 bytes.
std::map<std::string, std::string> rename(std::string_view caller,
                                          const std::string& file,
                                          const LazyTensors& tensors,
                                          const RenameRules& rules);

/// The same tensors by their new names.
LazyTensors renamed(LazyTensors tensors, const std::map<std::string, std::string>& names);

}  // namespace xattn::detail
