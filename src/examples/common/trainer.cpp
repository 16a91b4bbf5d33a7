// SPDX-License-Identifier: Apache-2.0
#include "common/trainer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <torch/nn/utils/clip_grad.h>
#include <xattn/load.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <type_traits>
#include <utility>

#include "common/batch_norm.h"

namespace examples {
namespace {

constexpr auto kModel = "model.";
constexpr auto kMean = "optimizer.mean.";          // of the gradient, by parameter
constexpr auto kMeanSquare = "optimizer.square.";  // of its square
constexpr auto kRandom = "random.batches";         // the trainer's own generator
constexpr auto kRandomDefault = "random.default";  // LibTorch's generator, which dropout uses
constexpr auto kStep = "step";
constexpr auto kCurve = "curve.";

double learning_rate(const TrainerOptions& options, int64_t step) {
  const auto done = static_cast<double>(step);
  const auto warm_up = static_cast<double>(std::min(options.warm_up, options.steps / 2));
  const auto all = static_cast<double>(options.steps);
  if (done < warm_up) return options.learning_rate * (done + 1) / warm_up;
  return options.learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * (done - warm_up) / (all - warm_up)));
}

torch::optim::AdamWOptions adamw_options(const TrainerOptions& options) {
  return torch::optim::AdamWOptions(options.learning_rate).betas({0.9, 0.99}).weight_decay(options.weight_decay);
}

at::Generator default_generator() {
  return at::detail::getDefaultCPUGenerator();
}

// The optimizer's state of a parameter, created if the parameter had no gradient yet.
torch::optim::AdamWParamState& state_of(torch::optim::AdamW& optimizer, const torch::Tensor& parameter) {
  auto& state = optimizer.state()[parameter.unsafeGetTensorImpl()];
  if (!state) {
    auto fresh = std::make_unique<torch::optim::AdamWParamState>();
    fresh->step(0);
    fresh->exp_avg(torch::zeros_like(parameter));
    fresh->exp_avg_sq(torch::zeros_like(parameter));
    state = std::move(fresh);
  }
  return static_cast<torch::optim::AdamWParamState&>(*state);
}

// The step of a state.
int64_t step_of(const torch::Tensor& step, int64_t steps) {
  const bool sound = step.scalar_type() == torch::kInt64 && step.numel() == 1;
  if (!sound || step.item<int64_t>() < 0 || step.item<int64_t>() > steps) {
    throw xattn::FileError(fmt::format("the state of the training must have a step from 0 to {}, int64 []", steps));
  }
  return step.item<int64_t>();
}

// Throws unless a generator can continue from this state.
void check_random(const torch::Tensor& state, const char* name) {
  try {
    Random(0).set_state(state.contiguous());
  } catch (const c10::Error&) {
    throw xattn::FileError(fmt::format("{} in the state of the training must be the state of a random generator", name));
  }
}

// Gradients are exchanged in buckets, roughly in the order in which backward computes them. Every parameter must take part in
// every step.
std::unique_ptr<c10d::Reducer> make_reducer(const torch::nn::Module& model, const Processes& processes) {
  if (processes.size() == 1) return nullptr;
  std::vector<torch::Tensor> parameters;
  for (const auto& parameter : model.parameters()) {
    if (parameter.requires_grad()) parameters.push_back(parameter);
  }
  auto assigned =
      c10d::compute_bucket_assignment_by_size(parameters, {c10d::kDefaultFirstBucketBytes, c10d::kDefaultBucketBytesCap});
  auto& buckets = std::get<0>(assigned);
  std::ranges::reverse(buckets);
  const std::vector<bool> is_sparse(parameters.size(), false);
  const std::unordered_map<size_t, std::string> names;
  const auto if_possible = [](const auto&... all) -> std::unique_ptr<c10d::Reducer> {
    if constexpr (std::is_constructible_v<c10d::Reducer, decltype(all)...>) return std::make_unique<c10d::Reducer>(all...);
    return nullptr;
  };
  const auto make = [&](const auto&... more) {
    return if_possible(parameters, buckets, processes.group(), is_sparse, int64_t{c10d::kDefaultBucketBytesCap},
                       /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/false, names,
                       int64_t{c10d::kDefaultFirstBucketBytes}, more...);
  };
  // Newer versions of LibTorch have more parameters, all behind these.
  constexpr bool kSkipsUnused = false, kIsPython = false;
  if (auto reducer = make(kSkipsUnused, kIsPython, std::vector<int64_t>())) return reducer;
  if (auto reducer = make(kSkipsUnused, kIsPython)) return reducer;
  if (auto reducer = make(kSkipsUnused)) return reducer;
  return make();
}

}  // namespace

Trainer::Trainer(std::shared_ptr<torch::nn::Module> model, const TrainerOptions& options, const Processes& processes)
    : model_(std::move(model)),
      options_(options),
      optimizer_(model_->parameters(), adamw_options(options)),
      random_(options.seed),
      processes_(processes),
      reducer_(make_reducer(*model_, processes)) {
  set_processes(*model_, processes);
}

Trainer::~Trainer() = default;

