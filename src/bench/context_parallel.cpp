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

Prints what rank 0 sees; all ranks have alike shares. A call attends with all queries to all keys, without gradients:
  kept       to a context that was projected once
  one call   to a context that serves this call alone, left as it came where that is cheaper
share is what a rank holds of the context, exchanged what it gives to collectives in a call, memory the most its process has held.)";

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
  const auto first = a.keys * place.rank / place.size, own = a.keys * (place.rank + 1) / place.size - first;
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
  program::Program program("context_parallel",
                           "Times attention to a context that is shared out over the processes it is started as.");
  program.option("--keys", arguments.keys, "Of the whole context").positive().shows_default();
  program.option("--queries", arguments.queries, "The same on all ranks").positive().shows_default();
  program.option("--features", arguments.features, "Of everything").positive().shows_default();
  program.option("--heads", arguments.heads).positive().shows_default();
  program.option("--calls", arguments.calls, "The median of so many is reported").positive().shows_default();
  program::add_device_option(program, arguments.device);
  program.footer(bench::kFooter);
  return program.run(argc, argv, [&] { bench::run(arguments); });
}
