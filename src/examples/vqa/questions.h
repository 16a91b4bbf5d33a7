// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>

namespace vqa {

/// Different words that the questions are made of, and one more: word 0 is padding, at the end of the shorter questions.
int64_t vocabulary_size();

/// Every question that can be asked, as words: int64 [9 cells, 4 phrases, 5 words]. Cells are counted row by row.
const torch::Tensor& question_words();

/// The question as text. words: int64 [5].
std::string question_text(const torch::Tensor& words);

}  // namespace vqa
