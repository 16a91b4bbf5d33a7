// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <xattn/safetensors.h>

#include <map>
#include <memory>
#include <string>

#include "cli/cli.h"
#include "cli/layer_in_file.h"
#include "programs/interrupt.h"

namespace xattn::cli {
namespace {

struct RunArguments {
  std::string file;
  std::string inputs;
  std::string output;
  std::string weights = "none";
  LayerArguments layer;
};

const std::map<std::string, AttentionWeights> kWeights = {
    {"none", AttentionWeights::none}, {"mean", AttentionWeights::mean}, {"per-head", AttentionWeights::per_head}};

void run(const RunArguments& arguments) {
  check_output(arguments.output, {arguments.file, arguments.inputs, arguments.layer.ip_adapter});
  const auto [output, weights] =
      run_layer(arguments.file, arguments.inputs, arguments.layer, kWeights.at(arguments.weights), /*fixture=*/false);
  NamedTensors results = {{"output", output}};
  if (weights.defined()) results["weights"] = weights;
  const program::Interrupt interrupt;
  save_safetensors(arguments.output, results);
  interrupt.check("stopped; " + arguments.output + " is written");
}

}  // namespace

void add_run(program::Command& xattn) {
  const auto arguments = std::make_shared<RunArguments>();
  auto command = xattn.subcommand("run", "Run an attention layer of a file on inputs from another file.",
                                  [arguments] { run(*arguments); });
  command.option("FILE", arguments->file, "Weights in any format that inspect reads", {.required = true});
  command.option("--inputs", arguments->inputs, "File with the inputs, as described below",
                 {.required = true, .type_name = "IN"});
  command.option("--output", arguments->output, "safetensors to write", {.required = true, .type_name = "OUT"});
  command.option("--weights", arguments->weights, "Also write attention weights: their mean over heads, or those of each head",
                 {.one_of = {"none", "mean", "per-head"}});
  add_layer_options(command, arguments->layer);
  command.footer(
      fmt::format("Example: xattn run weights.safetensors --inputs in.safetensors --output out.safetensors --weights mean\n\n"
                  "IN holds {}\n"
                  "OUT gets output [B, Lq, Eo] and, with --weights, weights: mean [B, Lq, Lk] or per-head [B, H, Lq, Lk].",
                  kInputsHelp));
}

}  // namespace xattn::cli
