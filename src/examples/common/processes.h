// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/types.h>

#include <functional>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace examples {

/// Another process of the team has failed, or did not answer in time: the team is of no more use.
class LostProcess : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The processes that train one model together, each on its part of every batch: started by scripts/launch.sh, torchrun or mpirun.
/// Alone, if it was started alone. Copies are the same team.
class Team {
 public:
  Team() = default;

  /// Waits for the others. Throws std::invalid_argument or std::runtime_error, see launch.h.
  static Team from_environment(torch::Device device);

  /// The device for this process: of several CUDA devices its own.
  static torch::Device device_of(torch::Device device);

  int rank() const { return group_ ? group_->getRank() : 0; }
  int size() const { return group_ ? group_->getSize() : 1; }
  bool leads() const { return rank() == 0; }
  const c10::intrusive_ptr<c10d::ProcessGroup>& group() const { return group_; }

  /// This process's part of a batch whose first axis is its examples. Throws std::runtime_error if there are fewer than processes.
  torch::Tensor part_of(const torch::Tensor& batch) const;

  /// Does what exchanges something with the others. Throws LostProcess where that fails; what else it throws passes.
  void together(const std::function<void()>& exchange) const;

  /// The sum of all processes' numbers, got `together`; x may ask for its gradient, which is that of all processes' losses together.
  torch::Tensor sum(const torch::Tensor& x) const;

  /// Whether it is so in any process.
  bool any(bool here) const;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

}  // namespace examples
