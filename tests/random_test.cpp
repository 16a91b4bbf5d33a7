// SPDX-License-Identifier: Apache-2.0
#include <random>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/attention.h>
#include <xattn/cross_attention.h>
#include <xattn/decoupled.h>
#include <xattn/frozen.h>
#include <xattn/frozen_decoupled.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "one_thread.h"
#include "plan/order_traits.h"

#ifndef XATTN_NO_DISTRIBUTED
#include <xattn/distributed.h>

#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#endif

// Random layers, masks, types, orders and paths, the same in every run, each against a definition in float64 that is written
// out here: a path that forgets an option has no chance to agree with it.
namespace xattn::test {
namespace {

using torch::Tensor;

// Draws the parts of a case from its number.
class Draw {
 public:
  explicit Draw(unsigned number) : engine_(number) { torch::manual_seed(number); }

  template <class T>
  T of(const std::vector<T>& all) {
    return all[static_cast<size_t>(std::uniform_int_distribution<int64_t>(0, std::ssize(all) - 1)(engine_))];
  }
  int64_t number(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }

 private:
  std::mt19937 engine_;
};

struct Sizes {
  int64_t B, H, Lq, Lk;
};

// A mask, and its meaning written out: the allowed keys, and the biases.
struct Restrictions {
  Mask mask;
  Tensor allowed;              // bool [B, H, Lq, Lk]
  std::vector<Tensor> biases;  // four axes each
  Tensor learned;              // the bias among them that requires a gradient

