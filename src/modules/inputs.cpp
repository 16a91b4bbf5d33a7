// SPDX-License-Identifier: Apache-2.0
#include "modules/inputs.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "attention/mask_parts.h"
#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"
#include "cpu/matrix_product.h"

namespace xattn::detail {

using torch::Tensor;

namespace {

void check_input(
    std::string_view caller, const char* name, const Tensor& x, const char* length, const torch::nn::Linear& projection) {
  const auto features = projection->options.in_features();
  const auto& weight = projection->weight;
  check_value(x.defined() && (x.dim() == 2 || x.dim() == 3) && x.size(-1) == features, caller,
              "{} must have shape [B, {}, {}], but has {}.", name, length, features, shape_of(x));
  check_type(!x.is_meta() || x.device() != weight.device(), caller, "{} must hold numbers, but is on meta.", name);
  const bool is_casted = !x.is_meta() && at::autocast::is_autocast_enabled(x.device().type());
  if (is_casted) {
    check_type(x.is_floating_point(), caller, "{} must be of a floating point type, but is {}.", name, type_of(x));
  } else {
    check_type(x.scalar_type() == weight.scalar_type(), caller, "{} must be {}, the type of the parameters, but is {}.", name,
               type_of(weight), type_of(x));
  }
  check_type(x.device() == weight.device(), caller, "{} must be on {}, as the parameters, but is on {}.", name,
             weight.device().str(), x.device().str());
}

}  // namespace

void check_key_value(std::string_view caller,
                     const Tensor& key,
                     const Tensor& value,
                     const Mask& mask,
                     const torch::nn::Linear& key_linear,
                     const torch::nn::Linear& value_linear,
                     int64_t num_heads) {
  check_input(caller, "key", key, "Lk", key_linear);
  check_input(caller, "value", value, "Lk", value_linear);
  check_value(key.sizes().slice(0, key.dim() - 1) == value.sizes().slice(0, value.dim() - 1), caller,
              "value must have the batch and length of key, {}, but has {}.", shape_of(key), shape_of(value));
  const auto B = key.dim() == 3 ? key.size(0) : 1;
  check_mask(mask, caller, B, num_heads, std::nullopt, key.size(-2), key.device());
}

void check_query(std::string_view caller, const Tensor& query, const Context& context, const torch::nn::Linear& query_linear) {
  check_query(caller, query, context.is_batched(), context.batch_size(), query_linear);
}

void check_query(
    std::string_view caller, const Tensor& query, bool is_batched, int64_t batch_size, const torch::nn::Linear& query_linear) {
  check_input(caller, "query", query, "Lq", query_linear);
  check_value((query.dim() == 3) == is_batched && (query.dim() == 2 || query.size(0) == batch_size), caller,
              "query must have shape {}Lq, {}] to match its context, but has {}.",
              is_batched ? formatted("[{}, ", batch_size) : "[", query.size(-1), shape_of(query));
}

// A unit batch axis also gets its natural stride back: `transpose().contiguous()` may leave a huge one there, with which
// products are ten times slower.
Tensor batched(const Tensor& x) {
  if (x.dim() == 2) return x.unsqueeze(0);
  return x.size(0) == 1 ? x.select(0, 0).unsqueeze(0) : x;
}

}  // namespace xattn::detail
