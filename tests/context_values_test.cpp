// SPDX-License-Identifier: Apache-2.0
// Contexts that are joined, appended to, truncated and reordered, against the one context made at once from all of their keys.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/block.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/frozen.h>
#include <xattn/frozen_block.h>

#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using torch::Tensor;

constexpr int64_t kB = 3, kH = 4, kLq = 5;
constexpr double kAllowed = 1e-5;  // relative, in float32: the limit of `tolerance`

CrossAttentionOptions options_of(AttentionWeights weights = AttentionWeights::per_head) {
  return CrossAttentionOptions(9, 33, 17, 22)
      .num_heads(kH)
      .kv_heads(2)
      .head_dim(6)
      .value_head_dim(5)
      .attention_weights(weights);
}

CrossAttention double_copy(const CrossAttention& module) {
  auto copy = std::dynamic_pointer_cast<CrossAttentionImpl>(module->clone());
  copy->options.plan(PlanMode::standard);
  copy->to(torch::kDouble);
  return copy;
}

// Keys, values and a mask of one part of a context, and the same mask as dense tensors for the whole batch.
struct Part {
  Tensor key, value;
  Mask mask;
  Tensor allowed, bias;  // [B, H, Lq, n]
};

// One of the kinds of masks that a part may have.
Part draw_part(int64_t n, int64_t kind, at::TensorOptions options = torch::kFloat) {
  const auto all = [n, options](const Tensor& x) { return x.to(options.device()).expand({kB, kH, kLq, n}); };
  const auto some = [](at::IntArrayRef sizes) { return torch::rand(sizes) < 0.7; };
  Part part{torch::randn({kB, n, 33}, options), torch::randn({kB, n, 17}, options), {}, {}, {}};
  part.allowed = all(torch::ones({1, 1, 1, n}, torch::kBool));
  part.bias = all(torch::zeros({1, 1, 1, n}, torch::kDouble));
  const auto keep = [&](const Tensor& x) {
    part.allowed = all(x);
    return x.to(options.device());
  };
  const auto bias = [&](const Tensor& x) {
    part.bias = all(x.to(torch::kDouble));
    return Mask::bias(x.to(options.device()));
  };
  switch (kind) {
    case 1: {
      const auto lengths = torch::randint(0, n + 1, {kB});
      keep((torch::arange(n) < lengths.unsqueeze(1)).view({kB, 1, 1, n}));
      part.mask = Mask::lengths(lengths.to(options.device()), n);
      break;
    }
    case 2: part.mask = Mask::key_padding(keep(some({kB, 1, 1, n})).view({kB, n})); break;
    case 3: part.mask = Mask::dense(keep(some({kLq, n}))); break;
    case 4: part.mask = Mask::dense(keep(some({kB, kH, kLq, n}))); break;
    case 5: part.mask = bias(torch::randn({1, kH, 1, n})); break;
    case 6: {
      const auto padding = keep(some({kB, 1, 1, n}));
      part.mask = bias(torch::randn({kB, 1, kLq, n}, torch::kDouble)) & Mask::key_padding(padding.view({kB, n}));
      break;
    }
    default: break;
  }
  return part;
}
constexpr int64_t kKinds = 7;

std::vector<Part> draw_parts(const std::vector<int64_t>& lengths, at::TensorOptions options = torch::kFloat) {
  std::vector<Part> parts;
  for (const auto n : lengths) {
    parts.push_back(draw_part(n, torch::randint(kKinds, {1}).item<int64_t>(), options));
  }
  return parts;
}

// The first `count` parts as one. Its mask is built of dense tensors alone.
Part whole(const std::vector<Part>& parts, size_t count) {
  std::vector<Tensor> keys, values, allowed, biases;
  for (size_t i = 0; i < count; ++i) {
    keys.push_back(parts[i].key);
    values.push_back(parts[i].value);
    allowed.push_back(parts[i].allowed);
    biases.push_back(parts[i].bias);
  }
  Part all{torch::cat(keys, 1), torch::cat(values, 1), {}, torch::cat(allowed, 3), torch::cat(biases, 3)};
  all.mask = Mask::dense(all.allowed) & Mask::bias(all.bias);
  return all;
}
Part whole(const std::vector<Part>& parts) {
  return whole(parts, parts.size());
}

std::tuple<Tensor, Tensor> exact(const CrossAttention& module, const Tensor& query, const Part& all) {
  const torch::NoGradGuard no_grad;
  return double_copy(module)->forward(query.to(torch::kDouble), all.key.to(torch::kDouble), all.value.to(torch::kDouble),
                                      all.mask);
}

void expect_equal(const std::tuple<Tensor, Tensor>& actual,
                  const std::tuple<Tensor, Tensor>& expected,
                  const std::string& what,
                  double allowed = kAllowed) {
  expect_close(std::get<0>(actual), std::get<0>(expected), allowed, "output, " + what);
  expect_close(std::get<1>(actual), std::get<1>(expected), allowed, "weights, " + what);
}

template <class F>
void for_each_pair(const F& check) {
  for (const auto logits : kAllOrders) {
    for (const auto values : kAllOrders) {
      SCOPED_TRACE(std::string(name_of(logits)) + ", " + std::string(name_of(values)));
      check(Orders{logits, values});
    }
  }
}

bool is_folded(const Orders& orders) {
  return orders.logits == Order::fold_into_context || orders.values == Order::fold_into_context;
}

class ContextValuesTest : public testing::TestWithParam<torch::Device> {
 protected:
  ContextValuesTest() { torch::manual_seed(0); }

  CrossAttention module_in(const Orders& orders, at::ScalarType type = torch::kFloat) {
    CrossAttention module(options_of().plan(PlanMode::pin(orders)));
    module->to(GetParam(), type);
    return module;
  }
  at::TensorOptions of(at::ScalarType type) { return at::TensorOptions(GetParam()).dtype(type); }

  const ContextOptions three_{.expected_queries = 3};
};
INSTANTIATE_TEST_SUITE_P(Devices, ContextValuesTest, testing::ValuesIn(devices()), device_name);

// ---- Modules ---------------------------------------------------------------------------------------------------------------

// Output, weights and all gradients of attention to a context.
std::vector<Tensor> gradients(CrossAttention module,
                              const Tensor& query,
                              const std::vector<Part>& parts,
                              const Context& context) {
  module->zero_grad();
  for (const auto& part : parts) part.key.mutable_grad() = part.value.mutable_grad() = Tensor();
  const auto [output, weights] = module->attend(query, context);
  (output.sin().sum() + weights.square().sum()).backward({}, /*retain_graph=*/true);
  std::vector<Tensor> keys, values, all = {output, weights};
  for (const auto& part : parts) {
    keys.push_back(part.key.grad());
    values.push_back(part.value.grad());
  }
  all.insert(all.end(), {torch::cat(keys, 1), torch::cat(values, 1)});
  for (const auto& parameter : module->parameters()) all.push_back(parameter.grad().clone());
  return all;
}

TEST_P(ContextValuesTest, JoinedAndAppendedModuleContextsEqualTheOneBigContextWithGradients) {
  for_each_pair([&](const Orders& orders) {
    auto module = module_in(orders, torch::kDouble);
    const auto query = torch::randn({kB, kLq, 9}, of(torch::kDouble));
    auto parts = draw_parts({7, 0, 33, 4}, of(torch::kDouble));
    for (auto& part : parts) part.key.requires_grad_(), part.value.requires_grad_();
    const auto all = whole(parts);
    const auto expected = gradients(module, query, parts, module->context(all.key, all.value, all.mask, three_));
    std::vector<Context> contexts;
    Context grown;
    for (const auto& part : parts) {
      contexts.push_back(module->context(part.key, part.value, part.mask, three_));
      grown = contexts.size() == 1 ? contexts[0] : grown.append(part.key, part.value, part.mask);
    }
    for (const auto& context : {Context::join(contexts), grown}) {
      EXPECT_EQ(context.length(), 44);
      const auto found = gradients(module, query, parts, context);
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(torch::allclose(found[i], expected[i], 1e-11, 1e-12)) << "result or gradient " << i;
      }
    }
  });
}

