#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

selenium=4.51.0

usage() {
  cat <<'END'
usage: scripts/check_report.sh REPORT.html [--screenshot FILE.png]

Opens a report of vqa, caption or transcribe in headless Chromium, points at all its words, and checks what it shows. Sets everything up
first: Chromium by apt where root or sudo without a password allows it, selenium by pip in .venv-browser of the project.

  --screenshot FILE.png  draw the page
  -h, --help             show this

example: scripts/check_report.sh vqa.html
END
}

case ${1:-} in
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
esac

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$scripts/../.venv-browser/bin/python

packages=()
command -v chromium > /dev/null || command -v google-chrome > /dev/null || packages+=(chromium)
command -v chromedriver > /dev/null || packages+=(chromium-driver)
[[ -e $python ]] || python3 -c 'import ensurepip, venv' 2> /dev/null || packages+=(python3-venv)
if ((${#packages[@]})); then "$scripts/install_packages.sh" "${packages[@]}"; fi

if [[ $("$python" -c 'import selenium; print(selenium.__version__)' 2> /dev/null) != "$selenium" ]]; then
  python3 -m venv "$scripts/../.venv-browser"
  "$python" -m pip install --quiet --disable-pip-version-check "selenium==$selenium"
fi
check=$scripts/check_report.py
if grep -q '<audio' "$1"; then check=$scripts/check_transcript.py; fi
"$python" "$check" "$@"
