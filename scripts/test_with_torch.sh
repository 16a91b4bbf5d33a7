#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/test_with_torch.sh VERSION [-DNAME=VALUE ...] [ctest options]

Installs this version of PyTorch into build-torch-VERSION/venv, builds everything with its LibTorch in build-torch-VERSION, and runs
the tests there; see scripts/test.sh --help. What is there already is not installed again. pip takes the build for the CPU where it
finds one, else the CUDA build, which runs without a GPU too: 5 GB on disk. At the end it prints the row of this run for the table
in tests/README.md.

examples: scripts/test_with_torch.sh 2.15.0 -DXATTN_EXAMPLES=OFF
          scripts/test_with_torch.sh 2.13.0 -DCMAKE_C_COMPILER=clang-19 -DCMAKE_CXX_COMPILER=clang++-19
END
}

case ${1:-} in
  -h | --help) usage; exit ;;
  [0-9]*.[0-9]*.[0-9]*) version=$1; shift ;;
  *) echo "scripts/test_with_torch.sh: expected a version such as 2.13.0, but got '${1:-}'; see --help" >&2; exit 2 ;;
esac

folder=build-torch-$version
python=$folder/venv/bin/python
find_torch() {
  "$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' 2> /dev/null
}
source scripts/steps.sh
find_torch > /dev/null || step "Installing PyTorch $version" scripts/install_torch.sh "$version" "$folder/venv"
torch=$(find_torch)
scripts/test.sh -B "$folder" -DTorch_DIR="$torch/share/cmake/Torch" "$@"

kind="CPU build"
if [[ -e $torch/lib/libtorch_cuda.so ]]; then
  kind="CUDA build"
  nvidia-smi -L > /dev/null 2>&1 || kind+=", no CUDA device"
fi
system=$(. /etc/os-release && echo "$PRETTY_NAME")
runs=$("$folder/xattn" --version)  # the kernels among others
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[^=]*=//p' "$folder/CMakeCache.txt")
echo "| $version, $kind | $system, $("$compiler" --version | head -1), $(uname -m), ${runs#*, }, $(nproc) cores | the suite |"
