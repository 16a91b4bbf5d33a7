// SPDX-License-Identifier: Apache-2.0
// Objects that several threads may share. Also built as a program of its own, which is all the thread sanitizer needs.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <torch/csrc/autograd/autograd.h>
#include <unistd.h>
#include <xattn/block.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/frozen.h>
#include <xattn/frozen_block.h>
#include <xattn/frozen_decoupled.h>
#include <xattn/frozen_linear.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "one_thread.h"

namespace xattn::test {
namespace {

using at::Tensor;

struct SharedInputs {
  static constexpr int64_t kB = 2, kLq = 9, kLk = 77;

  explicit SharedInputs(at::ScalarType type)
      : query(at::randn({kB, kLq, 20}, type)), key(at::randn({kB, kLk, 24}, type)), value(at::randn({kB, kLk, 12}, type)) {}
  Tensor query, key, value;
  Mask mask = Mask::lengths(at::tensor({77, 50}), kLk) & Mask::dense(at::rand({kB, 1, kLq, kLk}) < 0.7);
};

CrossAttentionOptions shared_options() {
  return CrossAttentionOptions(20, 24, 12, 40).num_heads(4).kv_heads(2);
}

using Results = std::vector<std::tuple<Tensor, Tensor>>;  // outputs and weights

bool are_equal(const Results& a, const Results& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return std::get<0>(x).equal(std::get<0>(y)) && std::get<1>(x).equal(std::get<1>(y));
  };
  return std::ranges::equal(a, b, equal);
}

// Expects `call`, which computes on `count` threads, to return on each of several threads at once what it returns on one.
void expect_equal_bits_on_all_threads(const std::function<Results()>& call, int count = 1) {
  const Threads of_a_call(count);
  const auto guarded = [&call] {
    const at::NoGradGuard no_grad;  // of this thread
    return call();
  };
  const auto expected = guarded();
  std::vector<int> equal(4, 1);
  std::vector<std::thread> threads;
  for (auto& is_equal : equal) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 10; ++repeat) is_equal &= are_equal(guarded(), expected);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(equal, std::vector<int>(4, 1));
}

// Sizes whose calls have several tasks each, on this library's kernels. LibTorch's own loops over several threads, and its graphs
// of shared parameters, are not for the thread sanitizer, which does not see their barriers: none of them is in these calls.
TEST(ThreadsTest, ShareTheWorkersOfTheKernelsAndGetTheSameBits) {
  CrossAttention module(CrossAttentionOptions(96, 80, 80, 96).num_heads(4));
  for (auto& parameter : module->parameters()) parameter.requires_grad_(false);
  const auto query = at::randn({2, 100, 96}), key = at::randn({2, 150, 80}), few = query.narrow(1, 0, 1).contiguous();
  for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
    const auto frozen = module->freeze({.plan = PlanMode::pin({order, order})});
    expect_equal_bits_on_all_threads(
        [&]() -> Results {
          const auto x = query.detach().requires_grad_();
          const at::AutoGradMode with_gradients(true);
          const auto output = std::get<0>(module->forward(x, key, key, {}, {.weights = AttentionWeights::none}));
          return {frozen.forward(query, key, key),
                  frozen.forward(few, key, key),
                  {output.detach(), torch::autograd::grad({output.sum()}, {x})[0]}};
        },
        /*count=*/3);
  }
}

TEST(ThreadsTest, ShareAModuleAndItsContextAndGetTheSameBits) {
  for (const auto type : {at::kDouble, at::kFloat}) {  // on LibTorch's operators, and on this library's kernels
    SCOPED_TRACE(type);
    CrossAttention module(shared_options());
    module->to(type);
    const SharedInputs x(type);
    const auto shared = module->context(x.key, x.value, x.mask);
    expect_equal_bits_on_all_threads([&]() -> Results {
      const auto own = module->context(x.key, x.value, x.mask);
      return {module->forward(x.query, x.key, x.value, x.mask), module->attend(x.query, shared), module->attend(x.query, own)};
    });
  }
}

TEST(ThreadsTest, ShareAFrozenLayerAndItsContextsAndGetTheSameBits) {
  struct Case {
    const char* name;
    Order order = Order::standard;
    std::optional<at::ScalarType> storage = {};
    AttentionWeights weights = AttentionWeights::per_head;
    bool bias_kv = false;
  };
  for (const auto& c :
       {Case{.name = "standard"}, Case{.name = "fold_into_query", .order = Order::fold_into_query},
        Case{.name = "fold_into_context", .order = Order::fold_into_context},
        Case{.name = "bfloat16", .storage = at::kBFloat16}, Case{.name = "mean weights", .weights = AttentionWeights::mean},
        Case{.name = "on operators", .bias_kv = true}}) {
    SCOPED_TRACE(c.name);
    CrossAttention module(shared_options().attention_weights(c.weights).bias_kv(c.bias_kv));
    const auto frozen = module->freeze({.plan = PlanMode::pin({c.order, c.order}), .storage = c.storage});
    EXPECT_EQ(frozen.uses_kernels(), !c.bias_kv);
    const SharedInputs x(at::kFloat);
    const auto many = frozen.context(x.key, x.value, x.mask),
               few = frozen.context(x.key, x.value, x.mask, {.expected_queries = 1});
    expect_equal_bits_on_all_threads([&]() -> Results {
      const auto own = frozen.context(x.key, x.value, x.mask);
      return {frozen.forward(x.query, x.key, x.value, x.mask), frozen.attend(x.query, many), frozen.attend(x.query, few),
              frozen.attend(x.query, own)};
    });
  }
}

