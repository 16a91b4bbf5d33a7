#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/test.sh [-B DIR] [-DNAME=VALUE ...] [ctest options]

Sets everything up (see scripts/build.sh --help), builds the tests and runs them.

  -B DIR         the build folder (build)
  -DNAME=VALUE   an option for CMake
  -h, --help     show this
  all else       goes to ctest

example: scripts/test.sh -R Distributed --repeat until-fail:50
END
}

folder=build
build=()
ctest=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    -B) folder=${2:?"-B needs a folder"}; shift ;;
    -D*=*) build+=("$1") ;;
    *) ctest+=("$1") ;;
  esac
  shift
done

source scripts/steps.sh
step "Building the library, the programs and the tests" scripts/build.sh --tests -B "$folder" "${build[@]}"
step "Running the tests" ctest --test-dir "$folder" --output-on-failure -j "$(nproc)" "${ctest[@]}"
