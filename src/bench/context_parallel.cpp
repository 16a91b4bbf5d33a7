// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <xattn/distributed.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

#include "programs/launch.h"
#include "programs/program.h"

namespace bench {
namespace {

constexpr auto kFooter = R"(Example: scripts/launch.sh 4 build/context_parallel --keys 1048576

Prints the measurements of rank 0; all ranks have equal shares. A call attends with all queries to all keys, without gradients:
  kept       to a context that was projected once
  one call   to a context that serves this call alone, not projected where that is cheaper
share is the size of a rank's part of the context, exchanged the bytes that it passes to collectives in a call, memory the peak of
its process.)";

struct Arguments {
  int64_t keys = 1 << 20, queries = 16, features = 512, heads = 8, calls = 5;
  std::string device = program::default_device();
};

double median(std::vector<double> x) {
  std::ranges::sort(x);
  return x[x.size() / 2];
}

double most_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return 1e-6 * static_cast<double>(usage.ru_maxrss);  // GB: Linux counts in KB
}

void run(const Arguments& a) {
  const auto place = launch::find_place().value_or(launch::Place{.address = "127.0.0.1", .port = 29500});
  const auto device = program::find_device(a.device == "cuda" ? fmt::format("cuda:{}", place.local_rank) : a.device);
  const auto group = launch::join(place, device, std::chrono::minutes(10));
  torch::manual_seed(0);
  xattn::CrossAttention module(xattn::CrossAttentionOptions(a.features, a.features, a.features, a.features)
                                   .num_heads(a.heads)
                                   .attention_weights(xattn::AttentionWeights::none));
  module->eval();
  module->to(device);
  xattn::ContextParallel parallel(module, group);

  const at::NoGradGuard no_grad;
  const auto query = torch::randn({1, a.queries, a.features}, device);
  const auto first = a.keys * place.rank / place.size;
  const auto own = a.keys * (place.rank + 1) / place.size - first;
  const auto x = torch::randn({1, own, a.features}, device);
  const auto report = [&](const char* name, const xattn::SharedContext& context, const auto& call) {
    call();
    std::vector<double> seconds;
    const auto before = parallel.bytes_exchanged();
    for (int64_t i = 0; i < a.calls; ++i) {
      const auto start = std::chrono::steady_clock::now();
      std::get<0>(call()).sum().template item<float>();  // waits for a device
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    if (place.rank > 0) return;
    std::cout << fmt::format("{:<9} {:>8.3f} GB share {:>9.1f} KB exchanged {:>9.1f} ms {:>7.2f} GB memory  {}, {}\n", name,
                             1e-9 * static_cast<double>(context.bytes()),
                             1e-3 * static_cast<double>(parallel.bytes_exchanged() - before) / static_cast<double>(a.calls),
                             1e3 * median(seconds), most_memory(), xattn::name_of(context.orders().logits),
                             xattn::name_of(context.orders().values));
  };
  if (place.rank == 0) {
    std::cout << fmt::format("{} keys of {} features, {} queries, {} heads; {} processes of {} threads\n", a.keys, a.features,
                             a.queries, a.heads, place.size, at::get_num_threads());
  }
  report("one call", parallel.context(x, x, {}, {.expected_queries = a.queries}),
         [&] { return parallel.forward(query, x, x); });
  const auto kept = parallel.context(x, x);
  report("kept", kept, [&] { return parallel.attend(query, kept); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Arguments arguments;
  program::Program program("context_parallel", "Times attention to a context that is divided among the started processes.");
  program.option("--keys", arguments.keys, "Keys of the whole context", {.positive = true});
  program.option("--queries", arguments.queries, "Queries, the same on all ranks", {.positive = true});
  program.option("--features", arguments.features, "Features of queries, keys, values and output", {.positive = true});
  program.option("--heads", arguments.heads, "Heads", {.positive = true});
  program.option("--calls", arguments.calls, "Calls of which the median is reported", {.positive = true});
  program::add_device_option(program, arguments.device);
  program.footer(bench::kFooter);
  return program.run(argc, argv, [&] { bench::run(arguments); });
}