TEST_P(ContextValuesTest, AppendLeavesEveryEarlierContextAsItWas) {
  const torch::NoGradGuard no_grad;
  for (const int64_t capacity : {0, 20, 200}) {
    for_each_pair([&](const Orders& orders) {
      auto module = module_in(orders);
      const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
      const auto parts = draw_parts({0, 1, 1, 9, 0, 40, 1, 30}, of(torch::kFloat));
      auto options = three_;
      options.capacity = capacity;
      std::vector<Context> contexts = {module->context(parts[0].key, parts[0].value, parts[0].mask, options)};
      std::vector<Tensor> outputs = {std::get<0>(module->attend(query, contexts[0]))};
      for (size_t i = 1; i < parts.size(); ++i) {
        contexts.push_back(contexts.back().append(parts[i].key, parts[i].value, parts[i].mask));
        const auto found = module->attend(query, contexts.back());
        expect_equal(found, exact(module, query, whole(parts, i + 1)), "after " + std::to_string(i));
        outputs.push_back(std::get<0>(found));
      }
      for (size_t i = 0; i < contexts.size(); ++i) {
        EXPECT_TRUE(std::get<0>(module->attend(query, contexts[i])).equal(outputs[i])) << i;
      }
    });
  }
}

TEST_P(ContextValuesTest, AppendCopiesNothingWhileThereIsRoomAndTwoAppendsToOneContextDoNotMeet) {
  const torch::NoGradGuard no_grad;
  for (const auto order : {Order::standard, Order::fold_into_query}) {
    auto module = module_in({order, order});
    const auto parts = draw_parts({4, 3, 3}, of(torch::kFloat));
    const auto make = [&](int64_t capacity) {
      return module->context(parts[0].key, parts[0].value, parts[0].mask, {.expected_queries = 3, .capacity = capacity});
    };
    const auto add = [](const Context& context, const Part& part) { return context.append(part.key, part.value, part.mask); };
    const auto address = [](const Context& context) { return context.key().const_data_ptr(); };
    const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));

    const auto context = make(7);
    const auto first = add(context, parts[1]), sibling = add(context, parts[2]), longer = add(first, parts[2]);
    EXPECT_EQ(address(first), address(context));
    EXPECT_NE(address(sibling), address(context)) << "the first append has used the room";
    EXPECT_NE(address(longer), address(context)) << "the room is full";
    EXPECT_EQ(address(add(longer, parts[1])), address(longer)) << "a copy has room";
    EXPECT_NE(address(add(make(6), parts[1])), address(make(6)));
    expect_equal(module->attend(query, first), exact(module, query, whole({parts[0], parts[1]})), "first");
    expect_equal(module->attend(query, sibling), exact(module, query, whole({parts[0], parts[2]})), "sibling");
    expect_equal(module->attend(query, longer), exact(module, query, whole(parts)), "longer");
  }
}

TEST_P(ContextValuesTest, AppendIsAllowedBetweenForwardAndBackward) {
  auto module = module_in({});
  for (auto& parameter : module->key_linear->parameters()) parameter.requires_grad_(false);
  for (auto& parameter : module->value_linear->parameters()) parameter.requires_grad_(false);
  const auto parts = draw_parts({4, 3}, of(torch::kFloat));
  const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat)).requires_grad_();
  const auto context = module->context(parts[0].key, parts[0].value, parts[0].mask, {.capacity = 10});
  const auto output = std::get<0>(module->attend(query, context)).sum();
  EXPECT_EQ(context.append(parts[1].key, parts[1].value).key().const_data_ptr(), context.key().const_data_ptr());
  output.backward();
  EXPECT_TRUE(query.grad().isfinite().all().item<bool>());
}

TEST_P(ContextValuesTest, BiasKvStaysTheLastKeyAndIsThereOnce) {
  CrossAttention module(options_of().bias_kv(true));
  module->to(GetParam(), torch::kDouble);
  const auto query = torch::randn({kB, kLq, 9}, of(torch::kDouble));
  const auto parts = draw_parts({7, 0, 5}, of(torch::kDouble));
  const auto expected = exact(module, query, whole(parts));
  std::vector<Context> contexts;
  for (const auto& part : parts) contexts.push_back(module->context(part.key, part.value, part.mask));
  const auto joined = Context::join(contexts);
  EXPECT_EQ(std::get<1>(expected).size(3), 13);
  expect_equal(module->attend(query, joined), expected, "joined", 1e-12);
  const auto grown =
      contexts[0].append(parts[1].key, parts[1].value, parts[1].mask).append(parts[2].key, parts[2].value, parts[2].mask);
  expect_equal(module->attend(query, grown), expected, "grown", 1e-12);
  expect_equal(module->attend(query, joined.truncate(7)), exact(module, query, parts[0]), "truncated", 1e-12);
  const auto frozen = module->freeze();
  const auto first = frozen.context(parts[0].key, parts[0].value, parts[0].mask, {.capacity = 30});
  const auto all =
      first.append(parts[1].key, parts[1].value, parts[1].mask).append(parts[2].key, parts[2].value, parts[2].mask);
  expect_equal(frozen.attend(query, all), expected, "frozen", 1e-12);
  expect_equal(frozen.attend(query, FrozenContext::join({first, all.truncate(0)})), exact(module, query, parts[0]), "frozen",
               1e-12);
}

TEST_P(ContextValuesTest, CausalMasksCountOverAllKeys) {
  for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
    auto module = module_in({}, torch::kDouble);
    const auto query = torch::randn({kB, kLq, 9}, of(torch::kDouble));
    const auto parts = draw_parts({2, 3, 2}, of(torch::kDouble));
    auto all = whole(parts);
    all.mask = all.mask & Mask::causal(alignment);
    const auto expected = exact(module, query, all);
    std::vector<Context> contexts;
    for (const auto& part : parts) {
      contexts.push_back(module->context(part.key, part.value, part.mask & Mask::causal(alignment)));
    }
    expect_equal(module->attend(query, Context::join(contexts)), expected, "joined", 1e-12);
    auto grown = contexts[0].append(parts[1].key, parts[1].value, parts[1].mask);  // the causal part goes on
    grown = grown.append(parts[2].key, parts[2].value, parts[2].mask & Mask::causal(alignment));
    expect_equal(module->attend(query, grown), expected, "grown", 1e-12);

    contexts[1] = module->context(parts[1].key, parts[1].value, parts[1].mask);
    EXPECT_EQ(error_of<c10::ValueError>([&] { (void)Context::join(contexts); }),
              "[mask] masks must have the same causal part to be joined, because it counts over all keys, but they differ.");
  }
}

TEST_P(ContextValuesTest, TruncatedAndSelectedModuleContextsEqualThoseOfTheseKeysAndEntries) {
  for (const bool grows : {false, true}) {
    const at::AutoGradMode grad_mode(!grows);
    for_each_pair([&](const Orders& orders) {
      auto module = module_in(orders);
      const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
      for (int64_t kind = 0; kind < kKinds; ++kind) {
        const auto part = draw_part(37, kind, of(torch::kFloat));
        const auto context =
            module->context(part.key, part.value, part.mask, {.expected_queries = 3, .capacity = grows ? 50 : 0});
        for (const int64_t n : {0, 1, 20, 37}) {
          const auto first = [n](const Tensor& x, int64_t axis) { return x.narrow(axis, 0, n); };
          Part less{first(part.key, 1), first(part.value, 1), {}, first(part.allowed, 3), first(part.bias, 3)};
          less.mask = Mask::dense(less.allowed) & Mask::bias(less.bias);
          const auto truncated = context.truncate(n);
          EXPECT_EQ(truncated.length(), n);
          expect_equal(module->attend(query, truncated), exact(module, query, less), "first " + std::to_string(n));
          const auto again = truncated.append(part.key, part.value, part.mask);
          expect_equal(module->attend(query, again), exact(module, query, whole({less, part})), "appended to these");
        }
        const auto beams = torch::tensor({2, 0, 0, 1}).to(GetParam());
        const auto selected = context.select(beams);
        const auto [output, weights] = exact(module, query, whole({part}));
        expect_equal(module->attend(query.index_select(0, beams), selected),
                     {output.index_select(0, beams), weights.index_select(0, beams)}, "selected");
        EXPECT_EQ(context.select(torch::zeros({0}, torch::kInt).to(GetParam())).batch_size(), 0);
      }
    });
  }
}

