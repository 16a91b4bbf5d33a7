// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/types.h>

#include <functional>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace examples {

/// Another process has failed, or did not answer in time: the processes can no longer exchange anything.
class LostProcess : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The processes that train one model together, each on its part of every batch, started by scripts/launch.sh, torchrun or
/// mpirun; a single process if it was started alone. Copies share one process group.
class Processes {
 public:
  Processes() = default;

  /// Waits for the other processes. Throws std::invalid_argument or std::runtime_error, see launch.h.
  static Processes from_environment(torch::Device device);

  /// The device of this process: with several CUDA devices each process on a machine has its own.
  static torch::Device device_of(torch::Device device);

  int rank() const { return group_ ? group_->getRank() : 0; }
  int size() const { return group_ ? group_->getSize() : 1; }
  bool leads() const { return rank() == 0; }
  const c10::intrusive_ptr<c10d::ProcessGroup>& group() const { return group_; }

  /// This process's part of a batch, whose first axis counts examples. Throws std::runtime_error if there are fewer examples
  /// than processes.
  torch::Tensor part_of(const torch::Tensor& batch) const;

  /// Runs an exchange with the other processes. Throws LostProcess if the exchange fails; other errors pass through.
  void together(const std::function<void()>& exchange) const;

  /// The sum of x over all processes, by `together`. Differentiable: the gradient of x is that of the sum of all losses.
  torch::Tensor sum(const torch::Tensor& x) const;

  /// Whether it is true in any process.
  bool any(bool here) const;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

}  // namespace examples
