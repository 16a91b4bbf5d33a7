// SPDX-License-Identifier: Apache-2.0
#include <xattn/attention_map.h>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/cross_attention.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "attention/draw.h"
#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using detail::color_map;
using detail::resize_map;
using torch::Tensor;
using Sizes = std::vector<int64_t>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Tensor bytes(at::ArrayRef<int> values) {
  return torch::tensor(values).to(torch::kByte);
}

class AttentionMapTest : public testing::TestWithParam<torch::Device> {
 protected:
  AttentionMapTest() { torch::manual_seed(0); }
  // [..., Lk], rows that sum to one.
  Tensor weights(at::IntArrayRef shape) const { return torch::randn(shape, device_).softmax(-1); }
  torch::Device device_ = GetParam();
};

TEST_P(AttentionMapTest, ExampleOfTheHeader) {
  CrossAttention attention(8, 12, 12, 16);
  attention->to(device_);
  const auto query = torch::randn({1, 4, 8}, device_), context = torch::randn({1, 49, 12}, device_);
  const auto image = torch::full({224, 224, 3}, 128, torch::dtype(torch::kByte).device(device_));

  auto weights = std::get<1>(attention->forward(query, context, context));       // [1, 4, 49]
  auto maps = xattn::attention_maps(weights, {.rows = 7, .columns = 7});         // [1, 4, 7, 7]
  auto strongest = maps.max().item<double>();                                    // one scale for all words
  auto picture = xattn::overlay_map(image, maps[0][2], {.maximum = strongest});  // [224, 224, 3]: where word 2 looks
  auto regions = xattn::attention_entropy(weights).exp();                        // [1, 4]: at how many regions each looks

  EXPECT_EQ(maps.sizes(), (Sizes{1, 4, 7, 7}));
  EXPECT_EQ(picture.sizes(), (Sizes{224, 224, 3}));
  EXPECT_FALSE(picture.equal(image.cpu()));
  EXPECT_TRUE(regions.gt(1).logical_and(regions.lt(49.001)).all().item<bool>());
}

// ---- attention_maps ---------------------------------------------------------------------------------------------------------

TEST_P(AttentionMapTest, FoldsKeysRowByRow) {
  const auto maps =
      attention_maps(torch::arange(12, torch::dtype(torch::kFloat).device(device_)).view({1, 2, 6}), {.rows = 2, .columns = 3});
  EXPECT_TRUE(maps.is_cpu());
  EXPECT_TRUE(
      maps.equal(torch::tensor({0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.}).view({1, 2, 2, 3}).to(torch::kFloat)));
}

TEST_P(AttentionMapTest, AOneHotRowMarksExactlyItsCell) {
  const auto maps = attention_maps(torch::eye(6, device_).unsqueeze(0), {.rows = 2, .columns = 3});  // query i attends to key i
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_EQ(maps[0][i][i / 3][i % 3].item<float>(), 1);
    EXPECT_EQ(maps[0][i].sum().item<float>(), 1);
  }
}

TEST_P(AttentionMapTest, IsTheMeanOverAllOrTheChosenHeads) {
  const auto w = weights({2, 4, 3, 6});
  const MapOptions grid{.rows = 2, .columns = 3};
  auto chosen = grid;
  chosen.heads = {3, 1};
  expect_close(attention_maps(w, grid), w.mean(1).view({2, 3, 2, 3}), 1e-6, "all heads");
  expect_close(attention_maps(w, chosen), ((w.select(1, 1) + w.select(1, 3)) / 2).view({2, 3, 2, 3}), 1e-6, "two heads");
  chosen.heads = {2};
  EXPECT_TRUE(attention_maps(w, chosen).equal(w.select(1, 2).view({2, 3, 2, 3}).cpu()));
  expect_close(attention_maps(w.mean(1), grid), attention_maps(w, grid), 1e-6, "weights without an axis of heads");
}

