// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>
#include <torch/nn/module.h>

namespace xattn::test {

/// A device that stands in for a GPU on machines without one: LibTorch's PrivateUse1. The host must not touch its memory, and
/// the process dies with SIGSEGV if it does: the pages are protected, and opened only while an operator runs on them, which
/// LibTorch's CPU kernels compute. As on CUDA, an operator throws if it is given a tensor on the CPU beside one on the device,
/// unless it has no axes.
///
/// Registered by the first call; for a program of its own, because a process has one PrivateUse1.
c10::Device standin();

/// Moves a module there, as its `to` cannot: LibTorch replaces the data of a parameter only between devices that it knows.
void move_to_standin(torch::nn::Module& module);

/// While it lives, whatever would make a program wait for a GPU throws c10::Error: copies between the device and the CPU, and
/// operators whose result depends on values (`item`, `nonzero`, an index by a boolean mask, ...).
class NoWaiting {
 public:
  NoWaiting();
  ~NoWaiting();
  NoWaiting(const NoWaiting&) = delete;
  NoWaiting& operator=(const NoWaiting&) = delete;
};

}  // namespace xattn::test
