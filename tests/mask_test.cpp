// SPDX-License-Identifier: Apache-2.0
#include <xattn/mask.h>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/attention.h>

#include <sstream>

#include "attention/mask_parts.h"
#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

using detail::allowed_keys;
using detail::check_mask;
using detail::first_keys;
using detail::host_lengths;
using detail::is_causal_only;
using detail::needed_keys;
using detail::rows_without_keys;
using detail::shard_of_keys;
using detail::total_bias;

std::string formatted_shape(const torch::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

// A boolean table from rows of 0 and 1.
torch::Tensor table(std::vector<std::vector<int>> rows) {
  auto result = torch::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.front().size())}, torch::kBool);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < rows[i].size(); ++j) result[i][j] = rows[i][j] != 0;
  }
  return result;
}

// The keys that the mask allows, as a full table [B, H, Lq, Lk].
torch::Tensor expanded(const Mask& mask, int64_t B, int64_t H, int64_t Lq, int64_t Lk) {
  return allowed_keys(mask, Lq, Lk, torch::kCPU).expand({B, H, Lq, Lk});
}

TEST(MaskTest, DefaultRestrictsNothing) {
  const Mask mask;
  EXPECT_TRUE(mask.is_none());
  EXPECT_FALSE(allowed_keys(mask, 2, 3, torch::kCPU).defined());
  EXPECT_FALSE(total_bias(mask, 3).defined());
  EXPECT_FALSE(rows_without_keys(mask, 2, 3, torch::kCPU).defined());
}

TEST(MaskTest, KeyPaddingTrueMayAttend) {
  const auto valid = table({{1, 1, 0}, {1, 0, 0}});
  const auto keep = expanded(Mask::key_padding(valid), 2, 4, 5, 3);
  for (int64_t b = 0; b < 2; ++b) EXPECT_TRUE(keep[b].equal(valid[b].expand({4, 5, 3})));
}

TEST(MaskTest, LengthsKeepTheFirstKeys) {
  for (auto type : {torch::kLong, torch::kInt, torch::kByte}) {
    const auto mask = Mask::lengths(torch::tensor({2, 0, 3}).to(type), 3);
    EXPECT_TRUE(allowed_keys(mask, 1, 3, torch::kCPU).view({3, 3}).equal(table({{1, 1, 0}, {0, 0, 0}, {1, 1, 1}})));
  }
}

TEST(MaskTest, DenseTakesTwoThreeAndFourAxes) {
  const auto two = torch::rand({4, 5}) > 0.5, three = torch::rand({2, 4, 5}) > 0.5, four = torch::rand({2, 3, 1, 5}) > 0.5;
  EXPECT_TRUE(expanded(Mask::dense(two), 2, 3, 4, 5)[1][2].equal(two));
  EXPECT_TRUE(expanded(Mask::dense(three), 2, 3, 4, 5)[1][2].equal(three[1]));
  EXPECT_TRUE(expanded(Mask::dense(four), 2, 3, 4, 5)[1][2].equal(four[1][2].expand({4, 5})));
}

TEST(MaskTest, CausalUpperLeftStartsTogether) {
  const auto mask = Mask::causal(CausalAlignment::upper_left);
  EXPECT_TRUE(allowed_keys(mask, 2, 4, torch::kCPU).view({2, 4}).equal(table({{1, 0, 0, 0}, {1, 1, 0, 0}})));
  EXPECT_TRUE(allowed_keys(mask, 3, 2, torch::kCPU).view({3, 2}).equal(table({{1, 0}, {1, 1}, {1, 1}})));
}

TEST(MaskTest, CausalLowerRightEndsTogether) {
  const auto mask = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(allowed_keys(mask, 2, 4, torch::kCPU).view({2, 4}).equal(table({{1, 1, 1, 0}, {1, 1, 1, 1}})));
  EXPECT_TRUE(allowed_keys(mask, 3, 2, torch::kCPU).view({3, 2}).equal(table({{0, 0}, {1, 0}, {1, 1}})));
}