TEST_P(ContextValuesTest, SeveralQueriesShareAnEntryOfAModulesContext) {
  constexpr int64_t n = 2;
  for (const auto weights : {AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}) {
    auto attention = options_of(weights);
    CrossAttention module(attention);
    CrossAttentionBlock block(attention.dim_output(9).head_dim(6));
    DecoupledCrossAttention decoupled(DecoupledCrossAttentionOptions(attention).added({{8, 8}}));
    for (auto* each : std::initializer_list<torch::nn::Module*>{module.get(), block.get(), decoupled.get()}) {
      each->to(GetParam(), torch::kDouble);
    }
    const auto query = torch::randn({kB * n, kLq, 9}, of(torch::kDouble)).requires_grad_();
    const auto added = torch::randn({kB, 6, 8}, of(torch::kDouble));
    const auto repeated = [](const Tensor& x) { return x.repeat_interleave(n, 0); };
    const auto with_gradient = [&](const std::tuple<Tensor, Tensor>& results) {
      const auto& [output, its_weights] = results;
      const auto sum =
          output.sin().sum() + (its_weights.defined() ? its_weights.square().sum() : torch::zeros({}, of(torch::kDouble)));
      return std::vector<Tensor>{output, its_weights, torch::autograd::grad({sum}, {query})[0]};
    };
    const auto expect_same = [&](const std::tuple<Tensor, Tensor>& actual, const std::tuple<Tensor, Tensor>& expected) {
      const auto a = with_gradient(actual), b = with_gradient(expected);
      for (size_t i = 0; i < a.size(); ++i) expect_close(a[i], b[i], 1e-12, "result " + std::to_string(i));
    };
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      SCOPED_TRACE(kind);
      const auto part = draw_part(11, kind, of(torch::kDouble));
      const auto key = repeated(part.key), value = repeated(part.value);
      const auto causal = Mask::causal(CausalAlignment::lower_right);
      const auto mask = part.mask & causal;
      const auto all = Mask::dense(repeated(part.allowed)) & Mask::bias(repeated(part.bias)) & causal;
      expect_same(module->attend(query, module->context(part.key, part.value, mask)), module->forward(query, key, value, all));
      expect_same(block->attend(query, block->context(part.key, part.value, mask)), block->forward(query, key, value, all));
      const auto its_mask = Mask::lengths(torch::tensor({6, 0, 3}).to(GetParam()), 6);
      const auto its_all = Mask::lengths(torch::tensor({6, 6, 0, 0, 3, 3}).to(GetParam()), 6);
      expect_same(decoupled->attend(query, decoupled->context(part.key, part.value, mask),
                                    {decoupled->added_context(0, added, added, its_mask)}),
                  decoupled->forward(query, key, value, {{repeated(added), repeated(added), its_all}}, all));
    }
    EXPECT_EQ(error_of<c10::ValueError>([&] {
                const auto part = draw_part(4, 0, of(torch::kDouble));
                module->attend(query.narrow(0, 0, 4), module->context(part.key, part.value));
              }),
              "[cross_attention] query must have shape [3, Lq, 9] to match its context, but has [4, 5, 9].");
  }
}

TEST_P(ContextValuesTest, UnbatchedContextsGrowAndAreJoined) {
  auto module = module_in({}, torch::kDouble);
  const auto query = torch::randn({kLq, 9}, of(torch::kDouble));
  const auto key = torch::randn({8, 33}, of(torch::kDouble)), value = torch::randn({8, 17}, of(torch::kDouble));
  const auto padding = Mask::key_padding(torch::tensor({{true, false, true}}).to(GetParam()));
  const auto valid = torch::ones({1, 8}, torch::kBool).index_put_({0, 6}, false).to(GetParam());
  const auto expected = module->forward(query, key, value, Mask::key_padding(valid));
  const auto part = [&](int64_t first, int64_t n) { return std::pair(key.narrow(0, first, n), value.narrow(0, first, n)); };
  const auto [k1, v1] = part(0, 5);
  const auto [k2, v2] = part(5, 3);
  const auto context = module->context(k1, v1);
  expect_equal(module->attend(query, context.append(k2, v2, padding)), expected, "appended", 1e-12);
  expect_equal(module->attend(query, Context::join({context, module->context(k2, v2, padding)})), expected, "joined", 1e-12);
  const auto frozen = module->freeze();
  expect_equal(frozen.attend(query, frozen.context(k1, v1).append(k2, v2, padding)), expected, "frozen", 1e-12);
  EXPECT_EQ(error_of<c10::ValueError>([&, &k2 = k2, &v2 = v2] { (void)context.append(k2.unsqueeze(0), v2.unsqueeze(0)); }),
            "[context] key must be unbatched, as the context, but is a batch of 1.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)context.select(torch::tensor({0})); }),
            "[context] context must be batched to select entries, but is unbatched.");
  EXPECT_EQ(error_of<c10::ValueError>([&, &k1 = k1, &v1 = v1] { (void)frozen.context(k1, v1).select(torch::tensor({0})); }),
            "[frozen] context must be batched to select entries, but is unbatched.");
}

struct Autocast {
  explicit Autocast(at::DeviceType type) : type_(type) { at::autocast::set_autocast_enabled(type, true); }
  ~Autocast() {
    at::autocast::set_autocast_enabled(type_, false);
    at::autocast::clear_cache();
  }
  at::DeviceType type_;
};

TEST_P(ContextValuesTest, UnderAutocastAContextGrowsInItsOwnType) {
  const torch::NoGradGuard no_grad;
  auto module = module_in({});
  const auto parts = draw_parts({6, 5}, of(torch::kFloat));
  const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
  const auto all = whole(parts);
  const auto add = [&](const Context& context) { return context.append(parts[1].key, parts[1].value, parts[1].mask); };
  Context context;
  {
    const Autocast autocast(GetParam().type());
    context = module->context(parts[0].key, parts[0].value, parts[0].mask, {.capacity = 20});
    const auto type = at::autocast::get_autocast_dtype(GetParam().type());
    EXPECT_EQ(context.key().scalar_type(), type);
    const auto expected = module->attend(query, module->context(all.key, all.value, all.mask));
    expect_equal(module->attend(query, add(context)), expected, "under autocast", tolerance(type, 1));
    EXPECT_EQ(
        error_of<c10::ValueError>([&] { (void)module->context(all.key, all.value, {}, {.share = true}); }),
        "[cross_attention] share must be left out if a layer cannot read keys and values as given, but is set: the plan or "
        "autocast fixes another order.");
  }
  const auto type = std::string(c10::getDtypeNames(context.key().scalar_type()).first);
  EXPECT_EQ(error_of<c10::TypeError>([&] { (void)add(context); }),
            "[context] key must become " + type +
                ", the type of the context, but becomes float32. Make it and append to it "
                "under the same autocast.");
  auto half = module_in({Order::fold_into_query, Order::standard});  // keys as given, projected values
  context = half->context(parts[0].key, parts[0].value, parts[0].mask, {.expected_queries = 3, .capacity = 20});
  const Autocast autocast(GetParam().type());
  EXPECT_EQ(error_of<c10::TypeError>([&] { (void)add(context); }),
            "[context] value must become float32, the type of the context, but becomes " + type +
                ". Make it and append to it under the same autocast.");
}

