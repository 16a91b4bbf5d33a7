// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

// How programs find the other processes that were started with them. The library itself takes a finished process group.
namespace launch {

/// The place of this process among the processes that were started together.
struct Place {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  ///< on its machine
  std::string address;
  uint16_t port = 0;
  bool store_is_there = false;  ///< torchrun's agent serves the store; otherwise rank 0 does
};

/// Reads the environment: RANK and WORLD_SIZE, set by torchrun, or OMPI_COMM_WORLD_RANK and _SIZE, set by mpirun, with
/// MASTER_ADDR and MASTER_PORT. Returns nothing if no rank is set. Throws std::invalid_argument naming a variable that is
/// missing or invalid.
std::optional<Place> find_place();

/// Waits for the other processes, at most `timeout`, which also limits each collective. Tensors on the CPU use Gloo; if
/// `device` is a CUDA device, tensors on CUDA use NCCL, in builds that have it. The store listens at the place's address and at
/// no other. With a loopback address Gloo and NCCL use the loopback interface; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name
/// other interfaces. From then on the program ignores SIGPIPE unless it handles it; otherwise a process that dies could
/// silently end the others. Throws std::runtime_error if the backend is missing, and in the first process if its machine does
/// not have this address.
c10::intrusive_ptr<c10d::ProcessGroup> join(const Place& place, c10::Device device, std::chrono::milliseconds timeout);

}  // namespace launch
