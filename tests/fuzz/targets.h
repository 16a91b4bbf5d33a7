// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <string_view>

#include "files/mapped_file.h"

// Run readers on arbitrary bytes. A reader must return tensors or throw FileError; anything else is a bug, and so is a tensor that
// differs from its description. libFuzzer makes up the inputs (scripts/fuzz.sh), and fuzz_test.cpp runs those kept in
// tests/data/fuzz.
namespace xattn::test {

void fuzz_file(detail::Bytes file);    ///< a file in memory, of any format
void fuzz_pickle(detail::Bytes file);  ///< data.pkl, in an archive with storages; as a state dict and as TorchScript
void fuzz_json(detail::Bytes text);    ///< a document; the index of a sharded set; the config of an archive of torch.export
/// A folder: each of its files is "\n=== NAME\n" and the bytes, and "NAME/" is a folder.
void fuzz_folder(detail::Bytes files);

struct FuzzTarget {
  std::string_view name;
  void (*run)(detail::Bytes input);
};

// The formats of files have targets of their own, so that each has its share of the time and its own inputs.
inline constexpr std::array kFuzzTargets{
    FuzzTarget{"safetensors", fuzz_file}, FuzzTarget{"zip", fuzz_file},  FuzzTarget{"legacy", fuzz_file},
    FuzzTarget{"pickle", fuzz_pickle},    FuzzTarget{"json", fuzz_json}, FuzzTarget{"folder", fuzz_folder},
};

}  // namespace xattn::test