TEST(MaskTest, BothCausalAlignmentsTogetherKeepWhatBothAllow) {
  const auto upper = Mask::causal(CausalAlignment::upper_left), lower = Mask::causal(CausalAlignment::lower_right);
  for (const auto& [Lq, Lk] : {std::pair(2, 4), std::pair(4, 2), std::pair(3, 3)}) {
    EXPECT_TRUE(allowed_keys(upper & lower, Lq, Lk, torch::kCPU)
                    .equal(allowed_keys(upper, Lq, Lk, torch::kCPU) & allowed_keys(lower, Lq, Lk, torch::kCPU)));
  }
}

TEST(MaskTest, AndKeepsWhatBothAllowAndAddsBiases) {
  const auto keep = torch::rand({4, 5}) > 0.3, valid = torch::rand({2, 5}) > 0.3;
  const auto a = torch::randn({4, 5}), b = torch::randn({2, 3, 1, 5});
  const auto mask = Mask::dense(keep) & Mask::bias(a) & Mask::key_padding(valid) & Mask::bias(b);
  EXPECT_TRUE(expanded(mask, 2, 3, 4, 5)[1][0].equal(keep & valid[1]));
  EXPECT_TRUE(total_bias(mask, 5).equal(a + b));
}

TEST(MaskTest, BiasesAreAddedUpInTheTypeOfTheLogits) {
  const auto a = torch::randn({4, 5}).to(torch::kBFloat16), b = torch::randn({4, 5}).to(torch::kBFloat16);
  const auto mask = Mask::bias(a) & Mask::bias(b);
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    EXPECT_TRUE(total_bias(mask, 5, type).equal((a.to(type) + b.to(type)).view({1, 1, 4, 5}))) << type;
  }
  EXPECT_EQ(total_bias(mask, 5, torch::kBFloat16).scalar_type(), torch::kFloat);
  EXPECT_TRUE(total_bias(mask, 5, torch::kBFloat16).equal(total_bias(mask, 5, torch::kFloat)));
}

TEST(MaskTest, ABiasForbidsWhereItIsMinusInfinityInTheTypeOfTheLogits) {
  const auto mask = Mask::bias(torch::tensor({{std::numeric_limits<double>::lowest(), -1e9}, {-1e9, -1e9}}, torch::kDouble));
  const auto forbidden = [&](at::ScalarType type) { return total_bias(mask, 2, type).isneginf().view({2, 2}); };
  const auto empty = [&](at::ScalarType type) { return rows_without_keys(mask, 2, 2, torch::kCPU, type).view({2}); };
  EXPECT_TRUE(forbidden(torch::kDouble).equal(table({{0, 0}, {0, 0}})));
  EXPECT_TRUE(forbidden(torch::kFloat).equal(table({{1, 0}, {0, 0}})));
  EXPECT_TRUE(forbidden(torch::kHalf).equal(table({{1, 1}, {1, 1}})));
  EXPECT_TRUE(empty(torch::kFloat).equal(torch::tensor({false, false})));
  EXPECT_TRUE(empty(torch::kHalf).equal(torch::tensor({true, true})));
  EXPECT_TRUE(rows_without_keys(mask, 2, 0, torch::kCPU).item<bool>());
}

