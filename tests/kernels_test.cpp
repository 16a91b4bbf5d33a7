// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernels.h"

#include <gtest/gtest.h>
#include <xattn/version.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plan/runs_on.h"

// Every matrix lies in memory of exactly its size, so that the sanitizers notice a kernel that reads or writes beside it.
namespace xattn::detail {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kRoundoff = std::numeric_limits<float>::epsilon() / 2;

// A matrix whose rows lie `stride` apart; the last one ends where the memory ends. The gaps between rows hold NaN.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t gap = 0)
      : rows(rows),
        columns(columns),
        stride(columns + gap),
        data(std::make_unique<float[]>(static_cast<size_t>(rows > 0 ? (rows - 1) * stride + columns : 0))) {
    for (int64_t i = 0; i + 1 < rows; ++i) {
      for (int64_t j = columns; j < stride; ++j) at(i, j) = kNaN;
    }
  }
  float& at(int64_t i, int64_t j) { return data[static_cast<size_t>(i * stride + j)]; }
  float at(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * stride + j)]; }

  int64_t rows, columns, stride;
  std::unique_ptr<float[]> data;
};

Matrix random_matrix(int64_t rows, int64_t columns, int64_t gap = 0) {
  static std::mt19937 engine(1);
  std::uniform_real_distribution<float> distribution(-1, 1);
  Matrix matrix(rows, columns, gap);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) matrix.at(i, j) = distribution(engine);
  }
  return matrix;
}

Matrix copy_of(const Matrix& x) {
  Matrix copy(x.rows, x.columns, x.stride - x.columns);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < x.columns; ++j) copy.at(i, j) = x.at(i, j);
  }
  return copy;
}

void expect_equal_bits(const Matrix& actual, const Matrix& expected, const std::string& what) {
  for (int64_t i = 0; i < expected.rows; ++i) {
    for (int64_t j = 0; j < expected.columns; ++j) {
      if (std::bit_cast<uint32_t>(actual.at(i, j)) == std::bit_cast<uint32_t>(expected.at(i, j))) continue;
      FAIL() << what << " at " << i << ", " << j << ": " << actual.at(i, j) << " instead of " << expected.at(i, j);
    }
  }
}

Matrix transposed(const Matrix& x, int64_t gap = 0) {
  Matrix y(x.columns, x.rows, gap);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < x.columns; ++j) y.at(j, i) = x.at(i, j);
  }
  return y;
}

// To the nearest bfloat16 and back, by the definition: eight digits remain. For finite, normal numbers.
float rounded(float x) {
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);
  return static_cast<float>(std::ldexp(std::nearbyint(fraction * 256) / 256, exponent));
}

Matrix rounded(Matrix x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < x.columns; ++j) x.at(i, j) = rounded(x.at(i, j));
  }
  return x;
}

// The memory of a matrix of such numbers, in half the space.
std::vector<Bfloat16> upper_halves(const Matrix& x) {
  std::vector<Bfloat16> halves;
  for (int64_t i = 0; i < (x.rows - 1) * x.stride + x.columns; ++i) {
    halves.push_back({static_cast<uint16_t>(std::bit_cast<uint32_t>(x.data[static_cast<size_t>(i)]) >> 16)});
  }
  return halves;
}

// A product kernel, and the number of products whose sum is one of its terms.
struct OneProduct {
  std::string name;
  void (*product)(const Product&);
  int64_t parts = 1;
};

class KernelsTest : public testing::TestWithParam<const Kernels*> {
 protected:
  // With AMX, terms are sums of six products of parts.
  std::array<OneProduct, 2> products() const {
    return {OneProduct{"product", kernels_.product},
            {"product_of_many_rows", kernels_.product_of_many_rows, kernels_.has_matrix_unit ? 6 : 1}};
  }

  std::vector<float> packed(const Matrix& b) const {
    std::vector<float> to(static_cast<size_t>(kernels_.packed_size(b.rows, b.columns)), kNaN);
    kernels_.pack(b.data.get(), b.stride, b.rows, b.columns, to.data(), Storage::float32);
    return to;
  }

  std::vector<Bfloat16> packed_bfloat16(const Matrix& b) const {
    std::vector<Bfloat16> to(static_cast<size_t>(kernels_.packed_size(b.rows, b.columns)), {0x7fc0});
    kernels_.pack(b.data.get(), b.stride, b.rows, b.columns, to.data(), Storage::bfloat16);
    return to;
  }

  const Kernels& kernels_ = *GetParam();
};

// The operands of a product, and its result by a kernel.
struct Problem {
  Matrix a, b, c, bias;
  bool has_bias, accumulate;

