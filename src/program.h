// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>

// The manners that all our programs share: --device, --seed and --threads, errors in one line, and the exit status.
namespace program {

/// The user asked the job to stop; what() says how to go on.
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Empty if it is one, otherwise what is wrong: what CLI11 asks of a check.
inline std::string check_device_name(const std::string& name) {
  const auto message = fmt::format("'{}' is not cpu, cuda or cuda:N", name);
  try {
    const c10::Device device(name);
    return device.is_cpu() || device.is_cuda() ? "" : message;
  } catch (const c10::Error&) {
    return message;
  }
}

inline std::string default_device() {
  return torch::cuda::is_available() ? "cuda" : "cpu";
}

inline void add_device_option(CLI::App& program, std::string& device) {
  program.add_option("--device", device, "cpu, cuda or cuda:N; cuda where there is one")
      ->check(check_device_name, "DEVICE")
      ->capture_default_str();
}

/// threads: the default, or 0 for as many as LibTorch takes by itself.
inline void add_threads_option(CLI::App& program, int& threads) {
  auto* option = program.add_option("--threads", threads, "threads on the CPU; if not given, one for each core");
  option->check(CLI::Range(1, 1024));
  if (threads > 0) {
    option->description("threads on the CPU")->capture_default_str();
  }
}

/// The device of this name, which has passed `check_device_name`. Throws std::runtime_error if it is not there.
inline c10::Device find_device(const std::string& name) {
  const c10::Device device(name);
  const auto there_are = static_cast<int>(torch::cuda::device_count());
  if (device.is_cuda() && std::max<int>(device.index(), 0) >= there_are) {
    throw std::runtime_error(fmt::format("there is no device {} here ({} CUDA devices); try --device cpu", name, there_are));
  }
  return device;
}

inline void set_threads(int threads) {
  if (threads > 0) at::set_num_threads(threads);
}

/// The options of a program that runs a model.
struct CommonOptions {
  std::string device = default_device();
  uint64_t seed = 0;
  int threads = 0;
};

inline void add_common_options(CLI::App& program, CommonOptions& options) {
  add_device_option(program, options.device);
  program.add_option("--seed", options.seed, "same seed, threads and device, same result")->capture_default_str();
  add_threads_option(program, options.threads);
}

/// Sets the threads and the seed, and makes sure of the device.
inline c10::Device apply(const CommonOptions& options) {
  set_threads(options.threads);
  torch::manual_seed(options.seed);
  return find_device(options.device);
}

/// Parses the arguments, which runs subcommands, and runs the job; `main` returns what this returns: 0, 1 for a failed job, 2 for wrong usage.
inline int run(CLI::App& program, int argc, char** argv, const std::function<void()>& job) {
  const auto fail = [&program](int status, const std::string& message) {
    std::cerr << program.get_name() << ": " << message.substr(0, message.find('\n')) << std::endl;
    return status;
  };
  try {
    program.parse(argc, argv);
    job();
    return 0;
  } catch (const CLI::Success& help) {
    return program.exit(help);
  } catch (const CLI::ParseError& error) {
    return fail(2, error.what());
  } catch (const Interrupted& interrupted) {
    return fail(130, interrupted.what());  // as shells have it for Ctrl-C
  } catch (const c10::Error& error) {
    return fail(1, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
}

}  // namespace program
