// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/torch.h>
#include <xattn/distributed.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "programs/launch.h"
#include "ranks/processes.h"

// One of the processes that distributed_test.cpp starts: runs a scenario, and fails unless this rank's results equal those of a
// single process. All ranks draw the same inputs from the same seed.
namespace xattn::test::ranks {
namespace {

using torch::Tensor;

constexpr auto kTimeout = std::chrono::seconds(60), kShortTimeout = std::chrono::seconds(5);

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::cerr << what << "\n";
  ++failures;
}

void expect_close(const Tensor& found, const Tensor& expected, double allowed, const std::string& what) {
  if (found.defined() != expected.defined()) return expect(false, what + ": one is undefined");
  if (!found.defined()) return;
  if (found.sizes() != expected.sizes()) return expect(false, fmt::format("{}: other sizes", what));
  if (found.numel() == 0) return;
  const auto difference = (found.to(torch::kDouble) - expected.to(torch::kDouble)).abs().max().item<double>();
  const auto largest = expected.to(torch::kDouble).abs().max().item<double>();
  expect(difference <= allowed * largest, fmt::format("{}: off by {} of {}", what, difference, largest));
}

struct Ranks {
  launch::Place place;
  c10::intrusive_ptr<c10d::ProcessGroup> group;

  // The first key of each rank; shares are uneven, and some may be empty.
  std::vector<int64_t> borders(int64_t Lk, bool with_empty) const {
    std::vector<int64_t> result = {0};
    for (int r = 1; r < place.size; ++r) {
      const auto fair = Lk * r / place.size;
      result.push_back(with_empty && r == place.size - 1 ? Lk : std::min(Lk, fair + r % 2 * 2));
    }
    result.push_back(Lk);
    return result;
  }
};

struct Case {
  std::string name;
  CrossAttentionOptions options;
  Mask mask = {};
  at::ScalarType type = torch::kDouble;
  bool with_empty = false;
  Tensor bias = {};   // of the mask; its gradient is compared too
  bool self = false;  // the values are the keys
  bool unbatched = false;
  int64_t queries = 5;
};

constexpr int64_t kB = 2, kLq = 5, kLk = 13;

const auto kPlain = CrossAttentionOptions(6, 10, 9, 16).num_heads(4).kv_heads(2);

std::vector<Case> cases() {
  const auto& plain = kPlain;
  auto mean = plain, chosen = plain, normed = plain, free = plain, per_head = plain;
  mean.attention_weights(AttentionWeights::mean);
  per_head.attention_weights(AttentionWeights::per_head);
  chosen.attention_weights(AttentionWeights::per_head).weight_heads({3, 1});
  normed.qk_norm(NormKind::rms);
  auto mean_of_all = mean, pinned = plain;
  mean_of_all.weight_heads({3, 1});
  pinned.plan(PlanMode::standard);
  free.attention_weights(AttentionWeights::none).key_bias(false);
  const auto dense = torch::rand({kB, kLq, kLk}) < 0.6;
  const auto bias = torch::randn({1, 4, kLq, kLk}, torch::kDouble);
  const auto learned = torch::randn({1, 4, 1, kLk}, torch::kDouble).requires_grad_();
  const auto same = CrossAttentionOptions(6, 10, 10, 16).num_heads(4).attention_weights(AttentionWeights::per_head);
  return {
      {"plain", plain, {}},
      {"without a key's bias", free, {}},
      {"an empty share", plain, {}, torch::kDouble, true},
      {"lengths that leave shares without keys", per_head, Mask::lengths(torch::tensor({2, 0}), kLk)},
      {"a dense mask", chosen, Mask::dense(dense)},
      {"a bias", mean, Mask::bias(bias)},
      {.name = "a learned bias", .options = mean, .mask = Mask::bias(learned), .bias = learned},
      {.name = "a learned bias and an empty share",
       .options = free,
       .mask = Mask::bias(learned),
       .with_empty = true,
       .bias = learned},
      {.name = "keys that are the values", .options = same, .self = true},
      {.name = "keys that are the values and an empty share", .options = same, .with_empty = true, .self = true},
      {.name = "no batch", .options = per_head, .mask = Mask::lengths(torch::tensor({9}), kLk), .unbatched = true},
      {.name = "no queries", .options = mean, .queries = 0},
      {"causal from the first key", per_head, Mask::causal(CausalAlignment::upper_left)},
      {"causal from the last key, and padding", mean,
       Mask::causal(CausalAlignment::lower_right) & Mask::lengths(torch::tensor({13, 7}), kLk), torch::kDouble, true},
      {"a mean, which is of all heads whichever are chosen", mean_of_all, {}},
      {"a bias of rows that is finite and very negative", per_head, Mask::bias(torch::full({kLq, kLk}, -1e30, torch::kDouble)),
       torch::kFloat, true},
      {"the same in bfloat16", per_head, Mask::bias(torch::full({kLq, kLk}, -1e30, torch::kDouble)), torch::kBFloat16},
      {"a pinned order", pinned, {}},
      {"norms", normed, Mask::lengths(torch::tensor({13, 4}), kLk)},
      {"float32", mean, {}, torch::kFloat},
      {"bfloat16", per_head, Mask::lengths(torch::tensor({13, 7}), kLk), torch::kBFloat16},
  };
}

// Masks are of all ranks' queries.
std::vector<Case> cases_of_own_queries(int64_t all) {
  auto per_head = kPlain, mean = kPlain;
  per_head.attention_weights(AttentionWeights::per_head);
  mean.attention_weights(AttentionWeights::mean);
  const auto same = CrossAttentionOptions(6, 10, 10, 16).num_heads(4);
  const auto learned = torch::randn({1, 4, 1, kLk}, torch::kDouble).requires_grad_();
  return {
      {.name = "own, weights of each head", .options = per_head},
      {.name = "own, an empty share", .options = mean, .with_empty = true},
      {.name = "own, a mask for each query", .options = per_head, .mask = Mask::dense(torch::rand({kB, all, kLk}) < 0.6)},
      {.name = "own, causal", .options = mean, .mask = Mask::causal(CausalAlignment::upper_left)},
      {.name = "own, a learned bias", .options = mean, .mask = Mask::bias(learned), .bias = learned},
      {.name = "own, keys that are the values", .options = same, .self = true},
      {.name = "own, no batch", .options = per_head, .unbatched = true},
      {.name = "own, float32", .options = mean, .type = torch::kFloat},
      {.name = "own, bfloat16",
       .options = per_head,
       .mask = Mask::lengths(torch::tensor({13, 7}), kLk),
       .type = torch::kBFloat16},
  };
}

double allowed(at::ScalarType type) {
  return type == torch::kDouble ? 1e-12 : type == torch::kFloat ? 1e-5 : 1.5e-2;
}

// The inputs of a call, and the gradient of its output. The values may be the keys.
struct Inputs {
  Tensor query, key, value, grad;
  Tensor bias = {};  // of the mask
};

// Output, weights and all gradients of one process.
struct Results {
  Tensor output, weights, query, key, value, bias;
  std::vector<Tensor> parameters;
};

using Call = std::function<std::tuple<Tensor, Tensor>(const Tensor& query, const Tensor& key, const Tensor& value)>;

Results differentiate(CrossAttention module, const Inputs& inputs, const Call& call) {
  Results r;
  const auto leaf = [](const Tensor& x) { return x.detach().clone().requires_grad_(); };
  const auto query = leaf(inputs.query), key = leaf(inputs.key);
  const auto value = inputs.value.is_same(inputs.key) ? key : leaf(inputs.value);
  const auto bias = inputs.bias;
  module->zero_grad();
  if (bias.defined()) bias.mutable_grad() = Tensor();
  std::tie(r.output, r.weights) = call(query, key, value);
  r.output.backward(inputs.grad);
  expect(!bias.defined() || bias.grad().defined(), "the gradient of the bias is undefined");
  const auto gradient = [](const Tensor& x) { return x.grad().defined() ? x.grad().clone() : torch::zeros_like(x); };
  r.query = gradient(query), r.key = gradient(key), r.value = gradient(value);
  if (bias.defined()) r.bias = gradient(bias);
  for (const auto& parameter : module->parameters()) r.parameters.push_back(gradient(parameter));
  return r;
}

// Compares the gradients of all weights. That of the key's bias is exactly zero without a norm, so only its rounding remains.
void expect_parameters(
    const CrossAttention& module, const Results& found, const Results& whole, double limit, const std::string& what) {
  const auto names = module->named_parameters().keys();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == "key_linear.bias" && module->options.qk_norm() == NormKind::none) {
      expect(found.parameters[i].abs().max().item<double>() <= limit * whole.key.abs().max().item<double>() * 10,
             what + ", gradient of " + names[i]);
      continue;
    }
    expect_close(found.parameters[i], whole.parameters[i], limit, what + ", gradient of " + names[i]);
  }
}

