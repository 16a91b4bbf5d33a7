// SPDX-License-Identifier: Apache-2.0
#include <xattn/load.h>

#include <xattn/safetensors.h>
#include <xattn/torchscript.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <optional>
#include <set>

#include "check.h"
#include "check_file.h"

namespace xattn {
namespace {

using Names = std::vector<std::string>;

NamedTensors state_of(const torch::nn::Module& module) {
  NamedTensors state;
  for (const auto& item : module.named_parameters()) state.emplace(item.key(), item.value());
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) state.emplace(item.key(), item.value());
  }
  return state;
}

bool converts(torch::ScalarType from, torch::ScalarType to) {
  return from == to || (c10::isFloatingType(from) && c10::isFloatingType(to)) ||
         (c10::isComplexType(from) && c10::isComplexType(to));
}

// Why a value from a file does not fit into a tensor of the module; empty if it does.
std::string misfit(const torch::Tensor& value, const torch::Tensor& target) {
  if (!value.defined() || value.sizes() != target.sizes()) {
    return fmt::format("must have shape {}, but has {}", detail::shape_of(target), detail::shape_of(value));
  }
  if (!converts(value.scalar_type(), target.scalar_type())) {
    const auto name = [](const torch::Tensor& tensor) { return c10::getDtypeNames(tensor.scalar_type()).first; };
    return fmt::format("must convert to {}, but is {}", name(target), name(value));
  }
  return "";
}

// "; missing: a, b"
std::string list(std::string_view what, const Names& names) {
  return names.empty() ? "" : fmt::format("; {}: {}", what, fmt::join(names, ", "));
}

LoadReport load(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options, const std::string& source) {
  struct Copy {
    torch::Tensor target;
    torch::Tensor value;
  };
  LoadReport report;
  std::vector<Copy> copies;
  std::set<const void*> filled;
  const auto state = state_of(module);
  for (const auto& [full_name, value] : tensors) {
    if (!full_name.starts_with(options.prefix)) continue;
    const auto name = full_name.substr(options.prefix.size());
    const auto target = state.find(name);
    if (target == state.end()) {
      report.unexpected.push_back(name);
    } else if (const auto reason = misfit(value, target->second); !reason.empty()) {
      report.misshapen.push_back(name + " " + reason);
    } else {
      report.loaded.push_back(name);
      copies.push_back({target->second, value});
      filled.insert(target->second.unsafeGetTensorImpl());
    }
  }
  for (const auto& [name, target] : state) {
    if (!tensors.contains(options.prefix + name)) {
      (filled.contains(target.unsafeGetTensorImpl()) ? report.loaded : report.missing).push_back(name);
    }
  }

  const auto faults = (options.allow_missing ? "" : list("missing", report.missing)) +
                      (options.allow_unexpected ? "" : list("unexpected", report.unexpected)) +
                      list("misshapen", report.misshapen);
  if (!faults.empty()) {
    const auto message = fmt::format("[load_weights] {}: does not fit the module{}", source, faults);
    throw LoadError(detail::one_line(message), std::move(report));
  }

  torch::NoGradGuard no_grad;
  for (auto& copy : copies) {
    copy.value = copy.value.to(copy.target.scalar_type());  // may run out of memory: before anything changes
  }
  for (auto& copy : copies) copy.target.copy_(copy.value);
  return report;
}

