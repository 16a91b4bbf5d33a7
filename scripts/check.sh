#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/check.sh

Runs every command of README.md, the lines of its blocks marked sh, in order, and stops at the first that fails.

  -h, --help  show this
END
}

case ${1:-} in
  -h | --help) usage; exit ;;
  '') ;;
  *) echo "scripts/check.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
esac

mapfile -t commands < <(awk '/^```/ {inside = $0 == "```sh"; next} inside' README.md)
for command in "${commands[@]}"; do
  echo "\$ $command"
  bash -euo pipefail -c "$command"
done
