// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/plan.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// The layers of real models in bench/shapes.csv, which says what its columns mean. A program that uses this embeds that file.
namespace shapes {

/// What a call of the row does.
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
  Timed timed;
  bool learned_query;  ///< a parameter, the same for all batch entries
  bool one_context;    ///< key and value are one tensor
  int64_t B, H, G, Lq, Lk;
  int64_t valid;  ///< of the Lk keys; where they are fewer, there is a padding mask
  int64_t Eq, Ek, Eo;
  int64_t d, e;
  NormOver norm;
  bool maps;  ///< whether anyone wants weights of this layer
  std::string from;
  double gflop;        ///< operations of what is timed, in the standard order; three times those of forward with backward
  std::string orders;  ///< of the logits and of the values, the cheapest for what is timed: two letters of S, F, P, C, Q
  double times_fewer;  ///< operations those need than the standard order
};

/// All rows, in the order of the file.
const std::vector<Shape>& all();

/// The row of this name or, if there is none, the rows with `text` in their names, whatever the case; may be none.
std::vector<Shape> matching(std::string_view text);

/// What a planner is to know of it; weights are not frozen.
xattn::PlanRequest plan_request(const Shape& shape);

}  // namespace shapes