TEST_P(AttentionMapTest, LeavesOutLeadingKeys) {
  const auto w = weights({2, 3, 7});
  const auto maps = attention_maps(w, {.rows = 2, .columns = 3, .first_key = 1});
  EXPECT_TRUE(maps.equal(w.slice(2, 1).reshape({2, 3, 2, 3}).cpu()));
}

TEST_P(AttentionMapTest, MapsDoNotShareMemoryWithTheWeights) {
  const auto w = weights({1, 1, 4});
  const auto before = w.clone();
  attention_maps(w, {.rows = 2, .columns = 2}).zero_();
  EXPECT_TRUE(w.equal(before));
}

TEST_P(AttentionMapTest, MapsAreFloat32WithoutGradientFromEveryType) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    const auto w = weights({1, 2, 3, 4}).to(type).requires_grad_();
    const auto maps = attention_maps(w, {.rows = 2, .columns = 2});
    EXPECT_EQ(maps.scalar_type(), torch::kFloat);
    EXPECT_FALSE(maps.requires_grad());
    expect_close(maps, w.to(torch::kDouble).mean(1).view({1, 3, 2, 2}), tolerance(torch::kFloat, 4), "maps");
  }
}

TEST_P(AttentionMapTest, MapsThrowOnWeightsThatDoNotFitTheGrid) {
  const auto value_error = [&](const Tensor& w, const MapOptions& options) {
    return error_of<c10::ValueError>([&] { attention_maps(w, options); });
  };
  const auto w = weights({1, 4, 3, 6});
  EXPECT_EQ(error_of<c10::TypeError>([&] { attention_maps(w.to(torch::kLong), {.rows = 2, .columns = 3}); }),
            "[attention_maps] weights must be of a floating point type, but is int64.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { attention_maps(Tensor(), {.rows = 2, .columns = 3}); }),
            "[attention_maps] weights must be of a floating point type, but is undefined.");
  EXPECT_EQ(value_error(w[0][0], {.rows = 2, .columns = 3}),
            "[attention_maps] weights must have shape [B, H, Lq, Lk] or [B, Lq, Lk], but has [3, 6].");
  EXPECT_EQ(value_error(w, {.columns = 6}), "[attention_maps] rows must be at least 1, but is 0.");
  EXPECT_EQ(value_error(w, {.rows = 6}), "[attention_maps] columns must be at least 1, but is 0.");
  EXPECT_EQ(value_error(w, {.rows = 2, .columns = 4, .first_key = -2}),
            "[attention_maps] first_key must not be negative, but is -2.");
  EXPECT_EQ(value_error(w, {.rows = 2, .columns = 3, .first_key = 1}),
            "[attention_maps] weights must be over 1 + 2 x 3 = 7 keys (first_key + rows x columns), but are over 6.");
  EXPECT_EQ(value_error(w[0], {.rows = 2, .columns = 3, .heads = {0, 1}}),
            "[attention_maps] heads must be empty where weights have no axis of heads, but has 2 of them.");
  EXPECT_EQ(value_error(w, {.rows = 2, .columns = 3, .heads = {0, 4}}),
            "[attention_maps] heads must lie in [0, 4), but hold 4.");
  EXPECT_EQ(value_error(w, {.rows = 2, .columns = 3, .heads = {-1}}),
            "[attention_maps] heads must lie in [0, 4), but hold -1.");
}

// ---- resize_map -------------------------------------------------------------------------------------------------------------

TEST_P(AttentionMapTest, NearestRepeatsEachCell) {
  const auto map = torch::tensor({{1.f, 2.f}, {3.f, 4.f}}).to(device_);
  const auto large = resize_map(map, 4, 6, Interpolation::nearest);
  EXPECT_TRUE(large.is_cpu());
  EXPECT_TRUE(large.equal(map.cpu().repeat_interleave(2, 0).repeat_interleave(3, 1)));
}

TEST_P(AttentionMapTest, NearestIsTheCellOfThePixelsCentre) {
  const auto map = torch::tensor({{1.f, 2.f, 3.f}}).to(device_);  // centres of 4 pixels lie at 3/8, 9/8, 15/8 and 21/8 cells
  EXPECT_TRUE(resize_map(map, 1, 4, Interpolation::nearest).equal(torch::tensor({{1.f, 2.f, 2.f, 3.f}})));
}