// Computes the gradients of the mean over the examples of all processes; `step` becomes the step of all together.
void Trainer::backward(TrainingStep& step) {
  if (!reducer_) return step.loss.backward();
  const auto own = torch::tensor(static_cast<double>(step.examples), torch::dtype(torch::kFloat64).device(step.loss.device()));
  const auto all = processes_.sum(own);
  const auto share = (own / all).to(step.loss.scalar_type());
  const auto loss = step.loss * share * processes_.size();  // the reducer divides by the number of processes
  reducer_->prepare_for_backward({loss});
  processes_.together([&] { loss.backward(); });
  step.loss = processes_.sum(step.loss.detach() * share);
  step.accuracy = processes_.sum(step.accuracy * share);
  step.examples = static_cast<int64_t>(all.item<double>());
}

TrainingStep Trainer::learn(const Forward& forward) {
  for (auto& group : optimizer_.param_groups()) group.options().set_lr(learning_rate(options_, step_));
  auto step = forward(random_);
  optimizer_.zero_grad();
  backward(step);
  torch::nn::utils::clip_grad_norm_(model_->parameters(), options_.largest_gradient);
  optimizer_.step();
  ++step_;
  return step;
}

bool Trainer::run(const Forward& forward,
                  const std::function<void(const Progress&)>& report,
                  const std::function<bool()>& stop) {
  constexpr int64_t kStepsPerReport = 10;  // on a GPU a report has to wait for the device
  const auto per_point = std::max<int64_t>(1, options_.steps / 100);
  const auto begin = std::chrono::steady_clock::now();
  const auto first = step_;
  int64_t examples = 0;
  model_->train();
  while (step_ < options_.steps) {
    const auto step = learn(forward);
    examples += step.examples;
    const bool last = step_ == options_.steps;
    if (step_ % kStepsPerReport == 0 || step_ % per_point == 0 || last) {
      const auto loss = step.loss.item<double>();
      const auto accuracy = step.accuracy.item<double>();
      if (step_ % per_point == 0 || last) {
        for (auto& curve : curves_) curve.steps.push_back(static_cast<double>(step_));
        curves_[0].values.push_back(loss);
        curves_[1].values.push_back(accuracy);
      }
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
      const auto per_step = passed.count() / static_cast<double>(step_ - first);
      report({step_, options_.steps, loss, accuracy, static_cast<double>(examples) / passed.count(),
              per_step * static_cast<double>(options_.steps - step_)});
    }
    if (!last && processes_.any(stop())) return false;
  }
  return true;
}

std::map<std::string, torch::Tensor> Trainer::state() {
  auto state = pack(curves_);
  for (const auto& parameter : model_->named_parameters()) {
    state[kModel + parameter.key()] = parameter.value().detach();
    auto& moments = state_of(optimizer_, parameter.value());
    state[kMean + parameter.key()] = moments.exp_avg();
    state[kMeanSquare + parameter.key()] = moments.exp_avg_sq();
  }
  for (const auto& buffer : model_->named_buffers()) state[kModel + buffer.key()] = buffer.value();
  state[kStep] = torch::tensor(step_);
  state[kRandom] = random_.state();
  state[kRandomDefault] = default_generator().get_state();
  return state;
}

void Trainer::load_state(const std::map<std::string, torch::Tensor>& state) {
  for (const auto& parameter : model_->named_parameters()) {
    for (const auto* part : {kMean, kMeanSquare}) {
      const auto found = state.find(part + parameter.key());
      if (found == state.end() || found->second.sizes() != parameter.value().sizes()) {
        throw xattn::FileError(
            fmt::format("the state of the training has no {}{} of the model's shape", part, parameter.key()));
      }
    }
  }
  for (const auto* name : {kStep, kRandom, kRandomDefault}) {
    if (!state.contains(name)) throw xattn::FileError(fmt::format("the state of the training has no {}", name));
  }
  const auto step = step_of(state.at(kStep), options_.steps);
  auto curves = unpack_curves(state);
  for (const auto* name : {kRandom, kRandomDefault}) check_random(state.at(name), name);
  xattn::load_weights(*model_, state, {.prefix = kModel});
  step_ = step;
  curves_ = std::move(curves);
  for (const auto& parameter : model_->named_parameters()) {
    auto& moments = state_of(optimizer_, parameter.value());
    moments.step(step_);
    moments.exp_avg().copy_(state.at(kMean + parameter.key()));
    moments.exp_avg_sq().copy_(state.at(kMeanSquare + parameter.key()));
  }
  random_.set_state(state.at(kRandom).contiguous());
  default_generator().set_state(state.at(kRandomDefault).contiguous());
}

std::map<std::string, torch::Tensor> pack(const std::vector<Curve>& curves) {
  std::map<std::string, torch::Tensor> packed;
  for (const auto& curve : curves) {
    packed[kCurve + curve.name] =
        torch::stack({torch::tensor(curve.steps, torch::kFloat64), torch::tensor(curve.values, torch::kFloat64)});
  }
  return packed;
}

std::vector<Curve> unpack_curves(const std::map<std::string, torch::Tensor>& tensors) {
  const auto values = [](const torch::Tensor& row) {
    const auto flat = row.contiguous();
    return std::vector<double>(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel());
  };
  std::vector<Curve> curves;
  for (const std::string name : {"loss", "accuracy"}) {
    const auto packed = tensors.find(kCurve + name);
    if (packed == tensors.end() || packed->second.scalar_type() != torch::kFloat64 || packed->second.dim() != 2 ||
        packed->second.size(0) != 2) {
      throw xattn::FileError(fmt::format("must hold {}{}, float64 [2, N]", kCurve, name));
    }
    curves.push_back({name, values(packed->second[0]), values(packed->second[1])});
  }
  return curves;
}

}  // namespace examples
