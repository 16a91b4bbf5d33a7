# SPDX-License-Identifier: Apache-2.0
"""The rows of src/bench/blocks.json, their random numbers, and what they compute in the operations of any runtime."""

import functools
import json
from pathlib import Path

import numpy

BLOCKS = Path(__file__).resolve().parent.parent.parent / "src" / "bench" / "blocks.json"
EPS = 1e-5  # of the norms
DEFAULTS = {"kept": False, "layers": 1, "B": 1, "biases": "", "norm": None, "placement": "before", "self": False, "gate": False}


def read_blocks():
    return [DEFAULTS | row for row in json.loads(BLOCKS.read_text())["rows"]]


class Block:
    """Weights and inputs of a row as numpy float32, the same for each runtime: `weights` by name, and the list `inputs`."""

    def __init__(self, row):
        self.__dict__.update(row)
        self.timed = "attend" if self.kept else "forward"
        self.inner = row.get("inner", self.Eq)
        random = numpy.random.default_rng(0)
        normal = lambda *shape: random.standard_normal(shape, numpy.float32)
        self.weights = {}

        def uniform(least, most, *shape):
            return random.uniform(least, most, shape).astype(numpy.float32)

        def linear(name, inner, outer, bias):
            bound = inner**-0.5
            self.weights[name + "_w"] = uniform(-bound, bound, outer, inner)
            if bias:
                self.weights[name + "_b"] = uniform(-bound, bound, outer)

        def attention(prefix, names):
            for name in names:
                sizes = {"q": (self.Eq, self.inner), "o": (self.inner, self.Eq)}.get(name, (self.Ek, self.inner))
                linear(prefix + name, *sizes, name in self.biases)

        def norm(name):
            self.weights[name + "_w"] = uniform(0.5, 1.5, self.Eq)
            if self.norm == "layer":
                self.weights[name + "_b"] = uniform(-0.5, 0.5, self.Eq)

        query = normal(self.B, self.Lq, self.Eq)
        contexts = []  # of each projection: its prefix and its input
        if self.kind == "linear":
            linear("linear", self.Eq, self.Eo, False)
        else:
            self.d = self.inner // self.H
            self.scale = row.get("scale", self.d**-0.5)
            key = normal(self.B, self.Lk, self.Ek)
        if self.kind == "decoupled":
            image = normal(self.B, self.image, self.Ek)
            attention("text_", "qkvo")
            attention("image_", "kv")
            contexts = [("text_", key), ("image_", image)]
            self.inputs = [query, key, image]
        elif self.kind == "block":
            for i in range(self.layers):
                attention(f"attention{i}_", "qkvo")
                linear(f"feed_forward{i}_in", self.Eq, self.hidden, "f" in self.biases)
                linear(f"feed_forward{i}_out", self.hidden, self.Eq, "f" in self.biases)
                for branch in (f"attention{i}_", f"feed_forward{i}_"):
                    norm(branch + "norm")
                    if self.gate:
                        self.weights[branch + "gate"] = uniform(0.5, 1, 1)
                contexts.append((f"attention{i}_", key))
            self.inputs = [query] if self.self else [query, key]
        else:
            self.inputs = [query]
        if self.kept:
            self.inputs = [query] + [self.projected(x, prefix + name) for prefix, x in contexts for name in "kv"]

    def projected(self, x, name):
        """[B, L, E] -> [B, H, L, d]"""
        y = x @ self.weights[name + "_w"].T + self.weights.get(name + "_b", numpy.float32(0))
        return numpy.ascontiguousarray(y.reshape(self.B, x.shape[1], self.H, self.d).transpose(0, 2, 1, 3))


def forward(block, ops, inputs):
    """The output of a row. `ops` has the operations of a runtime, with weights by name: linear, norm, gate, activation, add,
    heads: [B, L, H d] -> [B, H, L, d] (or whatever its attend takes), attend: -> [B, Lq, H d]."""
    query, *rest = inputs
    if block.kind == "linear":
        return ops.linear(query, "linear")
    kept = list(zip(rest[::2], rest[1::2])) if block.kept else None

    def context(x, prefix):
        return [ops.heads(ops.linear(x, prefix + name)) for name in "kv"]

    def attend(x, prefix, contexts):
        q = ops.heads(ops.linear(x, prefix + "q"))
        attended = [ops.attend(q, k, v) for k, v in contexts]
        return ops.linear(functools.reduce(ops.add, attended), prefix + "o")

    def add_branch(x, prefix, branch):
        before = block.placement == "before"
        y = branch(ops.norm(x, prefix + "norm") if before else x)
        y = ops.add(x, ops.gate(y, prefix + "gate") if block.gate else y)
        return y if before else ops.norm(y, prefix + "norm")

    if block.kind == "decoupled":
        return attend(query, "text_", kept or [context(rest[0], "text_"), context(rest[1], "image_")])
    x = query
    for i in range(block.layers):
        first, second = f"attention{i}_", f"feed_forward{i}_"
        x = add_branch(
            x, first, lambda y: attend(y, first, [kept[i] if kept else context(y if block.self else rest[0], first)])
        )
        x = add_branch(x, second, lambda y: ops.linear(ops.activation(ops.linear(y, second + "in")), second + "out"))
    return x
