#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Copies a virtual environment so that its native libraries see a processor without AVX-512 and AMX.

    scripts/peers/hide_avx512.py .venv-bench .venv-bench-avx2
    LD_PRELOAD=.venv-bench-avx2/hide_avx512.so .venv-bench-avx2/bin/python ...

Some runtimes choose kernels by the instruction `cpuid` alone and have no setting for it. In the copy each of these instructions is
`int3; nop`, of the same length, and hide_avx512.so answers the signal. What the runtimes compute with is their own code for AVX2, as on
a processor that has no more. Files without the instruction are hard links to the original. Needs objdump and a C++ compiler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"


def text_sections(library):
    """Of each section of code: its address, its place in the file, its size."""
    lines = subprocess.run(["objdump", "-h", "-w", library], check=True, capture_output=True, text=True).stdout.splitlines()
    fields = [line.split() for line in lines if " CODE" in line]
    return [(int(field[3], 16), int(field[5], 16), int(field[2], 16)) for field in fields]


def addresses_of_cpuid(library):
    command = ["objdump", "-d", "-w", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        found = [int(line.split(":")[0], 16) for line in objdump.stdout if line.rstrip().endswith("\tcpuid")]
    if objdump.returncode:
        sys.exit(f"hide_avx512.py: objdump failed on {library}")
    return found


def replace(library):
    """Returns how many instructions were replaced. A library that has any becomes a file of its own."""
    code = library.read_bytes()
    if CPUID not in code:
        return 0
    found = addresses_of_cpuid(library)
    if not found:
        return 0
    patched, sections = bytearray(code), text_sections(library)
    for address in found:
        place = next(offset + address - start for start, offset, size in sections if start <= address < start + size)
        if patched[place : place + 2] != CPUID:
            sys.exit(f"hide_avx512.py: {library} has no cpuid at {address:#x}")
        patched[place : place + 2] = TRAP
    mode = library.stat().st_mode
    library.unlink()  # the original keeps its contents
    library.write_bytes(patched)
    library.chmod(mode)
    return len(found)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    for library in sorted(target.rglob("*.so*")):
        if library.is_file() and not library.is_symlink():
            count = replace(library)
            if count:
                print(f"{library.relative_to(target)}: {count} instructions")
    shim = Path(__file__).with_name("hide_avx512.cpp")
    subprocess.run(["c++", "-std=c++20", "-O2", "-fPIC", "-shared", shim, "-o", target / "hide_avx512.so"], check=True)


if __name__ == "__main__":
    main()