TEST(MaskTest, ThrowsOnImpossibleSizesAndBatches) {
  const auto lengths = Mask::lengths(torch::tensor({2, 3}), 5), others = Mask::lengths(torch::tensor({1, 2, 3}), 5);
  const auto error = [](const auto& call) { return error_of<c10::ValueError>(call); };
  EXPECT_EQ(error([] { Mask::cat({}); }), "[mask] masks must be at least one, but are none.");
  EXPECT_EQ(error([&] { needed_keys(lengths & others, 5); }),
            "[mask] lengths must be of one batch size, but are of 2 and of 3.");
  EXPECT_EQ(error([&] { host_lengths(others & lengths); }), "[mask] lengths must be of one batch size, but are of 3 and of 2.");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, 3}}); }), "[mask] lengths must fit its batch of 3, but has shape [2, 1, 1, 5].");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, 2}, {Mask::lengths(torch::tensor({1}), 4), 1}}); }),
            "[mask] masks must be of one size to be concatenated, but have shapes [2, 1, 1, 5] and [1, 1, 1, 4].");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, -1}}); }), "[mask] a batch must not be negative, but is -1.");
  EXPECT_EQ(error([&] { shard_of_keys(lengths, 0, -1, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [0, 0 + -1).");
  EXPECT_EQ(error([&] { shard_of_keys(lengths, -1, 2, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [-1, -1 + 2).");
  EXPECT_EQ(error([&] { shard_of_keys(lengths, 3, 3, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [3, 3 + 3).");
  EXPECT_EQ(error([] { shard_of_keys(Mask::causal(CausalAlignment::upper_left), 0, 1, -2, 5, torch::kCPU); }),
            "[mask] Lq and Lk must not be negative, but are -2 and 5.");
  EXPECT_EQ(error([&] { first_keys(lengths, 6); }), "[mask] Lk must lie in [0, 5], but is 6.");
  EXPECT_EQ(error([&] { lengths.slice(1, 3); }), "[mask] batch entries must lie in [0, 2), but are [1, 3).");
  EXPECT_EQ(error([&] { lengths.slice(1, 0); }), "[mask] batch entries must be [begin, end), but are [1, 0).");
}

TEST(MaskTest, CatJoinsTheBatchesOfMasksThatWereBuiltAlike) {
  const auto one = Mask::bias(torch::randn({1, 2, 1, 5})), each = Mask::bias(torch::randn({2, 1, 4, 5}));
  const auto joined = Mask::cat({{one, 3}, {each, 2}});
  const auto all = torch::cat({total_bias(one, 5).expand({3, 2, 4, 5}), total_bias(each, 5).expand({2, 2, 4, 5})});
  EXPECT_TRUE(total_bias(joined, 5).equal(all));
  const auto lengths = Mask::cat({{Mask::lengths(torch::tensor({2}), 5), 2}, {Mask::lengths(torch::tensor({0, 4}), 5), 2}});
  EXPECT_EQ(host_lengths(lengths), (std::vector<int64_t>{2, 2, 0, 4}));
  EXPECT_EQ(host_lengths(Mask::lengths(at::_neg_view(torch::tensor({-2, -4})), 6)), (std::vector<int64_t>{2, 4}));
}

TEST(MaskTest, CatIgnoresTheOrderInWhichPartsWereCombined) {
  const auto causal = Mask::causal(CausalAlignment::upper_left), bias = Mask::bias(torch::randn({1, 5}));
  const auto lengths = Mask::lengths(torch::tensor({2}), 5);
  const auto joined = Mask::cat({{causal & lengths & bias & causal, 1}, {bias & causal & lengths, 1}});
  EXPECT_TRUE(allowed_keys(joined, 3, 5, torch::kCPU)[1].equal(allowed_keys(causal & lengths, 3, 5, torch::kCPU)[0]));
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::cat({{causal & bias, 1}, {bias, 1}}); }),
            "[mask] masks must be built alike to be concatenated, but are of bias and causal, upper left and bias.");
}

TEST(MaskTest, BroadcastsWithoutCopying) {
  const auto valid = torch::ones({2, 5}, torch::kBool);
  EXPECT_EQ(allowed_keys(Mask::key_padding(valid), 1000, 5, torch::kCPU).data_ptr(), valid.data_ptr());
  const auto bias = torch::zeros({4, 5});
  EXPECT_EQ(total_bias(Mask::bias(bias), 5).data_ptr(), bias.data_ptr());
}

TEST(MaskTest, FindsRowsWithoutKeys) {
  const auto lengths = Mask::lengths(torch::tensor({0, 2}), 3);
  EXPECT_TRUE(rows_without_keys(lengths, 4, 3, torch::kCPU).view({2}).equal(torch::tensor({true, false})));
  const auto lower_right = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(rows_without_keys(lower_right, 3, 2, torch::kCPU).view({3}).equal(torch::tensor({true, false, false})));
  EXPECT_FALSE(rows_without_keys(lower_right, 2, 3, torch::kCPU).defined());
  const auto forbidding = Mask::bias(torch::tensor({{-kInfinity, 0.0}, {-kInfinity, -kInfinity}}));
  EXPECT_TRUE(rows_without_keys(forbidding, 2, 2, torch::kCPU).view({2}).equal(torch::tensor({false, true})));
  const auto joined = forbidding & Mask::key_padding(torch::tensor({{true, false}}));
  EXPECT_TRUE(rows_without_keys(joined, 2, 2, torch::kCPU).view({2}).equal(torch::tensor({true, true})));
}

TEST(MaskTest, FromMultiheadAttentionTurnsIgnoredIntoForbidden) {
  const auto ignored = table({{0, 0, 1}, {0, 1, 1}});
  const auto padding = Mask::from_multihead_attention(ignored, {}, 2);
  EXPECT_TRUE(expanded(padding, 2, 2, 1, 3).select(1, 0).squeeze(1).equal(~ignored));
  const auto attn_mask = torch::rand({4, 5, 3}) > 0.5;  // [B * H, Lq, Lk]
  const auto per_head = Mask::from_multihead_attention({}, attn_mask, 2);
  EXPECT_TRUE(expanded(per_head, 2, 2, 5, 3).equal(~attn_mask.view({2, 2, 5, 3})));
  const auto bias = torch::randn({5, 3});
  EXPECT_TRUE(total_bias(Mask::from_multihead_attention({}, bias, 2), 3).view({5, 3}).equal(bias));
  EXPECT_TRUE(Mask::from_multihead_attention({}, {}, 2).is_none());
}

TEST(MaskTest, FromScaledDotProductAttentionKeepsTrueAndReadsThreeAxesAsHeads) {
  const auto keep = torch::rand({3, 4, 5}) > 0.5;
  EXPECT_TRUE(expanded(Mask::from_scaled_dot_product_attention(keep), 2, 3, 4, 5)[1].equal(keep));
  const auto bias = torch::randn({4, 5});
  EXPECT_TRUE(total_bias(Mask::from_scaled_dot_product_attention(bias), 5).view({4, 5}).equal(bias));
  EXPECT_TRUE(is_causal_only(Mask::from_scaled_dot_product_attention({}, true), 4, 4));
  EXPECT_TRUE(Mask::from_scaled_dot_product_attention({}).is_none());
}

// Every number of axes that torch's function takes, and a last axis that stands for all keys.
TEST(MaskTest, FromScaledDotProductAttentionBroadcastsAsTorchDoesOverTheKeysToo) {
  const int64_t B = 2, H = 3, Lq = 4, Lk = 5;
  const auto q = torch::randn({B, H, Lq, 8}), k = torch::randn({B, H, Lk, 8}), v = torch::randn({B, H, Lk, 6});
  const std::vector<std::vector<int64_t>> shapes = {
      {B, H, Lq, 1}, {1, H, 1, 1}, {B, 1, 1, 1}, {1, 1, 1, 1}, {H, Lq, 1}, {Lq, 1}, {1, 1}, {1}, {}, {Lk}, {1, Lk}, {H, 1, Lk}};
  for (const auto& shape : shapes) {
    for (const bool is_bias : {false, true}) {
      const auto given = is_bias ? torch::randn(shape).requires_grad_() : torch::rand(shape) > 0.3;
      const auto dense = given.detach().expand({B, H, Lq, Lk}).contiguous();
      const auto mask = Mask::from_scaled_dot_product_attention(given), full = Mask::from_scaled_dot_product_attention(dense);
      const auto trace = formatted_shape(given);
      for (const auto path : {AttentionPath::automatic, AttentionPath::definition}) {
        const AttentionOptions options{.mask = mask, .weights = AttentionWeights::per_head, .log_sum_exp = true, .path = path};
        auto of_full = options;
        of_full.mask = full;
        const auto result = attention(q, k, v, options), expected = attention(q, k, v, of_full);
        expect_close(result.output, expected.output, 1e-6, trace);
        expect_close(result.weights, expected.weights, 1e-6, trace);
        const auto rows = expected.log_sum_exp.isfinite();
        EXPECT_TRUE(result.log_sum_exp.isfinite().equal(rows)) << trace;
        expect_close(result.log_sum_exp.masked_select(rows), expected.log_sum_exp.masked_select(rows), 1e-6, trace);
      }
      const auto allowed = allowed_keys(mask, Lq, Lk, torch::kCPU);
      const auto theirs = torch::scaled_dot_product_attention(q, k, v, given.detach().expand({B, H, Lq, Lk}));
      const auto has_key = is_bias ? torch::ones({1, 1, 1, 1}, torch::kBool) : allowed.any(-1, true);
      expect_close(attention(q, k, v, {.mask = mask}).output * has_key, theirs.nan_to_num(0) * has_key, 1e-5, trace);
      if (!is_bias) continue;
      const auto loss = attention(q, k, v, {.mask = mask, .log_sum_exp = true}).log_sum_exp.sum();
      EXPECT_EQ(torch::autograd::grad({loss}, {given})[0].sizes(), given.sizes()) << trace;
    }
  }
}

TEST(MaskTest, AnAxisForAllKeysStaysOneInContextsOfEveryLength) {
  const auto keep = torch::tensor({true, false}).view({2, 1, 1, 1});
  const auto rows = Mask::from_scaled_dot_product_attention(keep);
  const auto bias = Mask::from_scaled_dot_product_attention(torch::randn({2, 1, 1, 1}));
  for (const int64_t Lk : {0, 1, 3}) EXPECT_TRUE(allowed_keys(rows, 4, Lk, torch::kCPU).equal(keep.expand({2, 1, 1, Lk})));
  EXPECT_TRUE(allowed_keys(first_keys(rows, 7), 4, 7, torch::kCPU).equal(keep.expand({2, 1, 1, 7})));
  EXPECT_TRUE(allowed_keys(shard_of_keys(rows, 3, 2, 4, 9, torch::kCPU), 4, 2, torch::kCPU).equal(keep.expand({2, 1, 1, 2})));
  EXPECT_TRUE(allowed_keys(rows.slice(1, 2), 4, 3, torch::kCPU).equal(keep.slice(0, 1).expand({1, 1, 1, 3})));
  EXPECT_TRUE(
      allowed_keys(Mask::cat({{rows, 2}, {rows, 2}}), 4, 3, torch::kCPU).equal(torch::cat({keep, keep}).expand({4, 1, 1, 3})));
  const auto longer = detail::with_bias_kv(rows & bias, 4, 3, torch::kCPU);
  EXPECT_TRUE(allowed_keys(longer, 4, 4, torch::kCPU)
                  .equal(torch::cat({keep.expand({2, 1, 1, 3}), torch::ones({2, 1, 1, 1}, torch::kBool)}, 3)));
  EXPECT_TRUE(total_bias(longer, 4).select(3, 3).equal(torch::zeros({2, 1, 1})));
  const auto joined = detail::join_keys({{rows & bias, 3}, {Mask(), 2}});
  EXPECT_TRUE(allowed_keys(joined, 4, 5, torch::kCPU)
                  .equal(torch::cat({keep.expand({2, 1, 1, 3}), torch::ones({2, 1, 1, 2}, torch::kBool)}, 3)));
  EXPECT_TRUE(total_bias(joined, 5).equal(torch::cat({total_bias(bias, 3), torch::zeros({2, 1, 1, 2})}, 3)));
  EXPECT_EQ(error_of<c10::ValueError>([&] { check_mask(Mask::dense(keep), "attention", 2, 3, 4, 5, torch::kCPU); }),
            "[attention] mask (dense) must fit [B, H, Lq, Lk] = [2, 3, 4, 5], but has [2, 1, 1, 1].");  // as mask.h says
}

TEST(MaskTest, FromAdditiveForbidsLargeNegativeNumbersAndKeepsTheRestAsBias) {
  const double least = std::numeric_limits<float>::lowest();
  const auto mask = Mask::from_additive(torch::tensor({{0.0, -1.5, -10000.0}, {least, -kInfinity, 2.0}}));
  EXPECT_TRUE(allowed_keys(mask, 2, 3, torch::kCPU).view({2, 3}).equal(table({{1, 1, 0}, {0, 0, 1}})));
  EXPECT_TRUE(total_bias(mask, 3).view({2, 3}).equal(torch::tensor({{0.0, -1.5, 0.0}, {0.0, 0.0, 2.0}})));
}

TEST(MaskTest, FromAdditiveDoesNotHideNaN) {
  const auto keep = torch::tensor({{1.0f, 0.0f}});
  const auto mask = Mask::from_additive((1 - keep) * -kInfinity);  // a common mistake: 0 times infinity
  const auto x = torch::randn({1, 1, 1, 4}), k = torch::randn({1, 1, 2, 4});
  EXPECT_TRUE(attention(x, k, k, {.mask = mask}).output.isnan().all().item<bool>());
}

TEST(MaskTest, IsCausalOnlyWhereAFlagOfTheKernelExpressesIt) {
  const auto lower_right = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(is_causal_only(Mask::causal(CausalAlignment::upper_left), 2, 4));
  EXPECT_TRUE(is_causal_only(lower_right, 3, 3));
  EXPECT_FALSE(is_causal_only(lower_right, 2, 4));
  EXPECT_FALSE(is_causal_only(lower_right & Mask::bias(torch::zeros({3, 3})), 3, 3));
  EXPECT_FALSE(is_causal_only(Mask(), 3, 3));
}

TEST(MaskTest, ErrorsNameAnArgumentOfAWrongType) {
  const auto floats = torch::zeros({2, 3}), bools = torch::zeros({2, 3}, torch::kBool);
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::key_padding(floats); }),
            "[mask] key_padding must be bool, true = may attend, but is float32.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::dense(floats); }),
            "[mask] dense must be bool, true = may attend, but is float32.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::dense({}); }),
            "[mask] dense must be bool, true = may attend, but is undefined.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::bias(bools); }), "[mask] bias must be of a floating point type, but is bool.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_additive(bools); }),
            "[mask] from_additive must be of a floating point type, but is bool.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::lengths(floats[0], 3); }),
            "[mask] lengths must be of an integer type, but is float32.");
  const auto bytes = torch::zeros({2, 3}, torch::kByte);
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_multihead_attention(bytes, {}, 1); }),
            "[mask] key_padding_mask must be bool or of a floating point type, but is uint8.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_multihead_attention({}, bytes, 1); }),
            "[mask] attn_mask must be bool or of a floating point type, but is uint8.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_scaled_dot_product_attention(bytes); }),
            "[mask] attn_mask must be bool or of a floating point type, but is uint8.");
}

