#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times the rows of src/bench/shapes.csv in other runtimes, each alone in a process of its own, at its best settings.

    .venv-bench/bin/python scripts/bench_peers.py --shape "SD1.5 16x16" --threads 1 2

Prints one object of JSON, as `xattn_bench --json` does. Each candidate is compared with float64 before it is timed; the candidates
of one runtime are timed by turns.

    pytorch       eager; sdpa; mha: nn.MultiheadAttention, the sequence first or the batch first
    compile       torch.compile of eager and of sdpa: freezing, packed weights, linears of one input made one; with a C++ wrapper too
    onnxruntime   the plain graph, and the MultiHeadAttention operator: all graph optimizations, inputs and outputs bound
    openvino      the plain graph, and its ScaledDotProductAttention: latency hint, float32, inputs and outputs bound
    cuda          eager; sdpa with each backend; torch.compile with max-autotune and CUDA graphs: bfloat16
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = Path(__file__).resolve().parent.parent / "src" / "bench" / "shapes.csv"
PACKAGES = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2"]
PACKAGES_CPU = ["onnx==1.23.2", "onnxruntime==1.32.0", "openvino==2026.4.1"]
RUNTIMES = ["pytorch", "compile", "onnxruntime", "openvino"]
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


# ---- Time --------------------------------------------------------------------------------------------------------------------


def measure(calls, seconds, wait=lambda: None):
    """As src/bench/measure.h: by turns, in twenty rounds, in samples of 200 us or more."""
    repeats, spent, samples = [1] * len(calls), [0.0] * len(calls), [[] for _ in calls]
    clock = time.perf_counter

    def sample(i):
        call = calls[i]
        begin = clock()
        for _ in range(repeats[i]):
            call()
        wait()
        return clock() - begin

    wait()
    for i in range(len(calls)):
        while sample(i) < 200e-6:
            repeats[i] *= 2
    for turn in range(1, 21):
        for k in range(len(calls)):
            i = (k + turn) % len(calls)
            while spent[i] < seconds * turn / 20 or len(samples[i]) < 2:
                taken = sample(i)
                spent[i] += taken
                samples[i].append(1e6 * taken / repeats[i])
    import numpy

    result = []
    for each in samples:
        low, median, high = numpy.quantile(each, [0.25, 0.5, 0.75])
        result.append({"us": median, "low": low, "high": high, "least": min(each), "samples": len(each)})
    return result


# ---- A row: numbers, and the definition --------------------------------------------------------------------------------------


class Layer:
    """Weights [out, in] and inputs of a row as numpy float32, the same for each runtime."""

    def __init__(self, row):
        import numpy

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


def gigabytes(row, logits):
    inner = row["H"] * max(row["d"], row["e"])
    rows = row["B"] * (row["Lq"] * (row["Eq"] + row["Eo"] + 3 * inner) + row["Lk"] * (row["Ek"] + 3 * inner))
    weights = 4 * inner * (row["Eq"] + 2 * row["Ek"] + row["Eo"])
    maps = 2.5 * row["B"] * row["H"] * row["Lq"] * row["Lk"] if logits else 0
    return 4e-9 * (rows + weights + maps) * (2.5 if row["timed"] == "backward" else 1)


def gigabytes_free():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1.024e-6


def torch_layer(torch, layer, device="cpu", dtype=None):
    """The same layer with torch tensors."""
    import copy

    result = copy.copy(layer)
    dtype = dtype or torch.float32
    for name in [*Layer.WEIGHTS, "query", "key", "value", "keep", "bias", "grad"]:
        array = getattr(layer, name)
        if array is not None:
            tensor = torch.from_numpy(array).to(device)
            setattr(result, name, tensor if tensor.dtype == torch.bool else tensor.to(dtype))
    if layer.one_context:
        result.value = result.key
    return result


