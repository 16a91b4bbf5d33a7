// SPDX-License-Identifier: Apache-2.0
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/frozen.h>

#include <set>

#include "compare.h"
#include "modules/layer.h"
#include "test_util.h"

// fixture_test.cpp runs every order on every fixture; these tests cover properties that no fixture shows.
namespace xattn::test {
namespace {

using detail::attend;
using detail::make_context;
using detail::weights_of;
using torch::Tensor;

// The line of the order that was chosen for the logits.
std::string chosen(const std::string& explanation) {
  return explanation.substr(explanation.find("<- chosen") - 70, 70);
}

// The attention kernel that an explanation names.
std::string kernel_in(const std::string& explanation) {
  const std::string before = "attention by ";
  const auto begin = explanation.find(before) + before.size();
  return explanation.substr(begin, explanation.find(':', begin) - begin);
}

// The attention kernel that a call runs, by the operators of LibTorch that it calls; "own" if none of them attends.
template <class F>
std::string kernel_of(const F& call) {
  static std::set<std::string> called;
  called.clear();
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
        called.insert(function.name());
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  call();
  at::removeCallback(handle);
  if (called.contains("aten::scaled_dot_product_attention")) return "scaled_dot_product_attention";
  if (called.contains("aten::_scaled_dot_product_flash_attention_for_cpu")) return "fused_cpu";
  // On the kernels, an order that folds has all logits in memory too: its heads are rows of one product.
  return called.contains("aten::softmax") || called.contains("aten::unflatten") ? "tensor_operations" : "own";
}

class OrdersTest : public testing::TestWithParam<torch::Device> {
 protected:
  static constexpr int64_t kB = 2, kLq = 3, kLk = 5;

  OrdersTest() { torch::manual_seed(0); }

  CrossAttention make(const CrossAttentionOptions& options) const {
    CrossAttention module(options);
    module->to(GetParam(), torch::kDouble);
    return module;
  }
  Tensor random(at::IntArrayRef shape) const { return torch::randn(shape, torch::dtype(torch::kDouble).device(GetParam())); }

  // Every pair of orders by its parts, with the products made ahead.
  template <class F>
  void for_each_pair(const CrossAttention& module, const AttentionOptions& how, const F& check) const {
    for (const auto logits : kAllOrders) {
      for (const auto values : kAllOrders) {
        SCOPED_TRACE(std::string(name_of(logits)) + ", " + std::string(name_of(values)));
        const Orders orders{logits, values};
        const detail::Layer layer(orders, weights_of(*module));
        check(orders, attend(layer, query_, make_context(layer, key_, value_), how));
      }
    }
  }

