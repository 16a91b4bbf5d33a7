// SPDX-License-Identifier: Apache-2.0
// An outside program: trains the module inside a model of its own, from weights of a TorchScript file. Fails unless it learns,
// and unless attention is exact whatever flags this program is compiled with.
#include <torch/torch.h>
#include <xattn/xattn.h>

#include <iostream>
#include <vector>

struct Model : torch::nn::Module {
  xattn::CrossAttention attention = register_module("attention", xattn::CrossAttention(8, 12, 12, 16));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(16, 1));
};

// LibTorch's operators check the results: a compiler that may assume there is no NaN could remove a check written here.
bool is_exact() {
  const auto q = torch::randn({2, 4, 40, 16}), k = torch::randn({2, 4, 300, 16}), v = torch::randn({2, 4, 300, 16});
  const auto wide = [](const torch::Tensor& x) { return x.to(torch::kDouble); };
  xattn::AttentionOptions options{.mask = xattn::Mask::bias(torch::randn({40, 300}))};
  const auto found = xattn::attention(q, k, v, options).output,
             exact = xattn::attention(wide(q), wide(k), wide(v), options).output;
  const auto error = ((found - exact).abs().max() / exact.abs().max()).item<double>();
  auto spoilt = q.clone();
  spoilt[0][0][0].fill_(torch::zeros({}) / torch::zeros({}));  // NaN
  const auto rows = xattn::attention(spoilt, k, v, options).output.isnan().any(-1).sum().item<int64_t>();
  std::cout << "error " << error << ", " << rows << " row of NaN\n";
  return !(error > 1e-5) && rows == 1;
}

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
  return is_exact() && losses.back() < losses.front() / 2 ? 0 : 1;
}
