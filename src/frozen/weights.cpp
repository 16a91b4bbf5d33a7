// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "base/check.h"
#include "base/describe.h"
#include "cpu/huge_pages.h"
#include "cpu/packed.h"
#include "frozen/engine.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// Matrices [count, n, k], as torch stores weights, packed as right sides [k, n].
Packed pack_weights(const Tensor& weights, at::ScalarType storage) {
  const auto w = weights.resolve_neg().contiguous();
  const auto count = w.size(0), n = w.size(1), k = w.size(2), size = kernels().packed_size(k, n);
  Packed result{at::empty({count * size}, w.options().dtype(storage)), k, n};
  for (int64_t i = 0; i < count; ++i) pack_transposed(data(w) + i * n * k, k, k, n, result.data, i * size);
  return result;
}

// Moves all into one allocation, because few of them would fill a huge page on their own.
void put_together(std::initializer_list<Packed*> all) {
  int64_t size = 0;
  for (const auto* each : all) size += each->data.defined() ? each->data.numel() : 0;
  const auto together = empty_in_huge_pages(size, (*all.begin())->data.options());
  int64_t first = 0;
  for (auto* each : all) {
    if (!each->data.defined()) continue;
    const auto place = together.narrow(0, first, each->data.numel());
    each->data = place.copy_(each->data);
    first += place.numel();
  }
}

NormWeights contiguous(NormWeights norm) {
  for (auto* x : {&norm.weight, &norm.bias}) {
    if (x->defined()) *x = x->resolve_neg().contiguous();
  }
  return norm;
}

Tensor or_zeros(const Tensor& bias, const Tensor& like, int64_t n) {
  return bias.defined() ? bias.resolve_neg().contiguous() : at::zeros({n}, like.options());
}

}  // namespace

EngineWeights::EngineWeights(const LayerWeights& l, const WeightProducts& products, at::ScalarType storage)
    : H(l.H), G(l.G), d(l.d), e(l.e), Eq(l.query.size(1)), Ek(l.key.size(1)), Ev(l.value.size(1)), Eo(l.output.size(0)) {
  for (const auto* weight : {&l.query, &l.key, &l.value, &l.output}) {
    check_type(weight->is_cpu() && weight->scalar_type() == at::kFloat, "engine",
               "weights must be float32 on the CPU, but are {} on {}.", type_of(*weight), weight->device().str());
  }
  scale = static_cast<float>(l.scale);
  query_bias = or_zeros(l.query_bias, l.query, H * d);
  key_bias = or_zeros(l.key_bias, l.key, G * d);
  value_bias = or_zeros(l.value_bias, l.value, G * e);
  output_bias = or_zeros(l.output_bias, l.output, Eo);
  query_norm = contiguous(l.query_norm);
  key_norm = contiguous(l.key_norm);
  const auto value_bias_of_heads = value_bias.view({G, 1, e}).expand({G, H / G, e}).reshape({H * e});
  output_bias_after_value =
      output_bias.to(at::kDouble).addmv(l.output.to(at::kDouble), value_bias_of_heads.to(at::kDouble)).to(at::kFloat);

  const auto pack_each = [storage](const Tensor& weights) { return pack_weights(weights, storage); };
  const auto pack = [&](const Tensor& weight) { return pack_each(weight.unsqueeze(0)); };
  query = pack(l.query);
  key = pack(l.key);
  value = pack(l.value);
  output = pack(l.output);
  key_fold = pack(l.key.t());
  query_fold = pack(l.query.t());
  value_fold = pack_each(l.value.view({G, e, Ev}));
  if (const auto& product = products.logits; product.weight.defined()) {  // [H, Ek, Eq]
    logits_product = pack(product.weight.flatten(0, 1));
    logits_product_bias = or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), l.query, H * Ek);
  }
  if (const auto& product = products.values; product.weight.defined()) {  // [H, Eo, Ev]
    values_product = pack(product.weight.transpose(0, 1).flatten(1));
    values_product_bias = or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), l.value, H * Eo);
  }
  put_together({&query, &key, &value, &output, &key_fold, &value_fold, &query_fold, &logits_product, &values_product});
}

}  // namespace xattn::detail
