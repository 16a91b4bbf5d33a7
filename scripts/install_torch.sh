#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs PyTorch into .venv of the project, or another VERSION into another VENV: install_torch.sh [VERSION VENV]. Called by
# scripts/build.sh, through CMake, when no other LibTorch will do, and by scripts/test_with_torch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:-2.13.0}
venv=${2:-.venv}
index=()
[[ -z ${XATTN_TORCH_INDEX:-} ]] || index=(--extra-index-url "$XATTN_TORCH_INDEX")

install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check "${index[@]}" "torch==$1"
}

python3 -m venv "$venv"
echo "Installing PyTorch $version for the CPU into $venv: a download of 190 MB, 1 GB on disk."
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
if install "$version+cpu" 2> "$errors"; then exit; fi
if ! grep -q "No matching distribution" "$errors"; then
  cat "$errors" >&2
  exit 1
fi
echo "pip finds no build for the CPU only; XATTN_TORCH_INDEX may name a package index that has it."
echo "Installing PyTorch $version as pip finds it: on x86-64 a CUDA build, a download of 2.7 GB, 5 GB on disk."
install "$version"
