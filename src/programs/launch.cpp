// SPDX-License-Identifier: Apache-2.0
#include "programs/launch.h"

#include <fmt/format.h>
#include <netdb.h>
#include <sys/socket.h>
#include <torch/version.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/printed.h"

#ifdef XATTN_HAS_NCCL

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace launch {
namespace {

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::optional<std::string>(value) : std::nullopt;
}

int64_t number(const char* name, int64_t least, int64_t most) {
  const auto text = variable(name);
  if (!text) throw std::invalid_argument(fmt::format("{} must be set beside the rank, but is not", name));
  size_t end = 0;
  int64_t value = -1;
  try {
    value = std::stoll(*text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != text->size() || value < least || value > most) {
    throw std::invalid_argument(fmt::format("{} must be a number from {} to {}, but is '{}'", name, least, most, *text));
  }
  return value;
}

bool is_loopback(const std::string& address) {
  return address == "localhost" || address == "::1" || address.starts_with("127.");
}

c10::intrusive_ptr<c10d::Backend> gloo(const Place& place,
                                       const c10::intrusive_ptr<c10d::Store>& store,
                                       std::chrono::milliseconds timeout) {
  using Gloo = c10d::ProcessGroupGloo;
  const auto options = Gloo::Options::create(timeout);
  if (const auto interface = variable("GLOO_SOCKET_IFNAME")) {
    options->devices.push_back(Gloo::createDeviceForInterface(*interface));
  } else if (is_loopback(place.address)) {
    options->devices.push_back(Gloo::createDeviceForHostname("127.0.0.1"));
  } else {
    options->devices.push_back(Gloo::createDefaultDevice());
  }
  return c10::make_intrusive<Gloo>(store, place.rank, place.size, options);
}

c10::intrusive_ptr<c10d::Backend> nccl([[maybe_unused]] const Place& place,
                                       [[maybe_unused]] const c10::intrusive_ptr<c10d::Store>& store,
                                       [[maybe_unused]] std::chrono::milliseconds timeout) {
#ifdef XATTN_HAS_NCCL
  if (is_loopback(place.address)) setenv("NCCL_SOCKET_IFNAME", "lo", /*overwrite=*/0);  // by default NCCL skips it
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, place.rank, place.size, options);
#else
  throw std::runtime_error("several processes on CUDA need NCCL, and this build has none; try --device cpu");
#endif
}

// Opens a socket that listens at one address of this name and at no other: LibTorch's store by itself would listen on every
// interface. The store takes over the socket.
int listen_at(const std::string& address, uint16_t port) {
  addrinfo hints = {};
  hints.ai_flags = AI_NUMERICSERV;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found); error != 0) {
    throw std::runtime_error(
        fmt::format("MASTER_ADDR must name a machine, but is '{}': {}", xattn::detail::shown(address), gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> all(found, freeaddrinfo);
  std::string reason;
  for (const auto* one = found; one != nullptr; one = one->ai_next) {
    const int listener = socket(one->ai_family, one->ai_socktype | SOCK_CLOEXEC, one->ai_protocol);
    const int yes = 1;  // the port can be used again as soon as the program that used it has ended
    if (listener >= 0 && setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) == 0 &&
        bind(listener, one->ai_addr, one->ai_addrlen) == 0 && listen(listener, SOMAXCONN) == 0) {
      return listener;
    }
    reason = std::generic_category().message(errno);
    if (listener >= 0) close(listener);
  }
  throw std::runtime_error(fmt::format("the first process must run where MASTER_ADDR is, but cannot listen at {} port {}: {}",
                                       xattn::detail::shown(address), port, reason));
}

// Gloo may write to a process that has just died. That raises SIGPIPE, which silently ends a program unless it is ignored, as
// in Python; then writing fails with an ordinary error.
void ignore_broken_pipes() {
  struct sigaction found = {};
  if (sigaction(SIGPIPE, nullptr, &found) == 0 && found.sa_handler == SIG_DFL) std::signal(SIGPIPE, SIG_IGN);
}

}  // namespace

std::optional<Place> find_place() {
  constexpr auto kMost = std::numeric_limits<int>::max();
  const bool by_torchrun = variable("RANK").has_value();
  if (!by_torchrun && !variable("OMPI_COMM_WORLD_RANK")) return std::nullopt;
  Place place;
  place.size = static_cast<int>(number(by_torchrun ? "WORLD_SIZE" : "OMPI_COMM_WORLD_SIZE", 1, kMost));
  place.rank = static_cast<int>(number(by_torchrun ? "RANK" : "OMPI_COMM_WORLD_RANK", 0, place.size - 1));
  const auto* local = by_torchrun ? "LOCAL_RANK" : "OMPI_COMM_WORLD_LOCAL_RANK";
  place.local_rank = variable(local) ? static_cast<int>(number(local, 0, kMost)) : place.rank;
  const auto address = variable("MASTER_ADDR");
  if (!address || address->empty()) throw std::invalid_argument("MASTER_ADDR must be set beside the rank, but is not");
  place.address = *address;
  place.port = static_cast<uint16_t>(number("MASTER_PORT", 1, std::numeric_limits<uint16_t>::max()));
  place.store_is_there = variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
  return place;
}

c10::intrusive_ptr<c10d::ProcessGroup> join(const Place& place, c10::Device device, std::chrono::milliseconds timeout) {
  ignore_broken_pipes();
  c10d::TCPStoreOptions options;
  // The libuv of LibTorch 2.7 cannot take over a listening socket; that of 2.12 can, those between are untested.
  options.useLibUV = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 12;
  options.port = place.port;
  options.isServer = place.rank == 0 && !place.store_is_there;
  options.timeout = timeout;
  options.waitWorkers = false;  // the backends wait for each other
  if (options.isServer) options.masterListenFd = listen_at(place.address, place.port);
  c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::TCPStore>(place.address, options);
  // torchrun's store outlives the processes that it restarts.
  const auto attempt = variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
  store = c10::make_intrusive<c10d::PrefixStore>("xattn/" + attempt, store);

  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, place.rank, place.size);
  using Type = c10d::ProcessGroup::BackendType;
  const auto add = [&](c10::DeviceType kind, Type type, const auto& backend) {
    auto own_keys = c10::make_intrusive<c10d::PrefixStore>(c10::DeviceTypeName(kind, true), store);
    group->setBackend(kind, type, backend(place, own_keys, timeout));
  };
  group->setDefaultBackend(device.is_cuda() ? Type::NCCL : Type::GLOO);
  add(c10::kCPU, Type::GLOO, gloo);  // with CUDA as well: counts and settings are tensors on the CPU
  if (device.is_cuda()) add(c10::kCUDA, Type::NCCL, nccl);
  return group;
}

}  // namespace launch