std::optional<CrossAttentionOptions> layer_at(const std::string& prefix, const NamedTensors& tensors) {
  const auto weight = [&](const char* linear) -> std::optional<std::array<int64_t, 2>> {  // out, in
    const auto found = tensors.find(prefix + linear + ".weight");
    if (found == tensors.end() || found->second.dim() != 2 || found->second.numel() == 0) return {};
    return std::array{found->second.size(0), found->second.size(1)};
  };
  const auto bias = [&](const char* linear) { return tensors.contains(prefix + linear + ".bias"); };

  const auto query = weight("query_linear");    // [H * d, Eq]
  const auto key = weight("key_linear");        // [G * d, Ek]
  const auto value = weight("value_linear");    // [G * e, Ev]
  const auto output = weight("output_linear");  // [Eo, H * e]
  const bool normed = tensors.contains(prefix + "query_norm.weight") || tensors.contains(prefix + "key_norm.weight");
  if (!query || !key || !value || !output || normed) return {};
  const auto [inner_query, dim_query] = *query;
  const auto [inner_key, dim_key] = *key;
  const auto [inner_value, dim_value] = *value;
  const auto [dim_output, inner_output] = *output;
  const int64_t group = inner_query / inner_key;  // H / G
  if (inner_query != group * inner_key || inner_output != group * inner_value) return {};
  return CrossAttentionOptions(dim_query, dim_key, dim_value, dim_output)
      .num_heads(group)
      .kv_heads(1)
      .head_dim(inner_key)
      .value_head_dim(inner_value)
      .query_bias(bias("query_linear"))
      .key_bias(bias("key_linear"))
      .value_bias(bias("value_linear"))
      .output_bias(bias("output_linear"));
}

}  // namespace

FileFormat detect_format(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  detail::check_file(in.is_open(), "load", path, "cannot be opened: {}", detail::system_reason());
  std::string start(9, '\0');
  in.read(start.data(), static_cast<std::streamsize>(start.size()));
  if (start.starts_with("PK\3\4")) {  // a zip archive
    return FileFormat::torchscript;
  }
  // A length of eight bytes, then JSON.
  detail::check_file(start[8] == '{', "load", path,
                     "must be a safetensors file or an archive of torch.jit.save, but is neither");
  return FileFormat::safetensors;
}

NamedTensors load_tensors(const std::string& path) {
  if (detect_format(path) == FileFormat::torchscript) return load_torchscript(path);
  const SafetensorsFile file(path);
  NamedTensors tensors;
  for (const auto& [name, entry] : file.entries()) tensors.emplace(name, file.tensor(name));
  return tensors;
}

std::string LoadReport::summary() const {
  return fmt::format("loaded {} tensors", loaded.size()) + list("missing", missing) + list("unexpected", unexpected) +
         list("misshapen", misshapen);
}

LoadReport load_weights(torch::nn::Module& module, const NamedTensors& tensors, const LoadOptions& options) {
  return load(module, tensors, options, "set of tensors");
}

LoadReport load_weights(torch::nn::Module& module, const std::string& path, const LoadOptions& options) {
  return load(module, load_tensors(path), options, path);
}

void save_safetensors(const std::string& path,
                      const torch::nn::Module& module,
                      const std::map<std::string, std::string>& metadata) {
  save_safetensors(path, state_of(module), metadata);
}

CrossAttentionOptions FoundLayer::with_heads(int64_t num_heads) const {
  const int64_t group = options.num_heads() / options.kv_heads().value();
  const int64_t inner_qk = options.num_heads() * options.head_dim().value();
  const int64_t inner_v = options.num_heads() * options.value_head_dim().value();
  std::vector<int64_t> possible;
  for (int64_t heads = group; heads <= std::min(inner_qk, inner_v); heads += group) {
    if (inner_qk % heads == 0 && inner_v % heads == 0) possible.push_back(heads);
  }
  detail::check_value(std::ranges::count(possible, num_heads) == 1, "with_heads", "num_heads must be one of {}, but is {}.",
                      fmt::join(possible, ", "), num_heads);
  auto result = options;
  return result.num_heads(num_heads)
      .kv_heads(num_heads / group)
      .head_dim(inner_qk / num_heads)
      .value_head_dim(inner_v / num_heads);
}

std::vector<FoundLayer> find_layers(const NamedTensors& tensors) {
  constexpr std::string_view kEnding = "query_linear.weight";
  std::vector<FoundLayer> layers;
  for (const auto& [name, tensor] : tensors) {
    if (!name.ends_with(kEnding)) continue;
    const auto prefix = name.substr(0, name.size() - kEnding.size());
    if (!prefix.empty() && !prefix.ends_with('.')) continue;
    if (const auto options = layer_at(prefix, tensors)) {
      layers.push_back({prefix, *options});
    }
  }
  std::ranges::sort(layers, {}, &FoundLayer::prefix);
  return layers;
}

}  // namespace xattn
