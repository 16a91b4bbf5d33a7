// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

// What the sanitizers see here: every matrix lies in memory of exactly its size, so that no kernel reads or writes beside it.
namespace xattn::detail {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kRoundoff = std::numeric_limits<float>::epsilon() / 2;

// A matrix whose rows lie `stride` apart; the last one ends where the memory ends. Between the rows lie NaN.
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

void expect_equal_bits(const Matrix& actual, const Matrix& expected, const std::string& what) {
  for (int64_t i = 0; i < expected.rows; ++i) {
    for (int64_t j = 0; j < expected.columns; ++j) {
      ASSERT_EQ(std::bit_cast<uint32_t>(actual.at(i, j)), std::bit_cast<uint32_t>(expected.at(i, j)))
          << what << " at " << i << ", " << j << ": " << actual.at(i, j) << " instead of " << expected.at(i, j);
    }
  }
}

class KernelsTest : public testing::TestWithParam<const Kernels*> {
 protected:
  std::vector<float> packed(const Matrix& b) const {
    std::vector<float> to(static_cast<size_t>(kernels_.packed_size(b.rows, b.columns)), kNaN);
    kernels_.pack(b.data.get(), b.stride, b.rows, b.columns, to.data());
    return to;
  }

  // a b + bias + c, and expects it near the sums in float64: each of the k + 2 roundings is off by at most kRoundoff of the sum
  // of absolute values.
  void expect_product(
      const Matrix& a, const Matrix& b, const RightSide& right, const Matrix& c, const float* bias, bool accumulate) {
    Matrix actual(c.rows, c.columns, c.stride - c.columns);
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.columns; ++j) actual.at(i, j) = accumulate ? c.at(i, j) : kNaN;
    }
    kernels_.product({.m = a.rows,
                      .n = b.columns,
                      .k = a.columns,
                      .a = a.data.get(),
                      .a_stride = a.stride,
                      .b = right,
                      .c = actual.data.get(),
                      .c_stride = actual.stride,
                      .bias = bias,
                      .accumulate = accumulate});
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int64_t j = 0; j < b.columns; ++j) {
        double sum = (bias ? bias[j] : 0) + (accumulate ? c.at(i, j) : 0);
        double absolute = (bias ? std::abs(bias[j]) : 0) + (accumulate ? std::abs(c.at(i, j)) : 0);
        for (int64_t l = 0; l < a.columns; ++l) {
          const double term = double{a.at(i, l)} * b.at(l, j);
          sum += term;
          absolute += std::abs(term);
        }
        ASSERT_NEAR(actual.at(i, j), sum, static_cast<double>(a.columns + 2) * kRoundoff * absolute)
            << "m " << a.rows << ", n " << b.columns << ", k " << a.columns << " at " << i << ", " << j;
      }
      for (int64_t j = b.columns; i + 1 < a.rows && j < actual.stride; ++j) ASSERT_TRUE(std::isnan(actual.at(i, j)));
    }
  }

  const Kernels& kernels_ = *GetParam();
};

using KernelsProductTest = KernelsTest;
using KernelsPackTest = KernelsTest;
using KernelsSoftmaxTest = KernelsTest;