  // Reads a by rows or, if given, from `by_columns`.
  Matrix compute(void (*kernel)(const Product&), const RightSide& right, const Matrix* by_columns = nullptr) const {
    Matrix result(c.rows, c.columns, c.stride - c.columns);
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.columns; ++j) result.at(i, j) = accumulate ? c.at(i, j) : kNaN;
    }
    kernel({.sizes = {a.rows, b.columns, a.columns},
            .a = {by_columns ? by_columns->data.get() : a.data.get(), by_columns ? 1 : a.stride,
                  by_columns ? by_columns->stride : 1},
            .b = right,
            .c = {result.data.get(), result.stride},
            .bias = has_bias ? bias.data.get() : nullptr,
            .accumulate = accumulate});
    return result;
  }

  // Expects the sums in float64. Each of the k + 2 roundings (k * parts + 2 if every term is added in parts) is off by at most
  // kRoundoff of the sum of absolute values, and the parts of a term omit less than three roundoffs of it.
  void expect_sums(const Matrix& actual, int64_t parts = 1) const {
    const auto roundings = static_cast<double>(parts == 1 ? a.columns + 2 : a.columns * parts + 5);
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int64_t j = 0; j < b.columns; ++j) {
        double sum = (has_bias ? double{bias.at(0, j)} : 0) + (accumulate ? double{c.at(i, j)} : 0);
        double absolute = (has_bias ? std::abs(bias.at(0, j)) : 0) + (accumulate ? std::abs(c.at(i, j)) : 0);
        for (int64_t l = 0; l < a.columns; ++l) {
          const double term = double{a.at(i, l)} * b.at(l, j);
          sum += term;
          absolute += std::abs(term);
        }
        const double error = std::abs(actual.at(i, j) - sum), allowed = roundings * kRoundoff * absolute;
        if (error <= allowed) continue;
        FAIL() << "m " << a.rows << ", n " << b.columns << ", k " << a.columns << " at " << i << ", " << j << ": "
               << actual.at(i, j) << " instead of " << sum << ", more than " << allowed << " off";
      }
      for (int64_t j = b.columns; i + 1 < a.rows && j < actual.stride; ++j) ASSERT_TRUE(std::isnan(actual.at(i, j)));
    }
  }
};

Problem plain_problem(int64_t m, int64_t n, int64_t k) {
  return {.a = random_matrix(m, k),
          .b = random_matrix(k, n),
          .c = random_matrix(m, n),
          .bias = random_matrix(1, n),
          .has_bias = false,
          .accumulate = false};
}

// Calls `check` for every remainder of rows and columns, with strides, bias and sums of all kinds; then for long ones.
void for_each_problem(const std::function<void(const Problem&)>& check) {
  const auto problem = [](int64_t m, int64_t n, int64_t k, int kind) {
    return Problem{.a = random_matrix(m, k, kind % 3),
                   .b = rounded(random_matrix(k, n, kind % 4)),
                   .c = random_matrix(m, n, kind % 2),
                   .bias = random_matrix(1, n),
                   .has_bias = kind % 5 < 2,
                   .accumulate = kind % 7 < 3};
  };
  int kind = 0;
  for (int64_t m = 1; m <= 30; ++m) {
    for (int64_t n = 1; n <= 70; ++n, ++kind) {
      check(problem(m, n, 1 + kind % 19, kind));
      if (testing::Test::HasFatalFailure()) return;
    }
  }
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{3, 300, 1000}, {1, 533, 769}, {2, 290, 512}, {30, 65, 3100}, {230, 33, 257}}) {
    for (int each = 0; each < 4; ++each) {
      auto p = problem(m, n, k, ++kind);
      p.has_bias = each % 2 == 1;
      p.accumulate = each >= 2;
      check(p);
    }
  }
}

using KernelsProductTest = KernelsTest;
using KernelsPackTest = KernelsTest;
using KernelsSoftmaxTest = KernelsTest;

TEST_P(KernelsProductTest, EqualsSums) {
  for_each_problem([&](const Problem& p) {
    const auto panels = packed(p.b);
    for (const auto& each : products()) {
      SCOPED_TRACE(each.name);
      p.expect_sums(p.compute(each.product, kernels_.packed(panels.data(), p.b.rows)), each.parts);
      p.expect_sums(p.compute(each.product, kernels_.rows(p.b.data.get(), p.b.stride)), each.parts);
    }
  });
}

// In sums of few terms each term is visible.
TEST_P(KernelsProductTest, KeepsAllDigitsOfNumbersOfEverySize) {
  for (const float size : {1e-24f, 1e-12f, 1.0f, 1e12f, 1e18f}) {
    auto p = plain_problem(64, 64, 2);
    for (int64_t i = 0; i < 128; ++i)
      p.a.data[static_cast<size_t>(i)] *= size, p.b.data[static_cast<size_t>(i)] *= size < 1 ? 1 : size;
    const auto panels = packed(p.b);
    for (const auto& each : products()) {
      SCOPED_TRACE(each.name + ", " + std::to_string(size));
      p.expect_sums(p.compute(each.product, kernels_.packed(panels.data(), 2)), each.parts);
    }
  }
}

