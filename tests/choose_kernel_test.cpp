// SPDX-License-Identifier: Apache-2.0
#include "attention/choose_kernel.h"

#include <gtest/gtest.h>

namespace xattn::test {
namespace {

using detail::choose_kernel;
using detail::KernelRequest;

TEST(ChooseKernelTest, RunsOwnKernelsForFloat32OnTheCpu) {
  KernelRequest r{.own_kernels = true};
  EXPECT_EQ(choose_kernel(r).kernel, AttentionKernel::heads);
  r.returns_weights = r.returns_log_sum_exp = r.mask_is_learned = true;
  r.equal_head_sizes = false;
  EXPECT_EQ(choose_kernel(r).kernel, AttentionKernel::heads) << "without gradients they return everything";
  r.is_differentiated = true;
  EXPECT_EQ(choose_kernel(r).kernel, AttentionKernel::tensor_operations);
  EXPECT_EQ(choose_kernel(r).reason, "weights and gradients are requested");
  r.returns_weights = false;
  EXPECT_EQ(choose_kernel(r).reason, "the mask's bias requires a gradient");
  r.mask_is_learned = false;
  EXPECT_EQ(choose_kernel(r).kernel, AttentionKernel::heads);
}

TEST(ChooseKernelTest, RunsTheDefinitionForDropoutAndEmptyInputsOnAllDevices) {
  for (const bool own : {false, true}) {
    for (const bool on_cpu : {false, true}) {
      KernelRequest r{.own_kernels = own, .on_cpu = own || on_cpu, .drops_weights = true};
      EXPECT_EQ(choose_kernel(r).kernel, AttentionKernel::tensor_operations);
      EXPECT_EQ(choose_kernel(r).reason, "dropout is above 0");
      r.drops_weights = false;
      r.is_empty = true;
      EXPECT_EQ(choose_kernel(r).reason, "an axis is empty");
    }
  }
}

TEST(ChooseKernelTest, RunsLibTorchsKernelElsewhereUnlessItCannotReturnAllThatIsWanted) {
  KernelRequest cpu, other{.on_cpu = false};
  EXPECT_EQ(choose_kernel(cpu).kernel, AttentionKernel::fused_cpu);
  EXPECT_EQ(choose_kernel(other).kernel, AttentionKernel::scaled_dot_product_attention);
  cpu.returns_log_sum_exp = other.returns_log_sum_exp = true;
  EXPECT_EQ(choose_kernel(cpu).kernel, AttentionKernel::fused_cpu);
  EXPECT_EQ(choose_kernel(other).kernel, AttentionKernel::tensor_operations);
  other.returns_log_sum_exp = false;
  cpu.equal_head_sizes = other.equal_head_sizes = false;
  EXPECT_EQ(choose_kernel(cpu).kernel, AttentionKernel::tensor_operations);
  EXPECT_EQ(choose_kernel(other).kernel, AttentionKernel::scaled_dot_product_attention);
  other.returns_weights = true;
  EXPECT_EQ(choose_kernel(other).reason, "attention weights are requested");
}

TEST(ChooseKernelTest, ReadsALongContextInPartsUnlessWeightsAreReturned) {
  EXPECT_EQ(detail::own_kernel(4096, false), AttentionKernel::heads);
  EXPECT_EQ(detail::own_kernel(4097, false), AttentionKernel::heads_in_parts);
  EXPECT_EQ(detail::own_kernel(4097, true), AttentionKernel::heads);
  EXPECT_EQ(choose_kernel({.own_kernels = true, .Lk = 5000}).kernel, AttentionKernel::heads_in_parts);
  EXPECT_TRUE(detail::is_fused(AttentionKernel::heads_in_parts));
  EXPECT_FALSE(detail::is_fused(AttentionKernel::chain));
}

TEST(ChooseKernelTest, NamesAreThoseOfTheEnumerators) {
  EXPECT_EQ(name_of(AttentionKernel::tensor_operations), "tensor_operations");
  EXPECT_EQ(name_of(AttentionKernel::chain), "chain");
  EXPECT_EQ(name_of(AttentionKernel::scaled_dot_product_attention), "scaled_dot_product_attention");
}

}  // namespace
}  // namespace xattn::test
