// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/heads.h"
#include "attention/merge.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "frozen/row_norm.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

int64_t bytes(const Tensor& x) {
  return static_cast<int64_t>(x.nbytes());
}

// Of the weights that query rows meet, given or constant ones.
int64_t bytes_of_weights(const EngineWeights& w, const Orders& orders, bool query_is_given) {
  int64_t total = 0;
  if (query_is_given && !is_folded(orders.logits)) {
    total += bytes(orders.logits == Order::prefold ? w.logits_product.data : w.query.data);
    if (orders.logits == Order::fold_into_query) total += bytes(w.key_fold.data);
  }
  if (is_folded(orders.values)) return total;
  if (orders.values == Order::prefold) return total + bytes(w.values_product.data);
  return total + bytes(w.output.data) + (orders.values == Order::standard ? 0 : bytes(w.value_fold.data));
}

// Operations that are done before threads have met.
bool is_little(const EngineWeights& w, int64_t B, int64_t Lq, int64_t Lk) {
  constexpr int64_t kLittle = 20'000'000;
  return 2 * B * (Lq * w.H * (w.Eq * w.d + w.e * w.Eo) + Lk * w.G * (w.Ek * w.d + w.Ev * w.e)) < kLittle;
}

class Attend {
 public:
  Attend(const EngineWeights& w, const EngineSide& side, const EngineCall& call)
      : w_(w),
        side_(side),
        query_(call.query.defined() ? call.query.resolve_neg().contiguous() : Tensor()),
        folded_(call.folded_query),
        queries_(query_.defined() && side.B > 0 ? query_.size(0) / side.B : 1),
        Lq_(query_.defined() ? query_.size(1) : folded_.size(0)),
        rows_(queries_ * Lq_),
        projected_rows_(is_little(w, side.B, rows_, side.Lk) ? rows_ : side.B * rows_),
        heads_{w.H, w.G, w.d, w.e, side.Lk, side.keys, side.values, /*are_packed=*/true},
        softmax_(call.mask, w.H, Lq_, side.Lk, w.scale, call.weights, call.weight_heads) {}

  // Into a result of its sizes.
  void run(const AttentionResult& result) {
    output_ = mutable_data(result.output);
    softmax_.write_to(result.weights);
    each_share_of_rows(
        side_.B * rows_, has_many_rows(projected_rows_, w_.Eo, w_.H * w_.e), reads(),
        [this](const Team& team) { return room_of(team); },
        [this](auto begin, auto end, auto scratch, const auto& team) { run_rows(begin, end, scratch, team); });
  }

 private:
  Reads reads() const {
    return {bytes_of_weights(w_, side_.orders, query_.defined()),
            (bytes(side_.keys) + bytes(side_.values)) / std::max<int64_t>(1, side_.B)};
  }

  // Whether one head after the other is done from logits to mixed values.
  bool by_heads() const { return side_.orders == Orders{}; }

  // Whether the mixed values of a head take the place of its projected query, which nobody reads any more.
  bool in_place() const { return by_heads() && w_.d == w_.e && query_.defined(); }

  // Whether both chains read the same rows of a context, as they came, and each part from memory once: worth its merging for few
  // query rows, and where a core's cache does not keep the whole from one chain to the other.
  bool reads_once() const {
    constexpr int64_t kNear = 2 << 20;  // bytes
    return is_raw(side_.orders.logits) && is_raw(side_.orders.values) && side_.raw == Raw::few_rows && w_.Ek == w_.Ev &&
           side_.keys.const_data_ptr() == side_.values.const_data_ptr() && 4 * side_.Lk * w_.Ek > kNear;
  }

  // Shares of such a context, whole panels, that are mixed apart. They do not depend on the threads, as the bits of a sum do on them.
  struct Shares {
    Shares(int64_t Lk, int64_t features) {
      constexpr int64_t kMost = 8, kLeastKeys = 64;
      constexpr int64_t kBlock = 384 << 10;  // bytes: what stays in a core's cache from one chain to the other
      const auto panel = kernels().panel;
      keys = round_up(std::max(kLeastKeys, (Lk + kMost - 1) / kMost), panel);
      block = std::clamp(kBlock / 4 / features / panel * panel, panel, keys);
    }
    int64_t count(int64_t length) const { return (length + keys - 1) / keys; }
    int64_t blocks() const { return (keys + block - 1) / block; }  // of a share

