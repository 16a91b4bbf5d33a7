// SPDX-License-Identifier: Apache-2.0
#include <string_view>
#include <utility>

#include "files/check_file.h"
#include "files/pickle.h"
#include "files/pickled_tensors.h"
#include "files/readers.h"

// An archive of TorchScript holds code and data.pkl, a pickle of the module's attributes: tensors, other values, and
// submodules. Only the code distinguishes parameters and buffers from other tensors, and it is not read: every attribute that
// is a tensor is taken. Tensors in attributes that are lists, tuples or dicts are left out, as in Python's state_dict().
namespace xattn::detail {
namespace {

constexpr std::string_view kTorchScript = "torchscript";

}  // namespace

Index read_torchscript(const std::string& path, const ZipFile& zip) {
  const FileCheck check(kTorchScript, path);
  const auto pickle = read_pickle(path, zip.bytes("data.pkl"), PickleNames::torchscript);
  check(pickle.kind(pickle.root) == Pickle::Kind::object, "must hold a module, but holds something else");
  PickledTensors found(kTorchScript, path, storages_of(kTorchScript, path, zip), pickle, Pickle::Kind::object);
  if (found.holds_tensors(pickle.root)) {
    found.add_all("", pickle.root);
  } else {
    check(
        !zip.has("constants/0"),
        "has no parameters, but constants without names, as torch.jit.freeze makes them; save the module before it is frozen");
  }
  return {std::move(found.tensors), {}, std::move(found.unreadable)};
}

}  // namespace xattn::detail