TEST(MaskTest, ErrorsNameAnArgumentThatIsNotDense) {
  const auto floats = torch::zeros({2, 3}).to_sparse(), bools = torch::zeros({2, 3}, torch::kBool).to_sparse();
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::key_padding(bools); }), "[mask] key_padding must be dense, but is sparse.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::dense(bools); }), "[mask] dense must be dense, but is sparse.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::bias(floats); }), "[mask] bias must be dense, but is sparse.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_additive(floats); }),
            "[mask] from_additive must be dense, but is sparse.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::lengths(torch::ones({2}, torch::kLong).to_sparse(), 3); }),
            "[mask] lengths must be dense, but is sparse.");
  EXPECT_EQ(error_of<c10::TypeError>([&] { Mask::from_multihead_attention(bools, {}, 1); }),
            "[mask] key_padding_mask must be dense, but is sparse.");
}

TEST(MaskTest, AnSdpaMaskMayLeaveOutAnyLeadingAxes) {
  const auto keep = torch::rand({2, 4, 3, 5}) < 0.5;
  for (const auto& given : {keep[0][0][0], keep[0][0], keep[0], keep}) {
    const auto mask = Mask::from_scaled_dot_product_attention(given);
    EXPECT_TRUE(allowed_keys(mask, 3, 5, torch::kCPU).expand({2, 4, 3, 5}).equal(given.expand({2, 4, 3, 5}))) << given.sizes();
  }
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::from_scaled_dot_product_attention(keep.unsqueeze(0)); }),
            "[mask] attn_mask must have shape [B|1, H|1, Lq|1, Lk|1] or leave out leading axes, but has [1, 2, 4, 3, 5].");
}