TEST_P(ContextValuesTest, WithKeyNormsContextsEqualTheOneBigContext) {
  for (const auto scope : {NormScope::per_head, NormScope::across_heads}) {
    CrossAttention module(options_of().qk_norm(NormKind::rms).qk_norm_scope(scope));
    module->to(GetParam());
    const auto parts = draw_parts({6, 5, 34}, of(torch::kFloat));
    const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
    const auto expected = exact(module, query, whole(parts));
    const auto frozen = module->freeze({.plan = PlanMode::standard});
    const auto [p1, p2, p3] = std::tie(parts[0], parts[1], parts[2]);
    const auto grow = [&, &p2 = p2, &p3 = p3](const auto& context) {
      return context.append(p2.key, p2.value, p2.mask).append(p3.key, p3.value, p3.mask);
    };
    expect_equal(module->attend(query, grow(module->context(p1.key, p1.value, p1.mask))), expected, "module");
    expect_equal(frozen.attend(query, grow(frozen.context(p1.key, p1.value, p1.mask))), expected, "frozen");
  }
}

// ---- Frozen layers ---------------------------------------------------------------------------------------------------------

// Calls check(frozen, type of the inputs, expected queries, allowed difference) for frozen layers in every order, type, storage
// and layout. In bfloat16, the output bias of rows without a mask is rounded otherwise than with one.
template <class F>
void for_each_frozen(at::Device device, const F& check) {
  CrossAttention module(options_of());
  module->to(device);
  for_each_pair([&](const Orders& orders) {
    const auto plan = PlanMode::pin(orders);
    // With four heads: unpacked, packed on read and packed.
    for (const int64_t rows : {int64_t{1}, int64_t{20}, ContextOptions::kMany}) {
      SCOPED_TRACE(rows);
      check(module->freeze({.plan = plan}), torch::kFloat, rows, kAllowed);
      if (!device.is_cpu()) continue;
      const auto half = module->freeze({.plan = plan, .storage = torch::kBFloat16});
      check(half, torch::kFloat, rows, tolerance(torch::kBFloat16, 1));
    }
    check(double_copy(module)->freeze({.plan = plan}), torch::kDouble, ContextOptions::kMany, 1e-12);
  });
}

TEST_P(ContextValuesTest, JoinedFrozenContextsEqualTheOneBigContextInEveryOrderAndLayout) {
  for_each_frozen(GetParam(), [&](const Frozen& frozen, at::ScalarType type, int64_t rows, double allowed) {
    const auto query = torch::randn({kB, kLq, 9}, of(type));
    for (const auto& lengths : std::vector<std::vector<int64_t>>{{7, 0, 33, 4}, {32, 64, 32}, {0, 1, 90}, {5}}) {
      const auto parts = draw_parts(lengths, of(type));
      const auto all = whole(parts);
      std::vector<FrozenContext> contexts;
      for (const auto& part : parts) contexts.push_back(frozen.context(part.key, part.value, part.mask, {rows}));
      const auto joined = FrozenContext::join(contexts);
      const auto big = frozen.context(all.key, all.value, all.mask, {rows});
      EXPECT_EQ(joined.length(), big.length());
      EXPECT_EQ(joined.bytes(), big.bytes());
      expect_equal(frozen.attend(query, joined), frozen.attend(query, big), "joined", allowed);
    }
  });
}

TEST_P(ContextValuesTest, FrozenContextsThatGrowEqualTheOneBigContextInEveryOrderAndLayout) {
  for_each_frozen(GetParam(), [&](const Frozen& frozen, at::ScalarType type, int64_t rows, double allowed) {
    const auto query = torch::randn({kB, kLq, 9}, of(type));
    for (const int64_t capacity : {0, 50, 200}) {
      const auto parts = draw_parts({3, 1, 1, 30, 0, 40, 1, 64}, of(type));
      const auto& first = parts[0];
      std::vector<FrozenContext> contexts = {
          frozen.context(first.key, first.value, first.mask, {.expected_queries = rows, .capacity = capacity})};
      std::vector<Tensor> outputs = {std::get<0>(frozen.attend(query, contexts[0]))};
      for (size_t i = 1; i < parts.size(); ++i) {
        contexts.push_back(contexts.back().append(parts[i].key, parts[i].value, parts[i].mask));
        const auto all = whole(parts, i + 1);
        const auto found = frozen.attend(query, contexts.back());
        expect_equal(found, frozen.attend(query, frozen.context(all.key, all.value, all.mask, {rows})), std::to_string(i),
                     allowed);
        outputs.push_back(std::get<0>(found));
      }
      for (size_t i = 0; i < contexts.size(); ++i) {
        EXPECT_TRUE(std::get<0>(frozen.attend(query, contexts[i])).equal(outputs[i])) << i;
      }
    }
  });
}

TEST_P(ContextValuesTest, TruncatedSelectedAndSlicedFrozenContextsEqualThoseOfTheseKeysAndEntries) {
  for_each_frozen(GetParam(), [&](const Frozen& frozen, at::ScalarType type, int64_t rows, double allowed) {
    const auto query = torch::randn({kB, kLq, 9}, of(type));
    for (const int64_t kind : {0, 1, 6}) {
      const auto part = draw_part(45, kind, of(type)), more = draw_part(3, kind, of(type));
      const auto context = frozen.context(part.key, part.value, part.mask, {.expected_queries = rows, .capacity = 60});
      const auto attend = [&](const Part& p) { return frozen.attend(query, frozen.context(p.key, p.value, p.mask, {rows})); };
      for (const int64_t n : {0, 1, 33, 45}) {
        const auto first = [n](const Tensor& x, int64_t axis) { return x.narrow(axis, 0, n); };
        Part less{first(part.key, 1), first(part.value, 1), {}, first(part.allowed, 3), first(part.bias, 3)};
        less.mask = Mask::dense(less.allowed) & Mask::bias(less.bias);
        const auto truncated = context.truncate(n);
        expect_equal(frozen.attend(query, truncated), attend(less), "first " + std::to_string(n), allowed);
        expect_equal(frozen.attend(query, truncated.append(more.key, more.value, more.mask)), attend(whole({less, more})),
                     "appended to these", allowed);
      }
      const auto beams = torch::tensor({2, 0, 0, 1}).to(GetParam());
      const auto pick = [&](const Tensor& x) { return x.index_select(0, beams); };
      const auto [output, weights] = attend(whole({part, more}));
      const auto beam_of_more = Part{pick(more.key), pick(more.value), {}, {}, {}};
      const auto longer = context.append(more.key, more.value, more.mask);
      expect_equal(frozen.attend(pick(query), longer.select(beams)), {pick(output), pick(weights)}, "selected", allowed);
      if (kind == 0) {
        expect_equal(frozen.attend(pick(query), context.select(beams).append(beam_of_more.key, beam_of_more.value)),
                     {pick(output), pick(weights)}, "appended to the selected ones", allowed);
      }
      if (kind == 6) continue;  // Mask::cat needs masks that were built alike
      const auto cat =
          FrozenContext::cat({context.slice(0, 1), frozen.context(part.key, part.value, part.mask, {rows}).slice(1, kB)});
      expect_equal(frozen.attend(query, cat), attend(part), "a batch of slices with room and without", allowed);
    }
  });
}

