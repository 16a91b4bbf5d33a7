#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
  cat <<'END'
usage: scripts/install_packages.sh PACKAGE...

Installs Debian packages by apt where root, or sudo without a password, allows it; else says which line does it, and fails.

example: scripts/install_packages.sh clang llvm
END
  (($#)) && exit 0 || exit 2
fi

install() {
  command -v apt-get > /dev/null || return 1
  local sudo=()
  if ((EUID != 0)); then
    sudo -n true 2> /dev/null || return 1
    sudo=(sudo)
  fi
  echo "Installing system packages: $*"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

if ! install "$@"; then
  echo "System packages are missing. Install them by this line, then start again:" >&2
  echo "  sudo apt-get install $*" >&2
  exit 1
fi