// The results of one process with all inputs in float64, which narrower types approximate.
Results truth(const CrossAttention& module, const Case& each, const Inputs& inputs) {
  CrossAttention exact(std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone()));
  exact->to(torch::kDouble);
  exact->options.plan(PlanMode::standard);
  const auto wide = [](const Tensor& x) { return x.to(torch::kDouble); };
  const auto key = wide(inputs.key), value = inputs.value.is_same(inputs.key) ? key : wide(inputs.value);
  return differentiate(exact, {wide(inputs.query), key, value, wide(inputs.grad), inputs.bias},
                       [&](const auto&... x) { return exact->forward(x..., each.mask); });
}

// Compares the queries of all ranks together; `own` rows from `before` on are this rank's.
void compare(const Ranks& ranks, const Case& each, Queries queries, int64_t before, int64_t own, int64_t all) {
  torch::manual_seed(1);
  CrossAttention module(each.options);
  module->to(each.type);
  const auto draw = [&](int64_t rows, int64_t features) {
    const auto x = torch::randn({kB, rows, features}).to(each.type);
    return each.unbatched ? x[0] : x;
  };
  const auto key = draw(kLk, each.options.dim_key());
  const Inputs inputs{draw(all, 6), key, each.self ? key : draw(kLk, each.options.dim_value()), draw(all, 16), each.bias};
  const auto whole = truth(module, each, inputs);

  const auto rank = static_cast<size_t>(ranks.place.rank);
  const auto borders = ranks.borders(kLk, each.with_empty);
  const auto first = borders[rank], n = borders[rank + 1] - first;
  const auto of_keys = [&](const Tensor& x, int64_t axis) { return x.defined() ? x.narrow(axis, first, n) : x; };
  const auto of_queries = [&](const Tensor& x) { return x.narrow(-2, before, own); };
  const auto own_key = of_keys(inputs.key, -2);
  const Inputs mine{of_queries(inputs.query), own_key, each.self ? own_key : of_keys(inputs.value, -2), of_queries(inputs.grad),
                    each.bias};
  // Relative to the largest element of all ranks: those of one rank may all be tiny.
  const auto within = [](const Tensor& x, const Tensor& of_all, int64_t axis, int64_t begin) {
    auto padded = of_all.to(torch::kDouble).clone();
    padded.narrow(axis, begin, x.size(axis)).copy_(x);
    return padded;
  };
  const auto limit = allowed(each.type);
  const auto expect_forward = [&](const Tensor& output, const Tensor& weights, const std::string& what) {
    expect(output.size(-2) == own, what + ", output: other sizes");
    expect_close(within(output, whole.output, -2, before), whole.output, limit, what + ", output");
    expect_close(weights, of_keys(whole.weights, -1), limit, what + ", weights");
  };

  ContextParallel parallel(module, ranks.group, queries);
  // A context kept for many queries is projected; a long one kept for few stays as it is.
  for (const int64_t expected : {ContextOptions::kMany, int64_t{1}}) {
    const auto what = fmt::format("rank {} of {}, {}, {} queries", ranks.place.rank, ranks.place.size, each.name, expected);
    const auto part = differentiate(module, mine, [&](const Tensor& q, const Tensor& k, const Tensor& v) {
      const auto context = parallel.context(k, v, each.mask, {.expected_queries = expected});
      expect(context.length() == kLk && context.first() == first && context.own_length() == n, what + ": lengths");
      expect(!each.options.plan().pinned || context.orders() == Orders{}, what + ": orders");
      return parallel.attend(q, context);
    });
    expect_forward(part.output, part.weights, what);
    {
      const torch::NoGradGuard no_grad;  // in float32 other kernels run
      const auto context = parallel.context(mine.key, mine.value, each.mask, {.expected_queries = expected});
      const auto [output, weights] = parallel.attend(mine.query, context);
      expect_forward(output, weights, what + ", without gradients");
    }
    expect_close(within(part.query, whole.query, -2, before), whole.query, limit, what + ", gradient of the query");
    expect_close(within(part.key, whole.key, -2, first), whole.key, limit, what + ", gradient of the keys");
    expect_close(within(part.value, whole.value, -2, first), whole.value, limit, what + ", gradient of the values");
    if (each.bias.defined()) {
      auto of_own = torch::zeros_like(whole.bias);
      of_own.narrow(-1, first, n).copy_(whole.bias.narrow(-1, first, n));
      expect((part.bias - of_own).abs().max().item<double>() <= limit * whole.bias.abs().max().item<double>(),
             what + ", gradient of the bias");
    }
    expect_parameters(module, part, whole, limit, what);
  }
}

