#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that Python reads what `xattn convert` writes: the same tensors, bit by bit, and all that a module asks for.

    .venv/bin/python scripts/check_state_dict.py [--program build/xattn]

Needs torch. Says nothing but the number of tensors if all is well.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "files"


def check(ok, message):
    if not ok:
        sys.exit(f"check_state_dict.py: {message}")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def convert(program, source, folder):
    copy = Path(folder) / "copy.pt"
    subprocess.run([program, "convert", source, copy], check=True)
    check(zipfile.ZipFile(copy).testzip() is None, f"{source.name}: a checksum of the copy is wrong")
    return torch.load(copy, weights_only=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=Path("build/xattn"))
    program = parser.parse_args().program.resolve()
    tensors = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("types.pt", "views.pt", "state_dict.pt"):
            original = torch.load(DATA / name, weights_only=True)
            copy = convert(program, DATA / name, folder)
            check(copy.keys() == original.keys(), f"{name}: other names, {sorted(copy.keys() ^ original.keys())}")
            for key, tensor in original.items():
                check(same(tensor, copy[key]), f"{name}: {key} is not the same")
            tensors += len(copy)
        module = torch.nn.TransformerDecoderLayer(16, 2, 32)
        torch.save(module.state_dict(), Path(folder) / "module.pt")
        torch.nn.TransformerDecoderLayer(16, 2, 32).load_state_dict(convert(program, Path(folder) / "module.pt", folder), strict=True)
    print(f"{tensors} tensors, and a module: Python reads what xattn wrote")


if __name__ == "__main__":
    main()