  // The sum of the biases for logits of a type, in float64: added in float32 at least; -inf in that type forbids.
  Tensor added(at::ScalarType type, const Sizes& s) const {
    const auto wide = type == torch::kDouble ? torch::kDouble : torch::kFloat;
    auto sum = torch::zeros({s.B, s.H, s.Lq, s.Lk}, wide);
    for (const auto& bias : biases) sum = sum + bias.to(wide);
    return sum.masked_fill(sum.detach().to(type).isinf(), -kInfinity).to(torch::kDouble);
  }
};

Restrictions draw_restrictions(Draw& draw, const Sizes& s, bool may_learn) {
  const auto& [B, H, Lq, Lk] = s;
  Restrictions r{{}, torch::ones({B, H, Lq, Lk}, torch::kBool), {}, {}};
  const auto axis = [&](int64_t size) { return draw.chance(0.5) ? size : 1; };
  if (draw.chance(0.3)) {
    const auto lengths = torch::randint(draw.chance(0.5) ? 0 : std::min<int64_t>(1, Lk), Lk + 1, {axis(B)}, torch::kLong);
    r.mask = r.mask & Mask::lengths(lengths, Lk);
    r.allowed = r.allowed & (torch::arange(Lk) < lengths.view({-1, 1, 1, 1}));
  }
  if (draw.chance(0.2)) {
    const auto valid = torch::rand({axis(B), Lk}) < 0.7;
    r.mask = r.mask & Mask::key_padding(valid);
    r.allowed = r.allowed & valid.unsqueeze(1).unsqueeze(1);
  }
  if (draw.chance(0.2)) {
    const auto keep = torch::rand({axis(B), axis(H), axis(Lq), Lk}) < 0.6;
    r.mask = r.mask & Mask::dense(keep);
    r.allowed = r.allowed & keep;
  }
  for (int i = 0; i < 2; ++i) {
    if (!draw.chance(0.25)) continue;
    const auto type = draw.of<at::ScalarType>({torch::kDouble, torch::kFloat, torch::kHalf});
    const std::vector<int64_t> shape = {axis(B), axis(H), axis(Lq), Lk};
    auto bias = torch::randn(shape, torch::kDouble);
    if (draw.chance(0.5)) {
      const auto least =
          draw.of<double>({-kInfinity, std::numeric_limits<double>::lowest(), std::numeric_limits<float>::lowest()});
      const auto entries = draw.chance(0.5) ? torch::rand(shape) < 0.4 : torch::rand({shape[0], shape[1], shape[2], 1}) < 0.3;
      bias = bias.masked_fill(entries, least);
    }
    bias = bias.to(type);
    if (may_learn && draw.chance(0.4)) r.learned = bias.requires_grad_();
    if (draw.chance(0.2)) bias = at::_neg_view(-bias);
    r.mask = r.mask & Mask::bias(bias);
    r.biases.push_back(bias);
  }
  for (const auto alignment : {CausalAlignment::upper_left, CausalAlignment::lower_right}) {
    if (!draw.chance(0.1)) continue;
    const auto last = torch::arange(Lq).unsqueeze(1) + (alignment == CausalAlignment::lower_right ? Lk - Lq : 0);
    r.mask = r.mask & Mask::causal(alignment);
    r.allowed = r.allowed & (torch::arange(Lk) <= last);
  }
  return r;
}

// softmax over the keys that are allowed; zeros in a row that has none.
Tensor softmax_by_definition(const Tensor& logits, const Tensor& allowed) {
  const auto forbidden = ~allowed | logits.isneginf();
  const auto empty = forbidden.all(-1, /*keepdim=*/true);
  return torch::softmax(logits.masked_fill(forbidden, -kInfinity).masked_fill(empty, 0), -1).masked_fill(forbidden, 0);
}

struct Result {
  Tensor output, weights;  // weights of all heads, or as requested
};

// q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e], all in float64.
Result attention_by_definition(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& allowed, const Tensor& added) {
  const auto group = q.size(1) / k.size(1);
  const auto logits = scale * torch::matmul(q, k.repeat_interleave(group, 1).transpose(2, 3)) + added;
  const auto weights = softmax_by_definition(logits, allowed);
  return {torch::matmul(weights, v.repeat_interleave(group, 1)), weights};
}

Tensor as_wanted(const Tensor& weights, AttentionWeights wanted, const std::vector<int64_t>& heads) {
  if (wanted == AttentionWeights::none) return {};
  if (wanted == AttentionWeights::mean) return weights.mean(1);
  return heads.empty() ? weights : weights.index_select(1, torch::tensor(heads));
}

// A layer by its parameters, in float64.
Result layer_by_definition(const CrossAttentionOptions& o,
                           const NamedTensors& p,
                           const Tensor& query,
                           const Tensor& key,
                           const Tensor& value,
                           const Tensor& allowed,
                           const Tensor& added) {
  const auto find = [&](const std::string& name) {
    const auto found = p.find(name);
    return found == p.end() ? Tensor() : found->second;
  };
  const auto project = [&](const std::string& name, const Tensor& x) {
    const auto y = torch::matmul(x, find(name + ".weight").t()), bias = find(name + ".bias");
    return bias.defined() ? y + bias : y;
  };
  const auto normalise = [&](const std::string& name, const Tensor& x) {
    const auto weight = find(name + ".weight"), bias = find(name + ".bias");
    const auto centred = o.qk_norm() == NormKind::layer ? x - x.mean(-1, /*keepdim=*/true) : x;
    const auto y = centred / (centred.square().mean(-1, /*keepdim=*/true) + o.qk_norm_eps()).sqrt() * weight;
    return bias.defined() ? y + bias : y;
  };
  const auto heads_of = [&](const std::string& side, Tensor x, int64_t n, int64_t size) {
    const bool has_norm = o.qk_norm() != NormKind::none && side != "value";
    if (has_norm && o.qk_norm_scope() == NormScope::across_heads) x = normalise(side + "_norm", x);
    x = x.view({x.size(0), x.size(1), n, size});
    if (has_norm && o.qk_norm_scope() == NormScope::per_head) x = normalise(side + "_norm", x);
    return x.transpose(1, 2);
  };
  const auto H = o.num_heads(), G = *o.kv_heads(), d = *o.head_dim(), e = *o.value_head_dim();
  const auto q = heads_of("query", project("query_linear", query), H, d);
  auto k = heads_of("key", project("key_linear", key), G, d), v = heads_of("value", project("value_linear", value), G, e);
  auto all_allowed = allowed, all_added = added;
  if (o.bias_kv()) {
    const auto with = [&](const Tensor& x, const Tensor& bias, int64_t size) {
      return torch::cat({x, bias.view({1, G, 1, size}).expand({x.size(0), -1, -1, -1})}, 2);
    };
    k = with(k, find("bias_k"), d), v = with(v, find("bias_v"), e);
    all_allowed = torch::constant_pad_nd(allowed, {0, 1}, 1), all_added = torch::constant_pad_nd(added, {0, 1}, 0);
  }
  const auto [mixed, weights] = attention_by_definition(q, k, v, *o.scale(), all_allowed, all_added);
  return {project("output_linear", mixed.transpose(1, 2).flatten(2)),
          as_wanted(weights, o.attention_weights(), o.weight_heads())};
}

Tensor wide(const Tensor& x) {
  return x.detach().to(torch::kDouble).clone().requires_grad_();
}

// All gradients of one number as one row, zeros where there is none, after a one: gradients that are zero but for rounding are
// then compared on the scale of all, or of inputs and cotangents.
Tensor gradients_of(const std::vector<Tensor>& outputs,
                    const std::vector<Tensor>& cotangents,
                    const std::vector<Tensor>& inputs) {
  auto loss = torch::zeros({}, torch::dtype(torch::kDouble));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].defined()) loss = loss + (outputs[i].to(torch::kDouble) * cotangents[i]).sum();
  }
  std::vector<Tensor> all = {torch::ones({1}, torch::kDouble)};
  const auto gradients = torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/false,
                                               /*allow_unused=*/true);
  for (size_t i = 0; i < inputs.size(); ++i) {
    all.push_back((gradients[i].defined() ? gradients[i] : torch::zeros_like(inputs[i])).flatten().to(torch::kDouble));
  }
  return torch::cat(all);
}

