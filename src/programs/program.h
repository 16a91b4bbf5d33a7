// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <csignal>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace CLI {
class App;
}

// Options and error handling shared by all programs. CLI11 parses the command line; only program.cpp includes it.
namespace program {

/// The user interrupted the job; what() says how to continue. A program that throws it exits with 128 plus the number of the
/// signal, as shells do: 130 for Ctrl-C.
class Interrupted : public std::runtime_error {
 public:
  explicit Interrupted(const std::string& message, int signal = SIGINT) : std::runtime_error(message), signal_(signal) {}
  int signal() const { return signal_; }

 private:
  int signal_;
};

/// An argument is wrong: "ARGUMENT: message". A program that throws it exits with status 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  UsageError(const std::string& argument, const std::string& message) : std::runtime_error(argument + ": " + message) {}
};

/// Conditions on an option's value. The error for a wrong value names the option.
struct Rules {
  bool required = false;
  bool positive = false;
  bool not_negative = false;
  bool device = false;                                    ///< cpu, cuda or cuda:N
  std::optional<std::pair<int64_t, int64_t>> range = {};  ///< least and greatest value
  std::vector<std::string> one_of = {};
  std::optional<std::pair<int, int>> list = {};  ///< least and greatest number of values, which commas separate
  bool one_at_a_time = false;                    ///< repeatable, with one value each time
  std::string needs = {};                        ///< the name of an option that was declared before
  std::string excludes = {};                     ///< likewise
  std::string type_name = {};                    ///< of the value, in the help text
};

/// A program, or one of its subcommands. Copies refer to the same one.
class Command {
 public:
  using Value = std::variant<std::string*,
                             int*,
                             int64_t*,
                             uint64_t*,
                             double*,
                             std::optional<std::string>*,
                             std::optional<int>*,
                             std::optional<int64_t>*,
                             std::optional<double>*,
                             std::vector<std::string>*,
                             std::vector<int>*,
                             std::vector<int64_t>*>;

  /// `names` as in "--threads", or "FILE" for a positional argument. `value` holds the default, is set when the arguments are
  /// parsed, and must live until then.
  template <class T>
  void option(const std::string& names, T& value, const std::string& help, const Rules& rules = {}) {
    add_option(names, &value, help, rules);
  }
  void flag(const std::string& names, bool& value, const std::string& help, const Rules& rules = {});

  Command subcommand(const std::string& name, const std::string& about, std::function<void()> job);

  /// The end of the help text: "Example: ...".
  void footer(const std::string& text);

 protected:
  explicit Command(CLI::App* app) : app_(app) {}
  void add_option(const std::string& names, Value value, const std::string& help, const Rules& rules);
  CLI::App* app_;
};

class Program : public Command {
 public:
  Program(const std::string& name, const std::string& about);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  /// The output of --version.
  void version(const std::string& text);
  /// Parses the arguments and runs the job. Returns the exit status: 0, 1 for a failed job, 2 for wrong usage, 130 if
  /// interrupted. An error is one line on standard error. Output that cannot be written is a failed job.
  int run(int argc, char** argv, const std::function<void()>& job);

  /// The same with the job of the chosen subcommand. `none_chosen`: the error if no subcommand is given.
  int run_subcommand(int argc, char** argv, const std::string& none_chosen);
};

std::string default_device();
void add_device_option(Command& command, std::string& device);

/// Without a value LibTorch chooses the number of threads.
void add_threads_option(Command& command, std::optional<int>& threads);

/// The device of this name, which has passed `Rules::device`. Throws std::runtime_error if the machine has no such device.
c10::Device find_device(const std::string& name);

/// Changes nothing without a value.
void set_threads(std::optional<int> threads);

/// The options of a program that runs a model.
struct CommonOptions {
  std::string device = default_device();
  uint64_t seed = 0;
  std::optional<int> threads;
};

void add_common_options(Command& command, CommonOptions& options);

/// Sets the threads and the seed, and returns the device.
c10::Device apply(const CommonOptions& options);

}  // namespace program
