// SPDX-License-Identifier: Apache-2.0

// The reference's example: text attends to an image. Two sentences of 4 words attend to 6 image features each.
#include <torch/types.h>
#include <xattn/cross_attention.h>

#include <iostream>

#include "programs/program.h"

namespace {

void run_example(torch::Device device) {
  xattn::CrossAttention attention(/*dim_query=*/128, /*dim_key=*/256, /*dim_value=*/256, /*dim_output=*/512);
  attention->to(device);

  const auto query = torch::randn({2, 4, 128}, device);
  const auto key = torch::randn({2, 6, 256}, device);
  const auto value = torch::randn({2, 6, 256}, device);
  const auto [output, weights] = attention->forward(query, key, value);

  std::cout << "Output shape: " << output.sizes() << "\n";              // [2, 4, 512]
  std::cout << "Attention weights shape: " << weights.sizes() << "\n";  // [2, 4, 6]
}

}  // namespace

int main(int argc, char** argv) {
  program::Program program("reference", "Runs cross attention once, on random numbers, and prints the shapes of its results.");
  program.footer("Example: reference --seed 1 --device cpu");
  program::CommonOptions options;
  program::add_common_options(program, options);
  return program.run(argc, argv, [&] { run_example(program::apply(options)); });
}
