# SPDX-License-Identifier: Apache-2.0
"""The definition in float64, and what PyTorch offers: eager, scaled_dot_product_attention, nn.MultiheadAttention, torch.compile."""

import copy
import math
import sys

import torch
import torch._inductor.config as config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import blocks
from .layer import EPS, Absent, Layer


def torch_layer(layer, device="cpu", dtype=None):
    """The same layer with torch tensors."""
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

    def __init__(self, layer):
        self.l = layer

    def heads(self, x, n, norm):
        over = self.l.norm if norm is not None else "-"
        if over == "across_heads":
            x = F.rms_norm(x, norm.shape, norm, EPS)
        x = x.view(x.shape[0], x.shape[1], n, -1)
        if over == "per_head":
            x = F.rms_norm(x, norm.shape, norm, EPS)
        return x.transpose(1, 2)

    def context(self, key, value, w):
        k = self.heads(F.linear(key, w.wk, w.bk), self.l.G, w.nk)
        return k, self.heads(F.linear(value, w.wv, w.bv), self.l.G, None)

    def project(self, query, w):
        return self.heads(F.linear(query, w.wq, w.bq), self.l.H, w.nq)

    def merge(self, mixed, w):
        return F.linear(mixed.transpose(1, 2).flatten(2), w.wo, w.bo)

    def eager(self, query, k, v, w, wanted="none"):
        if self.l.G < self.l.H:
            k, v = (x.repeat_interleave(self.l.H // self.l.G, 1) for x in (k, v))
        logits = torch.matmul(self.project(query, w), k.transpose(-2, -1)) / math.sqrt(self.l.d)
        if w.bias is not None:
            logits = logits + w.bias
        weights = torch.softmax(logits, -1)
        output = self.merge(torch.matmul(weights, v), w)
        return (output, *{"none": (), "mean": (weights.mean(1),), "per-head": (weights,)}[wanted])

    def sdpa(self, query, k, v, w, wanted="none"):
        q = self.project(query, w).expand(self.l.B, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, w.bias, enable_gqa=self.l.G != self.l.H)
        return (self.merge(mixed, w),)


class BlockModule(torch.nn.Module):
    """A row of blocks.json; `fused`: with scaled_dot_product_attention."""

    def __init__(self, block, fused):
        super().__init__()
        self.block, self.fused = block, fused
        for name, array in block.weights.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(array), requires_grad=False))

    def forward(self, *inputs):
        return (blocks.forward(self.block, self, inputs),)

    def linear(self, x, name):
        return F.linear(x, getattr(self, name + "_w"), getattr(self, name + "_b", None))

    def norm(self, x, name):
        weight = getattr(self, name + "_w")
        if self.block.norm == "rms":
            return F.rms_norm(x, weight.shape, weight, blocks.EPS)
        return F.layer_norm(x, weight.shape, weight, getattr(self, name + "_b"), blocks.EPS)

    def gate(self, x, name):
        return x * getattr(self, name).tanh()

    def activation(self, x):
        return F.relu(x) if self.block.activation == "relu" else F.gelu(x)

    def add(self, x, y):
        return x + y

    def heads(self, x):
        return x.view(x.shape[0], x.shape[1], self.block.H, -1).transpose(1, 2)

    def attend(self, q, k, v):
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.block.scale)
        else:
            mixed = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.block.scale, -1), v)
        return mixed.transpose(1, 2).flatten(2)


def exact(layer, wanted):
    """Places of queries, and the results that every candidate must reproduce there, in float64."""
    if isinstance(layer, blocks.Block):
        inputs = [torch.from_numpy(array).double() for array in layer.inputs]
        return torch.arange(layer.Lq), BlockModule(layer, False).double()(*inputs)
    most = 128  # few enough to be quick
    places = torch.arange(layer.Lq) if layer.Lq <= most else torch.arange(most) * (layer.Lq - 1) // (most - 1)
    part = copy.copy(layer)
    part.query = layer.query[:, places.numpy()]
    wide = torch_layer(part, dtype=torch.float64)
    steps = Steps(wide)
    with torch.no_grad():
        return places, steps.eager(wide.query, *steps.context(wide.key, wide.value, wide), wide, wanted)


def check(name, found, truth, allowed):
    """The largest error relative to the largest element; exits if it is too large."""
    places, expected = truth
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        x = torch.as_tensor(x).detach().cpu().double()
        x = x[:, places] if x.dim() == 3 else x[:, :, places]
        error = ((x - y).abs().max() / y.abs().max()).item()
        if not error <= allowed:
            sys.exit(f"bench_peers.py: {name} differs from float64 by {error:.1e}")
        largest = max(largest, error)
    return largest


