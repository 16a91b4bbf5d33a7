// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// Attention weights made into pictures, for contexts whose keys are the cells of an image: patches, or the places of a CNN's
// feature map. Of 4 words (query [1, 4, Eq]) that ask 7 x 7 regions (context [1, 49, Ek]) of an image [224, 224, 3]:
//
//   auto weights = std::get<1>(attention->forward(query, context, context));         // [1, 4, 49]
//   auto maps = xattn::attention_maps(weights, {.rows = 7, .columns = 7});           // [1, 4, 7, 7]
//   auto strongest = maps.max().item<double>();                                      // one scale for all words
//   auto picture = xattn::overlay_map(image, maps[0][2], {.maximum = strongest});    // [224, 224, 3]: where word 2 looks
//   auto regions = xattn::attention_entropy(weights).exp();                          // [1, 4]: at how many regions each looks
//
// Pure functions, safe to call from several threads. Tensors may be on any device; pictures are for looking at, so everything
// but the entropy is returned on the CPU and without gradient. Bad input throws c10::ValueError or c10::TypeError.
namespace xattn {

/// How the keys lie in the image, and what to show of them.
struct MapOptions {
  int64_t rows = 0;                 ///< of the grid of keys, which run row by row from the upper left; must be given
  int64_t columns = 0;              ///< likewise
  std::vector<int64_t> heads = {};  ///< show the mean over these; default: over all
  int64_t first_key = 0;            ///< leading keys to leave out, as 1 for a class token. Maps then sum to less than one.
};

/// weights [B, H, Lq, Lk], or [B, Lq, Lk] as already averaged, of any floating point type, with Lk = first_key + rows * columns
/// -> float32 [B, Lq, rows, columns]. Weights of unbatched inputs need `unsqueeze(0)`.
XATTN_API at::Tensor attention_maps(const at::Tensor& weights, const MapOptions& options);

enum class Interpolation {
  bilinear,  ///< smooth, between the centres of cells
  nearest,   ///< each pixel has the weight of its cell: shows the grid as it is
};

/// map [rows, columns] -> float32 [height, width]. Values are not rescaled.
XATTN_API at::Tensor resize_map(const at::Tensor& map,
                                int64_t height,
                                int64_t width,
                                Interpolation interpolation = Interpolation::bilinear);

/// map [...] with values from 0 to 1 -> uint8 RGB [..., 3], from black over purple and orange to light yellow: "inferno" of
/// matplotlib (N. Smith and S. van der Walt, 2015, CC0, https://bids.github.io/colormap), in which equal steps look equal and
/// lightness grows throughout, in grey print too. Values outside are drawn as the nearest end, NaN as 0.
XATTN_API at::Tensor color_map(const at::Tensor& map);

struct OverlayOptions {
  double opacity = 0.6;                ///< of the strongest weight, from 0 to 1; of others in proportion: zero leaves the image
  std::optional<double> maximum = {};  ///< the weight drawn strongest, as all above it; default: the largest of the map
  Interpolation interpolation = Interpolation::bilinear;
};

/// Draws a map over its image in the colours of `color_map`: image uint8 [H, W, 3], map [rows, columns] -> uint8 [H, W, 3].
XATTN_API at::Tensor overlay_map(const at::Tensor& image, const at::Tensor& map, const OverlayOptions& options = {});

/// The entropy of each row of weights, in nats: weights [..., Lk] -> [...], float32 (float64 for float64) and on their device.
/// 0 for one key alone, log n for n keys alike, 0 for a row without keys. Differentiable; a weight of zero passes no gradient.
XATTN_API at::Tensor attention_entropy(const at::Tensor& weights);

}  // namespace xattn
