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
#include <system_error>

#include "base/printed.h"

namespace program {
namespace {

constexpr int kMostThreads = 1024;

// A check in CLI11's form: returns the error in the name, or nothing.
std::string check_device_name(const std::string& name) {
  const auto message = fmt::format("'{}' is not cpu, cuda or cuda:N", name);
  try {
    const c10::Device device(name);
    return device.is_cpu() || device.is_cuda() ? "" : message;
  } catch (const c10::Error&) {
    return message;
  }
}

// If a program is started without one of its standard streams, the next file that it opens would take the stream's number, and
// output would go into that file. /dev/null takes the number instead: reading finds nothing there, and writing fails.
void keep_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) == -1 && errno == EBADF) open("/dev/null", stream == STDOUT_FILENO ? O_RDONLY : O_RDWR);
  }
}

// Beyond a limit on the size of files (`ulimit -f`), writing fails with a reason, as on a full disk, and does not end the
// program.
void report_limits_of_files() {
  struct sigaction found = {};
  if (sigaction(SIGXFSZ, nullptr, &found) == 0 && found.sa_handler == SIG_DFL) std::signal(SIGXFSZ, SIG_IGN);
}

// Output may be buffered: only flushing it shows whether it could be written.
void check_output() {
  errno = 0;
  std::cout.flush();
  if (std::cout.good() && std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
  throw std::runtime_error("standard output cannot be written" +
                           (errno != 0 ? ": " + std::generic_category().message(errno) : ""));
}

void add_rules(CLI::Option& option, const Rules& rules) {
  option.required(rules.required);
  if (rules.positive) option.check(CLI::PositiveNumber);
  if (rules.not_negative) option.check(CLI::NonNegativeNumber);
  if (rules.device) option.check(check_device_name, "DEVICE");
  if (rules.range) option.check(CLI::Range(rules.range->first, rules.range->second));
  if (!rules.one_of.empty()) option.check(CLI::IsMember(rules.one_of));
  if (rules.list) option.delimiter(',')->expected(rules.list->first, rules.list->second);
  if (rules.one_at_a_time) option.allow_extra_args(false);
  if (!rules.needs.empty()) option.needs(rules.needs);
  if (!rules.excludes.empty()) option.excludes(rules.excludes);
  if (!rules.type_name.empty()) option.type_name(rules.type_name);
}

template <class T>
bool has_default(const T&) {
  return true;
}
template <class T>
bool has_default(const std::optional<T>& value) {
  return value.has_value();
}
template <class T>
bool has_default(const std::vector<T>& values) {
  return !values.empty();
}

}  // namespace

void Command::add_option(const std::string& names, Value value, const std::string& help, const Rules& rules) {
  auto* option = std::visit(
      [&](auto* variable) {
        auto* added = app_->add_option(names, *variable, help);
        return has_default(*variable) ? added->capture_default_str() : added;
      },
      value);
  // An option that is not set is empty: an empty value would pass for a missing one.
  const auto not_empty = [](const std::string& text) {
    return text.empty() ? std::string("must not be empty") : std::string();
  };
  if (std::holds_alternative<std::string*>(value)) option->check(not_empty, "");
  add_rules(*option, rules);
}

void Command::flag(const std::string& names, bool& value, const std::string& help, const Rules& rules) {
  add_rules(*app_->add_flag(names, value, help), rules);
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
      app_->parse(argc, argv);  // runs the job of a subcommand
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

std::string default_device() {
  return torch::cuda::is_available() ? "cuda" : "cpu";
}

void add_device_option(Command& command, std::string& device) {
  command.option("--device", device, "cpu, cuda or cuda:N; cuda if the machine has a GPU", {.device = true});
}

void add_threads_option(Command& command, std::optional<int>& threads) {
  const auto by_default = threads ? std::to_string(*threads) : "one for each core";
  command.option("--threads", threads, "threads on the CPU; by default " + by_default, {.range = {{1, kMostThreads}}});
}

c10::Device find_device(const std::string& name) {
  const c10::Device device(name);
  const auto there_are = static_cast<int>(torch::cuda::device_count());
  if (device.is_cuda() && std::max<int>(device.index(), 0) >= there_are) {
    throw std::runtime_error(fmt::format("there is no device {} here ({} CUDA devices); try --device cpu", name, there_are));
  }
  return device;
}

void set_threads(std::optional<int> threads) {
  if (threads) at::set_num_threads(*threads);
}

void add_common_options(Command& command, CommonOptions& options) {
  add_device_option(command, options.device);
  command.option("--seed", options.seed, "the same seed, threads and device give the same result");
  add_threads_option(command, options.threads);
}

c10::Device apply(const CommonOptions& options) {
  set_threads(options.threads);
  at::manual_seed(options.seed);
  return find_device(options.device);
}

}  // namespace program