TEST_P(KernelsProductTest, GivesNoNumberWhereOneTermIsNone) {
  for (const float none : {kNaN, -kNaN, std::bit_cast<float>(0x7fffffff), kInfinity, -kInfinity}) {
    auto p = plain_problem(50, 70, 40);
    p.a.at(7, 20) = p.b.at(20, 69) = none;
    const auto panels = packed(p.b);
    for (const auto& each : products()) {
      const auto c = p.compute(each.product, kernels_.packed(panels.data(), 40));
      for (int64_t i = 0; i < 50; ++i) {
        for (int64_t j = 0; j < 70; ++j)
          EXPECT_EQ(std::isfinite(c.at(i, j)), i != 7 && j != 69) << each.name << ' ' << i << ' ' << j;
      }
    }
  }
}

TEST_P(KernelsProductTest, EqualsSumsOverTransposedRows) {
  for_each_problem([&](const Problem& p) {
    const auto b = transposed(p.b, p.a.rows % 2);
    p.expect_sums(p.compute(kernels_.product_transposed, kernels_.rows(b.data.get(), b.stride)));
  });
}

TEST_P(KernelsProductTest, GivesForALeftSideThatLiesTransposedTheBitsOfItsRows) {
  for_each_problem([&](const Problem& p) {
    if (p.a.columns == 1) return;
    const auto panels = packed(p.b);
    const auto right = kernels_.packed(panels.data(), p.b.rows);
    const auto a = transposed(p.a, p.b.columns % 3);
    for (const auto& each : products()) {
      expect_equal_bits(p.compute(each.product, right, &a), p.compute(each.product, right), each.name + " by columns");
    }
  });
}

TEST_P(KernelsProductTest, GivesForBfloat16TheBitsOfTheSameNumbersInFloat32) {
  for_each_problem([&](const Problem& p) {
    const auto panels = packed(p.b);
    const auto half_panels = packed_bfloat16(p.b);
    const auto rows = upper_halves(p.b);
    for (const auto& each : products()) {
      const auto expected = p.compute(each.product, kernels_.packed(panels.data(), p.b.rows));
      expect_equal_bits(p.compute(each.product, kernels_.packed(half_panels.data(), p.b.rows, Storage::bfloat16)), expected,
                        each.name + ", packed");
      expect_equal_bits(p.compute(each.product, kernels_.rows(rows.data(), p.b.stride, Storage::bfloat16)), expected,
                        each.name + ", rows");
    }
    const auto b = transposed(p.b, p.a.rows % 2);
    const auto columns = upper_halves(b);
    expect_equal_bits(p.compute(kernels_.product_transposed, kernels_.rows(columns.data(), b.stride, Storage::bfloat16)),
                      p.compute(kernels_.product_transposed, kernels_.rows(b.data.get(), b.stride)), "transposed");
  });
}

TEST_P(KernelsProductTest, IsBiasOrZeroOverNoTerms) {
  for (bool has_bias : {false, true}) {
    const Problem p{.a = random_matrix(3, 0),
                    .b = random_matrix(0, 40),
                    .c = random_matrix(3, 40),
                    .bias = random_matrix(1, 40),
                    .has_bias = has_bias,
                    .accumulate = false};
    for (const auto& each : products()) p.expect_sums(p.compute(each.product, kernels_.rows(p.b.data.get(), 40)));
    p.expect_sums(p.compute(kernels_.product_transposed, kernels_.rows(p.b.data.get(), 0)));
  }
}

TEST_P(KernelsProductTest, WritesTheSameBitsIntoPanels) {
  const int64_t panel = kernels_.panel, n = 13 * panel + 5;
  for (const auto& [m, k] : {std::pair<int64_t, int64_t>{1, 40}, {3, 40}, {15, 40}, {20, 1100}}) {
    const auto a = random_matrix(m, k), b = random_matrix(k, n);
    const auto packed_b = packed(b);
    for (const auto& each : products()) {
      const auto compute = [&, &m = m, &k = k](Matrix& c, int64_t c_stride, bool in_panels) {
        each.product({.sizes = {m, n, k},
                      .a = {a.data.get(), k},
                      .b = kernels_.packed(packed_b.data(), k),
                      .c = {c.data.get(), c_stride, in_panels, m * panel}});
      };
      Matrix plain(m, n), panels(14 * m, panel);  // the last panel is not full
      compute(plain, n, /*in_panels=*/false);
      compute(panels, panel, /*in_panels=*/true);
      Matrix back(m, n);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) back.at(i, j) = panels.at(j / panel * m + i, j % panel);
      }
      expect_equal_bits(back, plain, each.name + ", " + std::to_string(m) + " rows");
    }
  }
}