    int64_t keys, block;  // of one, and of a block of one
  };

  static LogSumExps take_sums(int64_t rows, Scratch& scratch) {
    auto* largest = scratch.take(rows);
    return {largest, scratch.take(rows)};
  }

  // What run_rows takes.
  Room room_of(const Team& team) const {
    const auto& w = w_;
    auto room = by_heads() ? scratch_of_heads(heads_, softmax_, team) : Room{w.H * side_.Lk};
    auto& floats = room.row;
    if (reads_once()) {
      const Shares shares(side_.Lk, w.Ev);
      floats += w.H * (shares.count(side_.Lk) * (w.Ev + 2 * shares.blocks() + 2) + 2);
    }
    if (!is_folded(side_.orders.logits) && query_.defined())
      floats += w.H * w.d + (is_raw(side_.orders.logits) ? w.H * w.Ek : 0);
    if (!is_folded(side_.orders.values) && !in_place()) floats += w.H * w.e + (is_raw(side_.orders.values) ? w.H * w.Ev : 0);
    floats += 2 * w.H + 16;
    return room;
  }

  // The whole chain for rows [begin, end) of all B * n * Lq.
  void run_rows(int64_t begin, int64_t end, Scratch scratch, const Team& team) const {
    const auto& w = w_;
    const auto n = end - begin;
    auto* output = output_ + begin * w.Eo;
    int64_t stride = 0;
    const bool raw = is_raw(side_.orders.values), folded = is_folded(side_.orders.values);
    const auto width = w.H * (raw ? w.Ev : w.e);
    auto* mixed = folded ? nullptr : scratch.take(n * width);
    const auto* rows = query_.defined() ? logits_rows(begin, n, in_place() ? mixed : nullptr, scratch, team, stride) : nullptr;
    if (!rows) stride = folded_.size(1);
    const auto log_sum_exp = softmax_.all_have_keys() || !raw ? LogSumExps{} : take_sums(n * w.H, scratch);
    for (int64_t first = begin; first < end;) {  // the part of each context
      const auto b = first / rows_, last = std::min(end, (b + 1) * rows_);
      const Segment segment{.context = b,
                            .first_row = first,
                            .rows = last - first,
                            .keys = side_.lengths[static_cast<size_t>(b)],
                            .queries = rows ? rows + (first - begin) * stride : data(folded_) + first % rows_ * stride,
                            .query_stride = stride,
                            .head_stride = w.d,
                            .weighted_values = folded ? output + (first - begin) * w.Eo : mixed + (first - begin) * width,
                            .log_sum_exp = log_sum_exp ? log_sum_exp + (first - begin) * w.H : LogSumExps{},
                            .context_rows = rows_};
      run_segment(segment, scratch, team);
      first = last;
    }
    if (folded) return;
    finish(mixed, log_sum_exp, n, output, scratch, team);
    if (!raw || log_sum_exp) return;
    for (auto row = begin; row < end; ++row) {  // of contexts without keys, which take no part in the bias of the values
      if (side_.lengths[static_cast<size_t>(row / rows_)] == 0) std::copy_n(data(w.output_bias), w.Eo, output_ + row * w.Eo);
    }
  }

