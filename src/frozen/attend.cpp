// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "attention/heads.h"
#include "attention/merge.h"
#include "cpu/elementwise.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"
#include "frozen/engine.h"
#include "frozen/packed_layers.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// Bytes of the weights that query rows are multiplied by; a constant query has already been multiplied by those of the logits.
int64_t bytes_of_weights(const EngineWeights& w, const Orders& orders, bool query_is_given) {
  int64_t total = 0;
  if (query_is_given && !is_folded(orders.logits)) {
    total += bytes_of(orders.logits == Order::prefold ? w.logits_product.data : w.query.data);
    if (orders.logits == Order::fold_into_query) total += bytes_of(w.key_fold().data);
  }
  if (is_folded(orders.values)) return total;
  if (orders.values == Order::prefold) return total + bytes_of(w.values_product.data);
  return total + bytes_of(w.output.data) + (orders.values == Order::standard ? 0 : bytes_of(w.value_fold().data));
}

bool is_small(const EngineWeights& w, int64_t B, int64_t Lq, int64_t Lk) {
  return 2 * B * (Lq * w.H * (w.Eq * w.d + w.e * w.Eo) + Lk * w.G * (w.Ek * w.d + w.Ev * w.e)) < kOperationsOfACall;
}

// Xq Wq + bq, normalised, for n rows: [n, H * d].
void project_query(
    const EngineWeights& w, const float* query, int64_t n, float* projected, int64_t all_rows, const TaskThreads& threads) {
  const auto width = w.query.n;
  threads.multiply(projection(query, n, w.query, w.query_bias, projected, all_rows));
  threads.parts(n, [&](int64_t begin, int64_t end) {
    auto* rows = projected + begin * width;
    normalise_rows(w.query_norm, rows, rows, end - begin, width);
  });
}

// (Xq Wq) Wk' of each head: projected [n, H * d] -> folded [n, H * Ek].
void fold_into_query(const EngineWeights& w,
                     const Packed& key_fold,
                     const float* projected,
                     int64_t n,
                     float* folded,
                     int64_t all_rows,
                     const TaskThreads& threads) {
  threads.each(w.H, [&](int64_t h) {
    multiply({.sizes = {n, w.Ek, w.d},
              .a = {projected + h * w.d, w.H * w.d},
              .b = packed(key_fold).from_row(h * w.G / w.H * w.d),
              .c = {folded + h * w.Ek, w.H * w.Ek},
              .all_rows = all_rows});
  });
}

// Divides the keys of a context that is read once into shares of whole panels, which are merged by their log-sum-exps, and the
// shares into blocks. The division does not depend on the threads, because the bits of the sums depend on it.
struct KeyShares {
  KeyShares(int64_t Lk, int64_t features) {
    const auto panel = kernels().panel;
    keys = round_up(std::max(kLeastKeysOfAShare, divided_up(Lk, kMostKeyShares)), panel);
    block = std::clamp(kKeyBlockBytes / 4 / features / panel * panel, panel, keys);
  }
  int64_t count(int64_t length) const { return divided_up(length, keys); }
  int64_t blocks() const { return divided_up(keys, block); }  // of a share

  int64_t keys, block;  // keys of a share, and of a block
};

// One of these shares.
struct KeyShare {
  int64_t first, last;
  float* weighted;        // [n, H, Ev], by softmax over this share
  LogSumExps sums;        // [n, H], over this share
  LogSumExps block_sums;  // [blocks, n, H], over its keys up to the end of each block
};

class Attend {
 public:
  Attend(const EngineWeights& w, const EngineContext& context, const EngineCall& call)
      : w_(w),
        context_(context),
        query_(call.query.defined() ? contiguous(call.query.resolve_neg()) : Tensor()),
        folded_(call.folded_query),
        Lq_(query_.defined() ? query_.size(1) : folded_.size(0)),
        rows_((query_.defined() && context.B > 0 ? query_.size(0) / context.B : 1) * Lq_),
        projected_rows_(is_small(w, context.B, rows_, context.Lk) ? rows_ : context.B * rows_),
        heads_{w.H, w.G, w.d, w.e, context.Lk, context.keys, context.values, /*are_packed=*/true, context.capacity},
        softmax_(call.how, w.H, Lq_, context.Lk, w.scale) {
    added_.reserve(call.added.size());
    for (const auto& added : call.added) {
      added_.emplace_back(*added.weights, *added.context,
                          EngineCall{.query = query_, .folded_query = {}, .how = {.mask = added.mask}});
      added_.back().factor_ = added.scale;
    }
  }