TEST_P(KernelsProductTest, EqualsSumsForEveryRemainderOfRowsAndColumns) {
  for (int64_t m = 1; m <= 30; ++m) {
    for (int64_t n = 1; n <= 70; ++n) {
      const int64_t k = 1 + (m * 7 + n) % 19;
      const auto a = random_matrix(m, k, m % 3), b = random_matrix(k, n, n % 4), c = random_matrix(m, n, m % 2);
      const auto bias = random_matrix(1, n);
      const auto panels = packed(b);
      const bool accumulate = (m + n) % 2 == 0;
      expect_product(a, b, kernels_.packed(panels.data(), k), c, n % 3 ? bias.data.get() : nullptr, accumulate);
      expect_product(a, b, kernels_.rows(b.data.get(), b.stride), c, n % 3 ? nullptr : bias.data.get(), accumulate);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(KernelsProductTest, EqualsSumsForLongOnes) {
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{3, 300, 1000}, {1, 333, 769}, {2, 290, 512}, {30, 65, 2049}, {700, 33, 257}}) {
    const auto a = random_matrix(m, k, 1), b = random_matrix(k, n, 3), c = random_matrix(m, n), bias = random_matrix(1, n);
    const auto panels = packed(b);
    expect_product(a, b, kernels_.packed(panels.data(), k), c, bias.data.get(), /*accumulate=*/true);
    expect_product(a, b, kernels_.rows(b.data.get(), b.stride), c, bias.data.get(), /*accumulate=*/false);
  }
}

TEST_P(KernelsProductTest, IsBiasOrZeroOverNoTerms) {
  const auto a = random_matrix(3, 0), b = random_matrix(0, 40), c = random_matrix(3, 40), bias = random_matrix(1, 40);
  expect_product(a, b, kernels_.rows(b.data.get(), 40), c, nullptr, /*accumulate=*/false);
  expect_product(a, b, kernels_.rows(b.data.get(), 40), c, bias.data.get(), /*accumulate=*/true);
}

TEST_P(KernelsProductTest, GivesEqualBitsHoweverItIsDivided) {
  const int64_t m = 37, n = 5 * kernels_.panel + 3, k = 600;
  const auto a = random_matrix(m, k), b = random_matrix(k, n), bias = random_matrix(1, n);
  const auto panels = packed(b);
  for (const auto& right : {kernels_.packed(panels.data(), k), kernels_.rows(b.data.get(), n)}) {
    const auto part = [&](Matrix& c, int64_t top, int64_t rows, int64_t panel, int64_t columns) {
      kernels_.product({.m = rows,
                        .n = columns,
                        .k = k,
                        .a = a.data.get() + top * k,
                        .a_stride = k,
                        .b = {right.data + panel * right.panel_stride, right.row_stride, right.panel_stride},
                        .c = c.data.get() + top * n + panel * kernels_.panel,
                        .c_stride = n,
                        .bias = bias.data.get() + panel * kernels_.panel});
    };
    Matrix whole(m, n);
    part(whole, 0, m, 0, n);
    for (int64_t rows = 1; rows <= 16; ++rows) {
      Matrix divided(m, n);
      for (int64_t top = 0; top < m; top += rows) part(divided, top, std::min(rows, m - top), 0, n);
      expect_equal_bits(divided, whole, std::to_string(rows) + " rows a call");
    }
    Matrix divided(m, n);
    for (int64_t panel = 0; panel < 6; panel += 2) {
      part(divided, 0, m, panel, std::min(2 * kernels_.panel, n - panel * kernels_.panel));
    }
    expect_equal_bits(divided, whole, "two panels a call");
  }
}

TEST_P(KernelsPackTest, LaysColumnsInPanelsFilledWithZeros) {
  for (int64_t k : {1, 3, 16, 33}) {
    for (int64_t n = 1; n <= 70; ++n) {
      const auto b = random_matrix(k, n, n % 3);
      Matrix transposed(n, k, n % 2);
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < n; ++j) transposed.at(j, i) = b.at(i, j);
      }
      const auto from_rows = packed(b);
      std::vector<float> from_columns(from_rows.size(), kNaN);
      kernels_.pack_transposed(transposed.data.get(), transposed.stride, k, n, from_columns.data());
      const auto right = kernels_.packed(from_rows.data(), k);
      for (int64_t j = 0; j < (n + kernels_.panel - 1) / kernels_.panel * kernels_.panel; ++j) {
        for (int64_t i = 0; i < k; ++i) {
          const auto at =
              static_cast<size_t>(j / kernels_.panel * right.panel_stride + i * right.row_stride + j % kernels_.panel);
          ASSERT_EQ(from_rows[at], j < n ? b.at(i, j) : 0) << "k " << k << ", n " << n << " at " << i << ", " << j;
          ASSERT_EQ(from_columns[at], from_rows[at]) << "k " << k << ", n " << n << " at " << i << ", " << j;
        }
      }
    }
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
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 30, 31, 32, 33, 64, 77, 257, 577, 1500}) {
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
          // y is up to 8 and so off by 8 roundoffs, twice in a quotient; exp, the sum of n positive terms and the division add theirs.
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

TEST_P(KernelsSoftmaxTest, MakesEmptyRowsZerosAndRowsWithNaNNaN) {
  for (int64_t n : {2, 4, 16, 19, 300}) {
    Matrix x(4, n);
    const auto keep = std::make_unique<bool[]>(static_cast<size_t>(4 * n));
    for (int64_t j = 0; j < n; ++j) {
      x.at(0, j) = -kInfinity;                  // empty by its values
      x.at(1, j) = j == 0 ? kNaN : -kInfinity;  // NaN and nothing else
      x.at(2, j) = kNaN;                        // empty by its mask: what is left out has no influence
      x.at(3, j) = j == n - 1 ? kNaN : 1;       // one NaN, left out
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
      EXPECT_EQ(unmasked.at(0, j), 0);
      EXPECT_TRUE(std::isnan(unmasked.at(1, j)));
    }
    EXPECT_EQ(sums[0], -kInfinity);
    EXPECT_TRUE(std::isnan(sums[1]));
    EXPECT_EQ(sums[2], -kInfinity);
    EXPECT_EQ(unmasked_sums[0], -kInfinity);
    EXPECT_TRUE(std::isnan(unmasked_sums[1]));
  }
}

TEST_P(KernelsSoftmaxTest, GivesEqualBitsHoweverTheRowsAreDivided) {
  for (int64_t n : {3, 4, 8, 30, 77, 300}) {
    const int64_t rows = 37;
    const auto x = random_matrix(rows, n);
    const auto run = [&](int64_t step) {
      Matrix y(rows, n);
      for (int64_t i = 0; i < rows * n; ++i) y.data[static_cast<size_t>(i)] = x.data[static_cast<size_t>(i)];
      for (int64_t i = 0; i < rows; i += step) {
        kernels_.softmax({.rows = std::min(step, rows - i), .n = n, .x = &y.at(i, 0), .x_stride = n, .scale = 3});
      }
      return y;
    };
    const auto whole = run(rows);
    for (int64_t step : {1, 2, 3, 5, 16}) expect_equal_bits(run(step), whole, std::to_string(step) + " rows a call");
  }
}

const auto name_of = [](const testing::TestParamInfo<const Kernels*>& info) { return std::string(info.param->name); };
INSTANTIATE_TEST_SUITE_P(Each, KernelsProductTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), name_of);
INSTANTIATE_TEST_SUITE_P(Each, KernelsPackTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), name_of);
INSTANTIATE_TEST_SUITE_P(Each, KernelsSoftmaxTest, testing::ValuesIn(all_kernels().begin(), all_kernels().end()), name_of);

TEST(KernelsChoiceTest, IsTheFirstOfThoseThatRun) {
  EXPECT_EQ(&kernels(), all_kernels().front());
  EXPECT_STREQ(all_kernels().back()->name, "plain");
}

}  // namespace
}  // namespace xattn::detail
