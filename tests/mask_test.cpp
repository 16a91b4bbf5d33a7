// SPDX-License-Identifier: Apache-2.0
#include <xattn/mask.h>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "compare.h"
#include "test_util.h"

namespace xattn::test {
namespace {

// A boolean table from rows of 0 and 1.
torch::Tensor table(std::vector<std::vector<int>> rows) {
  auto result = torch::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.front().size())}, torch::kBool);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < rows[i].size(); ++j) result[i][j] = rows[i][j] != 0;
  }
  return result;
}

// What the mask says, as a full table [B, H, Lq, Lk].
torch::Tensor expanded(const Mask& mask, int64_t B, int64_t H, int64_t Lq, int64_t Lk) {
  return mask.keep(Lq, Lk, torch::kCPU).expand({B, H, Lq, Lk});
}

TEST(MaskTest, DefaultRestrictsNothing) {
  const Mask mask;
  EXPECT_TRUE(mask.is_none());
  EXPECT_FALSE(mask.keep(2, 3, torch::kCPU).defined());
  EXPECT_FALSE(mask.additive().defined());
  EXPECT_FALSE(mask.empty_rows(2, 3, torch::kCPU).defined());
}

TEST(MaskTest, KeyPaddingTrueMayAttend) {
  const auto valid = table({{1, 1, 0}, {1, 0, 0}});
  const auto keep = expanded(Mask::key_padding(valid), 2, 4, 5, 3);
  for (int64_t b = 0; b < 2; ++b) EXPECT_TRUE(keep[b].equal(valid[b].expand({4, 5, 3})));
}

TEST(MaskTest, LengthsKeepTheFirstKeys) {
  for (auto type : {torch::kLong, torch::kInt, torch::kByte}) {
    const auto mask = Mask::lengths(torch::tensor({2, 0, 3}).to(type), 3);
    EXPECT_TRUE(mask.keep(1, 3, torch::kCPU).view({3, 3}).equal(table({{1, 1, 0}, {0, 0, 0}, {1, 1, 1}})));
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
  EXPECT_TRUE(mask.keep(2, 4, torch::kCPU).view({2, 4}).equal(table({{1, 0, 0, 0}, {1, 1, 0, 0}})));
  EXPECT_TRUE(mask.keep(3, 2, torch::kCPU).view({3, 2}).equal(table({{1, 0}, {1, 1}, {1, 1}})));
}

TEST(MaskTest, CausalLowerRightEndsTogether) {
  const auto mask = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(mask.keep(2, 4, torch::kCPU).view({2, 4}).equal(table({{1, 1, 1, 0}, {1, 1, 1, 1}})));
  EXPECT_TRUE(mask.keep(3, 2, torch::kCPU).view({3, 2}).equal(table({{0, 0}, {1, 0}, {1, 1}})));
}

TEST(MaskTest, BothCausalAlignmentsTogetherKeepWhatBothAllow) {
  const auto upper = Mask::causal(CausalAlignment::upper_left), lower = Mask::causal(CausalAlignment::lower_right);
  for (const auto& [Lq, Lk] : {std::pair(2, 4), std::pair(4, 2), std::pair(3, 3)}) {
    EXPECT_TRUE(
        (upper & lower).keep(Lq, Lk, torch::kCPU).equal(upper.keep(Lq, Lk, torch::kCPU) & lower.keep(Lq, Lk, torch::kCPU)));
  }
}

TEST(MaskTest, AndKeepsWhatBothAllowAndAddsBiases) {
  const auto keep = torch::rand({4, 5}) > 0.3, valid = torch::rand({2, 5}) > 0.3;
  const auto a = torch::randn({4, 5}), b = torch::randn({2, 3, 1, 5});
  const auto mask = Mask::dense(keep) & Mask::bias(a) & Mask::key_padding(valid) & Mask::bias(b);
  EXPECT_TRUE(expanded(mask, 2, 3, 4, 5)[1][0].equal(keep & valid[1]));
  EXPECT_TRUE(mask.additive().equal(a + b));
}

TEST(MaskTest, BiasesAreAddedUpInTheTypeOfTheLogits) {
  const auto a = torch::randn({4, 5}).to(torch::kBFloat16), b = torch::randn({4, 5}).to(torch::kBFloat16);
  const auto mask = Mask::bias(a) & Mask::bias(b);
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    EXPECT_TRUE(mask.additive(type).equal((a.to(type) + b.to(type)).view({1, 1, 4, 5}))) << type;
  }
  EXPECT_EQ(mask.additive(torch::kBFloat16).scalar_type(), torch::kFloat);
  EXPECT_TRUE(mask.additive(torch::kBFloat16).equal(mask.additive(torch::kFloat)));
}