TEST_P(ContextValuesTest, FrozenAppendCopiesNothingWhileThereIsRoom) {
  CrossAttention module(options_of());
  module->to(GetParam());
  for (const auto order : {Order::standard, Order::fold_into_query}) {
    const auto frozen = module->freeze({.plan = PlanMode::pin({order, order})});
    const auto part = draw_part(4, 0, of(torch::kFloat)), token = draw_part(1, 0, of(torch::kFloat));
    const auto context = frozen.context(part.key, part.value, {}, {.capacity = 64});
    const auto full = draw_part(64, 0, of(torch::kFloat));
    EXPECT_EQ(context.bytes(), frozen.context(full.key, full.value).bytes()) << "bytes count the room";
    auto grown = context;
    for (int i = 0; i < 60; ++i) grown = grown.append(token.key, token.value);
    EXPECT_EQ(grown.length(), 64);
    EXPECT_EQ(grown.bytes(), context.bytes());
    EXPECT_GT(grown.append(token.key, token.value).bytes(), context.bytes());
  }
}

TEST_P(ContextValuesTest, AppendedKeysBehindHostLengthsAreNeverRead) {
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  CrossAttention module(options_of());
  for (const auto order : kAllOrders) {
    const auto frozen = module->freeze({.plan = PlanMode::pin({order, order})});
    const auto query = torch::randn({kB, kLq, 9});
    const auto mask = Mask::lengths(torch::tensor({4, 0, 2}), 6);
    auto part = draw_part(6, 0);
    part.allowed = (torch::arange(6) < torch::tensor({4, 0, 2}).unsqueeze(1)).view({kB, 1, 1, 6}).expand({kB, kH, kLq, 6});
    const auto expected = exact(module, query, whole({part, part}));
    const auto spoilt = [&](const Tensor& x) {
      return x.masked_fill(part.allowed.select(1, 0).select(1, 0).unsqueeze(2).logical_not(), nan);
    };
    const auto key = spoilt(part.key), value = spoilt(part.value);
    const auto context = frozen.context(key, value, mask, {.expected_queries = 20, .capacity = 30});
    expect_equal(frozen.attend(query, context.append(key, value, mask)), expected, "appended");
    expect_equal(frozen.attend(query, FrozenContext::join({context, context})), expected, "joined");
  }
}

TEST_P(ContextValuesTest, EntriesAreSelectedByTheSignedNumbersOfANegatedView) {
  const auto x = torch::randn({2, 3, 8}, of(torch::kFloat));
  CrossAttention module(8, 8, 8, 8);
  module->to(GetParam());
  const auto indices = at::_neg_view(torch::tensor({0, -1})), same = torch::tensor({0, 1});
  const auto frozen = module->freeze();
  const auto context = frozen.context(x, x);
  EXPECT_TRUE(
      std::get<0>(frozen.attend(x, context.select(indices))).equal(std::get<0>(frozen.attend(x, context.select(same)))));
}

TEST_P(ContextValuesTest, EntriesAreSelectedFromAContextWithoutKeys) {
  auto module = module_in({});
  const auto frozen = module->freeze({.plan = PlanMode::standard});
  const auto part = draw_part(4, 0, of(torch::kFloat));
  const auto none = frozen.context(part.key.narrow(1, 0, 0), part.value.narrow(1, 0, 0), {}, {.capacity = 20});
  const auto beams = torch::tensor({1, 1, 0});
  const auto query = torch::randn({3, kLq, 9}, of(torch::kFloat));
  const auto pick = [&](const Tensor& x) { return x.index_select(0, beams.to(x.device())); };
  const auto expected = frozen.forward(query, pick(part.key), pick(part.value));
  expect_equal(frozen.attend(query, none.select(beams).append(pick(part.key), pick(part.value))), expected, "appended");
}

TEST_P(ContextValuesTest, ContextsMadeUnderInferenceModeGrowOutsideOfIt) {
  auto module = module_in({});
  const auto frozen = module->freeze({.plan = PlanMode::standard});
  const auto part = draw_part(4, 0, of(torch::kFloat));
  Context context;
  FrozenContext of_frozen;
  {
    const c10::InferenceMode inference;
    context = module->context(part.key, part.value, {}, {.capacity = 20});
    of_frozen = frozen.context(part.key, part.value, {}, {.capacity = 20});
  }
  const torch::NoGradGuard no_grad;
  const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
  const auto expected = exact(module, query, whole({part, part}));
  expect_equal(module->attend(query, context.append(part.key, part.value)), expected, "module");
  expect_equal(frozen.attend(query, of_frozen.append(part.key, part.value)), expected, "frozen");
}

// ---- Threads ---------------------------------------------------------------------------------------------------------------

TEST(ContextThreadsTest, SeveralThreadsAppendToOneContextAndEachGetsItsOwnKeys) {
  torch::manual_seed(0);
  CrossAttention module(options_of());
  const auto frozen = module->freeze({.plan = PlanMode::standard});
  const auto query = torch::randn({kB, kLq, 9});
  const auto part = draw_part(5, 0);
  constexpr size_t kThreads = 4;
  const auto own = draw_parts(std::vector<int64_t>(kThreads, 3));
  const torch::NoGradGuard no_grad;
  std::vector<std::tuple<Tensor, Tensor>> expected;
  for (const auto& each : own) expected.push_back(exact(module, query, whole({part, each})));
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto context = module->context(part.key, part.value, {}, {.capacity = 50});
    const auto of_frozen = frozen.context(part.key, part.value, {}, {.capacity = 50});
    std::vector<std::tuple<Tensor, Tensor>> found(kThreads), found_frozen(kThreads);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        const torch::NoGradGuard no_grad_here;
        found[i] = module->attend(query, context.append(own[i].key, own[i].value, own[i].mask));
        found_frozen[i] = frozen.attend(query, of_frozen.append(own[i].key, own[i].value, own[i].mask));
      });
    }
    for (auto& thread : threads) thread.join();
    for (size_t i = 0; i < kThreads; ++i) {
      expect_equal(found[i], expected[i], "module");
      expect_equal(found_frozen[i], expected[i], "frozen");
    }
  }
}

// ---- Decoding --------------------------------------------------------------------------------------------------------------

TEST(DecodingTest, CausalSelfAttentionTokenByTokenEqualsAllAtOnce) {
  torch::manual_seed(0);
  constexpr int64_t L = 40;
  CrossAttention module(CrossAttentionOptions(16, 16, 16, 16).num_heads(4));
  const auto frozen = module->freeze();
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, L, 16});
  const auto causal = Mask::causal(CausalAlignment::lower_right);
  const auto expected =
      std::get<0>(double_copy(module)->forward(x.to(torch::kDouble), x.to(torch::kDouble), x.to(torch::kDouble), causal));
  const auto none = x.narrow(1, 0, 0);
  auto context = module->context(none, none, causal, {.capacity = L});
  auto of_frozen = frozen.context(none, none, causal, {.capacity = L});
  std::vector<Tensor> outputs, of_frozen_outputs;
  for (int64_t i = 0; i < L; ++i) {
    const auto token = x.narrow(1, i, 1);
    context = context.append(token, token);
    of_frozen = of_frozen.append(token, token);
    outputs.push_back(std::get<0>(module->attend(token, context)));
    of_frozen_outputs.push_back(std::get<0>(frozen.attend(token, of_frozen)));
  }
  expect_close(torch::cat(outputs, 1), expected, kAllowed, "module");
  expect_close(torch::cat(of_frozen_outputs, 1), expected, kAllowed, "frozen");
}

// A decoder of two layers: self-attention with the norm of its block, then cross attention to one memory for all beams.
struct TwoLayerDecoder {
  static constexpr int64_t kE = 12, kBeams = 3, kTokens = 10;

  explicit TwoLayerDecoder(NormPlacement placement) {
    const auto attention = CrossAttentionOptions(kE, kE, kE, kE).num_heads(3);
    for (int i = 0; i < 2; ++i) {
      self.emplace_back(CrossAttentionBlockOptions(attention).norm_context(true).feed_forward(0).norm_placement(placement));
      cross.emplace_back(CrossAttentionBlockOptions(attention).feed_forward(20).norm_placement(placement));
      for (auto block : {self.back(), cross.back()}) {
        block->to(torch::kDouble);
        torch::nn::init::normal_(block->attention_norm->weight, 1, 0.3);
      }
    }
  }
  std::vector<CrossAttentionBlock> self, cross;
};