  // Writes to a result of the right sizes.
  void run(const AttentionResult& result) {
    output_ = mutable_data(result.output);
    softmax_.write_to(result.weights);
    auto reads = bytes_read();
    for (const auto& added : added_) {
      const auto more = added.bytes_read();
      reads = {reads.weights + more.weights, reads.context + more.context};
    }
    each_share_of_rows(
        {.rows = context_.B * rows_,
         .has_many_rows = has_many_rows(projected_rows_, w_.Eo, w_.H * w_.e),
         .is_uneven = by_heads() && softmax_.is_causal(),
         .reads = reads,
         .apart = scratch_size(TaskThreads{.all = false}),
         .together = scratch_size(TaskThreads{.all = true})},
        [this](auto begin, auto end, auto scratch, const auto& threads) { run_rows(begin, end, scratch, threads); });
  }

 private:
  // The left context of the logits.
  struct LeftRows {
    const float* data;
    int64_t stride;
  };

  bool logits_are(Order order) const { return context_.orders.logits == order; }
  bool values_are(Order order) const { return context_.orders.values == order; }
  bool values_are_raw() const { return is_raw(context_.orders.values); }
  bool values_are_folded() const { return is_folded(context_.orders.values); }

  // Whether each head is computed from logits to weighted values before the next one.
  bool by_heads() const { return context_.orders == Orders{}; }

  // Whether the weighted values of a head overwrite its projected query, which is not used after them.
  bool in_place() const { return by_heads() && w_.d == w_.e && query_.defined() && added_.empty(); }

  // Whether logits and weighted values read the rows of one context together, each share of them once from memory. Merging the
  // shares pays off for few query rows, if a core's cache cannot hold the context between logits and weighted values.
  bool reads_once() const {
    return is_raw(context_.orders.logits) && values_are_raw() && context_.layout == ContextLayout::unpacked && w_.Ek == w_.Ev &&
           context_.keys.const_data_ptr() == context_.values.const_data_ptr() && 4 * context_.Lk * w_.Ek > kCoreCache;
  }

  BytesRead bytes_read() const {
    const auto bytes_of_a_key =
        (bytes_of(context_.keys) + bytes_of(context_.values)) / std::max<int64_t>(1, context_.B * context_.capacity);
    return {bytes_of_weights(w_, context_.orders, query_.defined()), bytes_of_a_key * context_.Lk};
  }

  // Floats of a row of weighted values.
  int64_t weighted_width() const { return values_are_folded() ? w_.Eo : w_.H * (values_are_raw() ? w_.Ev : w_.e); }

  static LogSumExps take_sums(int64_t rows, Scratch& scratch) {
    auto* largest = scratch.take(rows);
    return {largest, scratch.take(rows)};
  }

  // An upper bound of the scratch that run_rows takes. Contexts of a decoupled layer use the same scratch one after the other.
  ScratchSize scratch_size(const TaskThreads& threads) const {
    auto size = scratch_of_context(threads);
    for (const auto& added : added_) {
      const auto other = added.scratch_of_context(threads);
      size = {std::max(size.row, other.row), std::max(size.logits, other.logits),
              std::max(size.rows_at_a_time, other.rows_at_a_time)};
    }
    if (!added_.empty()) size.row += 2 * w_.H * w_.e + w_.H * w_.d;
    return size;
  }

  ScratchSize scratch_of_context(const TaskThreads& threads) const {
    const auto& w = w_;
    auto size = by_heads() ? scratch_of_heads(heads_, softmax_, threads) : ScratchSize{w.H * context_.Lk};
    auto& floats = size.row;
    if (reads_once()) {
      const KeyShares shares(context_.Lk, w.Ev);
      floats += w.H * (shares.count(context_.Lk) * (w.Ev + 2 * shares.blocks() + 2) + 2);
    }
    if (!is_folded(context_.orders.logits) && query_.defined())
      floats += w.H * w.d + (is_raw(context_.orders.logits) ? w.H * w.Ek : 0);
    if (!values_are_folded() && !in_place()) floats += w.H * w.e + (values_are_raw() ? w.H * w.Ev : 0);
    floats += 2 * w.H + 16;
    return size;
  }