std::vector<Tensor> cotangents_of(const Result& result) {
  std::vector<Tensor> all = {torch::randn(result.output.sizes(), torch::kDouble)};
  all.push_back(result.weights.defined() ? torch::randn(result.weights.sizes(), torch::kDouble) : Tensor());
  return all;
}

const std::vector<at::ScalarType> kTypes = {torch::kDouble, torch::kFloat, torch::kFloat, torch::kBFloat16, torch::kHalf};

class AgreementTest : public testing::Test {
 protected:
  const OneThread one_thread_;  // sizes are small

  // Relative to the sums of a chain; gradients have two chains.
  static double limit(at::ScalarType type, int64_t terms, int chains = 1) { return chains * tolerance(type, terms); }
};

// ---- Layers -----------------------------------------------------------------------------------------------------------------

CrossAttentionOptions draw_options(Draw& draw) {
  const auto H = draw.of<int64_t>({1, 2, 4}),
             G = H / draw.of<int64_t>(H == 1 ? std::vector<int64_t>{1} : std::vector<int64_t>{1, 2});
  const auto d = draw.of<int64_t>({1, 3, 8, 16}), e = draw.chance(0.6) ? d : draw.of<int64_t>({2, 5, 8});
  const auto Ek = draw.number(2, 24);
  CrossAttentionOptions o(draw.number(2, 24), Ek, draw.chance(0.5) ? Ek : draw.number(2, 24), draw.number(2, 24));
  o.num_heads(H).kv_heads(G).head_dim(d).value_head_dim(e);
  o.query_bias(draw.chance(0.7)).key_bias(draw.chance(0.7)).value_bias(draw.chance(0.7)).output_bias(draw.chance(0.7));
  o.bias_kv(draw.chance(0.15));
  if (draw.chance(0.5)) o.scale(draw.of<double>({1, 0.3, 2, 0, -0.7}));
  if (draw.chance(0.25)) {
    o.qk_norm(draw.of<NormKind>({NormKind::rms, NormKind::layer})).qk_norm_eps(1e-2);
    if (draw.chance(0.5)) o.qk_norm_scope(NormScope::across_heads);
  }
  o.attention_weights(draw.of<AttentionWeights>({AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head}));
  if (o.attention_weights() == AttentionWeights::per_head && draw.chance(0.5)) o.weight_heads({H - 1, 0});
  return o;
}

