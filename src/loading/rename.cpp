// SPDX-License-Identifier: Apache-2.0
#include "loading/rename.h"

#include <regex>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/text.h"
#include "files/check_file.h"

namespace xattn::detail {

std::map<std::string, std::string> rename(std::string_view caller,
                                          const std::string& file,
                                          const LazyTensors& tensors,
                                          const RenameRules& rules) {
  constexpr size_t kMostOfRenamed = 1000;  // bytes: std::regex recurses once for each
  const FileCheck check(caller, file);
  std::vector<std::regex> patterns;
  for (const auto& [pattern, replacement] : rules) {
    try {
      patterns.emplace_back(pattern);
    } catch (const std::regex_error& error) {
      check_value(false, caller, "rename must have regular expressions, but has {}: {}.", in_quotes(pattern), error.what());
    }
  }
  std::vector<bool> matched(rules.size(), false);
  std::map<std::string, std::string> names;
  const auto add = [&](const std::string& name) {
    auto now = name;
    for (size_t i = 0; i < rules.size(); ++i) {
      check(now.size() <= kMostOfRenamed, "rename must have names of at most {} bytes, but there is {}", kMostOfRenamed,
            in_quotes(now));
      if (!std::regex_search(now, patterns[i])) continue;
      matched[i] = true;
      now = std::regex_replace(now, patterns[i], rules[i].second);
    }
    const auto [same, is_new] = names.emplace(now, name);
    check(is_new, "rename must give each tensor a name of its own, but makes {} of both {} and {}", in_quotes(now),
          in_quotes(same->second), in_quotes(name));
  };
  for (const auto& [name, info] : tensors.infos) add(name);
  for (const auto& [name, reason] : tensors.unreadable) add(name);
  for (size_t i = 0; i < rules.size(); ++i) {
    check(matched[i], "rename must have rules that match a name, but {} matches none", in_quotes(rules[i].first));
  }
  return names;
}

LazyTensors renamed(LazyTensors tensors, const std::map<std::string, std::string>& names) {
  LazyTensors result;
  for (const auto& [now, name] : names) {
    if (const auto info = tensors.infos.find(name); info != tensors.infos.end()) result.infos.emplace(now, info->second);
    if (const auto reason = tensors.unreadable.find(name); reason != tensors.unreadable.end()) {
      result.unreadable.emplace(now, reason->second);
    }
  }
  result.make = [make = std::move(tensors.make), names](const std::string& now) { return make(names.at(now)); };
  return result;
}

}  // namespace xattn::detail
