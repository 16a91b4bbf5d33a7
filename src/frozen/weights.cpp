// SPDX-License-Identifier: Apache-2.0
#include "base/check.h"
#include "base/describe.h"
#include "cpu/huge_pages.h"
#include "cpu/packed.h"
#include "frozen/engine.h"
#include "frozen/packed_layers.h"

namespace xattn::detail {

using at::Tensor;
using namespace engine;

namespace {

// Moves all into one allocation, because few of them would fill a huge page on their own.
void put_together(std::initializer_list<Packed*> all) {
  int64_t size = 0;
  at::TensorOptions options;
  for (const auto* each : all) {
    if (!each->data.defined()) continue;
    size += each->data.numel();
    options = each->data.options();
  }
  const auto together = empty_in_huge_pages(size, options);
  int64_t first = 0;
  for (auto* each : all) {
    if (!each->data.defined()) continue;
    const auto place = together.narrow(0, first, each->data.numel());
    each->data = place.copy_(each->data);
    first += place.numel();
  }
}

Packed pack(const Tensor& weight, at::ScalarType storage) {
  return pack_weights(weight.unsqueeze(0), storage);
}

// The right side [k, n], in float32.
Tensor unpacked(const Packed& p) {
  const auto panels = p.data.view({-1, p.k, kernels().panel});
  return panels.transpose(0, 1).reshape({p.k, -1}).narrow(1, 0, p.n).to(at::kFloat);
}

}  // namespace

Packed transposed(const Packed& p) {
  return pack(unpacked(p), p.data.scalar_type());
}

EngineWeights::EngineWeights(const LayerWeights& l,
                             const WeightProducts& products,
                             at::ScalarType storage_,
                             const std::optional<Orders>& pinned)
    : H(l.H),
      G(l.G),
      d(l.d),
      e(l.e),
      Eq(l.query.size(1)),
      Eo(l.output.size(0)),
      scale(static_cast<float>(l.scale)),
      storage(storage_),
      query_bias(copy_or_zeros(l.query_bias, H * d)),
      output_bias(copy_or_zeros(l.output_bias, Eo)),
      query_norm(copy_of(l.query_norm)) {
  for (const auto* weight : {&l.query, &l.key, &l.value, &l.output}) {
    check_type(weight->is_cpu() && weight->scalar_type() == at::kFloat, "engine",
               "weights must be float32 on the CPU, but are {} on {}.", type_of(*weight), name_of(weight->device()));
  }
  if (!pinned || !uses_product(pinned->logits)) query = pack(l.query, storage);
  if (!pinned || !uses_product(pinned->values)) output = pack(l.output, storage);
  set_context_weights(l, products, pinned);
  put_together({&query, &key, &value, &output, &logits_product, &values_product});
}

EngineWeights::EngineWeights(const EngineWeights& first,
                             const LayerWeights& l,
                             const WeightProducts& products,
                             const std::optional<Orders>& pinned)
    : EngineWeights(first) {
  is_added = true;
  set_context_weights(l, products, pinned);
  put_together({&key, &value, &logits_product});
}

// Sets everything that depends on the projections of keys and values.
void EngineWeights::set_context_weights(const LayerWeights& l,
                                        const WeightProducts& products,
                                        const std::optional<Orders>& pinned) {
  Ek = l.key.size(1), Ev = l.value.size(1);
  key_bias = copy_or_zeros(l.key_bias, G * d);
  value_bias = copy_or_zeros(l.value_bias, G * e);
  key_norm = copy_of(l.key_norm);
  const auto value_bias_of_heads = value_bias.view({G, 1, e}).expand({G, H / G, e}).reshape({H * e});
  output_bias_after_value =
      output_bias.to(at::kDouble).addmv(l.output.to(at::kDouble), value_bias_of_heads.to(at::kDouble)).to(at::kFloat);
  key = !pinned || !uses_product(pinned->logits) ? pack(l.key, storage) : Packed();
  value = !pinned || !uses_product(pinned->values) ? pack(l.value, storage) : Packed();
  folds = std::make_shared<Folds>();
  logits_product = values_product = {};
  if (const auto& product = products.logits; product.weight.defined()) {  // [H, Ek, Eq]
    logits_product = pack(product.weight.flatten(0, 1), storage);
    logits_product_bias = copy_or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), H * Ek);
  }
  if (const auto& product = products.values; product.weight.defined()) {  // [H, Eo, Ev]
    values_product = pack(product.weight.transpose(0, 1).flatten(1), storage);
    values_product_bias = copy_or_zeros(product.bias.defined() ? product.bias.flatten() : Tensor(), H * Eo);
  }
}

const Packed& EngineWeights::query_fold() const {
  return folds->query.get([this] { return transposed(query); });
}

const Packed& EngineWeights::key_fold() const {
  return folds->key.get([this] { return transposed(key); });
}

// If heads are whole panels, those of the packed weight are already one head's after the other's.
const Packed& EngineWeights::value_fold() const {
  return folds->value.get([this] {
    if (e % kernels().panel == 0) return Packed{value.data, Ev, e};
    return pack_weights(unpacked(value).t().reshape({G, e, Ev}), value.data.scalar_type());
  });
}

int64_t EngineWeights::bytes() const {
  int64_t bytes = folds->query.bytes() + folds->key.bytes() + (e % kernels().panel == 0 ? 0 : folds->value.bytes());
  const auto add = [&bytes](std::initializer_list<const Tensor*> tensors) {
    for (const auto* x : tensors) bytes += bytes_of(*x);
  };
  add({&key_bias, &value_bias, &output_bias_after_value, &key_norm.weight, &key_norm.bias, &key.data, &value.data,
       &logits_product.data, &logits_product_bias, &values_product.data, &values_product_bias});
  if (!is_added) add({&query_bias, &output_bias, &query_norm.weight, &query_norm.bias, &query.data, &output.data});
  return bytes;
}

}  // namespace xattn::detail
