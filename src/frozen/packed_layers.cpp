// SPDX-License-Identifier: Apache-2.0
#include "frozen/packed_layers.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/elementwise.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// As the kernels read it; x itself if it is so already.
Tensor plain(const Tensor& x) {
  return contiguous(x.resolve_neg());
}

Tensor copy_of(const Tensor& x) {
  return x.defined() ? x.resolve_neg().clone(at::MemoryFormat::Contiguous) : x;
}

}  // namespace

int64_t bytes_of(const Tensor& x) {
  return x.defined() ? static_cast<int64_t>(x.nbytes()) : 0;
}

NormWeights copy_of(NormWeights norm) {
  norm.weight = copy_of(norm.weight), norm.bias = copy_of(norm.bias);
  return norm;
}

Tensor copy_or_zeros(const Tensor& bias, int64_t n) {
  return bias.defined() ? copy_of(bias) : at::zeros({n}, at::kFloat);
}

Packed pack_weights(const Tensor& weights, at::ScalarType storage) {
  const auto w = plain(weights);
  const auto count = w.size(0), n = w.size(1), k = w.size(2), size = kernels().packed_size(k, n);
  const auto options = w.options().dtype(storage);
  const bool is_large = 4 * count * size >= kHugePage;
  Packed result{is_large ? empty_in_huge_pages(count * size, options) : at::empty({count * size}, options), k, n};
  for (int64_t i = 0; i < count; ++i) pack_transposed(data(w) + i * n * k, k, k, n, result.data, i * size);
  return result;
}

PackedLinear pack_linear(const LinearWeights& linear, at::ScalarType storage) {
  if (!linear.weight.defined()) return {};
  return {pack_weights(linear.weight.unsqueeze(0), storage), copy_or_zeros(linear.bias, linear.weight.size(0))};
}

Tensor apply(const PackedLinear& linear, const Tensor& given) {
  const auto x = plain(given);
  const auto& weight = linear.weight;
  auto sizes = x.sizes().vec();
  sizes.back() = weight.n;
  const auto y = in_huge_pages(at::empty(sizes, x.options()));
  const auto rows = x.numel() / weight.k;
  each_share_of_rows({.rows = rows,
                      .has_many_rows = has_many_rows(rows, weight.n, weight.k),
                      .reads = {.weights = bytes_of(weight.data), .context = 0},
                      .apart = {1},
                      .together = {1}},
                     [&](int64_t begin, int64_t end, Scratch, const TaskThreads& threads) {
                       const auto* from = data(x) + begin * weight.k;
                       auto* to = mutable_data(y) + begin * weight.n;
                       threads.multiply(projection(from, end - begin, weight, linear.bias, to, rows));
                     });
  return y;
}

void finish_block(const BlockWeights& w, const PackedFeedForward& packed, const Tensor& given, const Tensor& attended) {
  const auto query = plain(given);
  const auto Eq = w.features, rows = query.numel() / Eq, hidden_size = packed.in.weight.n;
  const bool normalises_copy = w.norms_before() && w.feed_forward_norm.kind != NormKind::none;
  const bool multiplies = packed.multiplier.weight.data.defined();
  const ScratchSize floats{
      std::max<int64_t>(1, hidden_size * (multiplies ? 2 : 1) + (hidden_size > 0 ? Eq * (normalises_copy ? 2 : 1) : 0))};
  each_share_of_rows(
      {.rows = rows,
       .has_many_rows = has_many_rows(rows, hidden_size, Eq),
       .reads = {.weights = packed.bytes(), .context = 0},
       .apart = floats,
       .together = floats},
      [&](int64_t begin, int64_t end, Scratch scratch, const TaskThreads& threads) {
        const auto n = end - begin;
        auto* x = mutable_data(attended) + begin * Eq;
        // x = from + gate * branch, and normalised if norms follow the sum
        const auto add = [&](const float* from, const Tensor& gate, const float* branch, const NormWeights& norm) {
          threads.parts(n, [&](int64_t first, int64_t last) {
            const auto at = first * Eq, count = last - first;
            add_rows(from + at, gate, branch + at, x + at, count, Eq);
            if (!w.norms_before()) normalise_rows(norm, x + at, x + at, count, Eq);
          });
        };
        add(data(query) + begin * Eq, w.attention_gate, x, w.attention_norm);
        if (hidden_size == 0) return;

        auto* entered = x;
        if (normalises_copy) {
          entered = scratch.take(n * Eq);
          threads.parts(n, [&](int64_t first, int64_t last) {
            normalise_rows(w.feed_forward_norm, x + first * Eq, entered + first * Eq, last - first, Eq);
          });
        }
        auto* hidden = scratch.take(n * hidden_size);
        auto* multiplier = multiplies ? scratch.take(n * hidden_size) : nullptr;
        threads.multiply(projection(entered, n, packed.in.weight, packed.in.bias, hidden, rows));
        if (multiplies)
          threads.multiply(projection(entered, n, packed.multiplier.weight, packed.multiplier.bias, multiplier, rows));
        threads.parts(n, [&](int64_t first, int64_t last) {
          const auto at = first * hidden_size;
          kernels().activate(pointwise(w.activation), hidden + at, multiplies ? multiplier + at : nullptr,
                             (last - first) * hidden_size);
        });
        auto* branch = scratch.take(n * Eq);
        threads.multiply(projection(hidden, n, packed.out.weight, packed.out.bias, branch, rows));
        add(x, w.feed_forward_gate, branch, w.feed_forward_norm);
      });
}

}  // namespace xattn::detail
