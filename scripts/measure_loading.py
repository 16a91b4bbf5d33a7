#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a safetensors file of several GB, and measures what opening it and running one layer of it cost.

    python3 scripts/measure_loading.py [--gigabytes 4] [--program build/xattn] [--folder DIR]

The file holds many attention layers of 2048 features in float32. Times and peak memory are of whole processes, each beside the
same on a file with one layer alone, so that what LibTorch itself takes can be subtracted. Needs nothing but Python.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH = 2048
LAYER = 4 * (4 * WIDTH * WIDTH + 4 * WIDTH)  # bytes


def write(path, layers):
    """Weights of `layers` layers, one after the other; all numbers are nonzero."""
    header, offset = {}, 0
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for ending, shape in (("weight", [WIDTH, WIDTH]), ("bias", [WIDTH])):
                end = offset + 4 * WIDTH * (WIDTH if ending == "weight" else 1)
                header[f"layers.{layer}.encoder_attn.{name}.{ending}"] = {
                    "dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    row = struct.pack("<f", 0.01) * WIDTH
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(offset // len(row)):
            file.write(row)


def write_inputs(path):
    parts = {"query": [1, 4, WIDTH], "context": [1, 8, WIDTH]}
    header, offset = {}, 0
    for name, shape in parts.items():
        end = offset + 4 * shape[1] * WIDTH
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.1) * (offset // 4))


def run(*command):
    """Seconds, and the peak of resident memory in MB."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"measure_loading.py: {' '.join(map(str, command))} failed")
    return time.monotonic() - begin, usage.ru_maxrss / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--program", type=Path, default=Path("build/xattn"))
    parser.add_argument("--folder", type=Path, help="for the file; a temporary one if it is not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        one, many, inputs = (Path(folder) / x for x in ("one.safetensors", "many.safetensors", "in.safetensors"))
        layers = max(1, int(arguments.gigabytes * 1e9 / LAYER))
        write(one, 1)
        write(many, layers)
        write_inputs(inputs)
        print(f"{many.stat().st_size / 1e9:.1f} GB, {layers} layers of {LAYER / 1e6:.0f} MB each; one layer alone beside it")
        for what, command in {
            "inspect": lambda file: ("inspect", file, "--json"),
            "run, one layer": lambda file: ("run", file, "--inputs", inputs, "--output", Path(folder) / "out.safetensors",
                                            "--prefix", "layers.0.encoder_attn", "--heads", "16", "--device", "cpu"),
        }.items():
            for name, file in (("one layer", one), ("all layers", many)):
                seconds, memory = min(run(arguments.program, *command(file)) for _ in range(3))
                print(f"  {what:<15} {name:<10} {seconds:6.2f} s  {memory:7.0f} MB at most")


if __name__ == "__main__":
    main()