# ---- Candidates: of each a name and a function that makes its call ----------------------------------------------------------


def torch_calls(layer, wanted, transform=None, device="cpu", dtype=None):
    """Functions that make eager and sdpa; `transform` compiles a module for inputs."""
    if isinstance(layer, blocks.Block):
        names = ["eager"] if layer.kind == "linear" else ["eager", "sdpa"]
        return {name: lambda fused=name == "sdpa": block_call(layer, fused, transform) for name in names}
    w = torch_layer(layer, device, dtype)
    steps = Steps(w)
    train = layer.timed == "backward"

    class Attention(torch.nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.attend = attend
            for name in Layer.WEIGHTS + (["query"] if layer.learned else []):
                tensor = getattr(w, name)
                self.register_parameter(
                    name, None if tensor is None else torch.nn.Parameter(tensor.clone(), requires_grad=train)
                )
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


def block_call(block, fused, transform):
    module = BlockModule(block, fused).eval()
    inputs = [torch.from_numpy(array) for array in block.inputs]
    run = transform(module, inputs) if transform else module
    return lambda: run(*inputs)


def mha_call(layer, wanted, batch_first):
    if layer.timed == "attend":
        raise Absent("it keeps no context")
    if layer.Eo != layer.Eq or layer.inner_qk != layer.Eq or layer.e != layer.d:
        raise Absent("its heads have the features of the query")
    if layer.G != layer.H or layer.norm != "-":
        raise Absent("it has no groups and no norms")
    w = torch_layer(layer)
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
        output, weights = module(
            asked, key, value, ignored, need_weights=wanted != "none", average_attn_weights=wanted != "per-head"
        )
        if train:
            torch.autograd.grad(output, leaves, w.grad if batch_first else w.grad.transpose(0, 1))
        output = output if batch_first else output.transpose(0, 1)
        return (output,) if wanted == "none" else (output, weights)

    return call


def candidates_pytorch(layer, wanted, threads):
    calls = torch_calls(layer, wanted)
    if isinstance(layer, blocks.Block):
        return calls
    calls["mha, sequence first"] = lambda: mha_call(layer, wanted, False)
    calls["mha, batch first"] = lambda: mha_call(layer, wanted, True)
    return calls


def candidates_compile(layer, wanted, threads):
    torch._dynamo.reset()
    train = layer.timed == "backward"
    config.freezing = not train
    config.cpp.enable_concat_linear = True
    config.cpp.threads = threads
    wrapped = {"cpp_wrapper": True}
    tuned = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
    # Where lengths may change, linears with frozen weights are oneDNN's, otherwise MKL's; autotuning has kernels of its own besides.
    settings = {
        "dynamic, C++ wrapper": (True, wrapped),
        "max-autotune, C++ wrapper": (False, wrapped | tuned),
        "dynamic, max-autotune": (True, tuned),
    }
    if train:
        settings = {"": (False, {})}

    def transform(dynamic, options):
        def apply(module, inputs):
            for tensor in inputs:
                axis = 2 if tensor.dim() == 4 else 1  # of the length
                if dynamic and tensor.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
            return torch.compile(module, fullgraph=True, options=options)

        return apply

    name = "sdpa" if "sdpa" in torch_calls(layer, wanted) else "eager"
    return {
        f"{name}, {text}".rstrip(", "): torch_calls(layer, wanted, transform(*setting))[name]
        for text, setting in settings.items()
    }


def candidates_cuda(layer, wanted, threads):
    torch._dynamo.reset()

    def compiled(module, inputs):
        return torch.compile(module, fullgraph=True, dynamic=False, mode="max-autotune")

    def with_backend(backend):
        call = torch_calls(layer, wanted, None, "cuda", torch.bfloat16)["sdpa"]()

        def run():
            with sdpa_kernel(backend):
                return call()

        return run

    calls = torch_calls(layer, wanted, None, "cuda", torch.bfloat16)
    for name, make in torch_calls(layer, wanted, compiled, "cuda", torch.bfloat16).items():
        calls["torch.compile, " + name] = make
    if wanted == "none":
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("math", SDPBackend.MATH),
        ):
            calls["sdpa, " + name] = lambda backend=backend: with_backend(backend)
    return calls