  // What meets the keys: projected, in `place` if that is given, folded, or the query itself.
  const float* logits_rows(int64_t begin, int64_t n, float* place, Scratch& scratch, const Team& team, int64_t& stride) const {
    const auto& w = w_;
    const auto* query = data(query_) + begin * w.Eq;
    const auto order = side_.orders.logits;
    stride = w.Eq;
    if (is_folded(order)) return query;
    stride = w.H * (order == Order::standard ? w.d : w.Ek);
    auto* rows = place ? place : scratch.take(n * stride);
    if (order == Order::prefold) {
      team.multiply({.m = n,
                     .n = stride,
                     .k = w.Eq,
                     .a = query,
                     .a_stride = w.Eq,
                     .b = packed(w.logits_product),
                     .c = rows,
                     .c_stride = stride,
                     .bias = data(w.logits_product_bias),
                     .all_rows = projected_rows_});
      return rows;
    }
    const auto inner = w.H * w.d;
    auto* projected = order == Order::standard ? rows : scratch.take(n * inner);
    team.multiply({.m = n,
                   .n = inner,
                   .k = w.Eq,
                   .a = query,
                   .a_stride = w.Eq,
                   .b = packed(w.query),
                   .c = projected,
                   .c_stride = inner,
                   .bias = data(w.query_bias),
                   .all_rows = projected_rows_});
    team.parts(n, [&](int64_t from, int64_t to) { normalise(w.query_norm, projected + from * inner, to - from, inner); });
    if (order == Order::standard) return rows;
    team.each(w.H, [&](int64_t h) {
      multiply({.m = n,
                .n = w.Ek,
                .k = w.d,
                .a = projected + h * w.d,
                .a_stride = inner,
                .b = packed(w.key_fold).from_row(h * w.G / w.H * w.d),
                .c = rows + h * w.Ek,
                .c_stride = stride,
                .all_rows = projected_rows_});
    });
    return rows;
  }

  void run_segment(const Segment& s, Scratch scratch, const Team& team) const {
    if (s.keys == 0) return clear(s);
    if (by_heads()) return attend_heads(heads_, softmax_, s, scratch, team);
    if (reads_once()) return attend_once(s, scratch, team);
    auto* logits = scratch.take(s.rows * w_.H * s.keys);  // [n, H, keys]
    meet(s, logits, team);
    team.parts(s.rows * w_.H, [&](int64_t begin, int64_t end) { softmax_.softmax_rows(s, logits, s.keys, begin, end); });
    if (softmax_.returns_weights()) {
      for (int64_t h = 0; h < w_.H; ++h) softmax_.write_weights(s, h, logits + h * s.keys, w_.H * s.keys);
    }
    mix(s, logits, team);
  }

  // logits [n, H, keys]
  void meet(const Segment& s, float* logits, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.logits;
    if (order == Order::standard) {
      return team.each(w.H, [&](int64_t h) { logits_of_head(heads_, s, h, logits + h * s.keys, w.H * s.keys); });
    }
    const auto first = s.context * side_.keys.stride(0);
    if (is_raw(order) && side_.raw != Raw::packed) {
      const auto panel = kernels().panel;
      return team.parts((s.keys + panel - 1) / panel, [&](int64_t begin, int64_t end) {
        meet_rows(s, begin * panel, std::min(s.keys, end * panel), logits);
      });
    }
    if (is_raw(order)) {
      return team.multiply({.m = s.rows * w.H,
                            .n = s.keys,
                            .k = w.Ek,
                            .a = s.queries,
                            .a_stride = w.Ek,
                            .b = packed(side_.keys, first, w.Ek),
                            .c = logits,
                            .c_stride = s.keys,
                            .all_rows = rows_ * w.H});
    }
    team.multiply({.m = s.rows,
                   .n = w.H * s.keys,
                   .k = w.Eq,
                   .a = s.queries,
                   .a_stride = s.query_stride,
                   .b = packed(side_.keys, first, w.Eq),
                   .c = logits,
                   .c_stride = w.H * s.keys,
                   .bias = data(side_.key_bias) + s.context * w.H * side_.Lk,
                   .all_rows = rows_});
  }