void equal(const Ranks& ranks) {
  torch::manual_seed(0);
  for (const auto& each : cases()) compare(ranks, each, Queries::same, 0, each.queries, each.queries);
}

// Each rank has queries of its own; with several ranks the first has none. The gradient is that of the sum of all losses.
void own_queries(const Ranks& ranks) {
  torch::manual_seed(2);
  const auto own = [](int64_t rank) { return 2 * rank; };
  int64_t before = 0, all = 0;
  for (int64_t r = 0; r < ranks.place.size; ++r) {
    if (r < ranks.place.rank) before += own(r);
    all += own(r);
  }
  for (const auto& each : cases_of_own_queries(all)) compare(ranks, each, Queries::own, before, own(ranks.place.rank), all);
}

// Log-sum-exps far from the largest logit: a key's bias of this size shifts all logits of a row by some hundreds.
void large_logits(const Ranks& ranks) {
  using enum Order;
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const auto order : {standard, fold_into_query}) {
      for (const double bias : {-100.0, 100.0}) {
        torch::manual_seed(3);
        CrossAttention module(CrossAttentionOptions(6, 10, 10, 16)
                                  .num_heads(4)
                                  .attention_weights(AttentionWeights::none)
                                  .plan(PlanMode::pin({order, order})));
        module->to(type);
        const torch::NoGradGuard no_grad;
        module->query_linear->weight.mul_(0.01);
        module->query_linear->bias.fill_(4);
        module->key_linear->bias.fill_(bias);
        const auto query = torch::randn({kB, kLq, 6}).to(type), key = torch::randn({kB, kLk, 10}).to(type);
        const auto borders = ranks.borders(kLk, /*with_empty=*/false);
        const auto rank = static_cast<size_t>(ranks.place.rank);
        const auto own = key.narrow(1, borders[rank], borders[rank + 1] - borders[rank]);
        ContextParallel parallel(module, ranks.group);
        expect_close(std::get<0>(parallel.forward(query, own, own)), std::get<0>(module->forward(query, key, key)),
                     type == torch::kDouble  ? 1e-11
                     : type == torch::kFloat ? 1e-3
                                             : 5e-2,
                     fmt::format("a key's bias of {} in {}, {}", bias, name_of(order), c10::getDtypeNames(type).first));
      }
    }
  }
}

