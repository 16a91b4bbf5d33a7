// SPDX-License-Identifier: Apache-2.0
#include "modules/inputs.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/constant_pad_nd.h>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "base/text.h"

namespace xattn::detail {

using at::Tensor;

void check_shape(std::string_view caller, const char* name, const Tensor& x, const char* length, int64_t features) {
  check_dense(caller, name, x);
  check_value(x.defined() && (x.dim() == 2 || x.dim() == 3) && x.size(-1) == features, caller,
              "{} must have shape [B, {}, {}], but has {}.", name, length, features, shape_of(x));
}

void check_device(std::string_view caller, const char* name, const Tensor& x, at::Device device) {
  check_type(x.device() == device, caller, "{} must be on {}, as the parameters, but is on {}.", name, name_of(device),
             name_of(x.device()));
}

Tensor checked_indices(std::string_view caller, const Tensor& indices, int64_t n) {
  check_type(indices.defined() && at::isIntegralType(indices.scalar_type(), /*includeBool=*/false), caller,
             "indices must be of an integer type, but are {}.", type_of(indices));
  check_value(indices.dim() == 1, caller, "indices must have shape [n], but have {}.", shape_of(indices));
  const auto numbers = indices.to(at::kLong).resolve_neg();  // the engine reads its memory
  if (numbers.is_cpu() && numbers.numel() > 0) {
    const auto least = numbers.min().item<int64_t>(), most = numbers.max().item<int64_t>();
    check_value(least >= 0 && most < n, caller, "indices must lie in [0, {}), but hold {}.", n, least < 0 ? least : most);
  }
  return numbers;
}

namespace {

// weight: of the projection that x is for, [out, in].
void check_input(std::string_view caller, const char* name, const Tensor& x, const char* length, const Tensor& weight) {
  check_shape(caller, name, x, length, weight.size(1));
  check_type(!x.is_meta() || x.device() != weight.device(), caller, "{} must hold numbers, but is on meta.", name);
  const bool is_casted = !x.is_meta() && at::autocast::is_autocast_enabled(x.device().type());
  if (is_casted) {
    check_type(x.is_floating_point(), caller, "{} must be of a floating point type, but is {}.", name, type_of(x));
  } else {
    check_type(x.scalar_type() == weight.scalar_type(), caller, "{} must be {}, the type of the parameters, but is {}.", name,
               type_of(weight), type_of(x));
  }
  check_device(caller, name, x, weight.device());
}

}  // namespace

ContextInputs context_inputs(
    std::string_view caller, const LayerWeights& layer, const Tensor& key, const Tensor& value, const Mask& mask) {
  check_input(caller, "key", key, "Lk", layer.key);
  check_input(caller, "value", value, "Lk", layer.value);
  check_value(key.sizes().slice(0, key.dim() - 1) == value.sizes().slice(0, value.dim() - 1), caller,
              "value must have the batch and length of key, {}, but has {}.", shape_of(key), shape_of(value));
  const auto Xk = batched(key);
  return {Xk, value.is_same(key) ? Xk : batched(value), mask, key.dim() == 3};
}

void check_mask(std::string_view caller, const LayerWeights& layer, const ContextInputs& context, std::optional<int64_t> Lq) {
  check_mask(context.mask, caller, context.B(), layer.H, Lq, context.Lk(), context.key.device());
}

void check_appended(std::string_view caller, const ContextInputs& more, bool is_batched, int64_t B) {
  check_value(more.is_batched == is_batched && more.B() == B, caller, "key must be {}, as the context, but is {}.",
              batch_of(is_batched, B), batch_of(more.is_batched, more.B()));
}

void normalise(ContextInputs& context, const NormWeights& norm) {
  const bool one = context.value.is_same(context.key);
  context.key = normalised(context.key, norm);
  context.value = one ? context.key : normalised(context.value, norm);
}

Tensor query_input(std::string_view caller, const LayerWeights& layer, const Tensor& query, bool is_batched, int64_t B) {
  check_input(caller, "query", query, "Lq", layer.query);
  const bool is_batch = query.dim() == 3;
  const bool fits = is_batch == is_batched && (!is_batch || query.size(0) == B);
  check_value(fits || !is_batch || (is_batched && B > 1), caller,
              "key and value of the context must have the batch of query, {}, but are {}.", shape_of(query),
              batch_of(is_batched, B));
  const auto expected = [&, E = query.size(-1)] {
    return is_batched ? formatted("[{}, Lq, {}]", B, E) : formatted("[Lq, {}]", E);
  };
  check_value(fits, caller, "query must have shape {} to match its context, but has {}.", expected, shape_of(query));
  return batched(query);
}

int64_t drop_padding(const LayerWeights& layer, ContextInputs& context) {
  const auto Lk = context.Lk();
  const auto needed = layer.bias_k.defined() ? Lk : needed_keys(context.mask, Lk);
  if (needed == Lk) return 0;
  context.key = context.key.narrow(1, 0, needed);
  context.value = context.value.narrow(1, 0, needed);
  context.mask = first_keys(context.mask, needed);
  return Lk - needed;
}

// An axis of one entry also gets its natural stride: `transpose().contiguous()` may leave a huge one, with which products take
// ten times as long.
Tensor batched(const Tensor& x) {
  if (x.dim() == 2) return x.unsqueeze(0);
  return x.size(0) == 1 ? x.squeeze(0).unsqueeze(0) : x;
}

std::tuple<Tensor, Tensor> results(const AttentionResult& result, bool is_batched, int64_t dropped_keys) {
  auto weights = result.weights;
  if (weights.defined() && dropped_keys > 0) weights = at::constant_pad_nd(weights, {0, dropped_keys});
  if (is_batched) return {result.output, weights};
  return {result.output.squeeze(0), weights.defined() ? weights.squeeze(0) : weights};
}

}  // namespace xattn::detail
