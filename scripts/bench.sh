#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: scripts/bench.sh [--quick] [--shape NAME]... [--limit GFLOP] [--passes N] [--seconds S] [--compile all|none] [--avx2]
                        [--device cpu|cuda]
       scripts/bench.sh --blocks [--shape NAME]... [--passes N] [--seconds S]
       scripts/bench.sh --crossover [--avx2]

Measures this library beside other runtimes on layers of real models, and writes the results to src/bench: results.json, the table in
README.md, and the plots.

  --quick        one short pass over the smaller rows; no returned weights, no crossovers
  --blocks       whole modules (blocks.json) instead of single layers: writes results-blocks.json and their table in README.md
  --crossover    only times the orders of products over a grid of lengths: writes crossover.json and crossover.svg. Five minutes
  --shape NAME   only rows whose names contain this; repeatable. The other rows keep their earlier results
  --limit GFLOP  leave out rows of more operations, in 1e9; by default no limit in the first pass and 500 in later ones, because a
                 call of a larger row takes seconds
  --passes N     passes over everything; their spread is reported (3)
  --seconds S    for each candidate of a row (0.5)
  --avx2         every runtime uses no more than AVX2 (src/bench/README.md says how); no returned weights. Writes results-avx2.json,
                 their table, ratios-avx2.svg, and crossover-avx2.json and .svg
  --compile WHAT run torch.compile, which takes a quarter of a minute a row, on all rows or none, instead of those with a goal
  --device cuda  in bfloat16 against LibTorch's and PyTorch's kernels on a GPU: prints a table and writes results-cuda.json
  -h, --help     show this

The other runtimes are installed by pip into .venv-bench (with CUDA: .venv-bench-cuda). Each runs in a process of its own, because the
waiting threads of one would take the processor from another. Nothing else should run on the machine. A full run takes hours.

example: scripts/bench.sh --quick --shape "SD1.5 16x16"
END
}

quick=0 passes=3 seconds=0.5 device=cpu limit=0 compile=goals blocks=0 avx2=0 crossover=0 name=--shape shapes=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --quick) quick=1 passes=1 seconds=0.2 limit=20 ;;
    --blocks) blocks=1 name=--row ;;
    --avx2) avx2=1 ;;
    --crossover) crossover=1 ;;
    --shape) shapes+=("${2:?"--shape needs a name"}"); shift ;;
    --limit) limit=${2:?"--limit needs a number"}; shift ;;
    --compile) compile=${2:?"--compile needs a word"}; shift ;;
    --passes) passes=${2:?"--passes needs a number"}; shift ;;
    --seconds) seconds=${2:?"--seconds needs a number"}; shift ;;
    --device) device=${2:?"--device needs a name"}; shift ;;
    *) echo "scripts/bench.sh: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done
if ((blocks)) && [[ $quick == 1 || $limit != 0 || $device != cpu || $avx2 == 1 ]]; then
  echo "scripts/bench.sh: --blocks excludes --quick, --limit, --avx2 and --device" >&2
  exit 2
fi
if ((avx2)); then
  if [[ $device != cpu ]]; then
    echo "scripts/bench.sh: --avx2 excludes --device $device" >&2
    exit 2
  fi
  export XATTN_KERNELS=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
fi
case $device in
  cpu) runtimes=(pytorch compile onnxruntime openvino); [[ $compile != none ]] || runtimes=(pytorch onnxruntime openvino) ;;
  cuda) runtimes=(cuda) ;;
  *) echo "scripts/bench.sh: --device must be cpu or cuda, but is '$device'" >&2; exit 2 ;;
esac
if [[ $device == cuda ]] && ! nvidia-smi --list-gpus 2> /dev/null | grep -q GPU; then
  echo "scripts/bench.sh: there is no CUDA device here (nvidia-smi lists none)" >&2
  exit 1
fi

