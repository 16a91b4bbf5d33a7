#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/header_times.sh [-B DIR]

Prints what it costs to include each public header, in seconds of the compiler, beside the headers of LibTorch that it builds on:
the least of three runs. Nothing else should run on the machine.

  -B DIR      a folder that scripts/build.sh has built in (build)
  -h, --help  show this
END
}

folder=build
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    -B) folder=${2:?"-B needs a folder"}; shift ;;
    *) echo "scripts/header_times.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done

cache=$folder/CMakeCache.txt
[[ -e $cache ]] || { echo "scripts/header_times.sh: there is no build in $folder; run scripts/build.sh first" >&2; exit 1; }
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$cache")
torch=$(sed -n 's/^Torch_DIR:PATH=//p' "$cache")/../../../include
file=$(mktemp --suffix=.cpp)
trap 'rm -f "$file"' EXIT

seconds() { # HEADER
  echo "#include <$1>" > "$file"
  local least=
  TIMEFORMAT=%U
  for _ in 1 2 3; do
    local time
    time=$({ time "$compiler" -std=c++20 -fsyntax-only -Iinclude -isystem "$torch" -isystem "$torch/torch/csrc/api/include" "$file"; } 2>&1)
    if [[ -z $least ]] || awk "BEGIN { exit !($time < $least) }"; then least=$time; fi
  done
  printf '%6.1f  %s\n' "$least" "$1"
}

for header in ATen/core/Tensor.h torch/nn/module.h torch/torch.h; do seconds "$header"; done
for header in include/xattn/*.h; do seconds "${header#include/}"; done
