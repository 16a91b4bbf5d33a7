// SPDX-License-Identifier: Apache-2.0
#pragma once

// The whole library. Start reading with cross_attention.h.
#include <xattn/attention.h>
#include <xattn/attention_kernel.h>
#include <xattn/attention_map.h>
#include <xattn/block.h>
#include <xattn/block_options.h>
#include <xattn/call_options.h>
#include <xattn/checkpoint.h>
#include <xattn/context.h>
#include <xattn/cross_attention.h>
#include <xattn/cross_attention_options.h>
#include <xattn/decoupled.h>
#include <xattn/file_error.h>
#include <xattn/find_blocks.h>
#include <xattn/find_layers.h>
#include <xattn/frozen.h>
#include <xattn/frozen_block.h>
#include <xattn/frozen_decoupled.h>
#include <xattn/frozen_linear.h>
#include <xattn/ip_adapter.h>
#include <xattn/layout.h>
#include <xattn/load.h>
#include <xattn/load_modules.h>
#include <xattn/load_stacks.h>
#include <xattn/mask.h>
#include <xattn/multihead_attention.h>
#include <xattn/norm.h>
#include <xattn/norm_options.h>
#include <xattn/plan.h>
#include <xattn/safetensors.h>
#include <xattn/stacks.h>
#include <xattn/state_dict.h>
#include <xattn/version.h>

#ifndef XATTN_NO_DISTRIBUTED
#include <xattn/distributed.h>
#endif