TEST(ThreadsTest, ShareAFrozenBlockALinearLayerAndTheirFirstUseAndGetTheSameBits) {
  const SharedInputs x(at::kFloat);
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(20, 24, 12, 20).num_heads(4).kv_heads(2)));
  const FrozenLinear linear(*torch::nn::Linear(20, 300));
  for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
    const auto freeze = [&] { return block->freeze({.plan = PlanMode::pin({order, order})}); };
    const auto run = [&](const FrozenBlock& frozen) -> Results {
      const auto own = frozen.context(x.key, x.value, x.mask);
      return {frozen.forward(x.query, x.key, x.value, x.mask), frozen.attend(x.query, own), {linear.forward(x.query), x.query}};
    };
    const auto first = freeze(), others = freeze();  // whose first calls, which pack for folds, are on several threads
    std::atomic<bool> is_first = true;
    expect_equal_bits_on_all_threads([&] { return run(is_first.exchange(false) ? first : others); });
  }
}

TEST(ThreadsTest, ShareAFrozenDecoupledLayerAndItsContextsAndGetTheSameBits) {
  for (const auto type : {at::kDouble, at::kFloat}) {
    SCOPED_TRACE(type);
    DecoupledCrossAttention module(DecoupledCrossAttentionOptions(shared_options()).added({{24, 12}}));
    module->to(type);
    const SharedInputs x(type);
    const auto frozen = module->freeze();
    const auto context = frozen.context(x.key, x.value, x.mask), added = frozen.added_context(0, x.key, x.value);
    expect_equal_bits_on_all_threads([&]() -> Results {
      return {frozen.forward(x.query, x.key, x.value, {{x.key, x.value}}, x.mask), frozen.attend(x.query, context, {added})};
    });
  }
}

#ifndef __SANITIZE_THREAD__  // which starts no thread after a fork
// libgomp's threads do not survive a fork: a child that calls an operator which needs them waits for ever.
TEST(ThreadsTest, AForkedProcessComputesOnFrozenObjects) {
  const at::NoGradGuard no_grad;
  const Threads two(2);
  const auto sizes = CrossAttentionOptions(64, 64, 64, 64).num_heads(4);
  CrossAttention module(sizes);
  CrossAttentionBlock block{CrossAttentionBlockOptions(sizes)};
  const auto frozen = module->freeze();
  const auto frozen_block = block->freeze();
  const auto folding = module->freeze({.plan = PlanMode::pin({Order::fold_into_context, Order::fold_into_context})});
  const auto half = module->freeze({.storage = at::kBFloat16});
  const auto x = at::randn({2, 600, 64}), twice = at::cat({x, x}), keys = at::randn({2, 500, 64});
  const auto columns = at::randn({64, 2, 500}).permute({1, 2, 0});
  const auto mask = Mask::lengths(at::tensor({500, 300}), 500);
  const auto context = frozen.context(keys, keys, mask, {.capacity = 600});
  const auto compute = [&] {
    Results results = {frozen.attend(x, context.select(at::tensor({1, 0}))), frozen.forward(x, columns, columns, mask)};
    for (const auto* each : {&frozen, &folding, &half}) {
      const auto all = each->context(keys, keys, {}, {.capacity = 1000}), some = each->context(columns, columns, mask);
      for (const auto& longer : {all.append(columns, columns), FrozenContext::join({some, some}), some.append(keys, keys)}) {
        results.push_back(each->attend(x, longer));
      }
      results.push_back(each->attend(twice, FrozenContext::cat({some, some})));
    }
    for (const auto weights : {AttentionWeights::mean, AttentionWeights::per_head}) {
      results.push_back(frozen.forward(x, keys, keys, mask, {.weights = weights}));
      results.push_back(frozen_block.forward(x, keys, keys, mask, {.weights = weights}));
    }
    return results;
  };
  const auto expected = compute();
  at::ones({1 << 20}).exp_();  // starts libgomp's threads

  const auto child = fork();
  if (child == 0) {
    alarm(60);
    const auto results = compute();
    const Threads one(1);  // for the comparison, an operator
    _exit(are_equal(results, expected) ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}
#endif

}  // namespace
}  // namespace xattn::test