// Rows that are pages apart are copied first.
TEST_P(KernelsProductTest, TheDistanceOfRowsChangesNoBit) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{8, 200, 64},
                                {9, 200, 64},
                                {30, 60, 64},
                                {30, 65, 5},
                                {115, 200, 1024},
                                {300, 97, 1023},
                                {30, 300, 3100},
                                {14, 97, 1100}}) {
    Problem p{.a = random_matrix(m, k, 3),
              .b = random_matrix(k, n),
              .c = random_matrix(m, n),
              .bias = random_matrix(1, n),
              .has_bias = true,
              .accumulate = m == 30};
    const auto panels = packed(p.b);
    const auto expected = p.compute(kernels_.product, kernels_.packed(panels.data(), k));
    const int64_t page = 1024;
    Matrix apart(m, k, (k + page - 1) / page * page - k);
    for (int64_t i = 0; i < m; ++i) std::copy_n(&p.a.at(i, 0), k, &apart.at(i, 0));
    p.a = std::move(apart);
    expect_equal_bits(p.compute(kernels_.product, kernels_.packed(panels.data(), k)), expected, std::to_string(m) + " rows");
  }
}

TEST_P(KernelsProductTest, GivesEqualBitsHoweverItIsDivided) {
  const int64_t m = 400, n = 9 * kernels_.panel + 3, k = 1700;
  const auto a = random_matrix(m, k), b = random_matrix(k, n), bias = random_matrix(1, n);
  const auto panels = packed(b);
  const auto columns = transposed(b);
  const auto compute = [&](auto kernel, const RightSide& right, int64_t rows_at_once, int64_t panels_at_once) {
    Matrix c(m, n);
    const int64_t columns_at_once = panels_at_once * kernels_.panel;
    for (int64_t top = 0; top < m; top += rows_at_once) {
      for (int64_t left = 0; left < n; left += columns_at_once) {
        kernel({.sizes = {std::min(rows_at_once, m - top), std::min(columns_at_once, n - left), k},
                .a = {a.data.get() + top * k, k},
                .b = right.from_panel(left / kernels_.panel),
                .c = {&c.at(top, left), n},
                .bias = &bias.data[static_cast<size_t>(left)]});
      }
    }
    return c;
  };
  const auto expect_equal_parts = [&](auto kernel, const RightSide& right, const std::string& what) {
    const auto whole = compute(kernel, right, m, 10);
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 64}) {
      expect_equal_bits(compute(kernel, right, rows, 10), whole, what + ", " + std::to_string(rows) + " rows a call");
    }
    expect_equal_bits(compute(kernel, right, m, 3), whole, what + ", three panels a call");
  };
  for (const auto& each : products()) {
    expect_equal_parts(each.product, kernels_.packed(panels.data(), k), each.name + ", packed");
    expect_equal_parts(each.product, kernels_.rows(b.data.get(), n), each.name + ", rows");
  }
  expect_equal_parts(kernels_.product_transposed, RightSide{columns.data.get(), Storage::float32, k, kernels_.panel * k},
                     "transposed");
}

TEST_P(KernelsPackTest, LaysColumnsInPanelsFilledWithZeros) {
  for (int64_t k : {1, 3, 16, 33}) {
    for (int64_t n = 1; n <= 70; ++n) {
      const auto b = random_matrix(k, n, n % 3);
      const auto columns = transposed(b, n % 2);
      const auto from_rows = packed(b);
      std::vector<float> from_columns(from_rows.size(), kNaN);
      kernels_.pack_transposed(columns.data.get(), columns.stride, k, n, from_columns.data(), Storage::float32);
      const auto halves = packed_bfloat16(b);
      std::vector<Bfloat16> halves_from_columns(halves.size(), {0x7fc0});
      kernels_.pack_transposed(columns.data.get(), columns.stride, k, n, halves_from_columns.data(), Storage::bfloat16);
      const auto right = kernels_.packed(from_rows.data(), k);
      for (int64_t j = 0; j < (n + kernels_.panel - 1) / kernels_.panel * kernels_.panel; ++j) {
        for (int64_t i = 0; i < k; ++i) {
          const auto at =
              static_cast<size_t>(j / kernels_.panel * right.panel_stride + i * right.row_stride + j % kernels_.panel);
          ASSERT_EQ(from_rows[at], j < n ? b.at(i, j) : 0) << "k " << k << ", n " << n << " at " << i << ", " << j;
          ASSERT_EQ(from_columns[at], from_rows[at]) << "k " << k << ", n " << n << " at " << i << ", " << j;
          ASSERT_EQ(std::bit_cast<float>(uint32_t{halves[at].bits} << 16), rounded(from_rows[at]));
          ASSERT_EQ(halves_from_columns[at].bits, halves[at].bits);
        }
      }
    }
  }
}