// Orders that are legal for such a layer.
Orders draw_orders(Draw& draw, const CrossAttentionOptions& o) {
  PlanRequest request;
  request.query_norm = request.key_norm = o.qk_norm() != NormKind::none;
  request.bias_kv = o.bias_kv();
  Orders orders{draw.of<Order>({std::begin(kAllOrders), std::end(kAllOrders)}),
                draw.of<Order>({std::begin(kAllOrders), std::end(kAllOrders)})};
  if (!illegal_for_logits(orders.logits, request).empty()) orders.logits = Order::standard;
  if (!illegal_for_values(orders.values, request).empty()) orders.values = Order::standard;
  return orders;
}

class LayerCase {
 public:
  explicit LayerCase(unsigned number)
      : draw_(number),
        options_(draw_options(draw_)),
        type_(draw_.of(kTypes)),
        sizes_{draw_.chance(0.05) ? 0 : draw_.number(1, 3), options_.num_heads(),
               draw_.chance(0.05) ? 0 : draw_.of<int64_t>({1, 2, 5, 30}),
               draw_.chance(0.08) ? 0 : draw_.of<int64_t>({1, 2, 7, 40})},
        self_(draw_.chance(0.3) && options_.dim_key() == options_.dim_value()),
        restrictions_(draw_restrictions(draw_, sizes_, /*may_learn=*/true)) {
    if (draw_.chance(0.6)) options_.plan(PlanMode::pin(draw_orders(draw_, options_)));
    module_ = CrossAttention(options_);
    options_ = module_->options;
    const torch::NoGradGuard no_grad;
    for (auto& parameter : module_->parameters()) parameter.add_(torch::randn_like(parameter) * 0.1);
    module_->to(type_);
    const auto input = [&](int64_t L, int64_t E) {
      const auto x = torch::randn({sizes_.B, L, E}).to(type_);
      return draw_.chance(0.2) ? at::_neg_view(-x) : x;
    };
    query_ = input(sizes_.Lq, options_.dim_query());
    key_ = input(sizes_.Lk, options_.dim_key());
    value_ = self_ ? key_ : input(sizes_.Lk, options_.dim_value());
  }

  void run() {
    SCOPED_TRACE(what());
    switch (draw_.number(0, 6)) {
      case 0: return evaluate();
      case 6: return decouple();
      case 1:
      case 2: return train();
      case 3: return freeze();
      case 4: return freeze();
      default: return run_in_parallel();
    }
  }

 private:
  std::string what() const {
    std::ostringstream text;
    text << *module_ << " " << type_ << " B " << sizes_.B << " Lq " << sizes_.Lq << " Lk " << sizes_.Lk << " biases "
         << restrictions_.biases.size() << (restrictions_.learned.defined() ? " (learned)" : "")
         << (restrictions_.mask.is_none() ? " no mask" : "");
    return text.str();
  }

  int64_t terms() const {
    return options_.dim_query() + options_.dim_key() + options_.dim_value() + sizes_.Lk +
           sizes_.H * (*options_.head_dim() + *options_.value_head_dim());
  }
  double allowed(int chains = 1) const { return chains * tolerance(type_, terms()); }

