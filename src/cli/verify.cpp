// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>

#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include "cli/cli.h"
#include "cli/layer_in_file.h"

namespace xattn::cli {
namespace {

struct VerifyArguments {
  std::string file;
  std::string expected;
  std::optional<double> tolerance;
  LayerArguments layer;
};

// The relative difference that rounding in this type explains; tests/README.md, "Accuracy".
double tolerance_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return 1e-12;
    case at::kHalf: return 2e-3;
    case at::kBFloat16: return 1.5e-2;
    default: return 1e-5;
  }
}

// The metadata of a fixture may name its layer.
LayerArguments with_metadata(LayerArguments arguments, const Checkpoint& fixture) {
  const auto& metadata = fixture.metadata();
  const auto text = [&](const char* key) -> std::optional<std::string> {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::nullopt : std::optional(found->second);
  };
  const auto number = [&](const char* key) -> std::optional<double> {
    const auto given = text(key);
    if (!given) return {};
    try {
      return std::stod(*given);
    } catch (const std::exception&) {
      throw FileError(fmt::format("[verify] {}: metadata {} must be a number", fixture.path(), key));
    }
  };
  if (!arguments.prefix) arguments.prefix = text("prefix");
  if (!arguments.qk_norm_eps) arguments.qk_norm_eps = number("qk_norm_eps");
  if (const auto scale = number("ip_scale")) arguments.ip_scale = *scale;
  if (const auto heads = number("num_heads"); heads && !arguments.heads) {
    constexpr double kMostHeads = 65536;  // the limit of --heads
    if (!(*heads >= 1 && *heads <= kMostHeads)) {
      throw FileError(fmt::format("[verify] {}: metadata num_heads must be from 1 to {}", fixture.path(), kMostHeads));
    }
    arguments.heads = static_cast<int64_t>(*heads);
  }
  return arguments;
}

// Prints a line about a tensor. Returns whether it is as expected.
bool compare(const char* name, const at::Tensor& found, const at::Tensor& expected, double tolerance) {
  const auto shape = [](const at::Tensor& x) { return fmt::format("[{}]", fmt::join(x.sizes(), ", ")); };
  if (found.sizes() != expected.sizes()) {
    std::cout << fmt::format("{:<8} must have shape {}, but has {}\n", name, shape(expected), shape(found));
    return false;
  }
  const auto wide = expected.to(at::kDouble);
  const auto difference = found.cpu().to(at::kDouble).sub(wide).abs();
  const auto largest = difference.numel() == 0 ? 0 : difference.max().item<double>();
  const auto size = wide.numel() == 0 ? 0 : wide.abs().max().item<double>();
  const auto relative = largest == 0 ? 0 : largest / size;
  const bool equal = relative <= tolerance;  // false for NaN
  std::cout << fmt::format("{:<8} {:<16} largest difference {:.1e}, of the largest element {:.1e}: {}\n", name, shape(expected),
                           largest, relative, equal ? "equal" : "DIFFERENT");
  return equal;
}

void verify(const VerifyArguments& arguments) {
  const auto fixture = open_checkpoint(arguments.expected);
  if (!fixture.contains("output")) throw FileError(fmt::format("[verify] {}: must hold output", fixture.path()));
  const auto output = fixture.tensor("output");
  const auto weights = fixture.contains("weights") ? fixture.tensor("weights") : at::Tensor();
  const auto wanted = !weights.defined()   ? AttentionWeights::none
                      : weights.dim() == 4 ? AttentionWeights::per_head
                                           : AttentionWeights::mean;
  const auto results = run_layer(arguments.file, arguments.expected, with_metadata(arguments.layer, fixture), wanted,
                                 /*fixture=*/true);
  const auto tolerance = arguments.tolerance.value_or(tolerance_of(output.scalar_type()));
  bool equal = compare("output", results.output, output, tolerance);
  if (weights.defined()) equal &= compare("weights", results.weights, weights, tolerance);
  if (!equal) {
    throw FileError(fmt::format("[verify] {}: does not give what {} holds, within {:.1e} of its largest element",
                                arguments.file, arguments.expected, tolerance));
  }
  std::cout << fmt::format("equal within {:.1e} of the largest element\n", tolerance);
}

}  // namespace

void add_verify(program::Command& xattn) {
  const auto arguments = std::make_shared<VerifyArguments>();
  auto command = xattn.subcommand("verify", "Run a layer, and compare its output with a recorded one.",
                                  [arguments] { verify(*arguments); });
  command.option("FILE", arguments->file, "Weights in any format that inspect reads", {.required = true});
  command.option("--expect", arguments->expected, "File that scripts/record.py wrote, as described below",
                 {.required = true, .type_name = "FIXTURE"});
  command.option("--tolerance", arguments->tolerance,
                 "Largest difference, relative to the largest element; by default it follows from the type of output",
                 {.not_negative = true});
  add_layer_options(command, arguments->layer);
  command.footer(
      fmt::format("Example: xattn verify weights.safetensors --expect fixture.safetensors\n\n"
                  "FIXTURE holds output [B, Lq, Eo], optionally weights ([B, Lq, Lk] or [B, H, Lq, Lk]), and the inputs:\n"
                  "{}\n"
                  "Its metadata may name prefix, num_heads, qk_norm_eps and ip_scale. Exit status 0 if all is equal, else 1.",
                  kInputsHelp));
}

}  // namespace xattn::cli