class Steps:
    """The steps of attention on torch tensors."""

    def __init__(self, torch, layer):
        self.torch, self.F, self.l = torch, torch.nn.functional, layer

    def heads(self, x, n, norm):
        over = self.l.norm if norm is not None else "-"
        if over == "across_heads":
            x = self.F.rms_norm(x, norm.shape, norm, EPS)
        x = x.view(x.shape[0], x.shape[1], n, -1)
        if over == "per_head":
            x = self.F.rms_norm(x, norm.shape, norm, EPS)
        return x.transpose(1, 2)

    def context(self, key, value, w):
        k = self.heads(self.F.linear(key, w.wk, w.bk), self.l.G, w.nk)
        return k, self.heads(self.F.linear(value, w.wv, w.bv), self.l.G, None)

    def project(self, query, w):
        return self.heads(self.F.linear(query, w.wq, w.bq), self.l.H, w.nq)

    def merge(self, mixed, w):
        return self.F.linear(mixed.transpose(1, 2).flatten(2), w.wo, w.bo)

    def eager(self, query, k, v, w, wanted="none"):
        if self.l.G < self.l.H:
            k, v = (x.repeat_interleave(self.l.H // self.l.G, 1) for x in (k, v))
        logits = self.torch.matmul(self.project(query, w), k.transpose(-2, -1)) / math.sqrt(self.l.d)
        if w.bias is not None:
            logits = logits + w.bias
        weights = self.torch.softmax(logits, -1)
        output = self.merge(self.torch.matmul(weights, v), w)
        return (output, *{"none": (), "mean": (weights.mean(1),), "per-head": (weights,)}[wanted])

    def sdpa(self, query, k, v, w, wanted="none"):
        q = self.project(query, w).expand(self.l.B, -1, -1, -1)
        mixed = self.F.scaled_dot_product_attention(q, k, v, w.bias, enable_gqa=self.l.G != self.l.H)
        return (self.merge(mixed, w),)


def exact(torch, layer, wanted):
    """Places of queries, what every candidate must give there in float64, and gradients by name."""
    wide = torch_layer(torch, layer, dtype=torch.float64)
    steps = Steps(torch, wide)
    most = 128
    places = torch.arange(layer.Lq)
    if layer.Lq > most and layer.timed != "backward":
        places = torch.arange(most) * (layer.Lq - 1) // (most - 1)
        wide.query = wide.query[:, places]
    names = leaf_names(layer) if layer.timed == "backward" else []
    for name in names:
        getattr(wide, name).requires_grad_()
    if layer.one_context:
        wide.value = wide.key
    with torch.set_grad_enabled(bool(names)):
        results = steps.eager(wide.query, *steps.context(wide.key, wide.value, wide), wide, wanted)
        grads = torch.autograd.grad(results[0], [getattr(wide, n) for n in names], wide.grad) if names else []
    return places, [x.detach() for x in results], dict(zip(names, grads))


def leaf_names(layer):
    return ["query", "key"] + ([] if layer.one_context else ["value"]) + [n for n in Layer.WEIGHTS if getattr(layer, n) is not None]


def check(torch, name, found, truth, allowed):
    """The largest error relative to the largest element; exits if it is too large."""
    places, expected, _ = truth
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        x = torch.as_tensor(x).detach().cpu().double()
        x = x[:, places] if x.dim() == 3 else x[:, :, places]
        error = ((x - y).abs().max() / y.abs().max()).item()
        if not error <= allowed:
            sys.exit(f"bench_peers.py: {name} differs from float64 by {error:.1e}")
        largest = max(largest, error)
    return largest


# ---- Runtimes ----------------------------------------------------------------------------------------------------------------
# Each gives pairs of a candidate's name and a function that makes it: () -> (call, results of a call as a tuple of arrays).


def torch_calls(torch, layer, wanted, transform=None, device="cpu", dtype=None):
    """Functions that make eager and sdpa; `transform` compiles a module for inputs."""
    w = torch_layer(torch, layer, device, dtype)
    steps = Steps(torch, w)
    train = layer.timed == "backward"

    class Attention(torch.nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.attend = attend
            for name in Layer.WEIGHTS + (["query"] if layer.learned else []):
                tensor = getattr(w, name)
                self.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor.clone(), requires_grad=train))
            self.bias = w.bias

        def forward(self, *inputs):
            if layer.learned:
                inputs = (self.query, *inputs)
            query, *context = inputs
            if layer.timed != "attend":
                context = steps.context(context[0], context[-1], self)
            return self.attend(query, *context, self, wanted)

    def make(attend):
        module = Attention(attend).train(train)
        inputs = [] if layer.learned else [w.query]
        if layer.timed == "attend":
            with torch.inference_mode():
                inputs += [x.contiguous() for x in steps.context(w.key, w.value, w)]
        else:
            inputs += [w.key] if layer.one_context else [w.key, w.value]
        inputs = [x.clone().requires_grad_(train) for x in inputs]
        run = transform(module, inputs) if transform else module
        if not train:
            def call():
                return run(*inputs)
        else:
            leaves = inputs + list(module.parameters())

            def call():
                output = run(*inputs)[0]
                torch.autograd.grad(output, leaves, w.grad)
                return (output,)
        return call

    result = {"eager": lambda: make(steps.eager)}
    if wanted == "none":
        result["sdpa"] = lambda: make(steps.sdpa)
    return result


def mha_call(torch, layer, wanted, batch_first):
    if layer.timed == "attend":
        raise Absent("it keeps no context")
    if layer.Eo != layer.Eq or layer.inner_qk != layer.Eq or layer.e != layer.d:
        raise Absent("its heads have the features of the query")
    if layer.G != layer.H or layer.norm != "-":
        raise Absent("it has no groups and no norms")
    w = torch_layer(torch, layer)
    train = layer.timed == "backward"
    module = torch.nn.MultiheadAttention(layer.Eq, layer.H, kdim=layer.Ek, vdim=layer.Ek, batch_first=batch_first).train(train)
    with torch.no_grad():
        if module.in_proj_weight is not None:
            module.in_proj_weight.copy_(torch.cat([w.wq, w.wk, w.wv]))
        else:
            for name, weight in (("q", w.wq), ("k", w.wk), ("v", w.wv)):
                getattr(module, name + "_proj_weight").copy_(weight)
        module.in_proj_bias.copy_(torch.cat([w.bq, w.bk, w.bv]))
        module.out_proj.weight.copy_(w.wo)
        module.out_proj.bias.copy_(w.bo)
    module.requires_grad_(train)
    order = (lambda x: x.clone()) if batch_first else (lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format))
    query, key = order(w.query).requires_grad_(train), order(w.key).requires_grad_(train)
    value = key if layer.one_context else order(w.value).requires_grad_(train)
    ignored = None if w.keep is None else ~w.keep
    leaves = [query, key] + ([] if layer.one_context else [value]) + list(module.parameters())

    def call():
        asked = query
        if layer.learned:
            asked = query.expand(layer.B, -1, -1) if batch_first else query.expand(-1, layer.B, -1)
        output, weights = module(asked, key, value, ignored, need_weights=wanted != "none", average_attn_weights=wanted != "per-head")
        if train:
            torch.autograd.grad(output, leaves, w.grad if batch_first else w.grad.transpose(0, 1))
        output = output if batch_first else output.transpose(0, 1)
        return (output,) if wanted == "none" else (output, weights)

    return call