TEST_P(AttentionMapTest, BilinearIsLinearBetweenCentres) {
  const auto map = torch::tensor({{0.f, 1.f}}).to(device_);
  EXPECT_TRUE(resize_map(map, 2, 4).equal(torch::tensor({0.f, 0.25f, 0.75f, 1.f}).expand({2, 4})));
}

TEST_P(AttentionMapTest, ResizingKeepsAConstantAndTheOwnSize) {
  const auto map = weights({3, 5});
  for (const auto interpolation : {Interpolation::bilinear, Interpolation::nearest}) {
    expect_close(resize_map(map, 3, 5, interpolation), map, 1e-6, "own size");
    expect_close(resize_map(torch::full({3, 5}, 0.25, device_), 7, 11, interpolation), torch::full({7, 11}, 0.25), 1e-6,
                 "constant");
  }
}

TEST_P(AttentionMapTest, ResizingThrowsOnBadInput) {
  const auto map = weights({3, 5});
  EXPECT_EQ(error_of<c10::ValueError>([&] { resize_map(map[0], 3, 5); }),
            "[resize_map] map must have shape [rows, columns], but has [5].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { resize_map(map.slice(0, 0, 0), 3, 5); }),
            "[resize_map] map must have shape [rows, columns], but has [0, 5].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { resize_map(map.to(torch::kByte), 3, 5); }),
            "[resize_map] map must be of a floating point type, but is uint8.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { resize_map(map, 0, 5); }), "[resize_map] height must be at least 1, but is 0.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { resize_map(map, 3, -1); }), "[resize_map] width must be at least 1, but is -1.");
}

// ---- color_map --------------------------------------------------------------------------------------------------------------

TEST_P(AttentionMapTest, ColorsAreThoseOfInferno) {
  // Rows 0, 51, 128 and 255 of the published table, times 255. The third lies between two control points.
  const auto map = torch::tensor({{0.0, 0.2}, {128 / 255.0, 1.0}}, device_);
  const auto colors = color_map(map);
  EXPECT_TRUE(colors.is_cpu());
  EXPECT_EQ(colors.scalar_type(), torch::kByte);
  ASSERT_EQ(colors.sizes(), (Sizes{2, 2, 3}));
  EXPECT_TRUE(colors[0][0].equal(bytes({0, 0, 4})));
  EXPECT_TRUE(colors[0][1].equal(bytes({66, 10, 104})));
  EXPECT_LE((colors[1][0].to(torch::kInt) - torch::tensor({188, 55, 84})).abs().max().item<int>(), 2);
  EXPECT_TRUE(colors[1][1].equal(bytes({252, 255, 164})));
}

TEST_P(AttentionMapTest, ColorsGrowLighterThroughout) {
  const auto colors = color_map(torch::linspace(0, 1, 101, device_)).to(torch::kDouble);              // [101, 3]
  const auto luminance = torch::mv(colors, torch::tensor({0.2126, 0.7152, 0.0722}, torch::kDouble));  // of ITU-R BT.709
  EXPECT_TRUE(luminance.diff().gt(0).all().item<bool>());
}

TEST_P(AttentionMapTest, ColorsOutsideTheRangeAreThoseOfItsEnds) {
  const auto infinity = std::numeric_limits<double>::infinity();
  const auto colors = color_map(torch::tensor({-0.5, 1.5, infinity, -infinity, kNaN}).to(device_));
  const auto ends = color_map(torch::tensor({0.0, 1.0, 1.0, 0.0, 0.0}));
  EXPECT_TRUE(colors.equal(ends));
  EXPECT_EQ(color_map(torch::tensor(0.5f)).sizes(), (Sizes{3}));
  EXPECT_EQ(color_map(torch::zeros({0, 4})).sizes(), (Sizes{0, 4, 3}));
}