  Tensor query_ = random({kB, kLq, 8}), key_ = random({kB, kLk, 12}), value_ = random({kB, kLk, 10});
  CrossAttentionOptions options_ = CrossAttentionOptions(8, 12, 10, 16).num_heads(4).kv_heads(2).head_dim(6).value_head_dim(5);
  Mask mask_ = Mask::lengths(torch::tensor({5, 0}), kLk).to(GetParam());
};

TEST_P(OrdersTest, LogSumExpIsThatOfTheDefinitionWithoutTheBiasOfTheKeys) {
  auto module = make(options_.key_bias(false));
  AttentionOptions how;
  how.mask = mask_;
  how.log_sum_exp = true;
  how.path = AttentionPath::definition;
  Tensor expected;
  for_each_pair(module, how, [&](const Orders& orders, const AttentionResult& result) {
    if (orders == Orders{}) expected = result.log_sum_exp;
    EXPECT_EQ(result.log_sum_exp.sizes(), (std::vector<int64_t>{kB, 4, kLq}));
    EXPECT_TRUE(result.log_sum_exp[1].eq(-std::numeric_limits<double>::infinity()).all().item<bool>());
    expect_close(result.log_sum_exp[0], expected[0], tolerance(torch::kDouble, 100), "log-sum-exp");
  });
}

TEST_P(OrdersTest, LogSumExpHoldsTheBiasOfTheKeysUnlessProductsWereMadeAhead) {
  auto module = make(options_);
  AttentionOptions how;
  how.mask = mask_;
  how.log_sum_exp = true;
  how.path = AttentionPath::definition;
  const auto of = [&](Order logits) {
    const detail::Layer layer({logits, Order::standard}, weights_of(*module));
    const auto query = make_query(layer.weights, query_, /*is_projected=*/true);
    return absolute(attend_heads(layer, query, make_context(layer, key_, value_), how)).log_sum_exp[0];
  };
  for (const auto order : {Order::fold_into_query, Order::fold_into_context}) {
    expect_close(of(order), of(Order::standard), tolerance(torch::kDouble, 100), std::string(name_of(order)));
  }
}

TEST_P(OrdersTest, DroppedWeightsCarryTheBiasOfTheValuesByWhatIsLeftOfThem) {
  // With one head and V = [1, 0] + bv, bv = [0 ... 0, 1], the output shows the weights after dropout, and bv last.
  auto module = make(CrossAttentionOptions(8, 12, kLk, kLk + 1).output_bias(false));
  const torch::NoGradGuard no_grad;
  module->value_linear->weight.copy_(torch::eye(kLk + 1, kLk));
  module->value_linear->bias.copy_(torch::eye(kLk + 1)[kLk]);
  module->output_linear->weight.copy_(torch::eye(kLk + 1));
  value_ = torch::eye(kLk, value_.options()).expand({kB, kLk, kLk});
  AttentionOptions how;
  how.dropout = 0.5;
  for_each_pair(module, how, [&](const Orders&, const AttentionResult& result) {
    const auto left = result.output.narrow(2, 0, kLk), bias = result.output.select(2, kLk);
    expect_close(bias, left.sum(2), tolerance(torch::kDouble, 100), "sums of what was left");
    EXPECT_GT((bias - 1).abs().max().item<double>(), 0.1) << "bv moved into bo gives 1 in every row";
  });
}

TEST_P(OrdersTest, ARowWithoutKeysIsTheBiasOfTheOutputAlone) {
  auto module = make(options_);
  const torch::NoGradGuard no_grad;
  const auto bo = module->output_linear->bias.clone();
  const auto bv = module->value_linear->bias.view({2, 1, 5}).expand({2, 2, 5}).flatten();  // of the 4 heads
  EXPECT_GT(torch::matmul(module->output_linear->weight, bv).abs().max().item<double>(), 0.1)
      << "what bv moved into bo would add to such a row";
  const auto valid = torch::arange(kLk, query_.device()).lt(torch::tensor({{5}, {0}}, query_.device()));
  for (const auto& mask : {mask_, Mask::key_padding(valid)}) {
    AttentionOptions how;
    how.mask = mask;
    module->to(torch::kDouble);
    for_each_pair(module, how, [&](const Orders&, const AttentionResult& result) {
      expect_close(result.output[1], bo.expand({kLq, 16}), 0, "output");
    });
    module->to(torch::kFloat);
    for (const auto logits : kAllOrders) {
      for (const auto values : kAllOrders) {
        const auto frozen = module->freeze({.plan = PlanMode::pin({logits, values})});
        const auto output =
            std::get<0>(frozen.forward(query_.to(torch::kFloat), key_.to(torch::kFloat), value_.to(torch::kFloat), mask));
        expect_close(output[1], bo.to(torch::kFloat).expand({kLq, 16}), 0, std::string(name_of(values)) + ", frozen");
      }
    }
  }
}

TEST_P(OrdersTest, ProductsOfWeightsFollowTheWeightsInTraining) {
  const Orders orders{Order::prefold, Order::prefold};
  auto module = make(options_.plan(PlanMode::pin(orders)));
  const auto output_with = [&](const detail::Layer& layer) {
    return attend(layer, query_, make_context(layer, key_, value_), {}).output;
  };
  const auto kept = detail::Layer(orders, weights_of(*module)).products;
  std::get<0>(module->forward(query_, key_, value_)).square().sum().backward();
  torch::optim::SGD(module->parameters(), torch::optim::SGDOptions(0.01)).step();
  const auto right = output_with(detail::Layer({}, weights_of(*module)));
  expect_close(std::get<0>(module->forward(query_, key_, value_)), right, tolerance(torch::kDouble, 400), "output");
  EXPECT_GT((output_with(detail::Layer(orders, weights_of(*module), kept)) - right).abs().max().item<double>(), 1e-3)
      << "products from before the step";
}

TEST_P(OrdersTest, DroppedAttentionIsRightInTheMean) {
  auto module = make(options_);
  AttentionOptions how;
  how.path = AttentionPath::definition;
  const auto exact = [&] {
    const detail::Layer layer({}, weights_of(*module));
    return attend(layer, query_, make_context(layer, key_, value_), how).output;
  }();
  // 2,000 copies of the query draw 2,000 masks each.
  constexpr int64_t kCopies = 2000;
  query_ = query_.narrow(1, 0, 1).expand({kB, kCopies, 8});
  how.dropout = 0.2;
  for_each_pair(module, how, [&](const Orders&, const AttentionResult& result) {
    const auto mean = result.output.mean(1);
    const auto error = result.output.std(1) / std::sqrt(static_cast<double>(kCopies));
    const auto off = ((mean - exact.select(1, 0)).abs() / error).max().item<double>();
    EXPECT_LT(off, 6) << "standard errors";
  });
}

TEST_P(OrdersTest, ABiasThatTheResultDoesNotDependOnHasADefinedGradientOfZero) {
  for (const auto logits : {Order::fold_into_query, Order::prefold}) {
    auto options = options_;
    auto module = make(options.plan(PlanMode::pin({logits, Order::standard})));
    std::get<0>(module->forward(query_, key_, value_)).sum().backward();
    const auto gradient = module->key_linear->bias.grad();
    ASSERT_TRUE(gradient.defined()) << name_of(logits);
    EXPECT_TRUE(gradient.eq(0).all().item<bool>()) << name_of(logits);

    // It decays as in the standard order: an optimizer would skip a parameter without a gradient.
    const auto before = module->key_linear->bias.detach().clone();
    torch::optim::SGD(module->parameters(), torch::optim::SGDOptions(0.1).weight_decay(0.5)).step();
    expect_close(module->key_linear->bias, 0.95 * before, tolerance(torch::kDouble, 4), std::string(name_of(logits)));
  }
}

TEST_P(OrdersTest, GradientsEqualDifferencesInFirstAndSecondOrder) {
  for (const auto order : kAllOrders) {
    auto options = options_;
    options.plan(PlanMode::pin({order, order})).attention_weights(AttentionWeights::per_head);
    auto module = make(options);
    const auto to_output = random({kB, kLq, 16}), to_weights = random({kB, 4, kLq, kLk});
    const auto f = [&](const std::vector<Tensor>& x) {
      const auto [output, weights] = module->forward(x[0], x[1], x[2], mask_);
      return (output * to_output).sum() + (weights * to_weights).sum();
    };
    std::vector<Tensor> inputs = {query_, key_, value_};
    for (auto& input : inputs) input = input.clone().requires_grad_();
    expect_gradient(f, inputs, std::string(name_of(order)));
    expect_second_gradient(f, inputs, std::string(name_of(order)));
  }
}

TEST_P(OrdersTest, AModulePlansItselfAndAPinHolds) {
  // One query row and a long context: folding wins by far.
  auto options = CrossAttentionOptions(64, 64, 64, 64).num_heads(4);
  EXPECT_NE(chosen(make(options)->explain(1, 1, 2000)).find("fold_into_query"), std::string::npos);
  EXPECT_NE(chosen(make(options)->explain(1, 2000, 2000)).find("standard"), std::string::npos);
  const auto pinned = make(options.plan(PlanMode::standard))->explain(1, 1, 2000);
  EXPECT_NE(pinned.substr(pinned.find("<- pinned") - 70, 70).find("standard"), std::string::npos) << pinned;
}

TEST_P(OrdersTest, ExplainNamesTheAttentionKernelThatRuns) {
  const auto expect_kernel = [](const std::string& explanation, const auto& call) {
    auto named = kernel_in(explanation);
    if (named == "heads" || named == "chain") named = "own";
    EXPECT_EQ(kernel_of(call), named) << explanation;
  };
  struct Case {
    bool weights, bias_kv, other_values, training, learned_mask, dropout;
  };
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    for (int bits = 0; bits < 64; ++bits) {
      const Case c{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0, (bits & 32) != 0};
      auto module = make(CrossAttentionOptions(16, 16, 16, 16)
                             .num_heads(2)
                             .value_head_dim(c.other_values ? 12 : 8)
                             .bias_kv(c.bias_kv)
                             .dropout(c.dropout ? 0.5 : 0)
                             .attention_weights(c.weights ? AttentionWeights::mean : AttentionWeights::none));
      module->to(type);
      for (const auto& [Lq, Lk] : {std::pair(1, 300), {40, 40}, {0, 5}, {5, 0}}) {
        SCOPED_TRACE((type == torch::kFloat ? "float, case " : "double, case ") + std::to_string(bits) + ", " +
                     std::to_string(Lq) + " queries, " + std::to_string(Lk) + " keys");
        const auto query = random({1, Lq, 16}).to(type), key = random({1, Lk, 16}).to(type);
        const auto bias = random({Lq, Lk}).to(type).requires_grad_(c.learned_mask);
        const auto mask = c.learned_mask ? Mask::bias(bias) : Mask();
        const at::AutoGradMode record(c.training);
        // With bias_kv the mask is made anew; without gradients the new one requires none. Plans do not depend on this.
        if (c.bias_kv && c.learned_mask && !c.training) continue;
        expect_kernel(module->explain(1, Lq, Lk, mask), [&] { module->forward(query, key, key, mask); });
        if (c.training || c.learned_mask || c.dropout || Lq * Lk == 0) continue;
        const auto frozen = module->freeze();
        expect_kernel(frozen.explain(1, Lq, Lk), [&] { frozen.forward(query, key, key); });
        const auto context = frozen.context(key, key);
        expect_kernel(frozen.explain(1, Lq, Lk, ContextOptions::kMany), [&] { frozen.attend(query, context); });
      }
    }
  }
}

TEST_P(OrdersTest, ExplainKnowsAutocast) {
  auto module = make(CrossAttentionOptions(16, 16, 16, 16).attention_weights(AttentionWeights::none));
  module->to(torch::kFloat);
  const auto query = random({1, 1, 16}).to(torch::kFloat), key = random({1, 300, 16}).to(torch::kFloat);
  const torch::NoGradGuard no_grad;
  const auto device = GetParam().type();
  at::autocast::set_autocast_enabled(device, true);
  const auto explanation = module->explain(1, 1, 300);
  EXPECT_EQ(kernel_of([&] { module->forward(query, key, key); }), kernel_in(explanation)) << explanation;
  EXPECT_NE(explanation.find("<- pinned"), std::string::npos) << explanation;
  at::autocast::set_autocast_enabled(device, false);
  at::autocast::clear_cache();
}

TEST_P(OrdersTest, APlanByGivenRatesIsWeighedByThem) {
  // If starting a product is the only cost, the standard order is the best: a fused kernel does two of its products.
  const Rates starting{.flops = 1e18, .memory = 1e18, .start_product = 1, .softmax = 1e18, .fused = 1e18};
  const auto by_starting = PlanMode::by(starting);
  const auto options =
      CrossAttentionOptions(64, 64, 64, 64).num_heads(4).attention_weights(AttentionWeights::none).plan(by_starting);
  auto module = make(options);
  EXPECT_NE(chosen(module->explain(1, 1, 2000)).find("standard"), std::string::npos);

  // A frozen layer on the library's own kernels has rates of its own, unless it is given others.
  module->to(torch::kFloat);
  const auto key = random({1, 2000, 64}).to(torch::kFloat);
  const auto orders = [&key](const Frozen& frozen) { return frozen.context(key, key, {}, {.expected_queries = 1}).orders(); };
  EXPECT_EQ(orders(module->freeze({.plan = by_starting})), Orders{});
  EXPECT_EQ(orders(module->freeze()) == Orders{}, !GetParam().is_cpu());

  EXPECT_EQ(error_of<c10::ValueError>([&] { make(CrossAttentionOptions(options).plan(PlanMode::by({}))); }),
            "[plan] rates must be above 0, but flops, memory and softmax are 0, 0 and 0.");
}

TEST_P(OrdersTest, ThePlanOfAModuleIsThatOfItsSizesAndRunsInEveryCase) {
  // Automatic plans over many sizes, against the reference's order.
  const int64_t sizes[] = {0, 1, 2, 5, 33, 200};
  auto options = CrossAttentionOptions(40, 24, 56, 32).num_heads(4).attention_weights(AttentionWeights::per_head);
  auto module = make(options);
  auto standard = make(options.plan(PlanMode::standard));
  const torch::NoGradGuard no_grad;
  for (size_t i = 0; i < module->parameters().size(); ++i) standard->parameters()[i].copy_(module->parameters()[i]);
  for (const auto Lq : sizes) {
    for (const auto Lk : sizes) {
      SCOPED_TRACE(std::to_string(Lq) + " queries, " + std::to_string(Lk) + " keys");
      const auto query = random({2, Lq, 40}), key = random({2, Lk, 24}), value = random({2, Lk, 56});
      const auto [output, weights] = module->forward(query, key, value);
      const auto [expected, expected_weights] = standard->forward(query, key, value);
      expect_close(output, expected, tolerance(torch::kDouble, 400), "output");
      expect_close(weights, expected_weights, tolerance(torch::kDouble, 400), "weights");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, OrdersTest, testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace xattn::test
