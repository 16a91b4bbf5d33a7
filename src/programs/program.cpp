// SPDX-License-Identifier: Apache-2.0
#include "programs/program.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <optional>
#include <system_error>

#include "base/printed.h"

namespace program {
namespace {

constexpr int kMostThreads = 1024;

// Empty if it is one, otherwise what is wrong: what CLI11 asks of a check.
std::string check_device_name(const std::string& name) {
  const auto message = fmt::format("'{}' is not cpu, cuda or cuda:N", name);
  try {
    const c10::Device device(name);
    return device.is_cpu() || device.is_cuda() ? "" : message;
  } catch (const c10::Error&) {
    return message;
  }
}

// Where a program was started without one of its standard streams, the next file that it opened would take its number, and what
// is printed would go into that file. Reads from what stands there instead find nothing, and writes fail.
void keep_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) == -1 && errno == EBADF) open("/dev/null", stream == STDOUT_FILENO ? O_RDONLY : O_RDWR);
  }
}

// Where files may not grow over a size (`ulimit -f`), writing fails with a reason, as on a full disk, and does not end the program.
void report_limits_of_files() {
  struct sigaction found = {};
  if (sigaction(SIGXFSZ, nullptr, &found) == 0 && found.sa_handler == SIG_DFL) std::signal(SIGXFSZ, SIG_IGN);
}

// What is printed may wait in memory: only when it is flushed, the system says whether there was room for it.
void check_output() {
  errno = 0;
  std::cout.flush();
  if (std::cout.good() && std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
  throw std::runtime_error("standard output cannot be written" +
                           (errno != 0 ? ": " + std::generic_category().message(errno) : ""));
}

}  // namespace

// ---- Options ---------------------------------------------------------------------------------------------------------------

Option& Option::required() {
  option_->required();
  return *this;
}

Option& Option::shows_default() {
  option_->capture_default_str();
  return *this;
}

Option& Option::range(int64_t least, int64_t most) {
  option_->check(CLI::Range(least, most));
  return *this;
}

Option& Option::positive() {
  option_->check(CLI::PositiveNumber);
  return *this;
}

Option& Option::not_negative() {
  option_->check(CLI::NonNegativeNumber);
  return *this;
}

Option& Option::one_of(const std::vector<std::string>& values) {
  option_->check(CLI::IsMember(values));
  return *this;
}

Option& Option::device() {
  option_->check(check_device_name, "DEVICE");
  return *this;
}

Option& Option::list(int least, int most) {
  option_->delimiter(',')->expected(least, most);
  return *this;
}

Option& Option::one_at_a_time() {
  option_->allow_extra_args(false);
  return *this;
}

Option& Option::type_name(const std::string& name) {
  option_->type_name(name);
  return *this;
}

Option& Option::description(const std::string& text) {
  option_->description(text);
  return *this;
}

Option& Option::needs(const Option& other) {
  option_->needs(other.option_);
  return *this;
}

Option& Option::excludes(const Option& other) {
  option_->excludes(other.option_);
  return *this;
}

// ---- Commands --------------------------------------------------------------------------------------------------------------

template <class T>
Option Command::option(const std::string& names, T& value, const std::string& help) {
  return Option(app_->add_option(names, value, help));
}
template Option Command::option(const std::string&, std::string&, const std::string&);
template Option Command::option(const std::string&, int&, const std::string&);
template Option Command::option(const std::string&, int64_t&, const std::string&);
template Option Command::option(const std::string&, uint64_t&, const std::string&);
template Option Command::option(const std::string&, double&, const std::string&);
template Option Command::option(const std::string&, std::optional<std::string>&, const std::string&);
template Option Command::option(const std::string&, std::optional<int64_t>&, const std::string&);
template Option Command::option(const std::string&, std::optional<double>&, const std::string&);
template Option Command::option(const std::string&, std::vector<std::string>&, const std::string&);
template Option Command::option(const std::string&, std::vector<int>&, const std::string&);
template Option Command::option(const std::string&, std::vector<int64_t>&, const std::string&);

Option Command::flag(const std::string& names, bool& value, const std::string& help) {
  return Option(app_->add_flag(names, value, help));
}

Command Command::subcommand(const std::string& name, const std::string& about, std::function<void()> job) {
  auto* command = app_->add_subcommand(name, about);
  command->callback(std::move(job));
  return Command(command);
}

void Command::footer(const std::string& text) {
  app_->footer(text);
}

Program::Program(const std::string& name, const std::string& about) : Command(new CLI::App(about, name)) {}

Program::~Program() {
  delete app_;
}

void Program::version(const std::string& text) {
  app_->set_version_flag("--version", text);
}

int Program::run(int argc, char** argv, const std::function<void()>& job) {
  const auto fail = [this](int status, const std::string& message) {
    std::cerr << app_->get_name() << ": " << xattn::detail::one_line(message.substr(0, message.find('\n'))) << std::endl;
    return status;
  };
  keep_standard_streams();
  report_limits_of_files();
  try {
    try {
      app_->parse(argc, argv);  // which runs the job of a subcommand
      job();
    } catch (const CLI::Success& help) {
      app_->exit(help);
    }
    check_output();
    return 0;
  } catch (const CLI::ParseError& error) {
    return fail(2, error.what());
  } catch (const UsageError& error) {
    return fail(2, error.what());
  } catch (const Interrupted& interrupted) {
    return fail(128 + interrupted.signal(), interrupted.what());
  } catch (const c10::Error& error) {
    return fail(1, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return fail(1, "there is not enough memory");
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
}

int Program::run_subcommand(int argc, char** argv, const std::string& none_chosen) {
  return run(argc, argv, [&] {
    // CLI11's own check would come first, and hide a misspelt name.
    if (app_->get_subcommands().empty()) throw UsageError(none_chosen);
  });
}

// ---- What programs share ---------------------------------------------------------------------------------------------------

std::string default_device() {
  return torch::cuda::is_available() ? "cuda" : "cpu";
}

Option add_device_option(Command& command, std::string& device) {
  auto option = command.option("--device", device, "cpu, cuda or cuda:N; cuda where there is one");
  return option.device().shows_default();
}

void add_threads_option(Command& command, int& threads) {
  auto option = command.option("--threads", threads, "threads on the CPU; if not given, one for each core");
  option.range(1, kMostThreads);
  if (threads > 0) option.description("threads on the CPU").shows_default();
}

c10::Device find_device(const std::string& name) {
  const c10::Device device(name);
  const auto there_are = static_cast<int>(torch::cuda::device_count());
  if (device.is_cuda() && std::max<int>(device.index(), 0) >= there_are) {
    throw std::runtime_error(fmt::format("there is no device {} here ({} CUDA devices); try --device cpu", name, there_are));
  }
  return device;
}

void set_threads(int threads) {
  if (threads > 0) at::set_num_threads(threads);
}

void add_common_options(Command& command, CommonOptions& options) {
  add_device_option(command, options.device);
  command.option("--seed", options.seed, "same seed, threads and device, same result").shows_default();
  add_threads_option(command, options.threads);
}

c10::Device apply(const CommonOptions& options) {
  set_threads(options.threads);
  at::manual_seed(options.seed);
  return find_device(options.device);
}

}  // namespace program