TEST(MaskTest, ErrorsNameAnArgumentOfAWrongShape) {
  const auto flat = torch::zeros({3}, torch::kBool), square = torch::zeros({3, 3}, torch::kBool);
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::key_padding(flat); }),
            "[mask] key_padding must have shape [B, Lk], but has [3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::dense(flat); }),
            "[mask] dense must have shape [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk], but has [3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::bias(torch::zeros({1, 1, 1, 1, 1})); }),
            "[mask] bias must have shape [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk], but has [1, 1, 1, 1, 1].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::lengths(torch::ones({2, 2}, torch::kLong), 3); }),
            "[mask] lengths must have shape [B], but has [2, 2].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::lengths(torch::tensor({2, 4}), 3); }),
            "[mask] lengths must lie in [0, 3], but hold 4.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::lengths(torch::tensor({-1, 2}), 3); }),
            "[mask] lengths must lie in [0, 3], but hold -1.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::lengths(torch::tensor({0}), -2); }),
            "[mask] Lk must not be negative, but is -2.");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::from_multihead_attention(flat, {}, 2); }),
            "[mask] key_padding_mask must have shape [B, Lk], but has [3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::from_multihead_attention({}, square.unsqueeze(0), 2); }),
            "[mask] attn_mask must have shape [Lq, Lk] or [B * 2, Lq, Lk], but has [1, 3, 3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { Mask::from_multihead_attention(square, {}, 0); }),
            "[mask] num_heads must be at least 1, but is 0.");
}