TEST(MaskTest, ABiasForbidsWhereItIsMinusInfinityInTheTypeOfTheLogits) {
  const auto mask = Mask::bias(torch::tensor({{std::numeric_limits<double>::lowest(), -1e9}, {-1e9, -1e9}}, torch::kDouble));
  const auto forbidden = [&](at::ScalarType type) { return mask.additive(type).isneginf().view({2, 2}); };
  const auto empty = [&](at::ScalarType type) { return mask.empty_rows(2, 2, torch::kCPU, type).view({2}); };
  EXPECT_TRUE(forbidden(torch::kDouble).equal(table({{0, 0}, {0, 0}})));
  EXPECT_TRUE(forbidden(torch::kFloat).equal(table({{1, 0}, {0, 0}})));
  EXPECT_TRUE(forbidden(torch::kHalf).equal(table({{1, 1}, {1, 1}})));
  EXPECT_TRUE(empty(torch::kFloat).equal(torch::tensor({false, false})));
  EXPECT_TRUE(empty(torch::kHalf).equal(torch::tensor({true, true})));
  EXPECT_TRUE(mask.empty_rows(2, 0, torch::kCPU).item<bool>());
}

TEST(MaskTest, RefusesSizesAndBatchesThatCannotBe) {
  const auto lengths = Mask::lengths(torch::tensor({2, 3}), 5), others = Mask::lengths(torch::tensor({1, 2, 3}), 5);
  const auto error = [](const auto& call) { return error_of<c10::ValueError>(call); };
  EXPECT_EQ(error([] { Mask::cat({}); }), "[mask] masks must be at least one, but are none.");
  EXPECT_EQ(error([&] { (lengths & others).needed_keys(5); }),
            "[mask] lengths must be of one batch size, but are of 2 and of 3.");
  EXPECT_EQ(error([&] { (others & lengths).host_lengths(); }),
            "[mask] lengths must be of one batch size, but are of 3 and of 2.");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, 3}}); }), "[mask] lengths must fit its batch of 3, but has shape [2, 1, 1, 5].");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, 2}, {Mask::lengths(torch::tensor({1}), 4), 1}}); }),
            "[mask] masks must be of one size to be put behind each other, but have shapes [2, 1, 1, 5] and [1, 1, 1, 4].");
  EXPECT_EQ(error([&] { Mask::cat({{lengths, -1}}); }), "[mask] a batch must not be negative, but is -1.");
  EXPECT_EQ(error([&] { lengths.shard(0, -1, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [0, 0 + -1).");
  EXPECT_EQ(error([&] { lengths.shard(-1, 2, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [-1, -1 + 2).");
  EXPECT_EQ(error([&] { lengths.shard(3, 3, 2, 5, torch::kCPU); }),
            "[mask] keys [first, first + n) must lie in [0, 5), but are [3, 3 + 3).");
  EXPECT_EQ(error([] { Mask::causal(CausalAlignment::upper_left).shard(0, 1, -2, 5, torch::kCPU); }),
            "[mask] Lq and Lk must not be negative, but are -2 and 5.");
  EXPECT_EQ(error([&] { lengths.first_keys(6); }), "[mask] Lk must lie in [0, 5], but is 6.");
  EXPECT_EQ(error([&] { lengths.slice(1, 3); }), "[mask] batch entries must lie in [0, 2), but are [1, 3).");
  EXPECT_EQ(error([&] { lengths.slice(1, 0); }), "[mask] batch entries must be [begin, end), but are [1, 0).");
}

TEST(MaskTest, MasksOfOneKindArePutBehindEachOther) {
  const auto one = Mask::bias(torch::randn({1, 2, 1, 5})), each = Mask::bias(torch::randn({2, 1, 4, 5}));
  const auto joined = Mask::cat({{one, 3}, {each, 2}});
  const auto all = torch::cat({one.additive().expand({3, 2, 4, 5}), each.additive().expand({2, 2, 4, 5})});
  EXPECT_TRUE(joined.additive().equal(all));
  const auto lengths = Mask::cat({{Mask::lengths(torch::tensor({2}), 5), 2}, {Mask::lengths(torch::tensor({0, 4}), 5), 2}});
  EXPECT_EQ(lengths.host_lengths(), (std::vector<int64_t>{2, 2, 0, 4}));
  EXPECT_EQ(Mask::lengths(at::_neg_view(torch::tensor({-2, -4})), 6).host_lengths(), (std::vector<int64_t>{2, 4}));
}

TEST(MaskTest, BroadcastsWithoutCopying) {
  const auto valid = torch::ones({2, 5}, torch::kBool);
  EXPECT_EQ(Mask::key_padding(valid).keep(1000, 5, torch::kCPU).data_ptr(), valid.data_ptr());
  const auto bias = torch::zeros({4, 5});
  EXPECT_EQ(Mask::bias(bias).additive().data_ptr(), bias.data_ptr());
}

TEST(MaskTest, FindsRowsWithoutKeys) {
  const auto lengths = Mask::lengths(torch::tensor({0, 2}), 3);
  EXPECT_TRUE(lengths.empty_rows(4, 3, torch::kCPU).view({2}).equal(torch::tensor({true, false})));
  const auto lower_right = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(lower_right.empty_rows(3, 2, torch::kCPU).view({3}).equal(torch::tensor({true, false, false})));
  EXPECT_FALSE(lower_right.empty_rows(2, 3, torch::kCPU).defined());
  const auto forbidding = Mask::bias(torch::tensor({{-kInfinity, 0.0}, {-kInfinity, -kInfinity}}));
  EXPECT_TRUE(forbidding.empty_rows(2, 2, torch::kCPU).view({2}).equal(torch::tensor({false, true})));
  const auto joined = forbidding & Mask::key_padding(torch::tensor({{true, false}}));
  EXPECT_TRUE(joined.empty_rows(2, 2, torch::kCPU).view({2}).equal(torch::tensor({true, true})));
}

TEST(MaskTest, FromMultiheadAttentionTurnsIgnoredIntoForbidden) {
  const auto ignored = table({{0, 0, 1}, {0, 1, 1}});
  const auto padding = Mask::from_multihead_attention(ignored, {}, 2);
  EXPECT_TRUE(expanded(padding, 2, 2, 1, 3).select(1, 0).squeeze(1).equal(~ignored));
  const auto attn_mask = torch::rand({4, 5, 3}) > 0.5;  // [B * H, Lq, Lk]
  const auto per_head = Mask::from_multihead_attention({}, attn_mask, 2);
  EXPECT_TRUE(expanded(per_head, 2, 2, 5, 3).equal(~attn_mask.view({2, 2, 5, 3})));
  const auto bias = torch::randn({5, 3});
  EXPECT_TRUE(Mask::from_multihead_attention({}, bias, 2).additive().view({5, 3}).equal(bias));
  EXPECT_TRUE(Mask::from_multihead_attention({}, {}, 2).is_none());
}

TEST(MaskTest, FromScaledDotProductAttentionKeepsTrueAndReadsThreeAxesAsHeads) {
  const auto keep = torch::rand({3, 4, 5}) > 0.5;
  EXPECT_TRUE(expanded(Mask::from_scaled_dot_product_attention(keep), 2, 3, 4, 5)[1].equal(keep));
  const auto bias = torch::randn({4, 5});
  EXPECT_TRUE(Mask::from_scaled_dot_product_attention(bias).additive().view({4, 5}).equal(bias));
  EXPECT_TRUE(Mask::from_scaled_dot_product_attention({}, true).is_causal_only(4, 4));
  EXPECT_TRUE(Mask::from_scaled_dot_product_attention({}).is_none());
}

TEST(MaskTest, FromAdditiveForbidsLargeNegativeNumbersAndKeepsTheRestAsBias) {
  const double least = std::numeric_limits<float>::lowest();
  const auto mask = Mask::from_additive(torch::tensor({{0.0, -1.5, -10000.0}, {least, -kInfinity, 2.0}}));
  EXPECT_TRUE(mask.keep(2, 3, torch::kCPU).view({2, 3}).equal(table({{1, 1, 0}, {0, 0, 1}})));
  EXPECT_TRUE(mask.additive().view({2, 3}).equal(torch::tensor({{0.0, -1.5, 0.0}, {0.0, 0.0, 2.0}})));
}

TEST(MaskTest, KnowsWhenAFlagSaysItAll) {
  const auto lower_right = Mask::causal(CausalAlignment::lower_right);
  EXPECT_TRUE(Mask::causal(CausalAlignment::upper_left).is_causal_only(2, 4));
  EXPECT_TRUE(lower_right.is_causal_only(3, 3));
  EXPECT_FALSE(lower_right.is_causal_only(2, 4));
  EXPECT_FALSE((lower_right & Mask::bias(torch::zeros({3, 3}))).is_causal_only(3, 3));
  EXPECT_FALSE(Mask().is_causal_only(3, 3));
}

TEST(MaskTest, RefusesWrongTypesByName) {
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
}

TEST(MaskTest, RefusesWrongShapesByName) {
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

TEST(MaskTest, HostLengthsSayWhichKeysNobodyNeeds) {
  const auto lengths = Mask::lengths(torch::tensor({2, 4}), 6);
  EXPECT_EQ(lengths.needed_keys(6), 4);
  EXPECT_EQ(Mask::lengths(torch::tensor({0, 0}), 6).needed_keys(6), 1);
  EXPECT_EQ(Mask().needed_keys(6), 6);
  EXPECT_EQ(Mask::lengths(torch::tensor({0, 0}), 0).needed_keys(0), 0);
  EXPECT_EQ(Mask::key_padding(torch::ones({2, 6}, torch::kBool)).needed_keys(6), 6);
  EXPECT_EQ((lengths & Mask::causal(CausalAlignment::upper_left)).needed_keys(6), 4);
  EXPECT_EQ((lengths & Mask::causal(CausalAlignment::lower_right)).needed_keys(6), 6);

  const auto both = lengths & Mask::bias(torch::randn({3, 6})) & Mask::causal(CausalAlignment::upper_left);
  EXPECT_TRUE(both.first_keys(4).keep(3, 4, torch::kCPU).equal(both.keep(3, 6, torch::kCPU).narrow(3, 0, 4)));
  EXPECT_TRUE(both.first_keys(4).additive().equal(both.additive().narrow(3, 0, 4)));
  EXPECT_TRUE(lengths.first_keys(2).is_none());  // all that are left are needed
}

TEST(MaskTest, CheckNamesThePartThatDoesNotFit) {
  const auto mask = Mask::causal(CausalAlignment::upper_left) & Mask::lengths(torch::tensor({1, 2}), 3);
  mask.check("caller", 2, 4, 5, 3, torch::kCPU);
  EXPECT_EQ(error_of<c10::ValueError>([&] { mask.check("caller", 2, 4, 5, 6, torch::kCPU); }),
            "[caller] mask (lengths) must fit [B, H, Lq, Lk] = [2, 4, 5, 6], but has [2, 1, 1, 3].");
  EXPECT_EQ(error_of<c10::ValueError>([&] { mask.check("caller", 3, 4, std::nullopt, 3, torch::kCPU); }),
            "[caller] mask (lengths) must fit [B, H, Lq, Lk] = [3, 4, Lq, 3], but has [2, 1, 1, 3].");
  EXPECT_EQ(error_of<c10::TypeError>([&] { mask.check("caller", 2, 4, 5, 3, torch::Device(torch::kCUDA, 0)); }),
            "[caller] mask (lengths) must be on cuda:0, as the inputs, but is on cpu.");
}

TEST(MaskTest, MovesBetweenDevices) {
  const auto mask = Mask::lengths(torch::tensor({1, 2}), 3) & Mask::bias(torch::randn({4, 3}));
  for (const auto& device : devices()) {
    const auto moved = mask.to(device);
    moved.check("caller", 2, 1, 4, 3, device);
    EXPECT_TRUE(moved.keep(4, 3, device).cpu().equal(mask.keep(4, 3, torch::kCPU)));
  }
}

}  // namespace
}  // namespace xattn::test
