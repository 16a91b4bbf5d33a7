// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// A page that shows how a model has learned, and its attention map for every word. All texts are UTF-8; none is read as HTML.
namespace examples {

/// A quantity over the training, such as the loss: values[i] at steps[i], in growing order. NaN leaves a gap.
struct Curve {
  std::string name;
  std::vector<double> steps;
  std::vector<double> values;
};

/// How many answers of one kind were right.
struct Rate {
  std::string name;
  int64_t right;
  int64_t total;

  double share() const { return static_cast<double>(right) / static_cast<double>(total); }
};

/// Counts of the given answers by the true ones. Left out of the page if there are no labels.
struct Confusion {
  std::vector<std::string> labels;
  torch::Tensor counts;  ///< int64 [N, N], rows the truth, columns the answer
};

/// A word with its attention map, float [rows, columns]: the share of the attention on each part of the picture. The map covers
/// the picture evenly.
struct Word {
  std::string text;
  torch::Tensor map;  ///< undefined if the word has none, as a comma may
};

/// One answer of the model: an answered question, or a sentence about a picture.
struct Example {
  bool right;
  std::string title;
  std::string answer = {};       ///< left out of the page if empty, as for a sentence, whose words are the answer
  std::string truth = {};        ///< likewise
  torch::Tensor picture;         ///< uint8 [height, width, 3]
  std::vector<Word> words = {};  ///< of the question, or of the sentence
  torch::Tensor map = {};        ///< of the whole answer, shown while the pointer is on no word; may be undefined
};

/// Empty parts are left out of the page.
struct Report {
  std::string title;
  std::string summary;
  std::vector<std::pair<std::string, std::string>> facts = {};  ///< name and value: the number of steps, the seed
  std::vector<Curve> curves = {};
  std::vector<Rate> rates = {};
  Confusion confusion = {};
  std::vector<Example> examples = {};  ///< in any order: the page shows wrong ones first
};

/// Writes one HTML page that needs no other file and no network. Pointing at a word shows its map over the picture. The same
/// report gives the same bytes. The file is written by `write_file`.
/// Throws c10::ValueError, naming the fault, if a tensor is not as described above or a curve has not as many steps as values;
/// std::runtime_error, naming the file, if it cannot be written.
void write_report(const std::string& path, const Report& report);

}  // namespace examples