TEST(MaskTest, KeysBehindAllHostLengthsAreNotNeeded) {
  const auto lengths = Mask::lengths(torch::tensor({2, 4}), 6);
  EXPECT_EQ(needed_keys(lengths, 6), 4);
  EXPECT_EQ(needed_keys(Mask::lengths(torch::tensor({0, 0}), 6), 6), 1);
  EXPECT_EQ(needed_keys(Mask(), 6), 6);
  EXPECT_EQ(needed_keys(Mask::lengths(torch::tensor({0, 0}), 0), 0), 0);
  EXPECT_EQ(needed_keys(Mask::key_padding(torch::ones({2, 6}, torch::kBool)), 6), 6);
  EXPECT_EQ(needed_keys(lengths & Mask::causal(CausalAlignment::upper_left), 6), 4);
  EXPECT_EQ(needed_keys(lengths & Mask::causal(CausalAlignment::lower_right), 6), 6);

  const auto both = lengths & Mask::bias(torch::randn({3, 6})) & Mask::causal(CausalAlignment::upper_left);
  EXPECT_TRUE(
      allowed_keys(first_keys(both, 4), 3, 4, torch::kCPU).equal(allowed_keys(both, 3, 6, torch::kCPU).narrow(3, 0, 4)));
  EXPECT_TRUE(total_bias(first_keys(both, 4), 4).equal(total_bias(both, 6).narrow(3, 0, 4)));
  EXPECT_TRUE(first_keys(lengths, 2).is_none());  // all remaining keys are needed
}

