// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

// How our programs find the other processes they were started with. The library itself takes a process group that is made.
namespace launch {

/// The place of this process among those that were started together.
struct Place {
  int rank = 0, size = 1;
  int local_rank = 0;  ///< on its machine
  std::string address;
  uint16_t port = 0;
  bool store_is_there = false;  ///< torchrun's agent serves the store; else rank 0 does
};

/// From the environment: RANK and WORLD_SIZE, as torchrun sets them, or OMPI_COMM_WORLD_RANK and _SIZE, as mpirun does, with MASTER_ADDR and
/// MASTER_PORT. Nothing if neither rank is set. Throws std::invalid_argument naming a variable that is missing or makes no sense.
std::optional<Place> find_place();

/// Waits for the others, at most `timeout`, which is also the time that a collective may take. Gloo for tensors on the CPU; if
/// `device` is one of CUDA, NCCL too for those on CUDA, in builds that have it. The store listens at the address of the place
/// and at no other. With a loopback address Gloo and NCCL stay on loopback; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name other
/// interfaces.
/// From then on the program ignores SIGPIPE, unless it handles it: else a process that dies could take the others with it, silently.
/// Throws std::runtime_error where the backend is missing, and in the first process if its machine has no such address.
c10::intrusive_ptr<c10d::ProcessGroup> join(const Place& place, c10::Device device, std::chrono::milliseconds timeout);

}  // namespace launch