  // The results for inputs and parameters in float64.
  Result expected(const std::vector<Tensor>& inputs, const NamedTensors& parameters) const {
    return layer_by_definition(options_, parameters, inputs[0], inputs[1], inputs.size() > 2 ? inputs[2] : inputs[1],
                               restrictions_.allowed, restrictions_.added(type_, sizes_));
  }
  Result expected() const {
    NamedTensors parameters;
    for (const auto& item : module_->named_parameters()) parameters[item.key()] = wide(item.value());
    const torch::NoGradGuard no_grad;
    return expected({wide(query_), wide(key_), wide(value_)}, parameters);
  }

  void compare(const std::tuple<Tensor, Tensor>& found, const Result& exact, const std::string& path) const {
    const auto& [output, weights] = found;
    EXPECT_EQ(output.scalar_type(), type_) << path;
    expect_close(output, exact.output, allowed(2), path + " output");
    expect_close(weights, exact.weights, allowed(2), path + " weights");
  }

  void evaluate() {
    module_->eval();
    const torch::NoGradGuard no_grad;
    const auto exact = expected();
    compare(module_->forward(query_, key_, value_, restrictions_.mask), exact, "forward");
    const auto context = module_->context(key_, value_, restrictions_.mask, draw_use());
    compare(module_->attend(query_, context), exact, "context and attend");
  }

  // Compares output, weights, and the gradients of both in inputs, parameters and a bias.
  void train() {
    const auto leaf = [](const Tensor& x) { return x.detach().clone().requires_grad_(); };
    std::vector<Tensor> inputs = {leaf(query_), leaf(key_)}, exact_inputs = {wide(query_), wide(key_)};
    if (!self_) inputs.push_back(leaf(value_)), exact_inputs.push_back(wide(value_));
    const auto result =
        draw_.chance(0.5)
            ? module_->forward(inputs[0], inputs[1], inputs.back(), restrictions_.mask)
            : module_->attend(inputs[0], module_->context(inputs[1], inputs.back(), restrictions_.mask, draw_use()));
    NamedTensors exact_parameters;
    auto exact_all = exact_inputs;
    for (const auto& item : module_->named_parameters()) {
      inputs.push_back(item.value());
      exact_all.push_back(exact_parameters[item.key()] = wide(item.value()));
    }
    const auto exact = expected(exact_inputs, exact_parameters);
    compare(result, exact, "training");
    if (restrictions_.learned.defined()) inputs.push_back(restrictions_.learned), exact_all.push_back(restrictions_.learned);
    const auto cotangents = cotangents_of(exact);
    expect_close(gradients_of({std::get<0>(result), std::get<1>(result)}, cotangents, inputs),
                 gradients_of({exact.output, exact.weights}, cotangents, exact_all), allowed(4), "gradients");
  }

  void freeze() {
    const auto exact = expected();
    FreezeOptions options;
    const bool constant = draw_.chance(0.2) && sizes_.B > 0;
    if (constant) {
      options.query = query_[0];
      query_ = query_.narrow(0, 0, 1).expand({sizes_.B, -1, -1});
    }
    const auto result = constant ? expected() : exact;
    if (draw_.chance(0.5)) options.plan = PlanMode::pin(draw_orders(draw_, options_));
    const auto frozen = module_->freeze(options);
    const auto& mask = restrictions_.mask;
    compare(constant ? frozen.forward(key_, value_, mask) : frozen.forward(query_, key_, value_, mask), result, "frozen");
    const auto context = frozen.context(key_, value_, mask, draw_use());
    compare(constant ? frozen.attend(context) : frozen.attend(query_, context), result, "frozen context and attend");
  }

