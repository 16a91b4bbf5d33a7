# SPDX-License-Identifier: Apache-2.0
"""The rows of src/bench/shapes.csv, their random numbers, and the timing of calls, for all runtimes."""

import csv
import sys
import time
from pathlib import Path

import numpy

SHAPES = Path(__file__).resolve().parent.parent.parent / "src" / "bench" / "shapes.csv"
EPS = 1e-6  # of the norms


class Absent(Exception):
    """Why a candidate cannot run a row."""


def read_shapes():
    with SHAPES.open() as file:
        rows = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter=";"))
    for row in rows:
        for name in "B H G Lq Lk valid Eq Ek Eo inner_qk inner_v".split():
            row[name] = int(row[name])
        row["d"], row["e"] = row["inner_qk"] // row["H"], row["inner_v"] // row["H"]
    return rows


def gflop(row):
    """The operations of the timed part, in the standard order, in 1e9; a multiplication and an addition are two."""
    inner = row["inner_qk"] + row["inner_v"]
    context = row["Lk"] * row["Ek"] * inner * row["G"] // row["H"] if row["timed"] != "attend" else 0
    query = row["Lq"] * (row["Eq"] * row["inner_qk"] + row["Lk"] * inner + row["inner_v"] * row["Eo"])
    return 2e-9 * row["B"] * (context + query) * (3 if row["timed"] == "backward" else 1)


def choose(rows, names):
    if not names:
        return rows
    chosen = []
    for name in names:
        exact = [row for row in rows if row["name"] == name]
        found = exact or [row for row in rows if name.lower() in row["name"].lower()]
        if not found:
            sys.exit(f"bench_peers.py: no row is named {name}")
        chosen += found
    return chosen


def measure(calls, seconds, wait=lambda: None):
    """As src/bench/measure.h: in turns, in twenty rounds, in samples of at least 200 us."""
    repeats, spent, samples = [1] * len(calls), [0.0] * len(calls), [[] for _ in calls]
    clock = time.perf_counter

    def sample(i):
        call = calls[i]
        begin = clock()
        for _ in range(repeats[i]):
            call()
        wait()
        return clock() - begin

    def keep(i, taken):
        spent[i] += taken
        samples[i].append(1e6 * taken / repeats[i])

    wait()
    for i in range(len(calls)):
        taken = sample(i)
        if taken > seconds:
            keep(i, taken)
        while taken < 200e-6:
            repeats[i] *= 2
            taken = sample(i)
    for turn in range(1, 21):
        for k in range(len(calls)):
            i = (k + turn) % len(calls)
            while spent[i] < seconds * turn / 20 or (len(samples[i]) < 2 and spent[i] < 10):
                keep(i, sample(i))
    result = []
    for each in samples:
        low, median, high, p95 = numpy.quantile(each, [0.25, 0.5, 0.75, 0.95])
        result.append({"us": median, "low": low, "high": high, "p95": p95, "least": min(each), "samples": len(each)})
    return result


class Layer:
    """Weights [out, in] and inputs of a row as numpy float32, the same for each runtime."""

    def __init__(self, row):
        self.__dict__.update(row)
        self.row = row
        self.learned, self.one_context = row["query"] == "learned", row["value"] == "key"
        random = numpy.random.default_rng(0)

        def uniform(*shape, bound):
            return random.uniform(-bound, bound, shape).astype(numpy.float32)

        def linear(inner, outer):
            return uniform(outer, inner, bound=inner**-0.5), uniform(outer, bound=inner**-0.5)

        kv = self.G * self.d, self.G * self.e
        self.wq, self.bq = linear(self.Eq, self.inner_qk)
        self.wk, self.bk = linear(self.Ek, kv[0])
        self.wv, self.bv = linear(self.Ek, kv[1])
        self.wo, self.bo = linear(self.inner_v, self.Eo)
        span = {"-": None, "per_head": (self.d, self.d), "across_heads": (self.inner_qk, kv[0])}[self.norm]
        self.nq, self.nk = (numpy.ones(n, numpy.float32) for n in span) if span else (None, None)
        normal = lambda *shape: random.standard_normal(shape, numpy.float32)
        self.query = normal(1 if self.learned else self.B, self.Lq, self.Eq)
        self.key = normal(self.B, self.Lk, self.Ek)
        self.value = self.key if self.one_context else normal(self.B, self.Lk, self.Ek)
        self.keep = self.bias = None
        if self.valid < self.Lk:
            self.keep = numpy.broadcast_to(numpy.arange(self.Lk) < self.valid, (self.B, self.Lk)).copy()
            self.bias = numpy.where(self.keep, 0, -numpy.inf).astype(numpy.float32)[:, None, None, :]
        self.grad = normal(self.B, self.Lq, self.Eo) if self.timed == "backward" else None

    WEIGHTS = ["wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo", "nq", "nk"]


def gigabytes_needed(row, logits):
    """An upper bound on the memory of a candidate, in 1e9 bytes; `logits`: whether it keeps the logits of all heads in memory."""
    inner = row["H"] * max(row["d"], row["e"])
    rows = row["B"] * (row["Lq"] * (row["Eq"] + row["Eo"] + 3 * inner) + row["Lk"] * (row["Ek"] + 3 * inner))
    weights = 4 * inner * (row["Eq"] + 2 * row["Ek"] + row["Eo"])
    maps = 2.5 * row["B"] * row["H"] * row["Lq"] * row["Lk"] if logits else 0
    return 4e-9 * (rows + weights + maps) * (2.5 if row["timed"] == "backward" else 1)


def gigabytes_free():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1.024e-6
