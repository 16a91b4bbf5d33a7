// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <string_view>

#include "files/mapped_file.h"

// Run readers on arbitrary bytes. A reader must return tensors or throw FileError; anything else is a bug. libFuzzer makes up
// the inputs (scripts/fuzz.sh), and fuzz_test.cpp runs those kept in tests/data/fuzz.
namespace xattn::test {

void fuzz_safetensors(detail::Bytes file);
void fuzz_zip(detail::Bytes file);     ///< an archive, by the reader that matches its entries
void fuzz_pickle(detail::Bytes file);  ///< data.pkl, in an archive with storages; as a state dict and as TorchScript
void fuzz_legacy(detail::Bytes file);  ///< a file of torch.save from before PyTorch 1.6
void fuzz_json(detail::Bytes file);    ///< the config of an archive of torch.export, with weights; the index of a sharded set

struct FuzzTarget {
  std::string_view name;
  void (*run)(detail::Bytes file);
};

inline constexpr std::array kFuzzTargets{
    FuzzTarget{"safetensors", fuzz_safetensors}, FuzzTarget{"zip", fuzz_zip},   FuzzTarget{"pickle", fuzz_pickle},
    FuzzTarget{"legacy", fuzz_legacy},           FuzzTarget{"json", fuzz_json},
};

}  // namespace xattn::test