def pytorch(layer, wanted, threads):
    import torch

    calls = torch_calls(torch, layer, wanted)
    calls["mha, sequence first"] = lambda: mha_call(torch, layer, wanted, False)
    calls["mha, batch first"] = lambda: mha_call(torch, layer, wanted, True)
    return calls


def compile(layer, wanted, threads):
    import torch
    import torch._inductor.config as config

    train = layer.timed == "backward"
    config.freezing = not train
    config.cpp.enable_concat_linear = True
    config.cpp.threads = threads
    # Where lengths may change, linears with frozen weights are oneDNN's, otherwise MKL's. max_autotune chose nothing else than these.
    settings = [("sdpa", "", False, {}), ("sdpa", ", dynamic", True, {}), ("sdpa", ", dynamic, C++ wrapper", True, {"cpp_wrapper": True}),
                ("eager", ", dynamic", True, {})]
    if train:
        settings = [("sdpa", "", False, {}), ("eager", "", False, {})]
    if wanted != "none":
        settings = [("eager", ", dynamic", True, {})]

    def transform(dynamic, options):
        def apply(module, inputs):
            torch._dynamo.reset()
            for tensor in inputs:
                axis = 2 if tensor.dim() == 4 else 1  # of the length
                if dynamic and tensor.shape[axis] > 1:
                    torch._dynamo.mark_dynamic(tensor, axis)
            return torch.compile(module, fullgraph=True, options=options)
        return apply

    return {name + ending: torch_calls(torch, layer, wanted, transform(*setting))[name] for name, ending, *setting in settings}