  // Computes the output of rows [begin, end) of all B * n * Lq.
  void run_rows(int64_t begin, int64_t end, Scratch scratch, const TaskThreads& threads) const {
    if (!added_.empty()) return run_rows_of_all_contexts(begin, end, scratch, threads);
    const auto n = end - begin, width = weighted_width();
    auto* const output = output_ + begin * w_.Eo;
    auto* const weighted = values_are_folded() ? output : scratch.take(n * width);
    const auto* projected = in_place() ? project(begin, n, weighted, threads) : nullptr;
    if (!in_place() && query_.defined() && projects_query(context_.orders.logits)) {
      projected = project(begin, n, scratch.take(n * w_.H * w_.d), threads);
    }
    // Rows without keys are found by their log-sum-exps, because they get no bias of the values.
    const bool needs_sums = values_are_raw() && !softmax_.all_have_keys();
    const auto sums = needs_sums ? take_sums(n * w_.H, scratch) : LogSumExps{};
    run_contexts(begin, end, projected, weighted, sums, scratch, threads);
    if (values_are_folded()) return;
    write_output(weighted, sums, n, output, scratch, threads);
    if (values_are_raw() && !needs_sums) write_output_of_empty_contexts(begin, end);
  }

  // The same for a decoupled layer, whose query is projected once.
  void run_rows_of_all_contexts(int64_t begin, int64_t end, Scratch scratch, const TaskThreads& threads) const {
    const auto n = end - begin, width = w_.H * w_.e;
    auto* const heads = scratch.take(n * width);
    auto* const heads_of_added = scratch.take(n * width);
    const bool projects = projects_query(context_.orders.logits) || std::ranges::any_of(added_, [](const Attend& added) {
                            return projects_query(added.context_.orders.logits);
                          });
    const auto* projected = projects ? project(begin, n, scratch.take(n * w_.H * w_.d), threads) : nullptr;
    write_heads(begin, end, projected, heads, scratch, threads);
    for (const auto& added : added_) {
      added.write_heads(begin, end, projected, heads_of_added, scratch, threads);
      for (int64_t i = 0; i < n * width; ++i) heads[i] += added.factor_ * heads_of_added[i];
    }
    threads.multiply(projection(heads, n, w_.output, w_.output_bias, output_ + begin * w_.Eo, projected_rows_));
  }

  // Computes the heads [n, H, e] of rows [begin, end), with the bias of the values. REQUIRES: the values end in heads.
  void write_heads(
      int64_t begin, int64_t end, const float* projected, float* heads, Scratch scratch, const TaskThreads& threads) const {
    const auto n = end - begin;
    if (!values_are_raw()) return run_contexts(begin, end, projected, heads, {}, scratch, threads);
    auto* const weighted = scratch.take(n * weighted_width());
    const auto sums = take_sums(n * w_.H, scratch);
    run_contexts(begin, end, projected, weighted, sums, scratch, threads);
    fold_into_heads(weighted, sums, n, heads, threads);
  }

  // Xq Wq + bq of n rows, in `place`.
  const float* project(int64_t begin, int64_t n, float* place, const TaskThreads& threads) const {
    project_query(w_, data(query_) + begin * w_.Eq, n, place, projected_rows_, threads);
    return place;
  }

  // Computes the weighted values of rows [begin, end), one context after another. projected: of these rows, if the order of the
  // logits reads it; the weighted values may overwrite it. sums: may be null.
  void run_contexts(int64_t begin,
                    int64_t end,
                    const float* projected,
                    float* weighted,
                    const LogSumExps& sums,
                    Scratch scratch,
                    const TaskThreads& threads) const {
    const auto left = left_rows(begin, end - begin, projected, scratch, threads);
    for (int64_t first = begin, last = begin; first < end; first = last) {
      const auto b = first / rows_, row = first - begin;
      last = std::min(end, (b + 1) * rows_);
      run_segment({.context = b,
                   .first_row = first,
                   .rows = last - first,
                   .keys = context_.lengths[static_cast<size_t>(b)],
                   .queries = left.data + (query_.defined() ? row : first % rows_) * left.stride,
                   .query_stride = left.stride,
                   .head_stride = w_.d,
                   .weighted_values = weighted + row * weighted_width(),
                   .log_sum_exp = sums ? sums + row * w_.H : LogSumExps{},
                   .context_rows = rows_},
                  scratch, threads);
    }
  }

