// SPDX-License-Identifier: Apache-2.0
#include "programs/launch.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace xattn::test {
namespace {

using Variables = std::map<std::string, std::string>;

// Sets the environment that a launcher of processes would set, without that of this process's own launcher.
class LaunchTest : public testing::Test {
 protected:
  LaunchTest() {
    for (const auto* name : kNames) {
      if (const char* value = std::getenv(name)) before_[name] = value;
    }
  }
  ~LaunchTest() override { set(before_); }

  static void set(const Variables& variables) {
    for (const auto* name : kNames) unsetenv(name);
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  }

  static std::optional<launch::Place> find(const Variables& variables) {
    set(variables);
    return launch::find_place();
  }

  static std::string refusal(const Variables& variables) {
    try {
      find(variables);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }

 private:
  static constexpr const char* kNames[] = {"RANK",
                                           "WORLD_SIZE",
                                           "LOCAL_RANK",
                                           "MASTER_ADDR",
                                           "MASTER_PORT",
                                           "OMPI_COMM_WORLD_RANK",
                                           "OMPI_COMM_WORLD_SIZE",
                                           "OMPI_COMM_WORLD_LOCAL_RANK",
                                           "TORCHELASTIC_USE_AGENT_STORE"};
  Variables before_;
};

TEST_F(LaunchTest, AProgramStartedByItselfHasNoPlace) {
  EXPECT_FALSE(find({}).has_value());
  EXPECT_FALSE(find({{"MASTER_ADDR", "a"}, {"MASTER_PORT", "1"}, {"WORLD_SIZE", "2"}}).has_value());
}

TEST_F(LaunchTest, ReadsWhatTorchrunSets) {
  const auto place = find({{"RANK", "5"},
                           {"WORLD_SIZE", "8"},
                           {"LOCAL_RANK", "1"},
                           {"MASTER_ADDR", "node0"},
                           {"MASTER_PORT", "29500"},
                           {"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->rank, 5);
  EXPECT_EQ(place->size, 8);
  EXPECT_EQ(place->local_rank, 1);
  EXPECT_EQ(place->address, "node0");
  EXPECT_EQ(place->port, 29500);
  EXPECT_TRUE(place->store_is_there);
}

TEST_F(LaunchTest, ReadsWhatMpirunSets) {
  const auto place = find({{"OMPI_COMM_WORLD_RANK", "2"},
                           {"OMPI_COMM_WORLD_SIZE", "3"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                           {"MASTER_ADDR", "10.0.0.1"},
                           {"MASTER_PORT", "65535"}});
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->rank, 2);
  EXPECT_EQ(place->size, 3);
  EXPECT_EQ(place->local_rank, 0);
  EXPECT_EQ(place->port, 65535);
  EXPECT_FALSE(place->store_is_there);
}

TEST_F(LaunchTest, NamesTheVariableThatIsMissingOrMakesNoSense) {
  const Variables right = {{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "29500"}};
  const auto with = [&](const std::string& name, const std::string& value) {
    auto variables = right;
    variables[name] = value;
    return refusal(variables);
  };
  const auto without = [&](const std::string& name) {
    auto variables = right;
    variables.erase(name);
    return refusal(variables);
  };
  EXPECT_EQ(refusal(right), "");
  EXPECT_EQ(without("WORLD_SIZE"), "WORLD_SIZE must be set beside the rank, but is not");
  EXPECT_EQ(without("MASTER_ADDR"), "MASTER_ADDR must be set beside the rank, but is not");
  EXPECT_EQ(without("MASTER_PORT"), "MASTER_PORT must be set beside the rank, but is not");
  EXPECT_EQ(with("RANK", "2"), "RANK must be a number from 0 to 1, but is '2'");
  EXPECT_EQ(with("RANK", "one"), "RANK must be a number from 0 to 1, but is 'one'");
  EXPECT_EQ(with("WORLD_SIZE", "0"), "WORLD_SIZE must be a number from 1 to 2147483647, but is '0'");
  EXPECT_EQ(with("MASTER_PORT", "65536"), "MASTER_PORT must be a number from 1 to 65535, but is '65536'");
  EXPECT_EQ(with("MASTER_PORT", "29500x"), "MASTER_PORT must be a number from 1 to 65535, but is '29500x'");
}

// The local addresses at which sockets of this port listen, in the system's form: hexadecimal, in the machine's byte order.
std::set<std::string> listening_at(uint16_t port) {
  std::set<std::string> addresses;
  for (const auto* table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    std::ifstream lines(table);
    std::string line;
    std::getline(lines, line);  // the heading
    while (std::getline(lines, line)) {
      std::istringstream fields(line);
      std::string number, local, remote, state;
      fields >> number >> local >> remote >> state;
      const auto colon = local.find(':');
      constexpr auto kListens = "0A";
      if (state == kListens && std::stoi(local.substr(colon + 1), nullptr, 16) == port)
        addresses.insert(local.substr(0, colon));
    }
  }
  return addresses;
}

// The IPv4 addresses of this machine other than loopback.
std::vector<std::string> own_addresses() {
  std::vector<std::string> addresses;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return addresses;
  for (const auto* one = all; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_addr->sa_family != AF_INET || (one->ifa_flags & IFF_LOOPBACK) != 0) continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr, text, sizeof(text));
    addresses.emplace_back(text);
  }
  freeifaddrs(all);
  return addresses;
}

std::string hexadecimal_of(const std::string& address) {
  in_addr number = {};
  EXPECT_EQ(inet_pton(AF_INET, address.c_str(), &number), 1);
  return fmt::format("{:08X}", number.s_addr);
}

uint16_t free_port() {
  const int probe = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(probe, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(probe);
  return ntohs(address.sin_port);
}

std::set<std::string> listening_of_group_at(const std::string& address) {
  const launch::Place place = {.rank = 0, .size = 1, .address = address, .port = free_port()};
  const auto group = launch::join(place, c10::kCPU, std::chrono::seconds(20));
  std::vector<torch::Tensor> sum = {torch::ones({1})};
  group->allreduce(sum)->wait();
  return listening_at(place.port);
}

TEST_F(LaunchTest, TheStoreListensAtTheAddressThatWasGivenAndAtNoOther) {
  set({});
  EXPECT_EQ(listening_of_group_at("127.0.0.1"), std::set{hexadecimal_of("127.0.0.1")});
  EXPECT_EQ(listening_of_group_at("127.0.0.2"), std::set{hexadecimal_of("127.0.0.2")});
  const auto local = listening_of_group_at("localhost");
  ASSERT_EQ(local.size(), 1U);
  const std::string kIpv6 = "00000000000000000000000001000000";
  EXPECT_TRUE(*local.begin() == hexadecimal_of("127.0.0.1") || *local.begin() == kIpv6) << *local.begin();
  for (const auto& address : own_addresses()) {
    EXPECT_EQ(listening_of_group_at(address), std::set{hexadecimal_of(address)}) << address;
  }
}

TEST_F(LaunchTest, TheFirstProcessMustBeWhereTheAddressIs) {
  set({});
  const auto refused = [](const std::string& address) {
    const launch::Place place = {.rank = 0, .size = 1, .address = address, .port = free_port()};
    try {
      launch::join(place, c10::kCPU, std::chrono::seconds(5));
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string("joined");
  };
  const auto elsewhere = refused("192.0.2.1");  // of no machine: RFC 5737
  EXPECT_TRUE(elsewhere.starts_with("the first process must run where MASTER_ADDR is, but cannot listen at 192.0.2.1 port "))
      << elsewhere;
  EXPECT_TRUE(elsewhere.ends_with(": Cannot assign requested address")) << elsewhere;
  const auto unknown = refused("no such\nhost.invalid");
  EXPECT_TRUE(unknown.starts_with("MASTER_ADDR must name a machine, but is 'no such\\x0ahost.invalid': ")) << unknown;
}

}  // namespace
}  // namespace xattn::test
