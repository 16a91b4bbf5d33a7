#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END_OF_USAGE'
usage: scripts/run.sh [BOARD.png QUESTION]

Sets everything up (see scripts/build.sh --help), runs the reference's example, then asks and describes a board of handwritten
digits with the trained models that ship with the project, and draws where they looked. Without arguments the board is
src/examples/data/board.png.

  -h, --help  show this

example: scripts/run.sh board.png "how many digits are in the top row"
END_OF_USAGE
}

case ${1:-} in
  -h | --help) usage; exit ;;
esac
if (($# != 0 && $# != 2)); then
  usage >&2
  exit 2
fi
board=${1:-src/examples/data/board.png}
question=${2:-what is left of the seven}

source scripts/steps.sh
step "Building the library and the reference's example" scripts/build.sh --target reference
step "The reference's example" build/reference
step "Building vqa and caption" scripts/build.sh --target vqa --target caption
step "Visual question answering, on $board: $question?" build/vqa ask "$board" "$question" --picture build/answer.png
step "Captioning, on the same board" build/caption describe "$board" --picture build/caption.png
step "Visual question answering on boards of held-out digits" build/vqa evaluate --boards 500
step "Captioning of such boards" build/caption evaluate --boards 500