  // The rows that are multiplied by the keys: those of a task, or of a constant query for all contexts.
  LeftRows left_rows(int64_t begin, int64_t n, const float* projected, Scratch& scratch, const TaskThreads& threads) const {
    const auto& w = w_;
    if (!query_.defined()) return {data(folded_), folded_.size(1)};
    const auto* query = data(query_) + begin * w.Eq;
    if (is_folded(context_.orders.logits)) return {query, w.Eq};
    if (logits_are(Order::standard)) return {projected, w.H * w.d};
    auto* rows = scratch.take(n * w.H * w.Ek);
    if (logits_are(Order::prefold)) {
      threads.multiply(projection(query, n, w.logits_product, w.logits_product_bias, rows, projected_rows_));
    } else {
      fold_into_query(w, w.key_fold(), projected, n, rows, projected_rows_, threads);
    }
    return {rows, w.H * w.Ek};
  }

  void run_segment(const Segment& s, Scratch scratch, const TaskThreads& threads) const {
    if (s.keys == 0) return clear(s);
    if (by_heads()) return attend_heads(heads_, softmax_, s, scratch, threads);
    if (reads_once()) return attend_once(s, scratch, threads);
    auto* logits = scratch.take(s.rows * w_.H * s.keys);  // [n, H, keys]
    write_logits(s, logits, threads);
    threads.parts(s.rows * w_.H, [&](int64_t begin, int64_t end) { softmax_.softmax_rows(s, logits, s.keys, begin, end); });
    write_weights(s, logits);
    write_weighted_values(s, logits, threads);
  }

  // Copies weights [n, H, keys] to the caller's buffer if requested.
  void write_weights(const Segment& s, const float* weights) const {
    for (int64_t h = 0; softmax_.returns_weights() && h < w_.H; ++h)
      softmax_.write_weights(s, h, weights + h * s.keys, w_.H * s.keys);
  }

  // logits [n, H, keys]
  void write_logits(const Segment& s, float* logits, const TaskThreads& threads) const {
    const auto& w = w_;
    const bool raw = is_raw(context_.orders.logits);
    if (logits_are(Order::standard)) {
      return threads.each(w.H, [&](int64_t h) { logits_of_head(heads_, s, h, logits + h * s.keys, w.H * s.keys); });
    }
    if (raw && context_.layout != ContextLayout::packed) {
      const auto panel = kernels().panel;
      return threads.parts(divided_up(s.keys, panel), [&](int64_t begin, int64_t end) {
        write_logits_of_rows(s, begin * panel, std::min(s.keys, end * panel), logits);
      });
    }
    // Heads are rows of the left context of a raw context, and columns of a folded one.
    const auto heads_left = raw ? w.H : 1, columns = raw ? s.keys : w.H * s.keys, k = raw ? w.Ek : w.Eq;
    threads.multiply({.sizes = {s.rows * heads_left, columns, k},
                      .a = {s.queries, k},
                      .b = packed(context_.keys, s.context * context_.keys.stride(0), k),
                      .c = {logits, columns},
                      .bias = raw ? nullptr : data(context_.key_bias) + s.context * w.H * context_.Lk,
                      .all_rows = rows_ * heads_left});
  }

  // logits [n, H, keys] of the keys [begin, end) of a context that is not packed.
  void write_logits_of_rows(const Segment& s, int64_t begin, int64_t end, float* logits) const {
    const auto& w = w_;
    const auto* keys = data(context_.keys) + s.context * context_.keys.stride(0);
    Product product{.sizes = {s.rows * w.H, 0, w.Ek}, .a = {s.queries, w.Ek}, .c = {nullptr, s.keys}};
    if (context_.layout == ContextLayout::unpacked) {
      product.sizes.n = end - begin;
      product.b = kernels().rows(keys + begin * w.Ek, w.Ek);
      product.c.data = logits + begin;
      return multiply_transposed(product);
    }
    const auto panel = kernels().panel;
    const auto packed_keys = at::empty({w.Ek, panel}, context_.keys.options());
    product.b = packed(packed_keys, 0, w.Ek);
    for (int64_t first = begin; first < end; first += panel) {
      product.sizes.n = std::min(panel, end - first);
      product.c.data = logits + first;
      pack_transposed(keys + first * w.Ek, w.Ek, w.Ek, product.sizes.n, packed_keys, 0);
      multiply(product);
    }
  }

