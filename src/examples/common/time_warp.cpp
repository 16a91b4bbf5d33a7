// SPDX-License-Identifier: Apache-2.0
#include "common/time_warp.h"

#include <array>
#include <cstddef>
#include <limits>
#include <utility>

namespace examples {

std::vector<int64_t> time_warp(const torch::Tensor& costs) {
  const auto rows = costs.size(0), columns = costs.size(1);
  const auto plain = costs.contiguous();
  const auto value = plain.accessor<float, 2>();
  enum Step : uint8_t { kBoth, kRow, kColumn };
  std::vector<Step> steps(static_cast<size_t>(rows * columns));
  std::vector<float> above(static_cast<size_t>(columns) + 1, std::numeric_limits<float>::infinity());
  above[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> here(above.size(), std::numeric_limits<float>::infinity());
    for (size_t j = 1; j < here.size(); ++j) {
      const auto both = above[j - 1], down = above[j], right = here[j - 1];
      const auto step = both < down && both < right ? kBoth : down < both && down < right ? kRow : kColumn;
      here[j] = value[row][static_cast<int64_t>(j) - 1] + std::array{both, down, right}.at(step);
      steps[static_cast<size_t>(row * columns) + j - 1] = step;
    }
    above = std::move(here);
  }
  std::vector<int64_t> entered(static_cast<size_t>(rows));
  for (auto row = rows - 1, column = columns - 1; row >= 0;) {
    entered[static_cast<size_t>(row)] = column;
    const auto step = row == 0 ? kColumn : column == 0 ? kRow : steps[static_cast<size_t>(row * columns + column)];
    if (step != kColumn) --row;
    if (step != kRow && --column < 0) break;
  }
  return entered;
}

}  // namespace examples