TEST_P(AttentionMapTest, ColoringThrowsOnIntegers) {
  EXPECT_EQ(error_of<c10::TypeError>([&] { color_map(torch::ones({2, 2}, torch::kLong)); }),
            "[color_map] map must be of a floating point type, but is int64.");
}

// ---- overlay_map ------------------------------------------------------------------------------------------------------------

TEST_P(AttentionMapTest, OpacityZeroAndAMapOfZerosReturnTheImage) {
  const auto image = torch::randint(256, {8, 12, 3}, torch::dtype(torch::kByte).device(device_));
  EXPECT_TRUE(overlay_map(image, weights({2, 3}), {.opacity = 0}).equal(image.cpu()));
  EXPECT_TRUE(overlay_map(image, torch::zeros({2, 3}, device_)).equal(image.cpu()));
  EXPECT_TRUE(overlay_map(image, torch::full({2, 3}, kNaN, device_)).equal(image.cpu()));
}

TEST_P(AttentionMapTest, OpacityOneShowsTheColorOfTheStrongestWeightAlone) {
  const auto image = torch::randint(256, {8, 12, 3}, torch::dtype(torch::kByte).device(device_));
  const auto picture = overlay_map(image, torch::full({2, 3}, 0.125, device_), {.opacity = 1});
  EXPECT_TRUE(picture.is_cpu());
  EXPECT_EQ(picture.scalar_type(), torch::kByte);
  EXPECT_TRUE(picture.equal(bytes({252, 255, 164}).expand({8, 12, 3})));
}

TEST_P(AttentionMapTest, AOneHotMapChangesItsCellAlone) {
  const auto image = torch::full({4, 6, 3}, 100, torch::dtype(torch::kByte).device(device_));
  auto map = torch::zeros({2, 3}, device_);
  map[1][2] = 0.3;
  const auto picture = overlay_map(image, map, {.opacity = 0.5, .interpolation = Interpolation::nearest});
  auto expected = image.cpu().clone();
  // Half way from (100, 100, 100) to (252, 255, 164); 177.5 is rounded to the even neighbour.
  expected.slice(0, 2, 4).slice(1, 4, 6).copy_(bytes({176, 178, 132}));
  EXPECT_TRUE(picture.equal(expected));
  const auto smooth = overlay_map(image, map, {.opacity = 0.5});
  EXPECT_TRUE(smooth[3][5].equal(bytes({176, 178, 132})));
  EXPECT_FALSE(smooth.equal(expected));
}

TEST_P(AttentionMapTest, AWeakerWeightIsMoreTransparentInProportion) {
  const auto image = torch::full({1, 2, 3}, 100, torch::dtype(torch::kByte).device(device_));
  const auto map = torch::tensor({{0.4f, 0.2f}}).to(device_);
  const auto picture = overlay_map(image, map, {.opacity = 0.8, .interpolation = Interpolation::nearest}).to(torch::kFloat);
  const auto color = color_map(torch::tensor(0.5f)).to(torch::kFloat);
  EXPECT_LE((picture[0][1] - (0.6 * 100 + 0.4 * color)).abs().max().item<float>(), 0.51);  // half of 0.8, and rounding
}

TEST_P(AttentionMapTest, MaximumIsTheWeightDrawnStrongest) {
  const auto image = torch::randint(256, {8, 12, 3}, torch::dtype(torch::kByte).device(device_));
  const auto map = weights({2, 3});
  const auto largest = map.max().item<double>();
  EXPECT_TRUE(overlay_map(image, map).equal(overlay_map(image, map, {.maximum = largest})));
  EXPECT_TRUE(overlay_map(image, map).equal(overlay_map(image, map * 0.5)));
  EXPECT_FALSE(overlay_map(image, map).equal(overlay_map(image, map * 0.5, {.maximum = largest})));
  EXPECT_TRUE(overlay_map(image, map.clamp_max(0.1), {.maximum = 0.1}).equal(overlay_map(image, map, {.maximum = 0.1})));
}