  // Compares one added context with the sum of two layers, the added one without output bias.
  void decouple() {
    auto pinned = options_.plan();
    if (pinned.pinned && !detail::ends_in_heads(pinned.orders.values)) pinned = PlanMode::automatic;
    const auto Lk = draw_.of<int64_t>({0, 1, 3, 20});
    const auto scale = draw_.of<double>({1, 0.5, -2});
    const AddedContextOptions added = AddedContextOptions(draw_.number(2, 24), draw_.number(2, 24)).scale(scale);
    auto first = options_;
    DecoupledCrossAttention module(DecoupledCrossAttentionOptions(first.plan(pinned)).added({added}));
    module->to(type_);
    const auto leaf = [](const Tensor& x) { return x.detach().clone().requires_grad_(); };
    std::vector<Tensor> inputs = {leaf(query_), leaf(key_), leaf(value_),
                                  leaf(torch::randn({sizes_.B, Lk, added.dim_key()}).to(type_)),
                                  leaf(torch::randn({sizes_.B, Lk, added.dim_value()}).to(type_))};
    const auto result = draw_.chance(0.5)
                            ? module->forward(inputs[0], inputs[1], inputs[2], {{inputs[3], inputs[4]}}, restrictions_.mask)
                            : module->attend(inputs[0], module->context(inputs[1], inputs[2], restrictions_.mask, draw_use()),
                                             {module->added_context(0, inputs[3], inputs[4], {}, draw_use())});

    std::vector<Tensor> exact_all;
    for (const auto& x : inputs) exact_all.push_back(wide(x));
    const auto exact_inputs = exact_all;
    NamedTensors of_first, of_added;
    for (const auto& item : module->named_parameters()) {
      inputs.push_back(item.value());
      exact_all.push_back(wide(item.value()));
      const auto& name = item.key();
      const auto own = name.substr(name.find('.') + 1);
      const bool is_added = name.starts_with("added0.");
      (is_added ? of_added : of_first)[own] = exact_all.back();
    }
    auto o = options_;
    const auto [output, weights] = layer_by_definition(o, of_first, exact_inputs[0], exact_inputs[1], exact_inputs[2],
                                                       restrictions_.allowed, restrictions_.added(type_, sizes_));
    for (const auto* own :
         {"query_linear.weight", "query_linear.bias", "query_norm.weight", "query_norm.bias", "output_linear.weight"}) {
      if (const auto found = of_first.find(own); found != of_first.end()) of_added[own] = found->second;
    }
    o.bias_kv(false).output_bias(false).dim_key(added.dim_key()).dim_value(added.dim_value());
    const auto all = torch::ones({sizes_.B, sizes_.H, sizes_.Lq, Lk}, torch::kBool);
    const auto none = torch::zeros({sizes_.B, sizes_.H, sizes_.Lq, Lk}, torch::kDouble);
    const auto other = layer_by_definition(o, of_added, exact_inputs[0], exact_inputs[3], exact_inputs[4], all, none);
    const Result exact{output + scale * other.output, weights};
    compare(result, exact, "decoupled");
    const auto frozen = module->freeze();
    compare(frozen.forward(query_, key_, value_, {{inputs[3], inputs[4]}}, restrictions_.mask), exact, "frozen decoupled");
    compare(frozen.attend(query_, frozen.context(key_, value_, restrictions_.mask, draw_use()),
                          {frozen.added_context(0, inputs[3], inputs[4], {}, draw_use())}),
            exact, "frozen decoupled with contexts");
    if (restrictions_.learned.defined()) inputs.push_back(restrictions_.learned), exact_all.push_back(restrictions_.learned);
    const auto cotangents = cotangents_of(exact);
    expect_close(gradients_of({std::get<0>(result), std::get<1>(result)}, cotangents, inputs),
                 gradients_of({exact.output, exact.weights}, cotangents, exact_all), allowed(6), "gradients of decoupled");
  }

