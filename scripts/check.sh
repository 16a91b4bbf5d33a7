#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/check.sh [--skip COMMAND]

Runs every command of README.md and of the pages in src, the lines of their blocks marked sh, in order, and stops at the first that
fails.

  --skip COMMAND  but not this one
  -h, --help      show this
END
}

skipped=
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --skip) skipped=${2:?"--skip needs a command"}; shift ;;
    *) echo "scripts/check.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done

mapfile -t commands < <(awk '/^```/ {inside = $0 == "```sh"; next} inside' README.md src/README.md src/*/README.md)
for command in "${commands[@]}"; do
  [[ $command != "$skipped" ]] || continue
  echo "\$ $command"
  bash -euo pipefail -c "$command"
done