TEST_P(AttentionMapTest, OverlayThrowsOnBadInput) {
  const auto image = torch::zeros({8, 12, 3}, torch::kByte);
  const auto map = weights({2, 3});
  EXPECT_EQ(error_of<c10::TypeError>([&] { overlay_map(image.to(torch::kFloat), map); }),
            "[overlay_map] image must be uint8, but is float32.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { overlay_map(image.permute({2, 0, 1}), map); }),
            "[overlay_map] image must have shape [H, W, 3], but has [3, 8, 12].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { overlay_map(image.slice(0, 0, 0), map); }),
            "[overlay_map] image must have shape [H, W, 3], but has [0, 12, 3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { overlay_map(image, map.unsqueeze(0)); }),
            "[overlay_map] map must have shape [rows, columns], but has [1, 2, 3].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { overlay_map(image, map.to(torch::kInt)); }),
            "[overlay_map] map must be of a floating point type, but is int32.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { overlay_map(image, map, {.opacity = 1.5}); }),
            "[overlay_map] opacity must lie in [0, 1], but is 1.5.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { overlay_map(image, map, {.maximum = 0}); }),
            "[overlay_map] maximum must be above 0, but is 0.");
}

// ---- attention_entropy ------------------------------------------------------------------------------------------------------

TEST_P(AttentionMapTest, EntropyOfUniformWeightsIsLogN) {
  for (const int64_t n : {1, 2, 7, 64}) {
    const auto entropy = attention_entropy(torch::full({2, 3, n}, 1.0 / static_cast<double>(n), device_));
    EXPECT_EQ(entropy.sizes(), (Sizes{2, 3}));
    EXPECT_NEAR(entropy.min().item<double>(), std::log(n), 1e-6 * (1 + std::log(n)));
    EXPECT_NEAR(entropy.max().item<double>(), std::log(n), 1e-6 * (1 + std::log(n)));
  }
}

TEST_P(AttentionMapTest, EntropyOfOneKeyAndOfNoneIsZero) {
  const auto w = torch::tensor({{0.f, 1.f, 0.f}, {0.f, 0.f, 0.f}, {0.5f, 0.f, 0.5f}}).to(device_);
  const auto entropy = attention_entropy(w);
  EXPECT_EQ(entropy[0].item<float>(), 0);
  EXPECT_EQ(entropy[1].item<float>(), 0);
  EXPECT_NEAR(entropy[2].item<float>(), std::log(2), 1e-6);
  EXPECT_EQ(attention_entropy(torch::zeros({4, 0}, device_)).sum().item<float>(), 0);
}

TEST_P(AttentionMapTest, EntropyIsDifferentiableAndAWeightOfZeroPassesNoGradient) {
  const auto w = torch::tensor({0.0, 0.25, 0.75}, torch::dtype(torch::kDouble).device(device_)).requires_grad_();
  attention_entropy(w).backward();
  const auto expected = torch::tensor({0.0, -1 - std::log(0.25), -1 - std::log(0.75)}, torch::kDouble);
  expect_close(w.grad(), expected, 1e-12, "gradient");
}

TEST_P(AttentionMapTest, EntropyIsFloat32OrWiderAndStaysOnItsDevice) {
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    const auto w = weights({2, 3, 9}).to(type);
    const auto entropy = attention_entropy(w);
    EXPECT_EQ(entropy.scalar_type(), type == torch::kDouble ? torch::kDouble : torch::kFloat);
    EXPECT_EQ(entropy.device(), w.device());
    const auto exact = w.to(torch::kDouble);
    expect_close(entropy, -(exact * exact.log()).sum(-1), tolerance(torch::kFloat, 9), "entropy");
  }
}

TEST_P(AttentionMapTest, EntropyThrowsOnBadInput) {
  EXPECT_EQ(error_of<c10::TypeError>([&] { attention_entropy(torch::ones({2, 3}, torch::kLong)); }),
            "[attention_entropy] weights must be of a floating point type, but is int64.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { attention_entropy(torch::tensor(1.f)); }),
            "[attention_entropy] weights must have shape [..., Lk], but has [].");
}

INSTANTIATE_TEST_SUITE_P(Devices, AttentionMapTest, testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace xattn::test
