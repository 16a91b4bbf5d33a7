// SPDX-License-Identifier: Apache-2.0
// An outside program: trains the module inside a model of its own, from weights of a TorchScript file. Fails unless it learns.
#include <torch/torch.h>
#include <xattn/xattn.h>

#include <iostream>
#include <vector>

struct Model : torch::nn::Module {
  xattn::CrossAttention attention = register_module("attention", xattn::CrossAttention(8, 12, 12, 16));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(16, 1));
};

int main(int, char** arguments) {
  torch::manual_seed(0);
  Model model;
  std::cout << xattn::load_weights(*model.attention, arguments[1]).summary() << "\n";
  torch::optim::Adam optimizer(model.parameters(), 1e-2);
  auto query = torch::randn({16, 4, 8}), context = torch::randn({16, 6, 12}), target = torch::randn({16, 4, 1});
  std::vector<double> losses;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    auto [output, weights] = model.attention->forward(query, context, context);
    auto loss = torch::mse_loss(model.head(output), target);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  std::cout << "loss " << losses.front() << " -> " << losses.back() << "\n";
  return losses.back() < losses.front() / 2 ? 0 : 1;
}