  // logits [n, H, keys] of keys [begin, end) that lie in rows.
  void meet_rows(const Segment& s, int64_t begin, int64_t end, float* logits) const {
    const auto& w = w_;
    const auto* keys = data(side_.keys) + s.context * side_.keys.stride(0);
    Step step{.m = s.rows * w.H, .k = w.Ek, .a = s.queries, .a_stride = w.Ek, .c_stride = s.keys};
    if (side_.raw == Raw::few_rows) {
      step.n = end - begin;
      step.b = {keys + begin * w.Ek, nullptr, w.Ek, 0};
      step.c = logits + begin;
      return multiply_transposed(step);
    }
    const auto panel = kernels().panel;
    const auto packed_keys = at::empty({w.Ek, panel}, side_.keys.options());
    step.b = packed(packed_keys, 0, w.Ek);
    for (int64_t first = begin; first < end; first += panel) {
      step.n = std::min(panel, end - first);
      step.c = logits + first;
      pack_transposed(keys + first * w.Ek, w.Ek, w.Ek, step.n, packed_keys, 0);
      multiply(step);
    }
  }

  void mix(const Segment& s, const float* weights, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.values;
    const auto first = s.context * side_.values.stride(0);
    if (order == Order::standard) {
      return team.each(w.H, [&](int64_t h) { weighted_values_of_head(heads_, s, h, weights + h * s.keys, w.H * s.keys); });
    }
    if (is_raw(order)) {
      return team.multiply(
          {.m = s.rows * w.H,
           .n = w.Ev,
           .k = s.keys,
           .a = weights,
           .a_stride = s.keys,
           .b = side_.raw != Raw::packed ? plain_rows(side_.values, first, w.Ev) : packed(side_.values, first, side_.Lk),
           .c = s.weighted_values,
           .c_stride = w.Ev,
           .all_rows = side_.raw == Raw::packed ? rows_ * w.H : 0});
    }
    const auto rows = w.H * s.keys;
    team.multiply({.m = s.rows,
                   .n = w.Eo,
                   .k = rows,
                   .a = weights,
                   .a_stride = rows,
                   .b = packed(side_.values, first, rows),
                   .c = s.weighted_values,
                   .c_stride = w.Eo,
                   .bias = data(w.output_bias),
                   .all_rows = rows_});
  }

  // meet and mix of a context that is read once, share by share.
  void attend_once(const Segment& s, Scratch scratch, const Team& team) const {
    const Shares shares(side_.Lk, w_.Ev);
    const auto count = shares.count(s.keys), rows = s.rows * w_.H, size = rows * w_.Ev;
    auto* logits = scratch.take(rows * s.keys);  // [n, H, keys]
    auto* mixed = scratch.take(count * size);
    const auto of_shares = take_sums(count * rows, scratch), of_blocks = take_sums(count * shares.blocks() * rows, scratch);
    team.each(count, [&](int64_t i) {
      const auto first = i * shares.keys, last = std::min(s.keys, first + shares.keys);
      const auto of_its_blocks = of_blocks + i * shares.blocks() * rows;
      mix_share(s, first, last, shares.block, logits, mixed + i * size, of_shares + i * rows, of_its_blocks);
    });
    const auto of_all = s.log_sum_exp ? s.log_sum_exp : take_sums(rows, scratch);
    for (int64_t row = 0; row < rows; ++row) {
      of_all.set(row, of_shares[row]);
      for (int64_t i = 1; i < count; ++i) of_all.set(row, log_sum(of_all[row], of_shares[i * rows + row]));
      auto* to = s.weighted_values + row * w_.Ev;
      for (int64_t i = 0; i < count; ++i) {
        const auto share = share_of(of_shares[i * rows + row], of_all[row]);
        const auto* from = mixed + i * size + row * w_.Ev;
        for (int64_t j = 0; j < w_.Ev; ++j) to[j] = (i > 0 ? to[j] : 0) + share * from[j];
      }
    }
    if (!softmax_.returns_weights()) return;
    for (int64_t i = 0; i < count; ++i) {
      const auto first = i * shares.keys, last = std::min(s.keys, first + shares.keys);
      auto up_to = of_blocks + i * shares.blocks() * rows;
      for (auto key = first; key < last; key += shares.block, up_to = up_to + rows) {
        const auto keys = std::min(shares.block, last - key);
        for (int64_t row = 0; row < rows; ++row) scale(logits + row * s.keys + key, keys, share_of(up_to[row], of_all[row]));
      }
    }
    for (int64_t h = 0; h < w_.H; ++h) softmax_.write_weights(s, h, logits + h * s.keys, w_.H * s.keys);
  }

