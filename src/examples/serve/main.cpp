// SPDX-License-Identifier: Apache-2.0

// How a server uses the library: threads take requests from a queue and share one frozen block and one context, without locks.
// Prints how many requests a second one thread and two threads answer, one by one and in batches.
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <xattn/block.h>
#include <xattn/frozen_block.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <iostream>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "programs/program.h"

namespace {

using torch::Tensor;

struct Request {
  Tensor query;  // [Lq, Eq]
  std::promise<Tensor> answer;
};

// Requests in the order in which they came, for any number of threads.
class Queue {
 public:
  // Waits while the queue is full.
  void push(Request request) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return requests_.size() < kMost; });
    requests_.push_back(std::move(request));
    changed_.notify_all();
  }

  // Waits for a request, and takes up to `most` of those that are there; none once the queue is closed and empty.
  std::vector<Request> pop(size_t most) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !requests_.empty() || closed_; });
    const auto end = requests_.begin() + static_cast<std::ptrdiff_t>(std::min(most, requests_.size()));
    std::vector<Request> taken(std::move_iterator(requests_.begin()), std::move_iterator(end));
    requests_.erase(requests_.begin(), end);
    changed_.notify_all();
    return taken;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

 private:
  static constexpr size_t kMost = 1000;  // a client that is faster than the server waits

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Request> requests_;
  bool closed_ = false;
};

class Server {
 public:
  Server(xattn::FrozenBlock block, xattn::FrozenContext context, int threads, size_t batch)
      : block_(std::move(block)), context_(std::move(context)), batch_(batch) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  // Answers the requests that are waiting.
  ~Server() {
    queue_.close();
    for (auto& thread : threads_) thread.join();
  }

  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // query [Lq, Eq] -> [Lq, Eq]. Throws c10::ValueError for any other, which must not spoil a batch of good ones.
  std::future<Tensor> submit(Tensor query) {
    const auto features = block_.options().attention().dim_query();
    if (query.dim() != 2 || query.size(1) != features || query.scalar_type() != at::kFloat) {
      throw c10::ValueError(fmt::format("[serve] query must be float32 [Lq, {}], but is {} [{}]", features,
                                        c10::getDtypeNames(query.scalar_type()).first, fmt::join(query.sizes(), ", ")));
    }
    Request request{std::move(query), {}};
    auto answer = request.answer.get_future();
    queue_.push(std::move(request));
    return answer;
  }

 private:
  void work() {
    at::set_num_threads(1);  // one core for each request: splitting small requests would cost more than it saves
    for (auto requests = queue_.pop(batch_); !requests.empty(); requests = queue_.pop(batch_)) answer(requests);
  }

  // Queries do not see each other, so those of several requests, of any lengths, are the rows of one call.
  void answer(std::vector<Request>& requests) const {
    std::vector<Tensor> queries;
    std::vector<int64_t> lengths;
    for (const auto& request : requests) {
      queries.push_back(request.query);
      lengths.push_back(request.query.size(0));
    }
    std::vector<Tensor> answers;
    try {
      const auto rows = torch::cat(queries).unsqueeze(0);
      const auto output = std::get<0>(block_.attend(rows, context_, {.weights = xattn::AttentionWeights::none}));
      answers = output.squeeze(0).split_with_sizes(lengths);
    } catch (...) {  // a server outlives a failed request
      for (auto& request : requests) request.answer.set_exception(std::current_exception());
      return;
    }
    for (size_t i = 0; i < requests.size(); ++i) requests[i].answer.set_value(answers[i]);
  }

  xattn::FrozenBlock block_;
  xattn::FrozenContext context_;
  size_t batch_;
  Queue queue_;
  std::vector<std::thread> threads_;
};

struct Options {
  int64_t requests = 2000, rows = 4, keys = 200, batch = 16;
  uint64_t seed = 0;
};

void serve(const Options& options) {
  constexpr int64_t kFeatures = 256;
  torch::manual_seed(options.seed);
  xattn::CrossAttentionBlock block(
      xattn::CrossAttentionBlockOptions(xattn::CrossAttentionOptions(kFeatures, kFeatures, kFeatures, kFeatures).num_heads(4)));
  block->eval();
  const auto frozen = block->freeze();
  const auto memory = torch::randn({1, options.keys, kFeatures});
  const auto context = frozen.context(memory, memory, {}, {.expected_queries = options.requests * options.rows});
  std::vector<Tensor> queries;
  for (int64_t i = 0; i < options.requests; ++i) queries.push_back(torch::randn({1 + i % options.rows, kFeatures}));

  for (const int threads : {1, 2}) {
    for (const auto batch : {int64_t{1}, options.batch}) {
      Server server(frozen, context, threads, static_cast<size_t>(batch));
      std::vector<std::future<Tensor>> answers;
      const auto begin = std::chrono::steady_clock::now();
      for (const auto& query : queries) answers.push_back(server.submit(query));
      for (const auto& answer : answers) answer.wait();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;

      const auto alone = std::get<0>(frozen.attend(queries.back().unsqueeze(0), context)).squeeze(0);
      const auto difference = (answers.back().get() - alone).abs().max().item<double>();
      std::cout << fmt::format("{} {}, batches of up to {}: {:.0f} requests/s; differs by {:.1g} from a call alone\n", threads,
                               threads == 1 ? "thread" : "threads", batch, options.requests / seconds.count(), difference);
    }
  }
  Server server(frozen, context, 1, 1);
  try {
    server.submit(torch::randn({4, kFeatures + 1}));
  } catch (const c10::ValueError& error) {
    std::cout << "A bad request is refused: " << error.what_without_backtrace() << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  program::Program program("serve",
                           "Serves a frozen block to several threads, and prints how many requests a second they answer.");
  program.option("--requests", options.requests, "How many to answer", {.range = {{1, 1'000'000}}});
  program.option("--rows", options.rows, "Most query rows of a request", {.range = {{1, 10'000}}});
  program.option("--keys", options.keys, "Length of the context that they attend to", {.range = {{1, 1'000'000}}});
  program.option("--batch", options.batch, "Most requests that are answered by one call", {.range = {{1, 1000}}});
  program.option("--seed", options.seed, "Of the random weights and requests");
  program.footer("Example: serve --requests 5000 --rows 8");
  return program.run(argc, argv, [&] { serve(options); });
}
