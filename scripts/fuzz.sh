#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/fuzz.sh [SECONDS [TARGET ...]]

Sets everything up (see scripts/build.sh --help; Clang by apt too), builds the fuzzers of the file readers in build-fuzz, and
lets each run for SECONDS (60) on inputs of its own making, grown from those in tests/data/fuzz; for 0 it runs only those. What
makes a reader crash, hang, or take memory out of proportion is kept in tests/data/fuzz/TARGET/crashes, where the tests find it,
and fails the script.

Prints how many lines of each reader's source have been reached. If all targets have run, it also fails if these are less than
95 % of the lines of a reader, which are all sources in src/files but the writers; the inputs in tests/data/fuzz alone reach them.

  TARGET      safetensors, zip, legacy, pickle, json or folder; all of them by default
  -h, --help  show this

example: scripts/fuzz.sh 600 zip pickle
END
}

seconds=60
all=(safetensors zip legacy pickle json folder)
targets=("${all[@]}")
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

limit=-max_total_time=$seconds
((seconds)) || limit=-runs=0  # libFuzzer's 0 seconds are no limit

# A run's findings stay in the build folder, as seeds for the next one.
failed=()
profiles=()
for target in "${targets[@]}"; do
  seeds=tests/data/fuzz/$target
  corpus=$folder/corpus/$target
  mkdir -p "$corpus" "$seeds/crashes"
  profile=$folder/$target.profraw
  rm -f "$profile"  # a reader that crashes writes none
  inputs=("$corpus" "$seeds")
  ((seconds)) || inputs=("$seeds")
  echo "$target:"
  if ! OMP_NUM_THREADS=1 LLVM_PROFILE_FILE="$profile" "$folder/fuzz_$target" "${inputs[@]}" \
    "$limit" -timeout=10 -rss_limit_mb=2048 -artifact_prefix="$seeds/crashes/" -print_final_stats=1 \
    > "$folder/$target.log" 2>&1; then
    failed+=("$target")
    tail -n 30 "$folder/$target.log"
  fi
  sed -n 's/^stat::number_of_executed_units: */  inputs: /p; s/^stat::peak_rss_mb: */  memory in MB: /p' "$folder/$target.log"
  [[ ! -e $profile ]] || profiles+=("$profile")
  rmdir --ignore-fail-on-non-empty "$seeds/crashes"
done

echo "lines covered:"
llvm-profdata merge -sparse "${profiles[@]}" -o "$folder/fuzz.profdata"
objects=("${targets[@]/#/--object=$folder/fuzz_}")
least=0
[[ ${targets[*]} != "${all[*]}" ]] || least=95
llvm-cov export --summary-only --instr-profile="$folder/fuzz.profdata" "${objects[@]}" |
  python3 -c '
import json, pathlib, sys
least, files = int(sys.argv[1]), json.load(sys.stdin)["data"][0]["files"]
found = {file["filename"].rpartition("/src/files/")[2]: file["summary"]["lines"] for file in files}
missed = []
for name in sorted(path.name for path in pathlib.Path("src/files").glob("*.cpp") if not path.name.startswith("write_")):
    lines = found.get(name, {"covered": 0, "count": 0, "percent": 0})
    print("  {:20} {:3} of {:3}  {:5.1f}%".format(name, lines["covered"], lines["count"], lines["percent"]))
    if lines["percent"] < least:
        missed.append(name)
if missed:
    sys.exit("Less than {} % of these: {}. Add inputs by write_seeds in scripts/make_fixtures.py.".format(least, ", ".join(missed)))
' "$least" || failed+=(coverage)
if ((${#failed[@]})); then
  echo "Failed: ${failed[*]}. Inputs that a reader fails on are in tests/data/fuzz." >&2
  exit 1
fi