TEST(DecodingTest, TenTokensThroughTwoLayersWithReorderedBeamsEqualAllAtOnce) {
  torch::manual_seed(0);
  for (const auto placement : {NormPlacement::before, NormPlacement::after}) {
    TwoLayerDecoder decoder(placement);
    const torch::NoGradGuard no_grad;
    constexpr auto E = TwoLayerDecoder::kE, beams = TwoLayerDecoder::kBeams, tokens = TwoLayerDecoder::kTokens;
    const auto memory = torch::randn({2, 7, E}, torch::kDouble);
    const auto causal = Mask::causal(CausalAlignment::lower_right);
    const auto nothing = torch::zeros({2 * beams, 0, E}, torch::kDouble);
    std::vector<Context> own, shared;
    for (int i = 0; i < 2; ++i) {
      own.push_back(decoder.self[i]->context(nothing, nothing, causal, {.capacity = 8}));
      shared.push_back(decoder.cross[i]->context(memory, memory));
    }
    auto history = nothing;  // the tokens of each beam so far
    for (int64_t step = 0; step < tokens; ++step) {
      const auto token = torch::randn({2 * beams, 1, E}, torch::kDouble);
      history = torch::cat({history, token}, 1);
      auto x = token;
      for (int i = 0; i < 2; ++i) {
        own[i] = own[i].append(x, x);
        x = std::get<0>(decoder.self[i]->attend(x, own[i]));
        x = std::get<0>(decoder.cross[i]->attend(x, shared[i]));
      }
      auto y = history;
      for (int i = 0; i < 2; ++i) {
        y = std::get<0>(decoder.self[i]->forward(y, y, y, causal));
        const auto repeated = memory.repeat_interleave(beams, 0);
        y = std::get<0>(decoder.cross[i]->forward(y, repeated, repeated));
      }
      expect_close(x, y.narrow(1, step, 1), 1e-11, "step " + std::to_string(step));
      const auto kept = torch::cat({torch::randint(beams, {beams}), torch::randint(beams, 2 * beams, {beams})});
      history = history.index_select(0, kept);
      for (auto& context : own) context = context.select(kept);
    }
  }
}

// ---- Shared contexts -------------------------------------------------------------------------------------------------------

TEST_P(ContextValuesTest, SharedContextsKeepTheCallersTensorsInOrdersThatReadThem) {
  CrossAttention module(CrossAttentionOptions(9, 33, 33, 22).num_heads(2).head_dim(6).value_head_dim(5));
  module->to(GetParam());
  const auto x = torch::randn({kB, 50, 33}, of(torch::kFloat)), other = torch::randn({kB, 50, 33}, of(torch::kFloat));
  const auto query = torch::randn({kB, kLq, 9}, of(torch::kFloat));
  for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{40}, int64_t{5000}, ContextOptions::kMany}) {
    const ContextOptions how{.expected_queries = rows, .share = true};
    for (const auto& value : {x, other}) {
      const auto expected =
          double_copy(module)->forward(query.to(torch::kDouble), x.to(torch::kDouble), value.to(torch::kDouble));
      const auto context = module->context(x, value, {}, how);
      EXPECT_TRUE(context.key().is_same(x));
      EXPECT_TRUE(context.value().is_same(value));
      expect_equal(module->attend(query, context), expected, "module");
      const auto frozen = module->freeze();
      const auto of_frozen = frozen.context(x, value, {}, how);
      EXPECT_EQ(of_frozen.bytes(), 0);
      expect_equal(frozen.attend(query, of_frozen), expected, "frozen");
      EXPECT_GT(of_frozen.append(x, value).bytes(), 0) << "a longer context is a copy";
      EXPECT_EQ(of_frozen.slice(0, 1).bytes(), 0);
    }
  }
  const auto empty = x.narrow(1, 0, 0);
  EXPECT_EQ(std::get<0>(module->attend(query, module->context(empty, empty, {}, {.share = true}))).sizes(),
            (std::vector<int64_t>{kB, kLq, 22}));
}

TEST(SharedContextOptionsTest, WhereKeysCannotStayAsTheyAreAreRefused) {
  const auto x = torch::randn({2, 5, 8});
  const ContextOptions share{.share = true};
  const std::string refusal = " share must be left out if a layer cannot read keys and values as given, but is set: ";
  const auto make = [](const CrossAttentionOptions& options) { return CrossAttention(options); };
  const CrossAttentionOptions plain(8, 8, 8, 8);
  const auto message = [&](const CrossAttentionOptions& options) {
    auto module = make(options);
    const auto error = error_of<c10::ValueError>([&] { (void)module->context(x, x, {}, share); });
    EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->freeze().context(x, x, {}, share); }),
              "[frozen]" + error.substr(error.find(']') + 1));
    return error;
  };
  EXPECT_EQ(message(CrossAttentionOptions(plain).qk_norm(NormKind::rms)),
            "[cross_attention]" + refusal + "a norm of the key follows Wk.");
  EXPECT_EQ(message(CrossAttentionOptions(plain).bias_kv(true)),
            "[cross_attention]" + refusal + "bias_kv adds a key that no projection made.");
  EXPECT_EQ(message(CrossAttentionOptions(plain).plan(PlanMode::standard)),
            "[cross_attention]" + refusal + "the plan or autocast fixes another order.");
  auto module = make(plain);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->context(x, x, {}, {.capacity = 9, .share = true}); }),
            "[cross_attention] capacity must be 0 for a shared context, but is 9.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->context(x, x, {}, {.capacity = -1}); }),
            "[cross_attention] capacity must not be negative, but is -1.");
  constexpr auto kHuge = std::numeric_limits<int64_t>::max();
  const std::string too_large = " capacity must be at most 1099511627776, but is 9223372036854775807.";
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->context(x, x, {}, {.capacity = kHuge}); }),
            "[cross_attention]" + too_large);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->freeze().context(x, x, {}, {.capacity = kHuge}); }),
            "[frozen]" + too_large);
  const auto strided = torch::randn({2, 8, 5}).transpose(1, 2);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)module->freeze().context(strided, x, {}, share); }),
            "[frozen] key must be contiguous to be shared, but has strides [40, 1, 5].");
  EXPECT_FALSE(module->context(strided, x, {}, share).key().is_contiguous()) << "a module reads any strides";
}

TEST(SharedContextOptionsTest, AreRefusedForAnyNumberOfQueriesByLayersThatMustProjectTheirKeys) {
  const CrossAttentionOptions sizes[] = {{8, 8, 8, 8}, {16, 40, 48, 1}, {128, 40, 16, 16}};
  for (const auto& options : sizes) {
    const auto key = torch::randn({1, 6, options.dim_key()}), value = torch::randn({1, 6, options.dim_value()});
    for (auto changed :
         {CrossAttentionOptions(options).qk_norm(NormKind::layer), CrossAttentionOptions(options).bias_kv(true)}) {
      CrossAttention module(changed.num_heads(8).head_dim(16));
      DecoupledCrossAttention decoupled{DecoupledCrossAttentionOptions(changed)};
      const auto frozen = module->freeze();
      for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{5}, int64_t{100'000}, ContextOptions::kMany}) {
        const ContextOptions how{.expected_queries = rows, .share = true};
        const std::function<void()> calls[] = {[&] { (void)module->context(key, value, {}, how); },
                                               [&] { (void)frozen.context(key, value, {}, how); },
                                               [&] { (void)decoupled->context(key, value, {}, how); }};
        for (const auto& call : calls) {
          EXPECT_NE(error_of<c10::ValueError>(call).find("share must be left out"), std::string::npos) << rows;
        }
      }
    }
  }
}