  // Keys [first, last), a block after the other: their logits -> weights among the keys of their block and those before, mixed
  // [n, H, Ev] by these; and the log-sum-exp of all, and up to each block.
  void mix_share(const Segment& s,
                 int64_t first,
                 int64_t last,
                 int64_t keys_of_a_block,
                 float* logits,
                 float* mixed,
                 LogSumExps of_share,
                 LogSumExps of_blocks) const {
    const auto rows = s.rows * w_.H;
    for (auto key = first; key < last; key += keys_of_a_block, of_blocks = of_blocks + rows) {
      auto block = s;
      block.first_key = key;
      block.keys = std::min(keys_of_a_block, last - key);
      block.log_sum_exp = of_blocks;
      meet_rows(s, key, key + block.keys, logits);
      softmax_.softmax_rows(block, logits + key, s.keys, 0, rows);
      for (int64_t row = 0; row < rows && key > first; ++row) {
        const auto all = log_sum(of_share[row], of_blocks[row]);
        scale(mixed + row * w_.Ev, w_.Ev, share_of(of_share[row], all));
        scale(logits + row * s.keys + key, block.keys, share_of(of_blocks[row], all));
        of_blocks.set(row, all);
      }
      for (int64_t row = 0; row < rows; ++row) of_share.set(row, of_blocks[row]);
      multiply({.m = rows,
                .n = w_.Ev,
                .k = block.keys,
                .a = logits + key,
                .a_stride = s.keys,
                .b = plain_rows(side_.values, s.context * side_.values.stride(0) + key * w_.Ev, w_.Ev),
                .c = mixed,
                .c_stride = w_.Ev,
                .accumulate = key > first});
    }
  }

  // From what the weights mixed to the output.
  void finish(float* mixed, const LogSumExps& log_sum_exp, int64_t n, float* output, Scratch& scratch, const Team& team) const {
    const auto& w = w_;
    const auto order = side_.orders.values;
    const bool bias_is_in = order == Order::standard;
    const auto* bias = data(bias_is_in || log_sum_exp ? w.output_bias : w.output_bias_after_value);
    if (order == Order::prefold) {
      const auto inner = w.H * w.Ev;
      team.multiply({.m = n,
                     .n = w.Eo,
                     .k = inner,
                     .a = mixed,
                     .a_stride = inner,
                     .b = packed(w.values_product),
                     .c = output,
                     .c_stride = w.Eo,
                     .bias = bias,
                     .all_rows = projected_rows_});
      if (log_sum_exp) add_bias(log_sum_exp, n, data(w.values_product_bias), w.Eo, output, 0);
      return;
    }
    const auto inner = w.H * w.e;
    if (order == Order::fold_into_query) {
      const auto* raw = mixed;
      mixed = scratch.take(n * inner);
      team.each(w.H, [&](int64_t h) {
        multiply({.m = n,
                  .n = w.e,
                  .k = w.Ev,
                  .a = raw + h * w.Ev,
                  .a_stride = w.H * w.Ev,
                  .b = packed(w.value_fold, h * w.G / w.H),
                  .c = mixed + h * w.e,
                  .c_stride = inner,
                  .all_rows = projected_rows_});
      });
      if (log_sum_exp) add_bias(log_sum_exp, n, data(w.value_bias), w.e, mixed, w.e);
    }
    team.multiply({.m = n,
                   .n = w.Eo,
                   .k = inner,
                   .a = mixed,
                   .a_stride = inner,
                   .b = packed(w.output),
                   .c = output,
                   .c_stride = w.Eo,
                   .bias = bias,
                   .all_rows = projected_rows_});
  }