TEST_P(KernelsPackTest, RoundsToTheNearestBfloat16AndOfTwoToTheEvenOne) {
  const std::vector<std::pair<uint32_t, uint16_t>> cases = {
      {0x3f800000, 0x3f80}, {0x3f807fff, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f808001, 0x3f81}, {0x3f818000, 0x3f82},
      {0xbf818000, 0xbf82}, {0x00000000, 0x0000}, {0x80000000, 0x8000}, {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80},
      {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0x7fffffff, 0x7fff}, {0xffffffff, 0xffff}};
  Matrix b(1, static_cast<int64_t>(cases.size()));
  for (size_t i = 0; i < cases.size(); ++i) b.data[i] = std::bit_cast<float>(cases[i].first);
  const auto halves = packed_bfloat16(b);
  for (size_t i = 0; i < cases.size(); ++i) {  // one row: the columns of all panels follow each other
    EXPECT_EQ(halves[i].bits, cases[i].second) << std::hex << cases[i].first;
  }
}

// Softmax in float64, by its definition.
struct Expected {
  std::vector<double> weights;
  double log_sum_exp;
};

Expected softmax_of(const Matrix& x, int64_t row, double scale, const float* bias, const bool* keep) {
  double largest = -kInfinity, sum = 0;
  std::vector<double> y;
  for (int64_t j = 0; j < x.columns; ++j) {
    y.push_back(keep && !keep[j] ? -kInfinity : scale * x.at(row, j) + (bias ? bias[j] : 0));
    largest = std::max(largest, y.back());
  }
  for (double& each : y) sum += each = largest == -kInfinity ? 0 : std::exp(each - largest);
  for (double& each : y) each = sum == 0 ? 0 : each / sum;
  return {y, largest + std::log(sum)};
}

TEST_P(KernelsSoftmaxTest, EqualsItsDefinitionWithAndWithoutBiasAndMask) {
  std::mt19937 engine(2);
  for (int64_t n : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 30, 31, 32, 33, 64, 77, 127, 128, 129, 257, 577, 1500}) {
    for (int64_t rows : {1, 3, 16, 37}) {
      for (int kind = 0; kind < 6; ++kind) {
        const bool has_bias = kind % 3 == 1 || kind == 5, has_keep = kind % 3 == 2, one_for_all = kind >= 3;
        auto x = random_matrix(rows, n, n % 3);
        Matrix original(rows, n);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < n; ++j) original.at(i, j) = x.at(i, j) *= 10;
        }
        const auto bias = random_matrix(one_for_all ? 1 : rows, n);
        const auto keep = std::make_unique<bool[]>(static_cast<size_t>((one_for_all ? 1 : rows) * n));
        for (int64_t i = 0; i < (one_for_all ? 1 : rows) * n; ++i) keep[static_cast<size_t>(i)] = engine() % 3 != 0;
        std::vector<float> log_sum_exp(static_cast<size_t>(rows));
        const float scale = kind == 4 ? -0.7f : 0.7f;
        kernels_.softmax({.rows = rows,
                          .n = n,
                          .x = x.data.get(),
                          .x_stride = x.stride,
                          .scale = scale,
                          .bias = has_bias ? bias.data.get() : nullptr,
                          .bias_stride = one_for_all ? 0 : n,
                          .keep = has_keep ? keep.get() : nullptr,
                          .keep_stride = one_for_all ? 0 : n,
                          .log_sum_exp = log_sum_exp.data()});
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t own = one_for_all ? 0 : i;
          const auto expected = softmax_of(original, i, scale, has_bias ? bias.data.get() + own * n : nullptr,
                                           has_keep ? keep.get() + own * n : nullptr);
          // y is up to 8, so off by 8 roundoffs, twice in a quotient; exp, the sum of n positive terms and division add more.
          const double relative = (2 * 3 * 8 + 8 + static_cast<double>(n)) * kRoundoff;
          for (int64_t j = 0; j < n; ++j) {
            const double wanted = expected.weights[static_cast<size_t>(j)];
            ASSERT_NEAR(x.at(i, j), wanted, relative * wanted) << "n " << n << ", kind " << kind << " at " << i << ", " << j;
          }
          if (expected.log_sum_exp == -kInfinity) {
            ASSERT_EQ(log_sum_exp[static_cast<size_t>(i)], -kInfinity);
          } else {
            ASSERT_NEAR(log_sum_exp[static_cast<size_t>(i)], expected.log_sum_exp, 16 * relative);
          }
          for (int64_t j = n; i + 1 < rows && j < x.stride; ++j) ASSERT_TRUE(std::isnan(x.at(i, j)));
        }
      }
    }
  }
}

