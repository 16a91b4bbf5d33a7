// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

// A register of floats in the instruction set that this file is compiled for. Each set has a namespace of its own,
// XATTN_KERNELS: otherwise the linker would keep one copy of each inline function, perhaps one that older processors cannot
// run. For the same reason, no file in this folder that is compiled for a set calls inline functions of the standard library or
// of kernels.h.
namespace xattn::detail::XATTN_KERNELS {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 14;        // with two vectors a row: 28 of 32 registers hold sums
constexpr int kTransposedSums = 16;  // of a tile of product_transposed.h: one `reduce`
constexpr bool kIsVectorised = true;
constexpr double kFlops = 220e9, kFlopsOfModules = 200e9;  // measured on one core with 2 MB of L2
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;         // 12 of 16 registers hold sums
constexpr int kTransposedSums = 12;  // measured: 8 take 1.2 times as long, because 8 chains of 4 cycles have no slack
constexpr bool kIsVectorised = true;
constexpr double kFlops = 100e9, kFlopsOfModules = 90e9;  // measured: 110e9 on Zen 4, 55e9 on Zen 3
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6;
constexpr int kTransposedSums = 4;  // one `reduce`
constexpr bool kIsVectorised = false;
constexpr double kFlops = 15e9, kFlopsOfModules = 20e9;  // LibTorch's operators run the products of modules
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
typedef float VectorInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

using Lanes = std::make_integer_sequence<int, kLanes>;  // a type without functions

inline Vector load(const float* from) {
  return *reinterpret_cast<const VectorInMemory*>(from);
}

inline void store(float* to, Vector x) {
  *reinterpret_cast<VectorInMemory*>(to) = x;
}

inline Vector broadcast(float x) {
  return x - Vector{};
}

inline Integers lane_numbers() {
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Vector sum_of(Vector x, Vector y) {
  return x + y;
}

inline Vector larger(Vector x, Vector y) {
  return x > y ? x : y;
}

// Loads `count` numbers, 0 to kLanes; the other lanes are 0, and no memory beyond these numbers is touched.
inline Vector load_first(const float* from, int64_t count) {
  if (count == kLanes) return load(from);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, reinterpret_cast<__m256i>(lane_numbers() < static_cast<int32_t>(count)));
#else
  Vector x{};
  for (int i = 0; i < kLanes; ++i) {
    if (i < count) x[i] = from[i];
  }
  return x;
#endif
}

inline void store_first(float* to, Vector x, int64_t count) {
  if (count == kLanes) return store(to, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, reinterpret_cast<__m256i>(lane_numbers() < static_cast<int32_t>(count)), x);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (i < count) to[i] = x[i];
  }
#endif
}

inline Vector load_first(const Bfloat16* from, int64_t count) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return reinterpret_cast<Vector>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves{};
  __builtin_memcpy(&halves, from, static_cast<size_t>(2 * count));
#if defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)), 16));
#else
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Unsigned) << 16);
#endif
#endif
}

inline Vector load(const Bfloat16* from) {
  return load_first(from, kLanes);
}

// Two consecutive vectors: the numbers at even positions, and those at odd ones.
inline void load_apart(const Bfloat16* from, Vector& even, Vector& odd) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
  const Unsigned words = *reinterpret_cast<const Words*>(from);
  even = reinterpret_cast<Vector>(words << 16);
  odd = reinterpret_cast<Vector>(words & 0xffff0000);
}

// Rounds to the nearest, ties to even.
inline void store(Bfloat16* to, Vector x) {
  const auto bits = reinterpret_cast<Unsigned>(x);
  const Unsigned rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Unsigned stored = x != x ? bits | 0x400000 : rounded;  // a NaN stays a NaN, whatever its bits
  for (int i = 0; i < kLanes; ++i) to[i].bits = static_cast<uint16_t>(stored[i] >> 16);
}

// A mask of the lanes that are true among the first `count`; the other lanes are false.
inline Integers load_first(const bool* from, int64_t count) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
  return reinterpret_cast<Integers>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes)) != 0;
#else
  Bytes bytes{};
  __builtin_memcpy(&bytes, from, static_cast<size_t>(count));
#if defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes)))) != 0;
#else
  return __builtin_convertvector(bytes, Integers) != 0;
#endif
#endif
}

// Swaps the lanes of x whose index has the bit kBit with the lanes of y whose index does not.
template <int kBit, int... kLane>
inline void swap_halves(Vector& x, Vector& y, std::integer_sequence<int, kLane...>) {
  const Vector low = __builtin_shufflevector(x, y, (kLane & kBit ? kLanes + kLane - kBit : kLane)...);
  y = __builtin_shufflevector(x, y, (kLane & kBit ? kLanes + kLane : kLane + kBit)...);
  x = low;
}

// Transposes the square matrix whose rows are in x: swaps its two blocks off the diagonal, then those of each block.
template <int kBit = kLanes / 2>
inline void transpose(Vector (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kBit) == 0) swap_halves<kBit>(x[i], x[i + kBit], Lanes{});
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(x);
}

// Lane i of the result: all lanes of x[i], reduced by `combine`.
template <int kBit = kLanes / 2, class Combine>
inline Vector reduce(const Vector (&x)[2 * kBit], Combine combine) {
  Vector halves[kBit];
#pragma GCC unroll 16
  for (int i = 0; i < kBit; ++i) {
    Vector low = x[i], high = x[i + kBit];
    swap_halves<kBit>(low, high, Lanes{});
    halves[i] = combine(low, high);
  }
  if constexpr (kBit > 1) {
    return reduce<kBit / 2>(halves, combine);
  } else {
    return halves[0];
  }
}

// Moves the lanes of two consecutive vectors: those at even positions to the first, those at odd ones to the second.
template <int... kLane>
inline void take_apart(Vector& x, Vector& y, std::integer_sequence<int, kLane...>) {
  const Vector even = __builtin_shufflevector(x, y, 2 * kLane...);
  y = __builtin_shufflevector(x, y, (2 * kLane + 1)...);
  x = even;
}

// The inverse of take_apart.
template <int... kLane>
inline void put_together(Vector& even, Vector& odd, std::integer_sequence<int, kLane...>) {
  const Vector x = __builtin_shufflevector(even, odd, (kLane / 2 + kLane % 2 * kLanes)...);
  odd = __builtin_shufflevector(even, odd, (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...);
  even = x;
}

template <int kBit, int... kLane>
inline Vector exchange(Vector x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kBit)...);
}

// Each lane of the result: the lanes of its group, reduced by `combine`. Groups are kWidth lanes, from lane 0 on.
template <int kWidth = kLanes, class Combine>
inline Vector reduce(Vector x, Combine combine) {
  if constexpr (kWidth > 1) x = reduce<kWidth / 2>(combine(x, exchange<kWidth / 2>(x, Lanes{})), combine);
  return x;
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