TEST(SharedContextOptionsTest, AreRefusedByABlockThatNormalisesItsKeys) {
  const CrossAttentionBlockOptions plain(CrossAttentionOptions(8, 8, 8, 8));
  const auto x = torch::randn({2, 5, 8});
  const ContextOptions share{.expected_queries = 1, .share = true};
  CrossAttentionBlock block(CrossAttentionBlockOptions(plain).norm_context(true));
  const std::string refusal =
      " share must be left out if a layer cannot read keys and values as given, but is set: norm_context normalises them.";
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)block->context(x, x, {}, share); }), "[cross_attention_block]" + refusal);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)block->freeze().context(x, x, {}, share); }), "[frozen_block]" + refusal);
  for (auto reads :
       {CrossAttentionBlockOptions(plain), CrossAttentionBlockOptions(plain).norm(NormKind::none).norm_context(true)}) {
    EXPECT_TRUE(CrossAttentionBlock(reads)->context(x, x, {}, share).key().is_same(x));
  }
}

TEST(JoinedContextsTest, OfDifferentLengthsFitWithEqualExpectedQueriesAndCapacity) {
  torch::manual_seed(0);
  CrossAttention module(CrossAttentionOptions(64, 16, 16, 16).num_heads(4).head_dim(4).value_head_dim(5));
  const torch::NoGradGuard no_gradients;
  const auto frozen = module->freeze();
  const auto first = torch::randn({2, 1, 16}), second = torch::randn({2, 150, 16}), query = torch::randn({2, 3, 64});
  const auto all = torch::cat({first, second}, 1);
  const auto expected = std::get<0>(module->forward(query, all, all));
  bool are_refused = false;
  for (const int64_t rows : {1, 5, 30, 1000}) {
    for (const int64_t capacity : {0, 150}) {
      const ContextOptions how{.expected_queries = rows, .capacity = capacity};
      const auto a = module->context(first, first, {}, how), b = module->context(second, second, {}, how);
      const auto c = frozen.context(first, first, {}, how), d = frozen.context(second, second, {}, how);
      if (a.orders() == b.orders()) {
        expect_close(std::get<0>(module->attend(query, Context::join({a, b}))), expected, kAllowed, "module");
      } else {
        are_refused = true;
        EXPECT_EQ(capacity, 0) << "equal capacities make one order";
        EXPECT_NE(error_of<c10::ValueError>([&] { (void)Context::join({a, b}); }).find("contexts must be in one order"),
                  std::string::npos);
      }
      if (c.orders() == d.orders()) {
        expect_close(std::get<0>(frozen.attend(query, FrozenContext::join({c, d}))), expected, kAllowed, "frozen");
      } else {
        are_refused = true;
        EXPECT_EQ(capacity, 0) << "equal capacities make one order";
        EXPECT_EQ(error_of<c10::ValueError>([&] { (void)FrozenContext::join({c, d}); }),
                  "[frozen] contexts must be in one order to be joined, but they differ. Make them for the same "
                  "expected_queries and capacity.");
      }
    }
  }
  EXPECT_TRUE(are_refused) << "otherwise this test shows nothing of orders that differ";
}

TEST(ContextOfABlockTest, IsRefusedByAttentionThatDoesNotApplyItsNorm) {
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(8, 8, 8, 8).num_heads(2)).norm_context(true));
  const auto x = torch::randn({2, 5, 8});
  for (const int64_t rows : {int64_t{1}, ContextOptions::kMany}) {
    const auto context = block->context(x, x, {}, {.expected_queries = rows});
    EXPECT_EQ(
        error_of<c10::ValueError>([&] { block->attention->attend(x, context); }),
        "[cross_attention] context must be made with the weights that attend to it, but they are another module's, or have "
        "changed since. Make the context again.");
    EXPECT_TRUE(std::get<0>(block->attend(x, context)).defined());
  }
}

TEST(SharedContextOptionsTest, AContextThatGrowsIsPlannedForItsCapacityAndNeverFolded) {
  const auto frozen = CrossAttention(CrossAttentionOptions(8, 64, 64, 8).num_heads(2).head_dim(64))->freeze();
  const auto few = torch::randn({1, 4, 64});
  const auto is_kept = frozen.context(few, few).orders();
  EXPECT_TRUE(is_folded(is_kept)) << "otherwise this test shows nothing";
  EXPECT_FALSE(is_folded(frozen.context(few, few, {}, {.capacity = 5}).orders()));
}

// ---- Bad input -------------------------------------------------------------------------------------------------------------

TEST(EmptyContextTest, EveryUseOfAnEmptyContextOrFrozenLayerIsAnError) {
  const Context context;
  const FrozenContext of_frozen;
  const Frozen frozen;
  CrossAttention module(options_of());
  const auto x = torch::randn({1, 2, 9}), key = torch::randn({1, 2, 33}), value = torch::randn({1, 2, 17});
  const std::vector<std::function<void()>> of_context = {
      [&] { (void)context.orders(); },         [&] { (void)context.key(); },
      [&] { (void)context.value(); },          [&] { (void)context.mask(); },
      [&] { (void)context.is_batched(); },     [&] { (void)context.batch_size(); },
      [&] { (void)context.length(); },         [&] { (void)context.append(key, value); },
      [&] { (void)context.truncate(0); },      [&] { (void)context.select(torch::tensor({0})); },
      [&] { (void)Context::join({context}); }, [&] { module->attend(x, context); }};
  for (const auto& use : of_context) {
    EXPECT_EQ(error_of<c10::ValueError>(use), "[context] context must be made by a module, but is empty.");
  }
  const auto made = module->freeze();
  const std::vector<std::function<void()>> of_frozen_context = {[&] { (void)of_frozen.orders(); },
                                                                [&] { (void)of_frozen.mask(); },
                                                                [&] { (void)of_frozen.is_batched(); },
                                                                [&] { (void)of_frozen.batch_size(); },
                                                                [&] { (void)of_frozen.length(); },
                                                                [&] { (void)of_frozen.bytes(); },
                                                                [&] { (void)of_frozen.slice(0, 1); },
                                                                [&] { (void)of_frozen.to(torch::kCPU); },
                                                                [&] { (void)of_frozen.append(key, value); },
                                                                [&] { (void)of_frozen.truncate(0); },
                                                                [&] { (void)of_frozen.select(torch::tensor({0})); },
                                                                [&] { (void)FrozenContext::join({of_frozen}); },
                                                                [&] { (void)FrozenContext::cat({of_frozen}); },
                                                                [&] { made.attend(x, of_frozen); }};
  for (const auto& use : of_frozen_context) {
    EXPECT_EQ(error_of<c10::ValueError>(use), "[frozen] context must be made by Frozen::context, but is empty.");
  }
  const auto its_context = made.context(key, value);
  const std::vector<std::function<void()>> of_layer = {
      [&] { frozen.forward(x, key, value); }, [&] { frozen.forward(key, value); }, [&] { (void)frozen.context(key, value); },
      [&] { frozen.attend(x, its_context); }, [&] { frozen.attend(its_context); }, [&] { (void)frozen.explain(1, 1, 1); },
      [&] { (void)frozen.orders(1, 1, 1); },  [&] { (void)frozen.options(); },     [&] { (void)frozen.uses_kernels(); }};
  for (const auto& use : of_layer) {
    EXPECT_EQ(error_of<c10::ValueError>(use), "[frozen] layer must be made by CrossAttention::freeze, but is empty.");
  }
}