  // To each row, the bias of every head that has a key there: at `step` from the head before, or all in one place.
  void add_bias(const LogSumExps& log_sum_exp, int64_t n, const float* bias, int64_t size, float* x, int64_t step) const {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t h = 0; h < w_.H; ++h) {
        if (log_sum_exp[row * w_.H + h].is_empty()) continue;
        const auto* from = bias + (step == 0 ? h : h * w_.G / w_.H) * size;
        auto* to = x + row * (step == 0 ? size : w_.H * size) + h * step;
        for (int64_t j = 0; j < size; ++j) to[j] += from[j];
      }
    }
  }

  // A context without keys.
  void clear(const Segment& s) const {
    if (is_folded(side_.orders.values)) {
      for (int64_t i = 0; i < s.rows; ++i) std::copy_n(data(w_.output_bias), w_.Eo, s.weighted_values + i * w_.Eo);
      return;
    }
    std::fill_n(s.weighted_values, s.rows * w_.H * (is_raw(side_.orders.values) ? w_.Ev : w_.e), 0.0f);
    for (int64_t row = 0; s.log_sum_exp && row < s.rows * w_.H; ++row) s.log_sum_exp.set(row, {});
  }

  const EngineWeights& w_;
  const EngineSide& side_;
  Tensor query_, folded_;
  int64_t queries_, Lq_, rows_;  // queries for a context, rows of one, rows for a context
  int64_t projected_rows_;       // those of all contexts, but where parts of the batch may be calls of their own: see forward
  Heads heads_;                  // of standard orders
  SoftmaxStage softmax_;
  float* output_ = nullptr;
};

// For B queries in all, of Lq rows; zeros where keys may be left out.
AttentionResult empty_result(const EngineWeights& w, int64_t B, int64_t Lq, int64_t Lk, bool all_keys, const EngineCall& call) {
  return {in_huge_pages(at::empty({B, Lq, w.Eo}, at::kFloat)),
          empty_weights(call.weights, call.weight_heads, B, w.H, Lq, Lk, all_keys),
          {}};
}

bool all_are(const std::vector<int64_t>& lengths, int64_t Lk) {
  return std::ranges::all_of(lengths, [Lk](int64_t length) { return length == Lk; });
}

int64_t rows_of(const EngineCall& call) {
  return call.query.defined() ? call.query.size(1) : call.folded_query.size(0);
}

}  // namespace

AttentionResult attend(const EngineWeights& weights, const EngineSide& side, const EngineCall& call) {
  const auto B = call.query.defined() ? call.query.size(0) : side.B;
  const auto result = empty_result(weights, B, rows_of(call), side.Lk, all_are(side.lengths, side.Lk), call);
  Attend(weights, side, call).run(result);
  return result;
}

AttentionResult forward(const Orders& orders,
                        const EngineWeights& w,
                        const Tensor& key,
                        const Tensor& value,
                        const std::vector<int64_t>& lengths,
                        const EngineCall& call) {
  const auto B = key.size(0), Lk = key.size(1), Lq = rows_of(call);
  const auto result = empty_result(w, B, Lq, Lk, all_are(lengths, Lk), call);
  constexpr int64_t kNear = 1 << 20;  // bytes of weights that each thread reads for itself
  const bool apart = B >= threads() && is_little(w, B, Lq, Lk) && bytes_of_weights(w, orders, call.query.defined()) <= kNear;
  if (threads() == 1 || !apart) {
    Attend(w, make_side(orders, w, key, value, lengths, Lq), call).run(result);
    return result;
  }
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    const auto part = [&](const Tensor& x) { return x.defined() ? x.narrow(0, begin, end - begin) : x; };
    auto its_call = call;
    its_call.query = part(call.query);
    its_call.mask = call.mask.slice(begin, end);
    const auto side = make_side(orders, w, part(key), part(value), {lengths.begin() + begin, lengths.begin() + end}, Lq);
    Attend(w, side, its_call).run({part(result.output), part(result.weights), {}});
  });
  return result;
}

}  // namespace xattn::detail
