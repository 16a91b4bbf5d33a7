// SPDX-License-Identifier: Apache-2.0
#include "common/processes.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <chrono>
#include <string>
#include <vector>

#include "programs/launch.h"

namespace examples {
namespace {

constexpr auto kTimeout = std::chrono::minutes(5);  // the first process may be writing a checkpoint

using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;

// Gloo throws std::runtime_error, unlike the rest of LibTorch; NCCL throws c10::DistBackendError.
void exchange_in(const GroupPtr& group, const std::function<void()>& exchange) {
  const auto fail = [&group](const std::exception& error) {
    const std::string what = error.what();
    throw LostProcess(fmt::format("process {} of {} lost the others: one has failed, or did not answer in time ({})",
                                  group->getRank(), group->getSize(), what.substr(0, what.find('\n'))));
  };
  try {
    exchange();
  } catch (const LostProcess&) {
    throw;
  } catch (const std::runtime_error& error) {
    fail(error);
  } catch (const c10::DistBackendError& error) {
    fail(error);
  }
}

torch::Tensor sum_of_all(const torch::Tensor& x, const GroupPtr& group) {
  std::vector<torch::Tensor> tensors = {x.detach().clone().contiguous()};
  exchange_in(group, [&] { group->allreduce(tensors)->wait(); });
  return tensors[0];
}

// The gradient of one process's x is the sum of the gradients in all processes, because x takes part in the loss of each.
struct Sum : torch::autograd::Function<Sum> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x, const GroupPtr& group) {
    context->saved_data["group"] = c10::IValue::make_capsule(group);
    return sum_of_all(x, group);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const auto group = c10::static_intrusive_pointer_cast<c10d::ProcessGroup>(context->saved_data["group"].toCapsule());
    return {sum_of_all(grads[0], group), {}};
  }
};

}  // namespace

Processes Processes::from_environment(torch::Device device) {
  Processes processes;
  const auto place = launch::find_place();
  if (place && place->size > 1) processes.group_ = launch::join(*place, device, kTimeout);
  return processes;
}

torch::Device Processes::device_of(torch::Device device) {
  const auto place = launch::find_place();
  if (!place || !device.is_cuda() || device.has_index()) return device;
  return {torch::kCUDA, static_cast<c10::DeviceIndex>(place->local_rank)};
}

torch::Tensor Processes::part_of(const torch::Tensor& batch) const {
  const auto n = batch.size(0);
  if (n < size()) throw std::runtime_error(fmt::format("a batch of {} cannot be shared by {} processes", n, size()));
  const auto first = n * rank() / size();
  return batch.narrow(0, first, n * (rank() + 1) / size() - first);
}

void Processes::together(const std::function<void()>& exchange) const {
  group_ ? exchange_in(group_, exchange) : exchange();
}

torch::Tensor Processes::sum(const torch::Tensor& x) const {
  return group_ ? Sum::apply(x, group_) : x;
}

bool Processes::any(bool here) const {
  return group_ ? sum(torch::tensor(here ? 1.0F : 0.0F)).item<float>() > 0 : here;
}

}  // namespace examples