  // weights [n, H, keys] -> s.weighted_values
  void write_weighted_values(const Segment& s, const float* weights, const TaskThreads& threads) const {
    const auto& w = w_;
    const auto& values = context_.values;
    if (values_are(Order::standard)) {
      return threads.each(w.H, [&](int64_t h) { weighted_values_of_head(heads_, s, h, weights + h * s.keys, w.H * s.keys); });
    }
    const auto first = s.context * values.stride(0);
    const bool raw = values_are_raw(), is_packed = context_.layout == ContextLayout::packed;
    const auto heads_left = raw ? w.H : 1, columns = raw ? w.Ev : w.Eo, k = raw ? s.keys : w.H * s.keys;
    threads.multiply(
        {.sizes = {s.rows * heads_left, columns, k},
         .a = {weights, k},
         .b = raw && !is_packed ? plain_rows(values, first, w.Ev) : packed(values, first, raw ? context_.capacity : k),
         .c = {s.weighted_values, columns},
         .bias = raw ? nullptr : data(w.output_bias),
         .all_rows = raw && !is_packed ? 0 : rows_ * heads_left});
  }

  // Computes logits, softmax and weighted values for a context that is read once.
  void attend_once(const Segment& s, Scratch scratch, const TaskThreads& threads) const {
    const KeyShares shares(context_.Lk, w_.Ev);
    const auto count = shares.count(s.keys), rows = s.rows * w_.H, size = rows * w_.Ev;
    auto* logits = scratch.take(rows * s.keys);  // [n, H, keys]
    auto* weighted = scratch.take(count * size);
    const auto sums = take_sums(count * rows, scratch), block_sums = take_sums(count * shares.blocks() * rows, scratch);
    const auto share_at = [&](int64_t i) {
      return KeyShare{.first = i * shares.keys,
                      .last = std::min(s.keys, (i + 1) * shares.keys),
                      .weighted = weighted + i * size,
                      .sums = sums + i * rows,
                      .block_sums = block_sums + i * shares.blocks() * rows};
    };
    threads.each(count, [&](int64_t i) { attend_share(s, share_at(i), shares.block, logits); });

    const auto all = s.log_sum_exp ? s.log_sum_exp : take_sums(rows, scratch);
    for (int64_t row = 0; row < rows; ++row) {
      all.set(row, sums[row]);
      for (int64_t i = 1; i < count; ++i) all.set(row, log_sum(all[row], sums[i * rows + row]));
      auto* to = s.weighted_values + row * w_.Ev;
      for (int64_t i = 0; i < count; ++i) {
        const auto factor = share_of(sums[i * rows + row], all[row]);
        const auto* from = weighted + i * size + row * w_.Ev;
        for (int64_t j = 0; j < w_.Ev; ++j) to[j] = (i > 0 ? to[j] : 0) + factor * from[j];
      }
    }
    if (!softmax_.returns_weights()) return;
    for (int64_t i = 0; i < count; ++i) {
      auto share = share_at(i);
      for (auto key = share.first; key < share.last; key += shares.block, share.block_sums = share.block_sums + rows) {
        const auto keys = std::min(shares.block, share.last - key);
        for (int64_t row = 0; row < rows; ++row)
          scale(logits + row * s.keys + key, keys, share_of(share.block_sums[row], all[row]));
      }
    }
    write_weights(s, logits);
  }