// Only the bias of the mask trains; the share of the last rank is empty.
void bias_alone(const Ranks& ranks) {
  CrossAttention module(CrossAttentionOptions(6, 10, 10, 16).num_heads(4));
  for (auto& parameter : module->parameters()) parameter.requires_grad_(false);
  const bool is_empty = ranks.place.size > 1 && ranks.place.rank == ranks.place.size - 1;
  const auto n = is_empty ? 0 : 3;
  const auto learned = torch::zeros({1, 4, 1, 3 * std::max(1, ranks.place.size - 1)}).requires_grad_();
  const auto key = torch::randn({kB, n, 10});
  ContextParallel parallel(module, ranks.group, Queries::own);
  const auto context = parallel.context(key, key, Mask::bias(learned));
  std::get<0>(parallel.attend(torch::randn({kB, 2, 6}), context)).square().sum().backward();
  expect(learned.grad().defined() && learned.grad().eq(0).all().item<bool>() == is_empty, "the gradient of the bias");
}

// What is made without gradients gives none later, on no rank, whichever order the plan takes.
void without_gradients(const Ranks& ranks) {
  torch::manual_seed(4);
  for (const auto order : {Order::standard, Order::fold_into_query}) {
    CrossAttention module(CrossAttentionOptions(6, 10, 10, 16).num_heads(4).plan(PlanMode::pin({order, order})));
    const auto query = torch::randn({kB, kLq, 6}), key = torch::randn({kB, 2 + ranks.place.rank, 10});
    ContextParallel parallel(module, ranks.group);
    std::optional<SharedContext> context;
    {
      const torch::NoGradGuard no_grad;
      context = parallel.context(key, key);
    }
    std::get<0>(parallel.attend(query, *context)).sum().backward();
    for (const auto* linear : {&module->key_linear, &module->value_linear}) {
      expect(!(*linear)->weight.grad().defined(), fmt::format("a gradient of the context's weights in {}", name_of(order)));
    }
    expect(module->query_linear->weight.grad().defined(), "the gradient of the query's weight");
  }
}