TEST_P(KernelsSoftmaxTest, HidesTheKeysBehindThoseThatARowSees) {
  std::mt19937 engine(3);
  for (int64_t n : {1, 2, 4, 8, 19, 64, 77, 128, 129, 300}) {
    for (int64_t visible : {int64_t{-20}, int64_t{-1}, int64_t{0}, int64_t{1}, n / 2, n - 1, n, n + 9}) {
      for (int64_t step : {0, 1, 7}) {
        for (int kind = 0; kind < 3; ++kind) {
          const int64_t rows = 37;
          auto x = random_matrix(rows, n);
          const auto bias = random_matrix(rows, n);
          const auto keep = std::make_unique<bool[]>(static_cast<size_t>(rows * n));
          const auto seen = std::make_unique<bool[]>(static_cast<size_t>(rows * n));
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              const auto at = static_cast<size_t>(i * n + j);
              keep[at] = kind != 2 || engine() % 3 != 0;
              seen[at] = keep[at] && j < visible + i * step;
            }
          }
          const Matrix original = copy_of(x);
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              if (j >= visible + i * step) x.at(i, j) = kNaN;  // has no influence
            }
          }
          std::vector<float> sums(static_cast<size_t>(rows)), largest(sums);
          kernels_.softmax({.rows = rows,
                            .n = n,
                            .x = x.data.get(),
                            .x_stride = n,
                            .scale = 0.7f,
                            .bias = kind == 1 ? bias.data.get() : nullptr,
                            .bias_stride = n,
                            .keep = kind == 2 ? keep.get() : nullptr,
                            .keep_stride = n,
                            .visible = visible,
                            .visible_step = step,
                            .log_sum_exp = sums.data(),
                            .largest = largest.data()});
          for (int64_t i = 0; i < rows; ++i) {
            const auto expected =
                softmax_of(original, i, 0.7, kind == 1 ? bias.data.get() + i * n : nullptr, seen.get() + i * n);
            const double relative = (2 * 3 * 8 + 8 + static_cast<double>(n)) * kRoundoff;
            for (int64_t j = 0; j < n; ++j) {
              const double wanted = expected.weights[static_cast<size_t>(j)];
              ASSERT_NEAR(x.at(i, j), wanted, relative * wanted) << n << " keys, kind " << kind << " at " << i << ", " << j;
            }
            const auto sum = sums[static_cast<size_t>(i)] + largest[static_cast<size_t>(i)];
            if (expected.log_sum_exp == -kInfinity) {
              ASSERT_EQ(sum, -kInfinity);
              ASSERT_EQ(largest[static_cast<size_t>(i)], 0);
            } else {
              ASSERT_NEAR(sum, expected.log_sum_exp, 16 * relative);
            }
          }
        }
      }
    }
  }
}

TEST_P(KernelsSoftmaxTest, IsExactToTwoUnitsOverTheWholeRange) {
  constexpr int64_t kSteps = 20000;
  for (int64_t i = 0; i <= kSteps; ++i) {
    const float y = -87.0f * static_cast<float>(i) / kSteps;
    std::vector<float> x = {y, 0, -kInfinity, -200};
    float log_sum_exp = 0;
    kernels_.softmax({.rows = 1, .n = 4, .x = x.data(), .x_stride = 4, .log_sum_exp = &log_sum_exp});
    const double sum = 1 + std::exp(double{y});
    ASSERT_NEAR(x[0], std::exp(double{y}) / sum, 4 * 2 * kRoundoff * std::exp(double{y}) / sum) << y;  // + sum, quotient
    ASSERT_NEAR(x[1], 1 / sum, 4 * kRoundoff) << y;
    ASSERT_EQ(x[2], 0);
    ASSERT_EQ(x[3], 0);
    ASSERT_NEAR(log_sum_exp, std::log(sum), 4 * kRoundoff) << y;
  }
}

