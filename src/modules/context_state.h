// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/context.h>

#include <string_view>

#include "modules/layer.h"
#include "modules/weights_stamp.h"

namespace xattn {

struct Context::State {
  detail::LayerContext parts;
  Mask mask;
  bool is_batched;
  detail::WeightsStamp made_from;
};

}  // namespace xattn
