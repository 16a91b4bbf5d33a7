#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times small layers beside other processes that take the processor: 0, 1, 2 and 4 that compute without end, and a call bound to one core.

    .venv-bench/bin/python scripts/bench_busy.py
    .venv-bench/bin/python scripts/bench_busy.py --shape "reference, 8 heads" --busy 0 2 --runtime xattn onnxruntime

Each runtime runs in a process of its own, started for each state of the machine and each number of threads. Writes the table between the
markers in src/bench/README.md, or with --print only prints it. Nothing else should run on the machine. Build the benchmark and .venv-bench
first (scripts/bench.sh --help). A full run takes some minutes.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "src" / "bench" / "README.md"
SHAPES = [
    "reference, 8 heads",
    "Whisper-small step, context kept",
    "SigLIP-B/16-224 MAP head B1",
    "SD1.5 8x8 mid",
    "reference, forward + backward",
    "SigLIP-B/16-224 MAP head B1, forward + backward",
]
OF_LIBTORCH = ["reference, 8 heads", "reference, forward + backward"]  # with two threads beside others, a call takes up to seconds
RUNTIMES = {"xattn": "xattn", "libtorch": "LibTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ONE_CORE = "one core"  # a state: no other process, but one core for all threads


@contextlib.contextmanager
def busy_processes(count):
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(runtime, threads, state, arguments):
    """The results of one process: {row: {candidate: [median, 95th percentile]}} in microseconds."""
    names = [name for name in arguments.shape if runtime != "libtorch" or name in OF_LIBTORCH]
    if not names:
        return {}
    shapes = [word for name in names for word in ("--shape", name)]
    shared = ["--threads", str(threads), "--seconds", str(arguments.seconds), *shapes]
    if runtime in ("xattn", "libtorch"):
        command = [arguments.bench, "--json", "--runtime", runtime, *shared]
    else:
        command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--only", runtime, *shared]
    bind = (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if state == ONE_CORE else None
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with busy_processes(0 if state == ONE_CORE else int(state)):
        print(f"{runtime}, {threads} threads, busy: {state}", file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=bind)
    if done.returncode != 0:
        sys.exit(f"bench_busy.py: {' '.join(command)} failed:\n{done.stderr}")
    text = done.stdout if runtime in ("xattn", "libtorch") else done.stdout.splitlines()[-1]
    results = {}
    for result in json.loads(text)["results"]:
        results.setdefault(result["row"], {})[result["candidate"]] = [result["us"], result["p95"]]
    return results


def time(us):
    return f"{us:.0f} µs" if us < 1e4 else f"{us / 1e3:.0f} ms"


def cell(candidates):
    """The candidate with the least median."""
    if not candidates:
        return "–"
    median, p95 = min(candidates.values())
    return f"{time(median)} ({time(p95)})"


def table(measured, arguments):
    """measured: {(state, threads, runtime): results of `run`}"""
    columns = [(name, runtime, threads) for runtime, name in RUNTIMES.items() if runtime in arguments.runtime for threads in (1, 2)]
    lines = ["| layer | busy | " + " | ".join(f"{name}, {threads}" for name, _, threads in columns) + " |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for row in arguments.shape:
        for state in arguments.busy:
            cells = [cell(measured[state, threads, runtime].get(row, {})) for _, runtime, threads in columns]
            lines.append(f"| {row} | {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="a row of shapes.csv; repeatable (six small ones)")
    parser.add_argument("--busy", nargs="+", default=["0", "1", "2", "4", ONE_CORE], choices=["0", "1", "2", "4", ONE_CORE])
    parser.add_argument("--runtime", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=0.2, help="for each candidate of a row (0.2)")
    parser.add_argument("--bench", default=str(ROOT / "build" / "xattn_bench"), help="the benchmark (build/xattn_bench)")
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or SHAPES
    measured = {}
    for state in arguments.busy:
        for threads in (1, 2):
            for runtime in arguments.runtime:
                measured[state, threads, runtime] = run(runtime, threads, state, arguments)
    text = table(measured, arguments)
    print(text)
    if not arguments.print:
        page = PAGE.read_text()
        PAGE.write_text(re.sub(r"(<!-- busy -->\n).*?(<!-- /busy -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.S))


if __name__ == "__main__":
    main()
