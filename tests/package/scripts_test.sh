#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests what the scripts print and do before they build anything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

fail() {
  echo "FAILED: $1" >&2
  cat "$temp/out" >&2
  exit 1
}

expect() { # STATUS TEXT COMMAND...
  local status=0
  "${@:3}" > "$temp/out" 2>&1 || status=$?
  ((status == $1)) || fail "'${*:3}' exits with $status, not $1"
  grep -qF -- "$2" "$temp/out" || fail "'${*:3}' does not say '$2'"
}

for script in build test run format check; do
  expect 0 "usage: scripts/$script.sh" "scripts/$script.sh" --help
done
expect 2 "unknown argument 'all'" scripts/build.sh all
expect 1 "--target needs a name" scripts/build.sh --target
expect 2 "unknown argument '--all'" scripts/format.sh --all

project=$temp/project
mkdir -p "$project/scripts" "$temp/bin"
cp scripts/*.sh "$project/scripts"

# On a machine with nothing on it and no way to install, one line names all packages.
for tool in bash cat dirname; do ln -s "$(command -v "$tool")" "$temp/bin"; done
packages="cmake ninja-build ccache pkg-config python3-venv g++ libfmt-dev nlohmann-json3-dev libcli11-dev libpng-dev libgtest-dev"
expect 1 "sudo apt-get install $packages" env -i PATH="$temp/bin" "$project/scripts/build.sh"

# PyTorch comes as the CPU build if pip has one, else as it is; its size is printed first. A script replaces Python and pip.
cat > "$temp/bin/python3" << 'END'
#!/usr/bin/env bash
case $* in
  *torch==*+cpu) [[ $builds == cpu ]] || { echo "ERROR: No matching distribution found" >&2; exit 1; } ;;
esac
echo "python3 $*"
END
chmod +x "$temp/bin/python3"
mkdir -p "$project/.venv/bin"
ln -s "$temp/bin/python3" "$project/.venv/bin/python"
install() { PATH="$temp/bin:$PATH" XATTN_TORCH_INDEX=the-index builds=$1 "$project/scripts/install_torch.sh"; }
expect 0 "--extra-index-url the-index torch==2.13.0+cpu" install cpu
grep -q "download of 190 MB" "$temp/out" || fail "the size is not announced"
expect 0 "--extra-index-url the-index torch==2.13.0" install cuda
grep -q "download of 2.7 GB" "$temp/out" || fail "the size is not announced"