void corners(const Ranks& ranks) {
  large_logits(ranks);
  bias_alone(ranks);
  without_gradients(ranks);
}

// The bytes that a call exchanges do not grow with the context.
void traffic(const Ranks& ranks) {
  CrossAttention module(CrossAttentionOptions(6, 10, 10, 16).num_heads(4));
  ContextParallel parallel(module, ranks.group);
  const torch::NoGradGuard no_grad;
  const auto query = torch::randn({kB, kLq, 6});
  std::vector<int64_t> exchanged;
  for (const int64_t n : {3, 3000}) {
    const auto x = torch::randn({kB, n, 10});
    const auto context = parallel.context(x, x);
    const auto before = parallel.bytes_exchanged();
    parallel.attend(query, context);
    exchanged.push_back(parallel.bytes_exchanged() - before);
  }
  const auto rows = kB * 4 * kLq;
  const auto expected =  // the sizes, the greatest, and the sums of e numbers and one
      ranks.place.size == 1 ? 0 : 16 + 4 * (rows + rows * (4 + 1));
  expect(exchanged[0] == expected && exchanged[1] == expected,
         fmt::format("{} and {} bytes exchanged, not {}", exchanged[0], exchanged[1], expected));
}

void errors(const Ranks& ranks) {
  CrossAttention module(CrossAttentionOptions(6, 10, 10, 16).num_heads(4));
  ContextParallel parallel(module, ranks.group);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::Error& error) {
      const std::string text = error.what_without_backtrace();
      return text.substr(0, text.find('\n'));
    }
    return "";
  };
  const auto rank = ranks.place.rank;
  const auto x = torch::randn({rank == 0 ? 2 : 3, 4, 10});
  const auto found = message([&] { return parallel.context(x, x); });
  const auto expected =
      ranks.place.size == 1 ? ""
      : rank == 0
          ? "[context_parallel] key must have one batch size on all ranks, but has 2 on rank 0 and 3 on rank 1."
          : fmt::format("[context_parallel] key must have one batch size on all ranks, but has 3 on rank {} and 2 on rank 0.",
                        rank);
  expect(found == expected, "batch: " + found);
  const auto y = torch::randn({2, 4, 10});
  const auto wrong = message([&] { return parallel.context(y, y, Mask::lengths(torch::tensor({4, 4}), 5)); });
  expect(
      wrong == fmt::format("[context_parallel] mask (lengths) must fit [B, H, Lq, Lk] = [2, 4, Lq, {}], but has [2, 1, 1, 5].",
                           4 * ranks.place.size),
      "mask: " + wrong);
  // Every rank reports an error raised on any one.
  const auto refused = [&](const char* name, const std::string& own, const std::string& said) {
    const auto others = fmt::format("[context_parallel] {} must be right on all ranks, but rank 0 refused its own.", name);
    expect(said == (rank == 0 ? own : others), fmt::format("{} of rank 0: {}", name, said));
  };
  const auto narrow = torch::randn({2, 4, 9});
  refused("key", "[context_parallel] key must have shape [B, Lk, 10], but has [2, 4, 9].", message([&] {
            const auto& own = rank == 0 ? narrow : y;
            return parallel.context(own, own);
          }));
  refused("key", "[context_parallel] key must have shape [B, Lk, 10], but has undefined.",
          message([&] { return parallel.context(rank == 0 ? Tensor() : y, y); }));
  refused(
      "key",
      "[context_parallel] options must have neither capacity nor share, which are for contexts of one process, but have one.",
      message([&] { return parallel.context(y, y, {}, {.capacity = rank == 0 ? 9 : 0}); }));
  ContextParallel apart(module, ranks.group, Queries::own);
  const auto of_apart = apart.context(y, y);
  refused("query", "[context_parallel] query must have shape [B, Lq, 6], but has [2, 3, 5].",
          message([&] { apart.attend(torch::randn({2, 3, rank == 0 ? 5 : 6}), of_apart); }));
  const auto context = parallel.context(y, y);
  refused("query", "[context_parallel] query must have shape [B, Lq, 6], but has [2, 3, 5].",
          message([&] { parallel.attend(torch::randn({2, 3, rank == 0 ? 5 : 6}), context); }));
  const auto longer = message([&] { parallel.attend(torch::randn({2, rank == 0 ? 3 : 4, 6}), context); });
  const auto other =
      fmt::format("[context_parallel] query must have one length on all ranks, but has {} on rank {} and {} on rank {}.",
                  rank == 0 ? 3 : 4, rank, rank == 0 ? 4 : 3, rank == 0 ? 1 : 0);
  expect(longer == (ranks.place.size == 1 ? "" : other), "length of the query: " + longer);
  const auto nowhere = message([&] {
    auto none = c10::make_intrusive<c10d::ProcessGroup>(rank, ranks.place.size);
    return ContextParallel(module, std::move(none)).context(y, y);
  });
  expect(nowhere.starts_with(fmt::format("[context_parallel] rank {} of {} has no exchange with the others (", rank,
                                         ranks.place.size)) == (ranks.place.size > 1),
         "a group without a backend: " + nowhere);
  {
    const torch::NoGradGuard no_grad;
    module->key_linear->weight.add_(1);
  }
  expect(message([&] {
           parallel.attend(torch::randn({2, 3, 6}), context);
         }).starts_with("[context_parallel] context must be made with"),
         "stale context");
  expect(message([&] { ContextParallel(CrossAttention(CrossAttentionOptions(6, 10, 10, 16).bias_kv(true)), ranks.group); }) ==
             "[context_parallel] module must have no bias_kv, whose free key belongs to no rank, but has one.",
         "bias_kv");
  const auto prefold = CrossAttentionOptions(6, 10, 10, 16).plan(PlanMode::pin({Order::prefold, Order::standard}));
  expect(message([&] { ContextParallel(CrossAttention(prefold), ranks.group); }) ==
             "[context_parallel] plan must be of orders that end in heads, standard and fold_into_query, but is prefold, "
             "standard.",
         "plan");
}

