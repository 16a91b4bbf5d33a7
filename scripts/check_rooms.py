#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the folders of src against the table of rooms in src/README.md: includes never point up, no two rooms have files of one
name, no group of rooms has more lines of code (without blank lines and comments) than its budget, and public headers define no
macros but XATTN_ and include nothing but the standard library, LibTorch and each other.

usage: scripts/check_rooms.py [--lines]

  --lines   also print the lines of code of each room
"""
import collections
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<xattn/([^>]+)>)', re.MULTILINE)
MACRO = re.compile(r'^\s*#\s*define\s+(?!XATTN_)(\w+)', re.MULTILINE)
FOREIGN = re.compile(r'^\s*#\s*include\s*<(?!(?:ATen|c10|torch|xattn)/)([^>]*/[^>]*)>', re.MULTILINE)
COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")', re.DOTALL)


def table(name):
    """The rows of the table below <!-- NAME --> in src/README.md, without backquotes."""
    text = (ROOT / "src/README.md").read_text().split(f"<!-- {name} -->")[1]
    rows = re.match(r"\s*((?:\|.*\n)+)", text)[1].splitlines()[2:]
    return [[cell.strip() for cell in row.replace("`", "").strip("|").split("|")] for row in rows]


def names(cell):
    return [name.strip() for name in cell.split(",") if name.strip()]


def lines_of_code(path):
    text = COMMENT.sub(lambda match: match[1] or "", path.read_text())
    return sum(1 for line in text.splitlines() if line.strip())


def read_rooms():
    """{room: rooms it may include from}, and {public header: room}."""
    below, room_of_header = {}, {}
    for room, stands_on, headers, _ in table("rooms"):
        below[room] = {room}
        for name in names(stands_on):
            below[room] |= below[name]  # KeyError: a room includes from one above it in the table
        for header in names(headers):
            room_of_header[header + ".h"] = room
    return below, room_of_header


def main(arguments):
    if arguments not in ([], ["--lines"]):
        print(__doc__, file=sys.stderr)
        return 2
    below, room_of_header = read_rooms()
    faults, lines, places = [], collections.Counter(), collections.defaultdict(set)
    files = [(path.relative_to(ROOT / "src").parts[0], path) for path in sorted((ROOT / "src").rglob("*.*"))
             if path.suffix in (".h", ".cpp")]
    for header in sorted((ROOT / "include/xattn").glob("*.h")):
        if header.name not in room_of_header:
            faults.append(f"include/xattn/{header.name} is of no room in src/README.md")
        else:
            files.append((room_of_header[header.name], header))
        faults += [f"include/xattn/{header.name} defines {name}, which is not XATTN_" for name in MACRO.findall(header.read_text())]
        faults += [f"include/xattn/{header.name} includes {name}" for name in FOREIGN.findall(header.read_text())]
    for room, path in files:
        name = path.relative_to(ROOT)
        if room not in below:
            faults.append(f"{name} is in no room of src/README.md")
            continue
        if path.is_relative_to(ROOT / "src"):
            lines[room] += lines_of_code(path)
            if path.stem != "main":
                places[path.stem].add(room)
        for own, public in INCLUDE.findall(path.read_text()):
            other = own.split("/")[0] if "/" in own else room
            if public:
                other = room_of_header.get(public)
            if other in ("caption", "common", "serve", "transcribe", "vqa"):
                other = "examples"
            if other not in below[room]:
                faults.append(f"{name} includes {own or public}, of a room ({other}) that {room} does not stand on")
    faults += [f"{stem} is a file's name in several rooms: {', '.join(sorted(rooms))}"
               for stem, rooms in places.items() if len(rooms) > 1]
    for what, rooms, budget, goal in table("budgets"):
        total, most = sum(lines[room] for room in names(rooms)), int(budget.replace(",", ""))
        print(f"{what}: {total:,} lines of {most:,} (goal: {goal})")
        if total > most:
            faults.append(f"{what} has {total:,} lines of code, over its budget of {most:,}")
    if arguments:
        for room in below:
            print(f"  {room:12}{lines[room]:6,}")
    for fault in faults:
        print(f"check_rooms.py: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
