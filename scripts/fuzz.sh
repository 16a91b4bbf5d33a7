#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/fuzz.sh [SECONDS [TARGET ...]]

Sets everything up (see scripts/build.sh --help; Clang by apt too), builds the fuzzers of the file readers in build-fuzz, and
lets each run for SECONDS (60) on inputs of its own making, grown from those in tests/data/fuzz. What makes a reader crash,
hang, or take memory out of proportion is kept in tests/data/fuzz/TARGET/crashes, where the tests find it, and fails the script.
Prints how many lines of each reader's source have been reached.

  TARGET      safetensors, zip, pickle, legacy or json; all of them by default
  -h, --help  show this

example: scripts/fuzz.sh 600 zip pickle
END
}

seconds=60
targets=(safetensors zip pickle legacy json)
case ${1:-} in
  -h | --help) usage; exit ;;
  '') ;;
  *[!0-9]*) echo "scripts/fuzz.sh: SECONDS must be a number, but is '$1'; see --help" >&2; exit 2 ;;
  *) seconds=$1; shift; (($# == 0)) || targets=("$@") ;;
esac

packages=()
command -v clang++ > /dev/null || packages+=(clang libclang-rt-dev)
command -v llvm-cov > /dev/null || packages+=(llvm)
if ((${#packages[@]})); then scripts/install_packages.sh "${packages[@]}"; fi

folder=build-fuzz
scripts/build.sh -B "$folder" -DXATTN_FUZZ=ON -DXATTN_TOOLS=OFF -DXATTN_BENCH=OFF -DXATTN_EXAMPLES=OFF -DXATTN_INSTALL=OFF \
  -DCMAKE_CXX_COMPILER=clang++

# A run's findings stay in the build folder, as seeds for the next one.
failed=()
for target in "${targets[@]}"; do
  seeds=tests/data/fuzz/$target
  corpus=$folder/corpus/$target
  mkdir -p "$corpus" "$seeds/crashes"
  echo "$target:"
  if ! OMP_NUM_THREADS=1 LLVM_PROFILE_FILE="$folder/$target.profraw" "$folder/fuzz_$target" "$corpus" "$seeds" \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -artifact_prefix="$seeds/crashes/" -print_final_stats=1 \
    > "$folder/$target.log" 2>&1; then
    failed+=("$target")
    tail -n 30 "$folder/$target.log"
  fi
  sed -n 's/^stat::number_of_executed_units: */  inputs: /p; s/^stat::peak_rss_mb: */  memory in MB: /p' "$folder/$target.log"
  rmdir --ignore-fail-on-non-empty "$seeds/crashes"
done

echo "lines covered:"
profiles=("${targets[@]/#/$folder/}")
llvm-profdata merge -sparse "${profiles[@]/%/.profraw}" -o "$folder/fuzz.profdata"
objects=("${targets[@]/#/--object=$folder/fuzz_}")
llvm-cov export --summary-only --instr-profile="$folder/fuzz.profdata" "${objects[@]}" |
  python3 -c '
import json, sys
for file in json.load(sys.stdin)["data"][0]["files"]:
    name, lines = file["filename"].rpartition("/src/")[2], file["summary"]["lines"]
    if "/src/" in file["filename"] and name.endswith(".cpp") and lines["covered"]:
        print("  {:20} {:3} of {:3}  {:3.0f}%".format(name, lines["covered"], lines["count"], lines["percent"]))
'
if ((${#failed[@]})); then
  echo "Failed: ${failed[*]}. The inputs are in tests/data/fuzz." >&2
  exit 1
fi