  ContextOptions draw_use() { return {.expected_queries = draw_.of<int64_t>({1, 100, ContextOptions::kMany})}; }

#ifdef XATTN_NO_DISTRIBUTED
  void run_in_parallel() { evaluate(); }
#else
  void run_in_parallel() {
    if (options_.bias_kv()) return evaluate();
    if (options_.plan().pinned) module_->options.plan(PlanMode::automatic);
    const auto group = c10::make_intrusive<c10d::ProcessGroup>(c10::make_intrusive<c10d::HashStore>(), /*rank=*/0, /*size=*/1);
    ContextParallel parallel(module_, group);
    const auto leaf = [](const Tensor& x) { return x.detach().clone().requires_grad_(); };
    std::vector<Tensor> inputs = {leaf(query_), leaf(key_), leaf(value_)}, exact_all = {wide(query_), wide(key_), wide(value_)};
    const auto [output, weights] = parallel.forward(inputs[0], inputs[1], inputs[2], restrictions_.mask);
    NamedTensors exact_parameters;
    const auto exact_inputs = exact_all;
    for (const auto& item : module_->named_parameters()) {
      inputs.push_back(item.value());
      exact_all.push_back(exact_parameters[item.key()] = wide(item.value()));
    }
    const auto exact = expected(exact_inputs, exact_parameters);
    compare({output, weights}, exact, "context parallel");
    const auto cotangents = cotangents_of(exact);
    expect_close(gradients_of({output}, cotangents, inputs), gradients_of({exact.output}, cotangents, exact_all), allowed(4),
                 "gradients of context parallel");
  }
#endif

  Draw draw_;
  CrossAttentionOptions options_;
  at::ScalarType type_;
  Sizes sizes_;
  bool self_;  // the values are the keys
  Restrictions restrictions_;
  CrossAttention module_{nullptr};
  Tensor query_, key_, value_;
};

TEST_F(AgreementTest, EveryPathOfALayerGivesWhatTheDefinitionGives) {
  constexpr unsigned kCases = 600;
  for (unsigned number = 0; number < kCases; ++number) {
    SCOPED_TRACE("case " + std::to_string(number));
    LayerCase(number).run();
    if (HasFailure()) return;  // one failed case is enough
  }
}

#ifndef XATTN_NO_DISTRIBUTED
TEST_F(AgreementTest, SeveralProcessesGiveTheGradientOfValuesThatAskAlone) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    CrossAttention module(CrossAttentionOptions(6, 8, 8, 8).num_heads(2).attention_weights(AttentionWeights::none));
    module->to(type);
    for (auto& parameter : module->parameters()) parameter.requires_grad_(false);
    const auto query = torch::randn({2, 3, 6}).to(type), context = torch::randn({2, 5, 8}).to(type);
    const auto weight = module->value_linear->weight.requires_grad_();
    const auto group = c10::make_intrusive<c10d::ProcessGroup>(c10::make_intrusive<c10d::HashStore>(), /*rank=*/0, /*size=*/1);
    ContextParallel parallel(module, group);
    const auto found = torch::autograd::grad({std::get<0>(parallel.forward(query, context, context)).sum()}, {weight})[0];
    const auto exact = torch::autograd::grad({std::get<0>(module->forward(query, context, context)).sum()}, {weight})[0];
    expect_close(found, exact, tolerance(type, 40), c10::toString(type));
  }
}
#endif

// ---- attention() ------------------------------------------------------------------------------------------------------------