// The last rank leaves; the others must notice and report it.
void lose(const Ranks& ranks, const std::function<void()>& leave, bool in_backward) {
  struct sigaction broken_pipe = {};
  sigaction(SIGPIPE, nullptr, &broken_pipe);
  expect(broken_pipe.sa_handler == SIG_IGN, "who writes to the dead rank dies too");
  CrossAttention module(CrossAttentionOptions(6, 10, 10, 16).num_heads(4));
  ContextParallel parallel(module, ranks.group);
  const auto x = torch::randn({2, 4, 10});
  const bool last = ranks.place.rank == ranks.place.size - 1;
  try {
    const auto context = parallel.context(x, x);
    if (last && !in_backward) leave();
    for (int call = 0; call < 3; ++call) {
      const auto output = std::get<0>(parallel.attend(torch::randn({2, 3, 6}), context));
      if (last) leave();
      if (in_backward) output.sum().backward({}, /*retain_graph=*/true);
    }
    expect(false, "nobody noticed");
  } catch (const c10::DistBackendError& error) {
    const std::string text = error.what_without_backtrace();
    expect(
        text.starts_with(fmt::format("[context_parallel] rank {} of {} lost the others", ranks.place.rank, ranks.place.size)),
        text);
  }
  if (failures == 0) std::_Exit(0);  // the group cannot be shut down cleanly
}

void die() {
  std::_Exit(0);
}

void death(const Ranks& ranks) {
  lose(ranks, die, false);
}

void death_in_backward(const Ranks& ranks) {
  lose(ranks, die, true);
}

// The rank and its connections remain, but it no longer responds until it is killed: only the timeout shows it.
void silence(const Ranks& ranks) {
  lose(ranks, [] { std::raise(SIGSTOP); }, false);
}

int run(int argc, char** argv) {
  const std::map<std::string, void (*)(const Ranks&)> scenarios = {{"equal", equal},
                                                                   {"own-queries", own_queries},
                                                                   {"corners", corners},
                                                                   {"traffic", traffic},
                                                                   {"errors", errors},
                                                                   {"death", death},
                                                                   {"death-in-backward", death_in_backward},
                                                                   {"silence", silence}};
  try {
    at::set_num_threads(1);
    const auto place = launch::find_place();
    if (argc != 2 || !scenarios.contains(argv[1]) || !place) {
      std::cerr << "usage: rank SCENARIO, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set\n";
      return 2;
    }
    const std::string scenario = argv[1];
    const bool loses = scenario.starts_with("death") || scenario == "silence";
    scenarios.at(scenario)({*place, launch::join(*place, torch::kCPU, loses ? kShortTimeout : kTimeout)});
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return failures > 0 ? 1 : 0;
}

const bool is_known = processes().emplace("rank", run).second;

}  // namespace
}  // namespace xattn::test::ranks
