#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times the rows of src/bench/shapes.csv in other runtimes, each in a process of its own, at its best settings; with --blocks, those of
blocks.json.

    .venv-bench/bin/python scripts/bench_peers.py --shape "SD1.5 16x16" --threads 1 2
    .venv-bench/bin/python scripts/bench_peers.py --blocks --row "BLIP text block"

Prints one JSON object, as `xattn_bench --json` does. Each candidate is compared with float64 before it is timed; the candidates of a
runtime take turns.

    pytorch       eager; sdpa; mha: nn.MultiheadAttention, the sequence first or the batch first
    compile       torch.compile of sdpa, or of eager if weights are returned: freezing, packed weights, merged linears of one input,
                  C++ wrapper, max-autotune, fixed or variable lengths
    onnxruntime   the plain graph, and the MultiHeadAttention operator: all graph optimizations, inputs and outputs bound
    openvino      the plain graph, and its ScaledDotProductAttention: latency hint, float32, inputs and outputs bound
    cuda          eager; sdpa with each backend; torch.compile with max-autotune and CUDA graphs: bfloat16
"""

import argparse
import importlib
import json
import os
import subprocess
import sys

PACKAGES = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2"]
PACKAGES_CPU = ["onnx==1.23.2", "onnxruntime==1.32.0", "openvino==2026.4.1"]
RUNTIMES = ["pytorch", "compile", "onnxruntime", "openvino"]


def versions(runtime):
    from importlib.metadata import version

    package = {"pytorch": "torch", "compile": "torch", "cuda": "torch"}.get(runtime, runtime)
    return {runtime: version(package)}


def run_one(arguments):
    """Times all rows in one runtime with one number of threads, in this process."""
    import torch
    from peers.blocks import Block, read_blocks
    from peers.layer import Absent, Layer, choose, gigabytes_free, gigabytes_needed, gflop, measure, read_shapes
    from peers.with_torch import check, exact

    runtime, threads = arguments.only, arguments.threads[0]
    torch.set_num_threads(threads)
    module = {"onnxruntime": "with_onnx", "openvino": "with_openvino"}.get(runtime, "with_torch")
    candidates = getattr(importlib.import_module("peers." + module), "candidates_" + runtime)
    on_gpu = runtime == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("bench_peers.py: there is no CUDA device here")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    # Sums of float32 differ from float64 by some 1e-6, of bfloat16 by 1e-2.
    allowed = 5e-2 if on_gpu else 1e-4
    results, skipped = [], []

    def where(row, wanted):
        print(f"{runtime}, {threads} threads, weights {wanted}: {row['name']}", file=sys.stderr)
        type = "bfloat16" if on_gpu else "float32"
        return {"row": row["name"], "weights": wanted, "threads": threads, "type": type, "runtime": runtime}

    def run_row(layer, wanted, where):
        ready = {}
        truth = exact(layer, wanted)
        for name, make in candidates(layer, wanted, threads).items():
            try:
                call = make()
                found = call()
                found = call.results() if hasattr(call, "results") else found
            except Absent as reason:
                skipped.append(where | {"candidate": name, "reason": str(reason)})
            except Exception as reason:  # a runtime that does not take this row
                print(f"{runtime}, {name}: {reason}", file=sys.stderr)
                skipped.append(where | {"candidate": name, "reason": str(reason).split("\n")[0][:200]})
            else:
                ready[name] = call, check(f"{layer.name}: {runtime}, {name}", found, truth, allowed)
        times = measure([call for call, _ in ready.values()], arguments.seconds, wait)
        for (name, (_, error)), each in zip(ready.items(), times):
            results.append(where | {"candidate": name, "error": error} | each)

    for row in choose(read_blocks(), arguments.shape) if arguments.blocks else []:
        with torch.inference_mode():
            run_row(Block(row), "none", where(row, "none"))
    for row in [] if arguments.blocks else choose(read_shapes(), arguments.shape):
        train = row["timed"] == "backward"
        too_long = arguments.limit and gflop(row) > arguments.limit
        if too_long or (arguments.goals and not row["goal"]):
            continue
        for wanted in arguments.weights:
            if wanted != "none" and (train or row["maps"] in ("-", "thrown away")):
                continue
            here = where(row, wanted)
            needed, free = gigabytes_needed(row, logits=True), gigabytes_free()
            if needed > free and not on_gpu:
                skipped.append(
                    here | {"candidate": "all", "reason": f"needs {needed:.1f} GB of memory, and {free:.1f} are free"}
                )
                continue
            with torch.set_grad_enabled(train), torch.inference_mode(not train):
                try:
                    run_row(Layer(row), wanted, here)
                except Absent as reason:
                    skipped.append(here | {"candidate": "all", "reason": str(reason)})
    print(json.dumps({"versions": versions(runtime), "results": results, "skipped": skipped}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", "--row", action="append", default=[], help="the row of this name, or all rows whose names contain it; repeatable"
    )
    parser.add_argument("--blocks", action="store_true", help="the rows of blocks.json; without --weights, --limit and --goals")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", default=["none"], choices=["none", "mean", "per-head"])
    parser.add_argument("--runtime", nargs="+", default=RUNTIMES, choices=[*RUNTIMES, "cuda"])
    parser.add_argument("--seconds", type=float, default=1, help="for each candidate of a row (1)")
    parser.add_argument("--limit", type=float, default=0, help="leave out rows of more operations, in 1e9")
    parser.add_argument("--goals", action="store_true", help="leave out rows without a goal")
    parser.add_argument(
        "--packages", action="store_true", help="print the packages for pip (with --runtime cuda, those for CUDA), and stop"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.blocks and (arguments.weights != ["none"] or arguments.limit or arguments.goals or "cuda" in arguments.runtime):
        parser.error("--blocks excludes --weights, --limit, --goals and --runtime cuda")
    if arguments.packages:
        return print(*PACKAGES, *([] if arguments.runtime == ["cuda"] else PACKAGES_CPU))
    if arguments.only:
        return run_one(arguments)
    merged = {"versions": {}, "results": [], "skipped": []}
    for threads in arguments.threads:
        for runtime in arguments.runtime:
            command = [
                sys.executable,
                __file__,
                "--only",
                runtime,
                "--threads",
                str(threads),
                "--seconds",
                str(arguments.seconds),
                "--limit",
                str(arguments.limit),
                "--weights",
                *arguments.weights,
                *(["--goals"] if arguments.goals else []),
                *(["--blocks"] if arguments.blocks else []),
            ]
            for name in arguments.shape:
                command += ["--shape", name]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            process = subprocess.run(command, stdout=subprocess.PIPE, env=environment)
            if process.returncode != 0:
                sys.exit(process.returncode)  # it has printed the reason
            part = json.loads(process.stdout.splitlines()[-1])
            merged["versions"] |= part["versions"]
            merged["results"] += part["results"]
            merged["skipped"] += part["skipped"]
    print(json.dumps(merged, indent=1))


if __name__ == "__main__":
    main()