if ((crossover)) && [[ $blocks == 1 || $device != cpu || ${#shapes[@]} != 0 ]]; then
  echo "scripts/bench.sh: --crossover excludes --blocks, --device $device and --shape" >&2
  exit 2
fi

venv=.venv-bench folder=build
if [[ $device == cuda ]]; then venv=.venv-bench-cuda folder=build-cuda; fi  # for another build of PyTorch
python=$venv/bin/python
read -ra packages < <(python3 scripts/bench_peers.py --packages --runtime "${runtimes[@]}")
stamp=$venv/installed
if [[ $(cat $stamp 2> /dev/null) != "${packages[*]}" ]]; then
  [[ -e $python ]] || python3 -m venv $venv
  index=()
  [[ -z ${XATTN_TORCH_INDEX:-} ]] || index=(--extra-index-url "$XATTN_TORCH_INDEX")
  install() { $python -m pip install --quiet --disable-pip-version-check "${index[@]}" "$@"; }
  if [[ $device == cuda ]] || ! install "${packages[0]}+cpu" "${packages[@]:1}" 2> /dev/null; then install "${packages[@]}"; fi
  echo "${packages[*]}" > $stamp
fi
peers=("$python")
if ((avx2 && !crossover)); then
  if ! [[ $venv-avx2/hide_avx512.so -nt $stamp ]]; then
    echo "scripts/bench.sh: making $venv-avx2, where native code sees a processor without AVX-512" >&2
    python3 scripts/peers/hide_avx512.py $venv $venv-avx2 > /dev/null
  fi
  peers=(env LD_PRELOAD="$PWD/$venv-avx2/hide_avx512.so" $venv-avx2/bin/python)
fi
torch=()
if [[ $device == cuda ]]; then
  torch=(-DTorch_DIR="$($python -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch")
fi
scripts/build.sh -B $folder --target xattn_bench "${torch[@]}"

load=$(cut -d' ' -f1 /proc/loadavg 2> /dev/null || echo 0)
if awk "BEGIN { exit !($load > 0.5) }"; then
  echo "scripts/bench.sh: this machine is busy (load $load): times will be too long, above all with two threads" >&2
fi

threads=(1)
if [[ $device == cpu ]] && (($(nproc) > 1)); then threads=(1 2); fi
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
ours=($folder/xattn_bench) device_option=(--device $device) blocks_option=() table_option=()
if ((blocks)); then ours+=(blocks) device_option=() blocks_option=(--blocks) table_option=(--blocks); fi
if ((avx2)); then table_option=(--avx2); fi
measure_crossovers() {
  for count in "${threads[@]}"; do $folder/xattn_bench --json --crossover --threads "$count" > "$results/crossover.$count.json"; done
  $python scripts/bench_report.py --crossover "${table_option[@]}" "$results"/crossover.*.json
  rm "$results"/crossover.*.json
}
if ((crossover)); then
  measure_crossovers
  exit
fi
named=()
for shape in "${shapes[@]}"; do named+=("$name" "$shape"); done
turn=6  # rows before another runtime takes over, so that other load, which changes within minutes, affects all of them
for ((pass = 1; pass <= passes; ++pass)); do
  if ((pass > 1 && limit == 0)); then limit=500; fi
  limited=(--limit "$limit")
  if ((blocks)); then limited=(); fi
  list=$("${ours[@]}" --list "${limited[@]}" "${named[@]}" | sed 's/  .*//')
  if [[ -z $list ]]; then
    if ((pass > 1)); then break; fi
    echo "scripts/bench.sh: --limit $limit leaves no row" >&2
    exit 2
  fi
  mapfile -t rows <<< "$list"
  for count in "${threads[@]}"; do
    # Returned weights are measured once, with one thread.
    weights=(--weights none)
    if ((blocks)); then
      weights=()
    elif ((pass == 1 && count == 1 && !quick && !avx2)); then
      weights+=(mean per-head)
    fi
    for ((first = 0; first < ${#rows[@]}; first += turn)); do
      options=(--seconds "$seconds" --threads "$count")
      for row in "${rows[@]:first:turn}"; do options+=("$name" "$row"); done
      part=$results/$pass.$count.$first
      for runtime in xattn libtorch; do
        "${ours[@]}" --json --runtime "$runtime" "${device_option[@]}" "${options[@]}" "${weights[@]}" > "$part.$runtime.json"
      done
      for runtime in "${runtimes[@]}"; do
        chosen=("${weights[@]}")
        if [[ $runtime == compile ]]; then
          if ((pass > 1)); then continue; fi
          chosen=()
          if [[ $compile == goals && ${#shapes[@]} == 0 && $blocks == 0 ]]; then chosen+=(--goals); fi
        fi
        "${peers[@]}" scripts/bench_peers.py "${blocks_option[@]}" --runtime "$runtime" "${options[@]}" "${chosen[@]}" > "$part.$runtime.json"
      done
    done
    if ((pass == 1 && !quick && !blocks)) && [[ $device == cpu && ${#shapes[@]} == 0 ]]; then
      $folder/xattn_bench --json --regret --threads "$count" --limit 20 --seconds 0.2 > "$results/regret.$count.json"
    fi
  done
done
if ((!quick && !blocks)) && [[ $device == cpu && ${#shapes[@]} == 0 ]]; then measure_crossovers; fi
$python scripts/bench_report.py --device $device "${table_option[@]}" "$results"/*.json
