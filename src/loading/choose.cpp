// SPDX-License-Identifier: Apache-2.0
#include "loading/choose.h"

#include <iterator>
#include <utility>

#include "base/text.h"
#include "loading/layouts.h"

namespace xattn::detail {
std::string must_be_one_of(std::vector<std::string> prefixes, const std::optional<std::string>& given) {
  for (auto& prefix : prefixes) prefix = in_quotes(prefix);
  return formatted("prefix must be one of {}, but {}", joined(prefixes), given ? "is " + in_quotes(*given) : "was not given");
}

std::vector<FoundLayer> likeliest(const std::vector<FoundLayer>& layers) {
  std::vector<FoundLayer> of_kind;
  for (const auto kind : {AttentionKind::cross, AttentionKind::unknown, AttentionKind::self}) {
    if (!of_kind.empty()) break;
    std::ranges::copy_if(layers, std::back_inserter(of_kind), [kind](const auto& layer) { return layer.kind == kind; });
  }
  return of_kind;
}

void explain_none(const Checkpoint& checkpoint, const std::string& place, const LayoutChoice& choice) {
  const auto prefix = with_point(place);
  std::vector<std::string> names;
  for (const auto& [name, info] : checkpoint.tensors()) {
    if (!name.starts_with(prefix)) continue;
    names.push_back(name);
    const auto is_weight = [&each = name](const auto& layout) { return each.ends_with(layout.projections[0].weight); };
    constexpr std::string_view kPacked = "qweight";  // GPTQ's and AWQ's name for weights of four bits
    if ((choice.own() && is_weight(*choice.own())) || std::ranges::any_of(layer_layouts(), is_weight) ||
        name.ends_with(kPacked))
      refuse_quantized(checkpoint, name);
  }
  for (const auto& [name, reason] : checkpoint.unreadable()) {
    load_check(checkpoint.path())(!name.starts_with(prefix), "must hold an attention layer, but tensor {} is not read: {}",
                                  in_quotes(name), reason);
  }
  const auto advice = advice_on(names);
  load_check(checkpoint.path())(advice.empty(), "must hold an attention layer in a layout that is known, but holds none{}",
                                advice);
}

void refuse_quantized(const Checkpoint& checkpoint, const std::string& name) {
  const auto type = checkpoint.tensors().at(name).type;
  const auto* advice = c10::isIntegralType(type, /*includeBool=*/false)
                           ? "; quantized weights must first be dequantised in Python, and saved again"
                           : "";
  load_check(checkpoint.path())(c10::isFloatingType(type), "tensor {} must have a floating point type, but has {}{}",
                                in_quotes(name), c10::getDtypeNames(type).first, advice);
}

}  // namespace xattn::detail