TEST(ContextErrorsTest, PartsThatDoNotFitAreRefused) {
  torch::manual_seed(0);
  CrossAttention module(options_of()), other(options_of());
  const auto frozen = module->freeze(), other_frozen = module->freeze();
  const auto part = draw_part(5, 0);
  const auto context = module->context(part.key, part.value);
  const auto of_frozen = frozen.context(part.key, part.value);
  const auto first = [](const Tensor& x) { return x.narrow(0, 0, 1); };
  const auto join_with = [&](const Context& with) {
    return error_of<c10::ValueError>([&] { (void)Context::join({context, with}); });
  };
  EXPECT_EQ(error_of<c10::ValueError>([] { (void)Context::join({}); }),
            "[context] contexts must be at least one, but are none.");
  EXPECT_EQ(join_with(other->context(part.key, part.value)),
            "[context] contexts must be made by one layer with the same weights, but they differ.");
  EXPECT_EQ(join_with(module->context(first(part.key), first(part.value))),
            "[context] contexts must have one batch, but have 3 and 1 entries.");
  module->options.plan(PlanMode::pin({Order::fold_into_query, Order::standard}));
  EXPECT_EQ(
      join_with(module->context(part.key, part.value, {}, {.expected_queries = 3})),
      "[context] contexts must be in one order, but are in standard, standard and in fold_into_query, standard. Make them "
      "for the same expected_queries and capacity.");
  EXPECT_EQ(error_of<c10::ValueError>([] { (void)FrozenContext::join({}); }),
            "[frozen] contexts must be at least one, but are none.");
  EXPECT_EQ(
      error_of<c10::ValueError>([&] { (void)FrozenContext::join({of_frozen, other_frozen.context(part.key, part.value)}); }),
      "[frozen] contexts must be of one Frozen, batch and device to be joined, but they differ.");
  const auto long_mask = Mask::lengths(torch::tensor({1, 2, 3}), 4);
  for (const auto& [caller, function] :
       std::vector<std::pair<std::string, std::function<void(const Tensor&, const Tensor&, const Mask&)>>>{
           {"[context]", [&](const auto& k, const auto& v, const Mask& m) { (void)context.append(k, v, m); }},
           {"[frozen]", [&](const auto& k, const auto& v, const Mask& m) { (void)of_frozen.append(k, v, m); }}}) {
    const auto& append = function;  // Clang before 16 lets no lambda capture a structured binding
    EXPECT_EQ(error_of<c10::ValueError>([&] { append(first(part.key), first(part.value), {}); }),
              caller + " key must be a batch of 3, as the context, but is a batch of 1.");
    EXPECT_EQ(error_of<c10::ValueError>([&] { append(part.value, part.value, {}); }),
              caller + " key must have shape [B, Lk, 33], but has [3, 5, 17].");
    EXPECT_EQ(error_of<c10::TypeError>([&] { append(part.key.to(torch::kDouble), part.value, {}); }),
              caller + " key must be float32, the type of the parameters, but is float64.");
    EXPECT_NE(error_of<c10::ValueError>([&] { append(part.key, part.value, long_mask); }).find(caller), std::string::npos);
    EXPECT_EQ(error_of<c10::ValueError>([&] { append(part.key, part.value, Mask::causal(CausalAlignment::upper_left)); }),
              "[mask] masks must have the same causal part to be joined, because it counts over all keys, but they differ.");
  }
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)context.truncate(6); }),
            "[context] n must lie in [0, 5], the length of the context, but is 6.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)of_frozen.truncate(-1); }),
            "[frozen] n must lie in [0, 5], the length of the context, but is -1.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)context.select(torch::tensor({0, 3})); }),
            "[context] indices must lie in [0, 3), but hold 3.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)of_frozen.select(torch::tensor({-1})); }),
            "[frozen] indices must lie in [0, 3), but hold -1.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)context.select(torch::zeros({1, 1}, torch::kLong)); }),
            "[context] indices must have shape [n], but have [1, 1].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { (void)context.select(torch::zeros({1})); }),
            "[context] indices must be of an integer type, but are float32.");
  const auto rows = [](int64_t Lq) { return Mask::dense(torch::ones({Lq, 5}, torch::kBool)); };
  EXPECT_EQ(
      error_of<c10::ValueError>([&] {
        (void)Context::join({module->context(part.key, part.value, rows(2)), module->context(part.key, part.value, rows(4))});
      }),
      "[mask] masks must have one size on all axes but the keys to be joined, but have shapes [1, 1, 2, 5] and [1, 1, 4, 5].");
}

// Sizes that the weights fit as well would be read out of bounds.
TEST(ContextErrorsTest, AContextIsOfTheHeadsAndEpsilonsThatItWasMadeWith) {
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 6, 16});
  const auto refused = [](const auto& attend) {
    const auto error = error_of<c10::ValueError>(attend);
    EXPECT_NE(error.find("context must be made with the weights that attend to it"), std::string::npos) << error;
  };
  using enum Order;
  for (const auto orders :
       {Orders{standard, standard}, Orders{fold_into_context, standard}, Orders{standard, fold_into_context}}) {
    CrossAttention module(CrossAttentionOptions(16, 16, 16, 32).num_heads(4).plan(PlanMode::pin(orders)));
    const auto context = module->context(x, x);
    module->options.num_heads(8).kv_heads(8).head_dim(4).value_head_dim(4);
    refused([&] { module->attend(x, context); });
  }
  CrossAttention normed(CrossAttentionOptions(16, 16, 16, 32).num_heads(4).qk_norm(NormKind::rms));
  const auto of_normed = normed->context(x, x);
  normed->options.qk_norm_eps(0.1);
  for (auto* norm : {&normed->query_norm, &normed->key_norm}) (*norm)->options.eps(0.1);
  refused([&] { normed->attend(x, of_normed); });
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(16, 16, 16, 16)).norm_context(true));
  const auto of_block = block->context(x, x);
  block->options.norm_eps(0.1);
  for (auto* norm : {&block->attention_norm, &block->feed_forward_norm}) (*norm)->options.eps(0.1);
  refused([&] { block->attend(x, of_block); });
}

TEST(ContextErrorsTest, AContextIsNotOfWeightsThatWereMovedAwayAndBack) {
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 3, 8});
  CrossAttention module(8, 8, 8, 8);
  const auto context = module->context(x, x);
  for (int i = 0; i < 100; ++i) {
    module->to(torch::kBFloat16);
    module->to(torch::kFloat);
    ASSERT_NE(error_of<c10::ValueError>([&] { module->attend(x, context); }), "") << "the allocator gave the same memory";
  }
}

TEST(ContextOfAPlanTest, APinnedPlanIsObeyedForAnyNumberOfQueries) {
  const auto x = torch::randn({2, 3, 8});
  for (const auto order : {Order::standard, Order::fold_into_query, Order::fold_into_context}) {
    const Orders orders{order, order};
    CrossAttention module(CrossAttentionOptions(8, 8, 8, 8).num_heads(2).plan(PlanMode::pin(orders)));
    EXPECT_EQ(module->context(x, x).orders(), orders);
  }
  EXPECT_EQ(CrossAttention(8, 8, 8, 8)->context(x, x).orders(), Orders{});
}

TEST(ContextErrorsTest, NothingIsAppendedAfterTheWeightsOrTheNormHaveChanged) {
  torch::manual_seed(0);
  const auto x = torch::randn({2, 3, 8});
  const std::string changed =
      "[context] context must be made with the weights that attend to it, but they are another module's, or have changed "
      "since. "
      "Make the context again.";
  CrossAttention module(8, 8, 8, 8);
  const auto context = module->context(x, x);
  CrossAttentionBlock block(CrossAttentionBlockOptions(CrossAttentionOptions(8, 8, 8, 8)).norm_context(true));
  const auto of_block = block->context(x, x);
  const torch::NoGradGuard no_grad;
  module->key_linear->weight.add_(1);
  block->attention_norm->weight.add_(1);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)context.append(x, x); }), changed);
  EXPECT_EQ(error_of<c10::ValueError>([&] { (void)of_block.append(x, x); }), changed);
}

}  // namespace
}  // namespace xattn::test
