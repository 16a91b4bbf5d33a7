#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/build.sh [--tests] [--target NAME] [-B DIR] [CMake options]

Sets everything up and makes a release build. What is there already is not fetched again.

  --tests        build the tests too, now and in later calls for this folder
  --target NAME  build this target and what it needs, and nothing else; repeatable
  -B DIR         the build folder (build)
  -h, --help     show this

1. System packages (compiler, CMake, libraries): installed by apt where root or sudo without a password allows it.
2. LibTorch, the first of: Torch_DIR or CMAKE_PREFIX_PATH; the torch of the active Python; .venv in the project, where
   PyTorch 2.13.0 is installed by pip if need be. XATTN_TORCH_INDEX may name a package index that has builds for the CPU only.
3. CMake, with the options given here. Several files are compiled as one, which is quick as a whole; who edits one file again and
   again gives -DXATTN_UNITY=OFF.

example: scripts/build.sh -DTorch_DIR=/opt/libtorch/share/cmake/Torch
END
}

tests=()
folder=build
target=()
options=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --tests) tests=(-DXATTN_TESTS=ON) ;;
    --target) target+=(--target "${2:?"--target needs a name"}"); shift ;;
    -B) folder=${2:?"-B needs a folder"}; shift ;;
    -*) options+=("$1") ;;
    *) echo "scripts/build.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done

# Whether LibTorch may have to go into a virtual environment that Python cannot make.
needs_venv() {
  case "${Torch_DIR:+Torch_DIR=} ${CMAKE_PREFIX_PATH:+CMAKE_PREFIX_PATH=} ${options[*]}" in
    *Torch_DIR=* | *CMAKE_PREFIX_PATH=*) return 1 ;;
  esac
  [[ ! -e .venv ]] && ! python3 -c 'import ensurepip, venv' 2> /dev/null
}

# The Debian packages of the tools and headers that are missing.
missing_packages() {
  command -v cmake > /dev/null || echo cmake
  command -v ninja > /dev/null || echo ninja-build
  command -v ccache > /dev/null || echo ccache
  command -v pkg-config > /dev/null || echo pkg-config
  if needs_venv; then echo python3-venv; fi
  local headers=(fmt/format.h:libfmt-dev nlohmann/json.hpp:nlohmann-json3-dev CLI/CLI.hpp:libcli11-dev png.h:libpng-dev
    gtest/gtest.h:libgtest-dev gloo/config.h:libgloo-dev sndfile.h:libsndfile1-dev samplerate.h:libsamplerate0-dev)
  if ! command -v c++ > /dev/null; then
    echo g++
    printf '%s\n' "${headers[@]#*:}"
  else
    for header in "${headers[@]}"; do
      printf '#if !__has_include(<%s>)\n%s\n#endif\n' "${header%:*}" "${header#*:}"
    done | c++ -E -P -x c++ -
  fi
}

mapfile -t packages < <(missing_packages)
if ((${#packages[@]})); then scripts/install_packages.sh "${packages[@]}"; fi

# A compiler takes up to 1.5 GB for one file that includes LibTorch.
memory=$(awk '/MemAvailable/ {print int($2 / 1.5e6)}' /proc/meminfo)
processors=$(nproc)
jobs=$((memory < 1 ? 1 : memory < processors ? memory : processors))
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$jobs}

# A folder keeps the generator that it was made with, and its tests.
[[ -e $folder/CMakeCache.txt ]] || options=(-G Ninja -DXATTN_TESTS=OFF "${options[@]}")
cmake -S . -B "$folder" --log-level=NOTICE -DCMAKE_BUILD_TYPE=Release -DXATTN_TORCH_INSTALLER="$PWD/scripts/install_torch.sh" \
  "${options[@]}" "${tests[@]}"
cmake --build "$folder" "${target[@]}"