def onnx_model(layer, wanted, operator):
    """The layer as an ONNX graph: of plain operations, or with the MultiHeadAttention operator of ONNX Runtime."""
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name, array):
        constants.append(numpy_helper.from_array(numpy.ascontiguousarray(array), name))
        return name

    def node(kind, *inputs, domain="", outputs=None, **attributes):
        outputs = outputs or [f"{kind}_{len(nodes)}"]
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def shape(*sizes):
        return constant(f"shape_{len(constants)}", numpy.array(sizes, numpy.int64))

    def linear(x, name):
        weight = constant("w" + name, getattr(layer, "w" + name).T)
        return node("Add", node("MatMul", x, weight), constant("b" + name, getattr(layer, "b" + name)))

    def rms(x, weight, name):
        return node("SimplifiedLayerNormalization", x, constant(name, weight), axis=-1, epsilon=EPS)

    def norm_of(x, n, weight, name):
        """[B, L, n d] -> the same, with the norm."""
        if weight is None:
            return x
        if layer.norm == "across_heads":
            return rms(x, weight, name)
        split = rms(node("Reshape", x, shape(0, 0, n, -1)), weight, name)
        return node("Reshape", split, shape(0, 0, -1))

    def split(x, n):
        return node("Transpose", node("Reshape", x, shape(0, 0, n, -1)), perm=[0, 2, 1, 3])

    def for_all_heads(x):
        """[B, G, L, size] -> [B, H, L, size]"""
        if layer.G == layer.H:
            return x
        expanded = node("Expand", node("Unsqueeze", x, shape(2)), shape(1, 1, layer.H // layer.G, 1, 1))
        return node("Reshape", expanded, shape(0, layer.H, layer.Lk, -1))

    inputs, feeds = [], {}

    def given(name, array):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT if array.dtype == numpy.float32 else TensorProto.INT32, array.shape))
        feeds[name] = array
        return name

    query = constant("query", layer.query) if layer.learned else given("query", layer.query)
    q = norm_of(linear(query, "q"), layer.H, layer.nq, "nq")
    if layer.timed == "attend":
        k_array, v_array = numpy_context(layer)  # [B, G, Lk, d]
        k, v = given("k", k_array), given("v", v_array)
    else:
        key = given("key", layer.key)
        value = key if layer.one_context else given("value", layer.value)
        k = norm_of(linear(key, "k"), layer.G, layer.nk, "nk")
        v = linear(value, "v")
    weights = None
    if operator:
        if wanted != "none":
            raise Absent("it returns no weights")
        if layer.G != layer.H:
            raise Absent("it has no groups")
        if layer.learned and layer.B > 1:
            q = node("Expand", q, shape(layer.B, 1, 1))
        mask = [given("keep", layer.keep.astype(numpy.int32))] if layer.keep is not None else []
        mixed = node("MultiHeadAttention", q, k, v, *([""] + mask if mask else []), domain="com.microsoft", num_heads=layer.H)
    else:
        if layer.timed != "attend":
            k, v = split(k, layer.G), split(v, layer.G)
        scaled = node("Mul", split(q, layer.H), constant("scale", numpy.float32(layer.d**-0.5)))
        logits = node("MatMul", scaled, node("Transpose", for_all_heads(k), perm=[0, 1, 3, 2]))
        if layer.bias is not None:
            logits = node("Add", logits, constant("bias", numpy.maximum(layer.bias, -1e30)))
        weights = node("Softmax", logits, axis=-1)
        mixed = node("Transpose", node("MatMul", weights, for_all_heads(v)), perm=[0, 2, 1, 3])
        mixed = node("Reshape", mixed, shape(0, 0, -1))
    outputs = [linear(mixed, "o")]
    if wanted != "none":
        outputs.append(node("ReduceMean", weights, shape(1), keepdims=0) if wanted == "mean" else weights)
    sizes = [[layer.B, layer.Lq, layer.Eo], [layer.B, layer.Lq, layer.Lk] if wanted == "mean" else [layer.B, layer.H, layer.Lq, layer.Lk]]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in zip(outputs, sizes)]
    graph = helper.make_graph(nodes, "attention", inputs, infos, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), feeds, list(zip(outputs, sizes))


def numpy_context(layer):
    """Projected k and v of a row without norms, [B, G, Lk, size]."""
    import numpy

    assert layer.norm == "-"
    return [numpy.ascontiguousarray((x @ w.T + b).reshape(layer.B, layer.Lk, layer.G, -1).transpose(0, 2, 1, 3))
            for x, w, b in ((layer.key, layer.wk, layer.bk), (layer.value, layer.wv, layer.bv))]


def write_model(model, folder):
    """Large models keep their weights in a file beside them."""
    import onnx

    path = os.path.join(folder, "model.onnx")
    onnx.save_model(model, path, save_as_external_data=model.ByteSize() > 1 << 30, location="weights")
    return path