TEST_P(KernelsSoftmaxTest, MakesRowsThatAMaskEmptiesZerosAndRowsWithNaNOrOnlyOverflowsNaN) {
  for (int64_t n : {2, 4, 16, 19, 300}) {
    Matrix x(4, n);
    const auto keep = std::make_unique<bool[]>(static_cast<size_t>(4 * n));
    for (int64_t j = 0; j < n; ++j) {
      x.at(0, j) = -kInfinity;                  // empty by its values
      x.at(1, j) = j == 0 ? kNaN : -kInfinity;  // NaN and nothing else
      x.at(2, j) = kNaN;                        // empty by its mask: masked values have no influence
      x.at(3, j) = j == n - 1 ? kNaN : 1;       // one NaN, masked
      keep[static_cast<size_t>(j)] = keep[static_cast<size_t>(n + j)] = true;
      keep[static_cast<size_t>(3 * n + j)] = j != n - 1;
    }
    auto unmasked = random_matrix(2, n);
    for (int64_t j = 0; j < n; ++j) unmasked.at(0, j) = x.at(0, j), unmasked.at(1, j) = x.at(1, j);
    std::vector<float> sums(4), unmasked_sums(2);
    kernels_.softmax({.rows = 4,
                      .n = n,
                      .x = x.data.get(),
                      .x_stride = n,
                      .keep = keep.get(),
                      .keep_stride = n,
                      .log_sum_exp = sums.data()});
    kernels_.softmax({.rows = 2, .n = n, .x = unmasked.data.get(), .x_stride = n, .log_sum_exp = unmasked_sums.data()});
    for (int64_t j = 0; j < n; ++j) {
      EXPECT_EQ(x.at(0, j), 0);
      EXPECT_TRUE(std::isnan(x.at(1, j)));
      EXPECT_EQ(x.at(2, j), 0);
      EXPECT_NEAR(x.at(3, j), j == n - 1 ? 0 : 1.0 / static_cast<double>(n - 1), 1e-6);
      EXPECT_TRUE(std::isnan(unmasked.at(0, j)));
      EXPECT_TRUE(std::isnan(unmasked.at(1, j)));
    }
    EXPECT_EQ(sums[0], -kInfinity);
    EXPECT_TRUE(std::isnan(sums[1]));
    EXPECT_EQ(sums[2], -kInfinity);
    EXPECT_TRUE(std::isnan(unmasked_sums[0]));
    EXPECT_TRUE(std::isnan(unmasked_sums[1]));
  }
}

TEST_P(KernelsSoftmaxTest, GivesEqualBitsHoweverTheRowsAreDivided) {
  for (int64_t n : {3, 4, 8, 30, 77, 300}) {
    const int64_t rows = 37;
    const auto x = random_matrix(rows, n);
    for (const int64_t visible : {n, n / 3}) {
      const auto run = [&](int64_t step) {
        auto y = copy_of(x);
        for (int64_t i = 0; i < rows; i += step) {
          kernels_.softmax({.rows = std::min(step, rows - i),
                            .n = n,
                            .x = &y.at(i, 0),
                            .x_stride = n,
                            .scale = 3,
                            .visible = visible + i,
                            .visible_step = 1});
        }
        return y;
      };
      const auto whole = run(rows);
      for (int64_t step : {1, 2, 3, 5, 16}) expect_equal_bits(run(step), whole, std::to_string(step) + " rows a call");
    }
  }
}

const auto set_of = [](const testing::TestParamInfo<const Kernels*>& info) {
  return std::string(name_of(info.param->instruction_set));
};
class KernelsRowsTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels_ = *GetParam();
};

TEST_P(KernelsRowsTest, NormalisesRowsWithAndWithoutMeanAndBias) {
  for (int64_t n : {1, 2, 7, 8, 15, 16, 17, 33, 320, 771}) {
    for (const bool subtracts_mean : {false, true}) {
      for (const bool has_bias : {false, true}) {
        const int64_t rows = 3;
        const auto x = random_matrix(rows, n), weight = random_matrix(1, n), bias = random_matrix(1, n);
        Matrix y(rows, n);
        constexpr double kEps = 1e-3;
        kernels_.normalise({.rows = rows,
                            .n = n,
                            .x = x.data.get(),
                            .y = y.data.get(),
                            .subtracts_mean = subtracts_mean,
                            .eps = kEps,
                            .weight = weight.data.get(),
                            .bias = has_bias ? bias.data.get() : nullptr});
        for (int64_t i = 0; i < rows; ++i) {
          double mean = 0, squares = 0;
          for (int64_t j = 0; subtracts_mean && j < n; ++j) mean += x.at(i, j) / static_cast<double>(n);
          for (int64_t j = 0; j < n; ++j) squares += (x.at(i, j) - mean) * (x.at(i, j) - mean) / static_cast<double>(n);
          for (int64_t j = 0; j < n; ++j) {
            const auto expected =
                (x.at(i, j) - mean) / std::sqrt(squares + kEps) * weight.at(0, j) + (has_bias ? bias.at(0, j) : 0);
            ASSERT_NEAR(y.at(i, j), expected, static_cast<double>(n + 16) * kRoundoff * 4)
                << "n " << n << " at " << i << ", " << j;
          }
        }
      }
    }
  }
}

