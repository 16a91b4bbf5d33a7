#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=23.1.4  # of clang-tidy, so that every machine agrees; from 21 on it skips LibTorch's headers

usage() {
  cat <<'END'
usage: scripts/tidy.sh [FILE ...]

Runs the clang-tidy of this project, which pip installs into .venv-tidy, over all sources in src, or over these. What it checks
is in .clang-tidy. The project must have been built once in build (see scripts/build.sh): its settings are used.

  -h, --help  show this

example: scripts/tidy.sh src/plan/plan.cpp
END
}

if [[ ${1:-} == -* ]]; then
  usage
  [[ $1 == -h || $1 == --help ]] && exit
  exit 2
fi

tool=.venv-tidy/bin/clang-tidy
if [[ $("$tool" --version 2> /dev/null) != *" $version"* ]]; then
  python3 -m venv .venv-tidy
  .venv-tidy/bin/python -m pip install --quiet --disable-pip-version-check "clang-tidy==$version"
fi

# Commands for one file each, without precompiled headers, which belong to GCC.
cmake -S . -B build-tidy -G Ninja --log-level=NOTICE -DCMAKE_BUILD_TYPE=Release -DXATTN_UNITY=OFF \
  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DXATTN_TESTS=OFF

files=("$@")
if (($# == 0)); then mapfile -t files < <(find src -name '*.cpp' | sort); fi
printf '%s\n' "${files[@]}" |
  xargs -P "$(nproc)" -I {} "$tool" -p build-tidy --quiet --extra-arg=-Wno-everything {}
