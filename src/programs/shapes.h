// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// The layers of real models in bench/shapes.csv, which describes its columns. The file is embedded into the program.
namespace shapes {

/// The part of the layer that a call of the row computes.
enum class Timed {
  forward,   ///< everything
  attend,    ///< attends to a context that was made before
  backward,  ///< everything, and the gradients of inputs and parameters
};

/// Which axis the RMS norms of projected queries and keys span.
enum class NormOver { nothing, head, heads };

/// One row; names of sizes as in xattn/attention.h.
struct Shape {
  std::string name;
  Timed timed = Timed::forward;
  bool learned_query = false;  ///< a parameter, the same for all batch entries
  bool one_context = true;     ///< key and value are one tensor
  int64_t B = 1, H = 1, G = 1, Lq = 1, Lk = 1;
  int64_t valid = 1;  ///< number of real keys; below Lk there is a padding mask
  int64_t Eq = 1, Ek = 1, Eo = 1, d = 1, e = 1;
  NormOver norm = NormOver::nothing;
  bool maps = false;  ///< whether models use the attention weights of this layer
};

/// All rows, in the order of the file.
const std::vector<Shape>& all();

/// The row of this name or, if there is none, the rows whose names contain `text`, whatever the case; possibly none.
std::vector<Shape> matching(std::string_view text);

/// The row as the planner sees it; weights are not frozen.
xattn::PlanRequest plan_request(const Shape& shape);

/// Numbers of operations of the timed part.
struct Operations {
  double standard;  ///< of the standard order, over all keys
  xattn::Orders
      orders;          ///< of fewest operations, over the real keys; if nothing is trained, products of weights are made ahead
  double times_fewer;  ///< operations of the standard order over those of `orders`, both over the real keys
};
Operations count_operations(const Shape& shape);

}  // namespace shapes
