// SPDX-License-Identifier: Apache-2.0
#include <string_view>
#include <utility>

#include "files/check_file.h"
#include "files/pickle.h"
#include "files/pickled_tensors.h"
#include "files/readers.h"

// An archive of TorchScript is code beside data.pkl, a pickle of the module's attributes: tensors, other values, and modules
// in it. Which tensors are parameters or buffers only the code says, and it is not read: each tensor that is an attribute is
// taken, and so are the few that are neither. Tensors in attributes that are lists, tuples or dicts are left out, as they are
// in Python's state_dict().
namespace xattn::detail {
namespace {

constexpr std::string_view kTorchScript = "torchscript";

}  // namespace

Index read_torchscript(const std::string& path, const ZipFile& zip) {
  const auto pickle = read_pickle(path, zip.bytes("data.pkl"), PickleNames::torchscript);
  check_file(pickle.kind(pickle.root) == Pickle::Kind::object, kTorchScript, path,
             "must hold a module, but holds something else");
  PickledTensors found(kTorchScript, path, zip, pickle, Pickle::Kind::object);
  if (found.holds_tensors(pickle.root)) {
    found.add_all("", pickle.root);
  } else {
    check_file(
        !zip.has("constants/0"), kTorchScript, path,
        "has no parameters, but constants without names, as torch.jit.freeze makes them; save the module before it is frozen");
  }
  return {std::move(found.tensors), {}};
}

}  // namespace xattn::detail
