#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/run.sh [vqa options]

Sets everything up (see scripts/build.sh --help), runs the reference's example, then trains and shows visual question answering.

  -h, --help  show this
  all else    goes to build/vqa; see build/vqa --help

example: scripts/run.sh --seed 1 --threads 2
END
}

case ${1:-} in
  -h | --help) usage; exit ;;
esac

scripts/build.sh
build/reference
build/vqa "$@"
