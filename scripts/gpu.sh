#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/gpu.sh [--rehearse] [--minutes N]
       scripts/gpu.sh --fetch

Builds on a machine with a GPU and without a network, runs the suites of CUDA, then the benchmark's rows, the most telling ones first.
Results go to $OUT, or to build-gpu/results, as they are made: what is there when the time is up, counts. PyTorch is that of python3.

  --fetch      on a machine with a network: unpacks the Debian packages that the build needs into .gpu, to be taken along
  --minutes N  for everything (14)
  --rehearse   the same steps without a GPU: the suites and rows run on the CPU
  -h, --help   show this

example: scripts/gpu.sh --fetch && scripts/gpu.sh --rehearse
END
}

minutes=14 device=cuda suites='*cuda*:Cuda*'
packages=(libfmt-dev nlohmann-json3-dev libcli11-dev libgtest-dev)
# The rows of README.md first, then all others.
rows=("SD1.5 16x16" "SD1.5 64x64" "IP-Adapter SD1.5 64x64 (4 tok), context kept" "Whisper-small decode" "Whisper-small step, context kept"
  "FLAN-T5-base teacher 128" "SigLIP-B/16-224 MAP head B8")
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --fetch)
      mkdir -p .gpu/packages
      (cd .gpu/packages && apt-get download -qq "${packages[@]}")
      for package in .gpu/packages/*.deb; do dpkg -x "$package" .gpu; done
      rm -r .gpu/packages
      exit ;;
    --rehearse) device=cpu suites='CrossAttentionTest.*:Devices/CrossAttentionTest.*' ;;
    --minutes) minutes=${2:?"--minutes needs a number"}; shift ;;
    *) echo "scripts/gpu.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done
if [[ ! -d .gpu/usr/include ]]; then
  echo "scripts/gpu.sh: there is no .gpu with the packages; scripts/gpu.sh --fetch makes it on a machine with a network" >&2
  exit 1
fi
if [[ $device == cuda ]] && ! nvidia-smi --list-gpus 2> /dev/null | grep -q GPU; then
  echo "scripts/gpu.sh: there is no CUDA device here (nvidia-smi lists none); --rehearse needs none" >&2
  exit 1
fi

folder=build-gpu
results=${OUT:-$PWD/$folder/results}
mkdir -p "$results"
left() { echo $((60 * minutes - SECONDS)); }  # seconds
within() { timeout --kill-after=5 "$(($(left) > 1 ? $(left) : 1))" "$@"; }
note() { echo "$SECONDS s: $*" | tee -a "$results/log.txt"; }

note "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo 'no GPU: a rehearsal')"
# The packages first: nothing may come from the machine itself by chance. c10d would need headers of Gloo and NCCL.
libraries=$(find .gpu/usr -name libgtest.a -printf '%h\n')
within cmake -S . -B $folder -G Ninja --log-level=NOTICE -DCMAKE_BUILD_TYPE=Release \
  -DTorch_DIR="$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch" \
  -DCMAKE_PREFIX_PATH="$PWD/.gpu/usr" -DCMAKE_LIBRARY_PATH="$PWD/$libraries" -DCMAKE_CXX_FLAGS="-isystem $PWD/.gpu/usr/include" \
  -DFETCHCONTENT_FULLY_DISCONNECTED=ON -DXATTN_EXAMPLES=OFF -DXATTN_DISTRIBUTED=OFF -DXATTN_INSTALL=OFF 2>&1 | tee "$results/build.txt"
note "configured"
within cmake --build $folder --target xattn_bench xattn_cli xattn_tests 2>&1 | tee -a "$results/build.txt" | tail -n 3
note "built: $($folder/xattn --version)"

# A failed suite does not keep the others or the benchmark from running.
within $folder/xattn_tests --gtest_brief=1 --gtest_filter="$suites" --gtest_output="xml:$results/tests.xml" > "$results/tests.txt" 2>&1 \
  && note "the suites passed" || note "the suites FAILED: $(tail -n 1 "$results/tests.txt")"

mapfile -t all < <($folder/xattn_bench --list | sed 's/  .*//')
for row in "${rows[@]}" "${all[@]}"; do
  file=$results/bench.$(tr -c 'A-Za-z0-9.\n' _ <<< "$row").json
  [[ ! -e $file ]] || continue
  if (($(left) < 20)); then break; fi
  within $folder/xattn_bench --shape "$row" --device $device --threads 1 --seconds 0.2 --json > "$file" 2>> "$results/log.txt" \
    || { rm "$file"; if (($(left) > 0)); then note "FAILED: $row"; fi; }  # or the time is up
done
note "$(find "$results" -name 'bench.*.json' -size +0 | wc -l) rows measured"
if (($(left) < 20)); then note "time is up"; fi
grep -q FAILED "$results/log.txt" && exit 1 || exit 0