  // Computes one share, one block of keys at a time. A block's logits become weights over the share's keys up to its end.
  void attend_share(const Segment& s, KeyShare share, int64_t keys_of_a_block, float* logits) const {
    const auto rows = s.rows * w_.H;
    for (auto key = share.first; key < share.last; key += keys_of_a_block, share.block_sums = share.block_sums + rows) {
      const bool is_first = key == share.first;
      auto block = s;
      block.first_key = key;
      block.keys = std::min(keys_of_a_block, share.last - key);
      block.log_sum_exp = share.block_sums;
      write_logits_of_rows(s, key, key + block.keys, logits);
      softmax_.softmax_rows(block, logits + key, s.keys, 0, rows);
      for (int64_t row = 0; row < rows && !is_first; ++row) {
        const auto before = share.sums[row], of_block = share.block_sums[row], all = log_sum(before, of_block);
        scale(share.weighted + row * w_.Ev, w_.Ev, share_of(before, all));
        scale(logits + row * s.keys + key, block.keys, share_of(of_block, all));
        share.block_sums.set(row, all);
      }
      for (int64_t row = 0; row < rows; ++row) share.sums.set(row, share.block_sums[row]);
      multiply({.sizes = {rows, w_.Ev, block.keys},
                .a = {logits + key, s.keys},
                .b = plain_rows(context_.values, s.context * context_.values.stride(0) + key * w_.Ev, w_.Ev),
                .c = {share.weighted, w_.Ev},
                .accumulate = !is_first});
    }
  }

  // Weighted values of n rows -> output [n, Eo].
  void write_output(
      float* weighted, const LogSumExps& sums, int64_t n, float* output, Scratch& scratch, const TaskThreads& threads) const {
    const auto& w = w_;
    const auto& bias = values_are(Order::standard) || sums ? w.output_bias : w.output_bias_after_value;
    if (values_are(Order::prefold)) {
      threads.multiply(projection(weighted, n, w.values_product, bias, output, projected_rows_));
      add_value_bias(
          sums, n, w.Eo, [&](int64_t h) { return data(w.values_product_bias) + h * w.Eo; },
          [&](int64_t row, int64_t) { return output + row * w.Eo; });
      return;
    }
    if (values_are(Order::fold_into_query)) {
      auto* heads = scratch.take(n * w.H * w.e);
      fold_into_heads(weighted, sums, n, heads, threads);
      weighted = heads;
    }
    threads.multiply(projection(weighted, n, w.output, bias, output, projected_rows_));
  }

  // Weighted values of raw contexts [n, H, Ev] -> heads [n, H, e], with the bias of the values if there are log-sum-exps.
  void fold_into_heads(
      const float* weighted, const LogSumExps& sums, int64_t n, float* heads, const TaskThreads& threads) const {
    const auto& w = w_;
    const auto width = w.H * w.e;
    const auto& fold = w.value_fold();
    threads.each(w.H, [&](int64_t h) {
      multiply({.sizes = {n, w.e, w.Ev},
                .a = {weighted + h * w.Ev, w.H * w.Ev},
                .b = packed(fold, h * w.G / w.H),
                .c = {heads + h * w.e, width},
                .all_rows = projected_rows_});
    });
    add_value_bias(
        sums, n, w.e, [&](int64_t h) { return data(w.value_bias) + h * w.G / w.H * w.e; },
        [&](int64_t row, int64_t h) { return heads + row * width + h * w.e; });
  }

  // Adds bias_of(h) [size] to place_of(row, h) for each head that has a key in a row; nothing if there are no log-sum-exps.
  template <class BiasOf, class PlaceOf>
  void add_value_bias(const LogSumExps& sums, int64_t n, int64_t size, const BiasOf& bias_of, const PlaceOf& place_of) const {
    for (int64_t row = 0; sums && row < n; ++row) {
      for (int64_t h = 0; h < w_.H; ++h) {
        if (sums[row * w_.H + h].is_empty()) continue;
        const auto* bias = bias_of(h);
        auto* place = place_of(row, h);
        for (int64_t j = 0; j < size; ++j) place[j] += bias[j];
      }
    }
  }

  void write_output_of_empty_contexts(int64_t begin, int64_t end) const {
    for (auto row = begin; row < end; ++row) {
      if (context_.lengths[static_cast<size_t>(row / rows_)] == 0)
        std::copy_n(data(w_.output_bias), w_.Eo, output_ + row * w_.Eo);
    }
  }