TEST_P(KernelsRowsTest, NormalisesEachRowAloneAndInPlace) {
  const int64_t rows = 5, n = 45;
  const auto x = random_matrix(rows, n), weight = random_matrix(1, n);
  Matrix together(rows, n), apart(rows, n);
  const auto norm = [&](const float* from, float* to, int64_t count) {
    kernels_.normalise(
        {.rows = count, .n = n, .x = from, .y = to, .subtracts_mean = true, .eps = 1e-5, .weight = weight.data.get()});
  };
  norm(x.data.get(), together.data.get(), rows);
  for (int64_t i = 0; i < rows * n; ++i) apart.data[static_cast<size_t>(i)] = x.data[static_cast<size_t>(i)];
  for (int64_t i = 0; i < rows; ++i) norm(&apart.at(i, 0), &apart.at(i, 0), 1);
  expect_equal_bits(apart, together, "one row a call, in place");
}

TEST_P(KernelsRowsTest, ActivationsEqualTheirDefinitionsOverTheWholeRange) {
  const auto exact = [](Pointwise f, double x) {
    switch (f) {
      case Pointwise::relu: return std::max(x, 0.0);
      case Pointwise::gelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
      case Pointwise::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
      case Pointwise::silu: return x / (1 + std::exp(-x));
    }
    return 0.0;
  };
  for (const auto f : {Pointwise::relu, Pointwise::gelu, Pointwise::gelu_tanh, Pointwise::silu}) {
    std::vector<float> x, y;
    for (float value = -120; value <= 120; value += 0.0137f) x.push_back(value);
    y = x;
    kernels_.activate(f, y.data(), nullptr, static_cast<int64_t>(y.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_NEAR(y[i], exact(f, x[i]), 2e-7 * std::abs(x[i]) + 1e-12) << "function " << static_cast<int>(f) << " of " << x[i];
    }
  }
}

TEST_P(KernelsRowsTest, ActivationsMultiplyAndTouchNothingBehindTheEnd) {
  for (int64_t n = 0; n < 40; ++n) {
    auto x = random_matrix(1, n + 1);
    const auto before = random_matrix(1, n + 1), multiplier = random_matrix(1, n + 1);
    for (int64_t i = 0; i <= n; ++i) x.at(0, i) = before.at(0, i);
    kernels_.activate(Pointwise::relu, x.data.get(), multiplier.data.get(), n);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(x.at(0, i), std::max(before.at(0, i), 0.0f) * multiplier.at(0, i));
    ASSERT_EQ(x.at(0, n), before.at(0, n));
  }
}

TEST_P(KernelsRowsTest, ActivationsOfNoNumberAreNone) {
  for (const auto f : {Pointwise::relu, Pointwise::gelu, Pointwise::gelu_tanh, Pointwise::silu}) {
    float x = kNaN;
    kernels_.activate(f, &x, nullptr, 1);
    EXPECT_TRUE(std::isnan(x)) << static_cast<int>(f);
  }
}

INSTANTIATE_TEST_SUITE_P(Each, KernelsProductTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), set_of);
INSTANTIATE_TEST_SUITE_P(Each, KernelsPackTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), set_of);
INSTANTIATE_TEST_SUITE_P(Each, KernelsSoftmaxTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), set_of);
INSTANTIATE_TEST_SUITE_P(Each, KernelsRowsTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), set_of);

TEST(KernelsChoiceTest, GivesTheUnitProductsOfManyRowsColumnsAndTermsAlone) {
  const auto rows = least_many_rows();
  EXPECT_EQ(has_many_rows(rows, kLeastManyColumns, kLeastManyDepth), kernels().has_matrix_unit);
  EXPECT_FALSE(has_many_rows(rows - 1, 4096, 4096));
  EXPECT_FALSE(has_many_rows(4096, kLeastManyColumns - 1, 4096));
  EXPECT_FALSE(has_many_rows(4096, 4096, kLeastManyDepth - 1));
}

TEST(KernelsChoiceTest, IsTheFirstOfThoseThatRunUnlessTheEnvironmentNamesOthers) {
  const char* wanted = std::getenv("XATTN_KERNELS");
  const auto fastest = all_kernels().front()->instruction_set;
  EXPECT_EQ(name_of(kernels().instruction_set), wanted ? std::string_view(wanted) : name_of(fastest));
  EXPECT_EQ(all_kernels().back()->instruction_set, InstructionSet::plain);
  EXPECT_EQ(version().kernels, name_of(kernels().instruction_set));
}

TEST(KernelsChoiceTest, RefusesUnknownInstructionSetsByName) {
  try {
    use_kernels_named("AVX2");
    FAIL() << "no error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "XATTN_KERNELS must be one of plain, avx2, avx512, amx, but is AVX2");
  }
}

}  // namespace
}  // namespace xattn::detail
