// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/block_options.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

enum class BlockKind { decoupled, block, linear };

/// One row of blocks.json, which describes its fields. The file is embedded into the program.
struct BlockRow {
  std::string name;
  BlockKind kind = BlockKind::block;
  bool kept = false, self = false;
  int64_t layers = 1;
  int64_t B = 1, Lq = 1, Lk = 1, image = 0;
  xattn::CrossAttentionBlockOptions block;  ///< other rows have its attention alone, of which a linear one uses two sizes
};

/// The row of this name or, if there is none, the rows whose names contain `text`; all rows for an empty text.
std::vector<BlockRow> block_rows(std::string_view text);

}  // namespace bench
