#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

if (($# < 2)) || [[ $1 == -h || $1 == --help ]]; then
  cat <<'END'
usage: scripts/launch.sh N PROGRAM [ARGUMENT]...

Starts a program N times on this machine, as processes that know of each other by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as
`torchrun --no-python --nproc-per-node N` does. Where one fails the others are stopped, and its status is that of the script. The cores
are shared out, unless OMP_NUM_THREADS says otherwise.

example: scripts/launch.sh 2 build/vqa train --steps 100
END
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

count=$1
shift
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
  echo "scripts/launch.sh: N must be a number from 1 up, but is '$count'" >&2
  exit 2
fi

# A port that is free now. (Another program could take it before rank 0 does.)
port=$((20000 + RANDOM % 20000))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((20000 + RANDOM % 20000)); done

cores=$(nproc)
export WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 MASTER_PORT=$port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > count ? cores / count : 1))}
processes=()
stop() { kill "${processes[@]}" 2> /dev/null || true; }
trap 'stop; wait; exit 130' INT TERM  # a training saves its state before it ends
for ((rank = 0; rank < count; ++rank)); do
  RANK=$rank LOCAL_RANK=$rank "$@" &
  processes+=($!)
done
status=0
for ((left = count; left > 0; --left)); do
  if wait -n; then continue; else status=$?; fi
  stop
  break
done
wait
exit "$status"