TEST(MaskTest, CheckNamesThePartThatDoesNotFit) {
  const auto mask = Mask::causal(CausalAlignment::upper_left) & Mask::lengths(torch::tensor({1, 2}), 3);
  check_mask(mask, "caller", 2, 4, 5, 3, torch::kCPU);
  EXPECT_EQ(error_of<c10::ValueError>([&] { check_mask(mask, "caller", 2, 4, 5, 6, torch::kCPU); }),
            "[caller] mask (lengths) must fit [B, H, Lq, Lk] = [2, 4, 5, 6], but has [2, 1, 1, 3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { check_mask(mask, "caller", 3, 4, std::nullopt, 3, torch::kCPU); }),
            "[caller] mask (lengths) must fit [B, H, Lq, Lk] = [3, 4, Lq, 3], but has [2, 1, 1, 3].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { check_mask(mask, "caller", 2, 4, 5, 3, torch::Device(torch::kCUDA, 0)); }),
            "[caller] mask (lengths) must be on cuda:0, as the inputs, but is on cpu.");
}

TEST(MaskTest, MovesBetweenDevices) {
  const auto mask = Mask::lengths(torch::tensor({1, 2}), 3) & Mask::bias(torch::randn({4, 3}));
  for (const auto& device : devices()) {
    const auto moved = mask.to(device);
    check_mask(moved, "caller", 2, 1, 4, 3, device);
    EXPECT_TRUE(allowed_keys(moved, 4, 3, device).cpu().equal(allowed_keys(mask, 4, 3, torch::kCPU)));
  }
}

}  // namespace
}  // namespace xattn::test