def onnxruntime(layer, wanted, threads):
    import numpy
    import onnxruntime as ort

    if layer.timed == "backward":
        raise Absent("it has no gradients")

    def make(operator):
        model, feeds, outputs = onnx_model(layer, wanted, operator)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            session = ort.InferenceSession(write_model(model, folder), options, ["CPUExecutionProvider"])
        binding = session.io_binding()
        kept = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        results = [ort.OrtValue.ortvalue_from_numpy(numpy.empty(size, numpy.float32)) for _, size in outputs]
        for (name, _), value in zip(outputs, results):
            binding.bind_ortvalue_output(name, value)

        def call():
            session.run_with_iobinding(binding)
            return results

        call.results = lambda: [x.numpy() for x in results]
        call.kept = kept
        return call

    return {"plain graph": lambda: make(False), "MultiHeadAttention": lambda: make(True)}


def openvino(layer, wanted, threads):
    import numpy
    import openvino as ov
    from openvino import opset13 as ops

    if layer.timed == "backward":
        raise Absent("it has no gradients")

    def sdpa_model():
        if wanted != "none":
            raise Absent("it returns no weights")
        if layer.G != layer.H or layer.norm != "-":
            raise Absent("left to the plain graph")
        constant = lambda array: ops.constant(numpy.ascontiguousarray(array))
        ints = lambda *sizes: ops.constant(numpy.array(sizes, numpy.int64))
        parameters, feeds = [], []

        def given(array):
            parameters.append(ops.parameter(array.shape, numpy.float32))
            feeds.append(array)
            return parameters[-1]

        linear = lambda x, name: ops.add(ops.matmul(x, constant(getattr(layer, "w" + name)), False, True), constant(getattr(layer, "b" + name)))
        split = lambda x, n: ops.transpose(ops.reshape(x, ints(0, 0, n, -1), True), ints(0, 2, 1, 3))
        q = split(linear(constant(layer.query) if layer.learned else given(layer.query), "q"), layer.H)
        if layer.learned and layer.B > 1:
            q = ops.broadcast(q, ints(layer.B, layer.H, layer.Lq, layer.d))
        if layer.timed == "attend":
            k, v = (given(x) for x in numpy_context(layer))
        else:
            key = given(layer.key)
            value = key if layer.one_context else given(layer.value)
            k, v = split(linear(key, "k"), layer.G), split(linear(value, "v"), layer.G)
        mask = [constant(numpy.maximum(layer.bias, -1e30))] if layer.bias is not None else []
        mixed = ops.scaled_dot_product_attention(q, k, v, *mask)
        merged = ops.reshape(ops.transpose(mixed, ints(0, 2, 1, 3)), ints(0, 0, -1), True)
        return ov.Model([linear(merged, "o")], parameters), feeds

    def make(fused):
        core = ov.Core()
        with tempfile.TemporaryDirectory() as folder:
            if fused:
                model, feeds = sdpa_model()
            else:
                graph, named, _ = onnx_model(layer, wanted, False)
                model = core.read_model(write_model(graph, folder))
                feeds = [named[x.any_name] for x in model.inputs]
            compiled = core.compile_model(model, "CPU", {
                "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "ENABLE_CPU_PINNING": False})
        request = compiled.create_infer_request()
        for i, array in enumerate(feeds):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        results = [ov.Tensor(numpy.zeros(list(x.shape), numpy.float32), shared_memory=True) for x in compiled.outputs]
        for i, tensor in enumerate(results):
            request.set_output_tensor(i, tensor)
        call = lambda: request.infer(share_inputs=True, share_outputs=True)
        call.results = lambda: [x.data for x in results]
        call.kept = feeds
        return call

    return {"plain graph": lambda: make(False), "ScaledDotProductAttention": lambda: make(True)}


def cuda(layer, wanted, threads):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def compiled(module, inputs):
        torch._dynamo.reset()
        return torch.compile(module, fullgraph=True, dynamic=False, mode="max-autotune")

    def with_backend(backend):
        call = torch_calls(torch, layer, wanted, None, "cuda", torch.bfloat16)["sdpa"]()

        def run():
            with sdpa_kernel(backend):
                return call()
        return run

    calls = torch_calls(torch, layer, wanted, None, "cuda", torch.bfloat16)
    for name, make in torch_calls(torch, layer, wanted, compiled, "cuda", torch.bfloat16).items():
        calls["torch.compile, " + name] = make
    if wanted == "none":
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION),
                              ("cudnn", SDPBackend.CUDNN_ATTENTION), ("math", SDPBackend.MATH)):
            calls["sdpa, " + name] = lambda backend=backend: with_backend(backend)
    return calls