  // Writes the weighted values of a context without keys.
  void clear(const Segment& s) const {
    if (values_are_folded()) {
      for (int64_t i = 0; i < s.rows; ++i) std::copy_n(data(w_.output_bias), w_.Eo, s.weighted_values + i * w_.Eo);
      return;
    }
    std::fill_n(s.weighted_values, s.rows * weighted_width(), 0.0f);
    for (int64_t row = 0; s.log_sum_exp && row < s.rows * w_.H; ++row) s.log_sum_exp.set(row, {});
  }

  const EngineWeights& w_;
  const EngineContext& context_;
  Tensor query_, folded_;
  int64_t Lq_, rows_;       // rows of a query, and of all queries of one context
  int64_t projected_rows_;  // all rows; those of one context in a small call, which `forward` may divide by contexts
  Heads heads_;             // of standard orders
  SoftmaxStage softmax_;
  float* output_ = nullptr;
  std::vector<Attend> added_;  // the added contexts of a decoupled layer
  float factor_ = 1;           // of the heads of such a context
};

int64_t rows_of(const EngineCall& call) {
  return call.query.defined() ? call.query.size(1) : call.folded_query.size(0);
}

// An uninitialised result for B queries; its weights are zeros if some keys may be left out.
AttentionResult empty_result(
    const EngineWeights& w, int64_t B, int64_t Lk, const std::vector<int64_t>& lengths, const EngineCall& call) {
  const auto Lq = rows_of(call);
  const bool all_keys = std::ranges::all_of(lengths, [Lk](int64_t length) { return length == Lk; });
  return {in_huge_pages(at::empty({B, Lq, w.Eo}, at::kFloat)), empty_weights(call.how, B, w.H, Lq, Lk, all_keys), {}};
}

}  // namespace

Tensor fold_query(const Orders& orders, const EngineWeights& w, const Tensor& query) {
  const auto Xq = contiguous(query.resolve_neg());
  if (is_folded(orders.logits)) return Xq;
  const TaskThreads one{.all = false};
  const auto n = query.size(0);
  const auto folded = at::empty({n, w.H * w.Ek}, query.options());
  if (orders.logits == Order::prefold) {
    multiply(projection(data(Xq), n, w.logits_product, w.logits_product_bias, mutable_data(folded), /*all_rows=*/0));
    return folded;
  }
  const auto projected = at::empty({n, w.H * w.d}, query.options());
  project_query(w, data(Xq), n, mutable_data(projected), /*all_rows=*/0, one);
  if (orders.logits == Order::standard) return projected;
  const auto key_fold = transposed(w.key);  // not kept: calls with a constant query do not fold
  fold_into_query(w, key_fold, data(projected), n, mutable_data(folded), /*all_rows=*/0, one);
  return folded;
}

AttentionResult attend(const EngineWeights& weights, const EngineContext& context, const EngineCall& call) {
  const auto B = call.query.defined() ? call.query.size(0) : context.B;
  const auto result = empty_result(weights, B, context.Lk, context.lengths, call);
  Attend(weights, context, call).run(result);
  return result;
}

AttentionResult forward(const Orders& orders,
                        const EngineWeights& w,
                        const Tensor& key,
                        const Tensor& value,
                        const std::vector<int64_t>& lengths,
                        const EngineCall& call) {
  const auto B = key.size(0), Lk = key.size(1), Lq = rows_of(call), threads = num_threads();
  const auto result = empty_result(w, B, Lk, lengths, call);
  const auto layout = context_layout(Lq, w.H);
  const bool weights_are_cached = bytes_of_weights(w, orders, call.query.defined()) <= kCoreCache / 2;
  if (threads == 1 || B < threads || !is_small(w, B, Lq, Lk) || !weights_are_cached) {
    Attend(w, make_engine_context(orders, w, key, value, lengths, layout), call).run(result);
    return result;
  }
  TaskThreads{.all = true}.parts(B, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    const auto part = [&](const Tensor& x) { return x.defined() ? x.narrow(0, begin, end - begin) : x; };
    auto part_call = call;
    part_call.query = part(call.query);
    part_call.how.mask = call.how.mask.slice(begin, end);
    const auto context =
        make_engine_context(orders, w, part(key), part(value), {lengths.begin() + begin, lengths.begin() + end}, layout);
    Attend(w, context, part_call).run({part(result.output), part(result.weights), {}});
  });
  return result;
}

}  // namespace xattn::detail