TEST_F(AgreementTest, EveryPathOfAttentionGivesWhatTheDefinitionGives) {
  constexpr unsigned kCases = 400;
  for (unsigned number = 0; number < kCases; ++number) {
    Draw draw(1'000'000 + number);
    const auto type = draw.of(kTypes);
    const auto H = draw.of<int64_t>({1, 2, 4}),
               G = H / draw.of<int64_t>(H == 1 ? std::vector<int64_t>{1} : std::vector<int64_t>{1, 2});
    const Sizes s{draw.number(1, 3), H, draw.chance(0.05) ? 0 : draw.of<int64_t>({1, 2, 5, 30}),
                  draw.chance(0.05) ? 0 : draw.of<int64_t>({1, 2, 7, 40})};
    const auto d = draw.of<int64_t>({1, 3, 8}), e = draw.chance(0.7) ? d : 5;
    const bool trains = draw.chance(0.6);
    const auto r = draw_restrictions(draw, s, trains);
    AttentionOptions options{.mask = r.mask};
    if (draw.chance(0.5)) options.scale = draw.of<double>({1, 0.3, 2, 0, -0.7});
    options.weights = draw.of<AttentionWeights>(
        {AttentionWeights::none, AttentionWeights::none, AttentionWeights::mean, AttentionWeights::per_head});
    if (options.weights == AttentionWeights::per_head && draw.chance(0.5)) options.weight_heads = {H - 1, 0};
    options.path = draw.of<AttentionPath>({AttentionPath::automatic, AttentionPath::fused, AttentionPath::definition});
    SCOPED_TRACE("case " + std::to_string(number) + ", " + c10::toString(type) + ", Lq " + std::to_string(s.Lq) + ", Lk " +
                 std::to_string(s.Lk) + ", scale " + std::to_string(options.scale.value_or(1 / std::sqrt(d))) + ", path " +
                 std::to_string(static_cast<int>(options.path)));

    // Two of the inputs may be one tensor.
    const bool values_are_keys = d == e && draw.chance(0.4), queries_are_keys = s.Lq == s.Lk && G == H && draw.chance(0.5);
    const auto input = [&](int64_t n, int64_t L, int64_t size) {
      const auto x = (torch::randn({s.B, L, n, size}) * 0.7).to(type).transpose(1, 2);
      return x.detach().requires_grad_(trains && draw.chance(0.8));
    };
    const auto k = input(G, s.Lk, d), v = values_are_keys ? k : input(G, s.Lk, e), q = queries_are_keys ? k : input(H, s.Lq, d);
    const auto exact_k = wide(k), exact_v = values_are_keys ? exact_k : wide(v), exact_q = queries_are_keys ? exact_k : wide(q);
    const auto scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(d)));
    auto exact = attention_by_definition(exact_q, exact_k, exact_v, scale, r.allowed, r.added(type, s));
    exact.weights = as_wanted(exact.weights, options.weights, options.weight_heads);

    AttentionResult result;
    try {
      result = attention(q, k, v, options);
    } catch (const c10::ValueError&) {  // says which requests have no fused kernel: see FusedRefusesWhatItsKernelsCannotDo
      ASSERT_EQ(options.path, AttentionPath::fused);
      options.path = AttentionPath::automatic;
      result = attention(q, k, v, options);
    }
    const auto allowed = limit(type, 2 * (d + e + s.Lk));
    expect_close(result.output, exact.output, allowed, "output");
    expect_close(result.weights, exact.weights, allowed, "weights");

    std::vector<Tensor> inputs, exact_inputs;
    const auto add = [&](const Tensor& x, const Tensor& of_exact, bool is_new) {
      if (!x.defined() || !x.requires_grad() || !is_new) return;
      inputs.push_back(x), exact_inputs.push_back(of_exact);
    };
    add(q, exact_q, true), add(k, exact_k, !queries_are_keys), add(v, exact_v, !values_are_keys);
    add(r.learned, r.learned, true);
    if (inputs.empty()) continue;
    const auto cotangents = cotangents_of(exact);
    expect_close(gradients_of({result.output, result.weights}, cotangents, inputs),
                 gradients_of({exact.output, exact.weights}, cotangents, exact_inputs), 4 * allowed, "gradients");

    // The second derivative, where rounding leaves something to compare.
    if (type == torch::kDouble) {
      const auto second = [&](const Tensor& output, const std::vector<Tensor>& of) {
        const auto first =
            torch::autograd::grad({output.sin().sum()}, of, {}, true, /*create_graph=*/true, /*allow_unused=*/true);
        auto sum = (output * 0).sum();
        for (const auto& gradient : first) sum = gradient.defined() ? sum + gradient.square().sum() : sum;
        return gradients_of({sum}, {torch::ones({}, torch::kDouble)}, of);
      };
      expect_close(second(result.output, inputs), second(exact.output, exact_inputs), 1e-11, "second derivatives");
    }
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace xattn::test
