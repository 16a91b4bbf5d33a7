// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <csignal>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

// The command line and the error handling of all our programs. CLI11 parses; program.cpp alone includes it.
namespace program {

/// The user asked the job to stop; what() says how to go on. A program that throws it exits with status 128 and the number of the
/// signal, as shells have it: 130 for Ctrl-C.
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

/// A declared option, flag or positional argument. A handle: copies name the same one.
class Option {
 public:
  Option& required();
  Option& shows_default();  ///< in the help text
  Option& range(int64_t least, int64_t most);
  Option& positive();
  Option& not_negative();
  Option& one_of(const std::vector<std::string>& values);
  Option& device();                            ///< cpu, cuda or cuda:N
  Option& list(int least, int most);           ///< so many values, separated by commas
  Option& one_at_a_time();                     ///< repeatable, and takes one value each time
  Option& type_name(const std::string& name);  ///< of its value, in the help text
  Option& description(const std::string& text);
  Option& needs(const Option& other);
  Option& excludes(const Option& other);

 private:
  friend class Command;
  explicit Option(CLI::Option* option) : option_(option) {}
  CLI::Option* option_;
};

/// A program, or one of its subcommands. A handle as well.
class Command {
 public:
  /// `names` as in "--threads", or "FILE" for a positional argument. `value` is set when the arguments are parsed, and must live
  /// until then: a string, an integer, a number, std::optional or std::vector of these.
  template <class T>
  Option option(const std::string& names, T& value, const std::string& help = {});
  Option flag(const std::string& names, bool& value, const std::string& help);

  Command subcommand(const std::string& name, const std::string& about, std::function<void()> job);

  /// What the help text ends with: "Example: ...".
  void footer(const std::string& text);

 protected:
  explicit Command(CLI::App* app) : app_(app) {}
  CLI::App* app_;
};

class Program : public Command {
 public:
  Program(const std::string& name, const std::string& about);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  /// What --version prints.
  void version(const std::string& text);
  /// Parses the arguments and runs the job. `main` returns what this returns: 0, 1 for a failed job, 2 for wrong usage, 130 if
  /// interrupted. An error is one line on standard error. Output that cannot be written is a failed job.
  int run(int argc, char** argv, const std::function<void()>& job);

  /// The same with the job of the chosen subcommand. `none_chosen`: the error if there is none.
  int run_subcommand(int argc, char** argv, const std::string& none_chosen);
};

std::string default_device();
Option add_device_option(Command& command, std::string& device);

/// threads: the default, or 0 for as many as LibTorch takes by itself.
void add_threads_option(Command& command, int& threads);

/// The device of this name, which has passed `Option::device`. Throws std::runtime_error if it is not there.
c10::Device find_device(const std::string& name);

/// Does nothing for 0.
void set_threads(int threads);

/// The options of a program that runs a model.
struct CommonOptions {
  std::string device = default_device();
  uint64_t seed = 0;
  int threads = 0;
};

void add_common_options(Command& command, CommonOptions& options);

/// Sets the threads and the seed, and makes sure of the device.
c10::Device apply(const CommonOptions& options);

}  // namespace program
