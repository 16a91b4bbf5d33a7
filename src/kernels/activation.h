// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/row_softmax.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

inline Vector magnitude_of(Vector x) {
  return reinterpret_cast<Vector>(reinterpret_cast<Unsigned>(x) & 0x7fffffff);
}

// 1 / (1 + exp(-x))
inline Vector sigmoid(Vector x) {
  const Vector e = exp_of_negative(-magnitude_of(x));
  return (x < 0.0f ? e : broadcast(1.0f)) / (e + 1.0f);
}

// The share of the normal distribution below x, to 1e-7: half of erfc(z) with z = |x| / sqrt(2), or the rest of 1. For
// 0 <= z <= 7 and t = 1 / (1 + 0.4 z), this polynomial t c1 + ... + t^9 c9 differs from exp(z^2) erfc(z) / 2 by at most 3.4e-8
// of it, the least that a polynomial of its degree reaches; beyond, exp(-z^2) is below 1e-21.
inline Vector normal_distribution(Vector x) {
  constexpr float kPerZ = 0.4f * 0.70710678f;
  constexpr float kCoefficients[] = {0.016319004f, -0.048505995f, -0.00446215f,  0.09943253f,   -0.00031917148f,
                                     0.114785137f, 0.096017972f,  0.1139627056f, 0.11276998395f};
  const Vector magnitude = magnitude_of(x);
  const Vector t = 1.0f / (magnitude * kPerZ + 1.0f);
  Vector p{};
  for (const float coefficient : kCoefficients) p = (p + coefficient) * t;
  const Vector tail = p * exp_of_negative(magnitude * magnitude * -0.5f);
  return x < 0.0f ? tail : 1.0f - tail;
}

inline Vector relu(Vector x) {
  return x < 0.0f ? Vector{} : x;  // a NaN stays NaN
}
inline Vector gelu(Vector x) {
  return x * normal_distribution(x);
}
// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vector gelu_tanh(Vector x) {
  return x * sigmoid(x * (x * x * 0.0713548163f + 1.59576912f));
}
inline Vector silu(Vector x) {
  return x * sigmoid(x);
}

template <Vector (*kActivation)(Vector)>
void activate_each(float* x, const float* multiplier, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    Vector y = kActivation(load_first(x + i, count));
    if (multiplier != nullptr) y *= load_first(multiplier + i, count);
    store_first(x + i, y, count);
  }
}

void activate(Pointwise function, float* x, const float* multiplier, int64_t n) {
  switch (function) {
    case Pointwise::relu: return activate_each<relu>(x, multiplier, n);
    case Pointwise::gelu: return activate_each<gelu>(x, multiplier, n);
    case Pointwise::gelu_tanh: return activate_each<gelu_tanh>(x, multiplier, n);
    case Pointwise::silu: return activate_each<silu>(x, multiplier, n);
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