def versions(runtime):
    from importlib.metadata import version

    package = {"pytorch": "torch", "compile": "torch", "cuda": "torch"}.get(runtime, runtime)
    return {runtime: version(package)}


def run_one(arguments):
    """All rows in one runtime with so many threads, in this process."""
    import torch

    runtime, threads = arguments.only, arguments.threads[0]
    torch.set_num_threads(threads)
    make_all = {"pytorch": pytorch, "compile": compile, "onnxruntime": onnxruntime, "openvino": openvino, "cuda": cuda}[runtime]
    on_gpu = runtime == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("bench_peers.py: there is no CUDA device here")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    # Sums of float32 differ from float64 by some 1e-6, of bfloat16 by 1e-2.
    allowed = 5e-2 if on_gpu else 1e-4
    results, skipped = [], []
    for row in choose(read_shapes(), arguments.shape):
        if arguments.limit and float(row["gflop"]) > arguments.limit:
            continue
        for wanted in arguments.weights:
            if wanted != "none" and (row["timed"] == "backward" or row["maps"] in ("-", "thrown away")):
                continue
            where = {"row": row["name"], "weights": wanted, "threads": threads, "type": "bfloat16" if on_gpu else "float32", "runtime": runtime}
            print(f"{runtime}, {threads} threads, weights {wanted}: {row['name']}", file=sys.stderr)
            need, free = gigabytes(row, runtime != "pytorch" or wanted != "none"), gigabytes_free()
            if need > free and not on_gpu:
                skipped.append(where | {"candidate": "all", "reason": f"it needs {need:.1f} GB, and {free:.1f} GB are free"})
                continue
            layer = Layer(row)
            truth = exact(torch, layer, wanted)
            ready, calls, errors = [], [], []
            with torch.set_grad_enabled(row["timed"] == "backward"), torch.inference_mode(row["timed"] != "backward"):
                try:
                    makers = make_all(layer, wanted, threads)
                except Absent as reason:
                    skipped.append(where | {"candidate": "all", "reason": str(reason)})
                    continue
                for name, make in makers.items():
                    try:
                        call = make()
                        found = call()
                        found = call.results() if hasattr(call, "results") else found
                    except Absent as reason:
                        skipped.append(where | {"candidate": name, "reason": str(reason)})
                        continue
                    except Exception as reason:
                        print(f"{runtime}, {name}: {reason}", file=sys.stderr)
                        skipped.append(where | {"candidate": name, "reason": str(reason).split("\n")[0][:200]})
                        continue
                    errors.append(check(torch, f"{row['name']}: {runtime}, {name}", found, truth, allowed))
                    ready.append(name)
                    calls.append(call)
                for name, error, times in zip(ready, errors, measure(calls, arguments.seconds, wait)):
                    results.append(where | {"candidate": name, "error": error} | times)
    print(json.dumps({"versions": versions(runtime), "results": results, "skipped": skipped}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=[], help="row by its name, or all with this in their names; repeatable")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", default=["none"], choices=["none", "mean", "per-head"])
    parser.add_argument("--runtime", nargs="+", default=RUNTIMES, choices=[*RUNTIMES, "cuda"])
    parser.add_argument("--seconds", type=float, default=1, help="for each candidate of a row (1)")
    parser.add_argument("--limit", type=float, default=0, help="leave out rows of more thousand million operations")
    parser.add_argument("--packages", action="store_true", help="print what pip is to install (with --runtime cuda, for that), and stop")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.packages:
        return print(*PACKAGES, *([] if arguments.runtime == ["cuda"] else PACKAGES_CPU))
    if arguments.only:
        return run_one(arguments)
    merged = {"versions": {}, "results": [], "skipped": []}
    for threads in arguments.threads:
        for runtime in arguments.runtime:
            command = [sys.executable, __file__, "--only", runtime, "--threads", str(threads), "--seconds", str(arguments.seconds),
                       "--limit", str(arguments.limit), "--weights", *arguments.weights]
            for name in arguments.shape:
                command += ["--shape", name]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            part = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.splitlines()[-1])
            merged["versions"] |= part["versions"]
            merged["results"] += part["results"]
            merged["skipped"] += part["skipped"]
    print(json.dumps(merged, indent=1))


if __name__ == "__main__":
    main()
