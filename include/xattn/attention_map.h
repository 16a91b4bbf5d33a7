// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// Attention weights as pictures, for contexts whose keys are the cells of an image: patches, or the positions of a CNN's
// feature map. For 4 words (query [1, 4, Eq]) that attend to 7 x 7 regions (context [1, 49, Ek]) of an image [224, 224, 3]:
//
//   auto weights = std::get<1>(attention->forward(query, context, context));         // [1, 4, 49]
//   auto maps = xattn::attention_maps(weights, {.rows = 7, .columns = 7});           // [1, 4, 7, 7]
//   auto strongest = maps.max().item<double>();                                      // one scale for all words
//   auto picture = xattn::overlay_map(image, maps[0][2], {.maximum = strongest});    // [224, 224, 3]: where word 2 attends
//   auto regions = xattn::attention_entropy(weights).exp();                          // [1, 4]: regions each word attends to
//
// Pure functions, safe to call from several threads. Tensors may be on any device. Maps and pictures are returned on the CPU
// and have no gradient. Bad input throws c10::ValueError or c10::TypeError.
namespace xattn {

/// How the keys are laid out in the image, and which heads and keys to show.
struct MapOptions {
  int64_t rows = 0;                 ///< rows of the grid of keys, which is stored row by row from the upper left; required
  int64_t columns = 0;              ///< columns of that grid; required
  std::vector<int64_t> heads = {};  ///< the map is the mean over these heads, or over all if empty
  int64_t first_key = 0;  ///< number of leading keys to leave out, 1 for a class token; maps then sum to less than one
};

/// weights [B, H, Lq, Lk], or [B, Lq, Lk] if already averaged, of any floating point type, with Lk = first_key + rows * columns
/// -> float32 [B, Lq, rows, columns]. Weights of unbatched inputs need `unsqueeze(0)`.
XATTN_API at::Tensor attention_maps(const at::Tensor& weights, const MapOptions& options);

enum class Interpolation {
  bilinear,  ///< smooth, between the centres of cells
  nearest,   ///< each pixel has the weight of its cell, so that the grid is visible
};

struct OverlayOptions {
  double opacity = 0.6;  ///< opacity of the maximum, from 0 to 1; proportional for smaller weights; 0 leaves the image as is
  std::optional<double> maximum = {};  ///< this weight and larger ones get that opacity; default: the largest in the map
  Interpolation interpolation = Interpolation::bilinear;
};

/// Draws a map over its image, from black to light yellow: image uint8 [height, width, 3], map [rows, columns] -> uint8 of
/// the same shape.
XATTN_API at::Tensor overlay_map(const at::Tensor& image, const at::Tensor& map, const OverlayOptions& options = {});

/// The entropy of each row of weights, in nats: weights [..., Lk] -> [...], float32 (float64 for float64) and on their device.
/// It is 0 if one key has all the weight, log n for n equal weights, and 0 for a row without keys. Differentiable; a weight of
/// zero passes no gradient.
XATTN_API at::Tensor attention_entropy(const at::Tensor& weights);

}  // namespace xattn
