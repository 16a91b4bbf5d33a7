#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=20.1.8  # of clang-format, so that every machine agrees

usage() {
  cat <<'END'
usage: scripts/format.sh [--check]

Formats all C++ files with the clang-format of this project, which pip installs into .venv-format.

  --check     change nothing; show what would change, and fail if anything would
  -h, --help  show this
END
}

mode=-i
case ${1:-} in
  -h | --help) usage; exit ;;
  --check) mode='--dry-run --Werror' ;;
  '') ;;
  *) echo "scripts/format.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
esac

tool=.venv-format/bin/clang-format
if [[ $("$tool" --version 2> /dev/null) != *" $version"* ]]; then
  python3 -m venv .venv-format
  .venv-format/bin/python -m pip install --quiet --disable-pip-version-check "clang-format==$version"
fi
# shellcheck disable=SC2086 # the mode is one or two words
find include src tests scripts -name '*.h' -o -name '*.cpp' | sort | xargs "$tool" $mode
