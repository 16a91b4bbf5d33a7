// SPDX-License-Identifier: Apache-2.0
#include "bench/block_rows.h"

#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "blocks.json.h"

namespace bench {
namespace {

// The value of a word in the row. Throws std::out_of_range for an unknown word.
template <class Value>
Value choose(const nlohmann::json& row,
             const char* field,
             const std::string& fallback,
             const std::map<std::string, Value>& values) {
  return values.at(row.value(field, fallback));
}

BlockRow parse(const nlohmann::json& row) {
  using xattn::Activation;
  using xattn::BlockGate;
  using xattn::NormKind;
  using xattn::NormPlacement;
  const auto number = [&](const char* field, int64_t fallback) { return row.value(field, fallback); };
  const auto has_bias = [biases = row.value("biases", "")](char of) { return biases.find(of) != std::string::npos; };
  const auto Eq = number("Eq", 1), Ek = number("Ek", Eq), H = number("H", 1);
  const bool self = row.value("self", false);
  const auto attention = xattn::CrossAttentionOptions(Eq, Ek, Ek, number("Eo", Eq))
                             .num_heads(H)
                             .head_dim(number("inner", Eq) / H)
                             .query_bias(has_bias('q'))
                             .key_bias(has_bias('k'))
                             .value_bias(has_bias('v'))
                             .output_bias(has_bias('o'))
                             .scale(row.contains("scale") ? std::optional<double>(row.at("scale")) : std::nullopt)
                             .attention_weights(xattn::AttentionWeights::none);
  return {
      .name = row.at("name"),
      .kind = choose<BlockKind>(
          row, "kind", "", {{"decoupled", BlockKind::decoupled}, {"block", BlockKind::block}, {"linear", BlockKind::linear}}),
      .kept = row.value("kept", false),
      .self = self,
      .layers = number("layers", 1),
      .B = number("B", 1),
      .Lq = number("Lq", 1),
      .Lk = number("Lk", 1),
      .image = number("image", 0),
      .block = xattn::CrossAttentionBlockOptions(attention)
                   .norm(choose<NormKind>(row, "norm", "",
                                          {{"", NormKind::none}, {"layer", NormKind::layer}, {"rms", NormKind::rms}}))
                   .norm_placement(choose<NormPlacement>(row, "placement", "before",
                                                         {{"before", NormPlacement::before}, {"after", NormPlacement::after}}))
                   .norm_context(self)
                   .gate(row.value("gate", false) ? BlockGate::scalar : BlockGate::none)
                   .feed_forward(number("hidden", 0))
                   .feed_forward_bias(has_bias('f'))
                   .activation(choose<Activation>(row, "activation", "gelu",
                                                  {{"gelu", Activation::gelu}, {"relu", Activation::relu}}))};
}

}  // namespace

std::vector<BlockRow> block_rows(std::string_view text) {
  std::vector<BlockRow> result;
  const auto table = nlohmann::json::parse(kBlocksJson);
  for (const auto& json : table.at("rows")) {
    auto row = parse(json);
    if (row.name == text) return {row};
    if (row.name.find(text) != std::string::npos) result.push_back(std::move(row));
  }
  return result;
}

}  // namespace bench
