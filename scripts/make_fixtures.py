#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data: results of PyTorch, for the C++ tests to compare with.

    python3 scripts/make_fixtures.py            write all files
    python3 scripts/make_fixtures.py --check    compute all again and compare with the files that are there

Needs torch, numpy and safetensors. One safetensors file for each case of the table CASES, with these tensors:

    weights.NAME                          parameters, by the names of the C++ module
    query, key, value                     inputs; self-attention has only `query`
    mask.key_padding  mask.lengths        masks, by the name of their builder in xattn/mask.h (true = may attend)
    mask.dense        mask.bias
    output, attention_weights             results
    cotangent.output                      the loss is (output * cotangent.output).sum()
    cotangent.attention_weights                       + (attention_weights * cotangent.attention_weights).sum()
    grad.query, grad.weights.NAME, ...    gradients of that loss

and these metadata, some only where they apply:

    options                      JSON, by the names of CrossAttentionOptions, where they differ from the default
    causal                       "upper_left" or "lower_right"
    dtypes, dtype                the types to run in; the type of inputs and weights in the file
    weights, prefix              if they are not in the file: "seed", or a TorchScript file and the prefix of their names there
    truth, shows, seed           the PyTorch code that computed the results; the purpose of the case; the seed of its numbers
    autocast, output_dtype ...   the type of autocast, and the types that PyTorch returns under it
    largest_logit                where logits are large
    script, torch, numpy         what made the file

The cases of BLOCK_CASES, in tests/data/block, are the same for CrossAttentionBlock; `block` is JSON by the names of
CrossAttentionBlockOptions, and `options` those of its attention.

Inputs and weights are stored in a type that holds them exactly. Results are computed from these values in float64 and stored in
float64, so that a run in any type is compared with the exact answer. Most cases lie on a coarse grid of numbers that bfloat16 and
float16 hold exactly too: one file then serves all four types.
"""

import argparse
import io
import json
import math
import os
import pickle
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
LINEARS = ("query_linear", "key_linear", "value_linear", "output_linear")
Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------- the truths


class CrossAttention(nn.Module):
    """The reference."""

    def __init__(self, dim_query: int, dim_key: int, dim_value: int, dim_output: int):
        super().__init__()
        self.query_linear = nn.Linear(dim_query, dim_output)
        self.key_linear = nn.Linear(dim_key, dim_output)
        self.value_linear = nn.Linear(dim_value, dim_output)
        self.output_linear = nn.Linear(dim_output, dim_output)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        Q = self.query_linear(query)
        K = self.key_linear(key)
        V = self.value_linear(value)
        attention_weights = torch.softmax(torch.matmul(Q, K.transpose(-2, -1)) / math.sqrt(K.size(-1)), dim=-1)
        output = self.output_linear(torch.matmul(attention_weights, V))
        return output, attention_weights


def reference(case: "Case", weights: Tensors, query: Tensor, key: Tensor, value: Tensor, masks: Tensors):
    """the reference class CrossAttention, in float64"""
    assert not masks
    return functional_call(CrossAttention(*case.sizes), weights, (query, key, value))


def multihead(case: "Case", weights: Tensors, query: Tensor, key: Tensor, value: Tensor, masks: Tensors):
    """torch.nn.MultiheadAttention(kdim, vdim, need_weights=True, average_attn_weights=False), in float64"""
    Eq, Ek, Ev, Eo = case.sizes
    assert Eq == Eo, "MultiheadAttention has one size for query and output"
    module = nn.MultiheadAttention(Eo, case.heads, kdim=Ek, vdim=Ev, batch_first=True, dtype=torch.float64)
    projections = [weights[f"{linear}.weight"] for linear in LINEARS[:3]]
    if Eq == Ek == Ev:
        parameters = {"in_proj_weight": torch.cat(projections)}
    else:
        parameters = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), projections, strict=True))
    parameters["in_proj_bias"] = torch.cat([weights[f"{linear}.bias"] for linear in LINEARS[:3]])
    parameters |= {f"out_proj.{x}": weights[f"output_linear.{x}"] for x in ("weight", "bias")}

    padding, attn_mask = masks.get("key_padding"), masks.get("bias")
    if "dense" in masks:
        attn_mask = ~masks["dense"]  # here true = ignored
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = over_heads(attn_mask).expand(case.B, case.heads, case.Lq, case.Lk).flatten(0, 1)
    ignored = None if padding is None else ~padding
    arguments = {"key_padding_mask": ignored, "attn_mask": attn_mask, "average_attn_weights": False}
    return functional_call(module, parameters, (query, key, value), arguments)


def sdpa(case: "Case", weights: Tensors, query: Tensor, key: Tensor, value: Tensor, masks: Tensors):
    """F.linear, F.rms_norm or F.layer_norm, F.scaled_dot_product_attention (math backend), in float64"""
    H, G = case.heads, case.kv_heads
    q = project(case, weights, "query", query, H)  # [B, H, Lq, d]
    k = project(case, weights, "key", key, G)  # [B, G, Lk, d]
    v = F.linear(value, weights["value_linear.weight"], weights.get("value_linear.bias")).unflatten(-1, (G, -1)).transpose(1, 2)

    # Called again with the identity for values, the same function gives the attention weights themselves. A row with no key to
    # attend to is zeros in both, and its gradient is zero: PyTorch runs this backend through its `_safe_softmax`.
    identity = torch.eye(case.Lk, dtype=torch.float64).expand(case.B, G, case.Lk, case.Lk)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "lower right causal bias will produce NaNs": no longer, asserted below
        options = {"scale": case.options.get("scale"), "enable_gqa": G != H} | sdpa_mask(case, masks)
        heads = F.scaled_dot_product_attention(q, k, v, **options)  # [B, H, Lq, e]
        attention_weights = F.scaled_dot_product_attention(q, k, identity, **options)  # [B, H, Lq, Lk]

    sums = attention_weights.sum(-1)
    assert torch.all((sums - 1).abs().minimum(sums.abs()) < 1e-14), f"{case.name}: a row sums neither to one nor to zero"
    merged = heads.transpose(1, 2).flatten(2)
    return F.linear(merged, weights["output_linear.weight"], weights.get("output_linear.bias")), attention_weights


def project(case: "Case", weights: Tensors, side: str, x: Tensor, heads: int) -> Tensor:
    """Projects queries or keys, normalises them and splits them into heads: [B, L, E] -> [B, heads, L, d]."""
    x = F.linear(x, weights[f"{side}_linear.weight"], weights.get(f"{side}_linear.bias"))
    if case.options.get("qk_norm_scope") == "across_heads":
        x = normalise(case, weights, side, x)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return normalise(case, weights, side, x)


def normalise(case: "Case", weights: Tensors, side: str, x: Tensor) -> Tensor:
    kind, eps = case.options.get("qk_norm", "none"), case.options.get("qk_norm_eps", 1e-6)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weights[f"{side}_norm.weight"], eps)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weights[f"{side}_norm.weight"], weights[f"{side}_norm.bias"], eps)
    return x


def sdpa_mask(case: "Case", masks: Tensors) -> dict:
    """The masks as arguments of scaled_dot_product_attention, where true = may attend, as in our files."""
    if case.causal and not masks:
        return {"is_causal": True} if case.causal == "upper_left" else {"attn_mask": causal_lower_right(case.Lq, case.Lk)}
    keep = torch.ones(case.B, 1, case.Lq, case.Lk, dtype=torch.bool)
    if case.causal:
        keep = keep.tril(0 if case.causal == "upper_left" else case.Lk - case.Lq)
    if "key_padding" in masks:
        keep = keep & masks["key_padding"][:, None, None, :]
    if "lengths" in masks:
        keep = keep & (torch.arange(case.Lk) < masks["lengths"][:, None])[:, None, None, :]
    if "dense" in masks:
        keep = keep & over_heads(masks["dense"])
    if "bias" in masks:
        return {"attn_mask": over_heads(masks["bias"]).masked_fill(~keep, -math.inf)}
    return {"attn_mask": None if keep.all() else keep}


class DecoderHalf(nn.TransformerDecoderLayer):
    """The part after self-attention, with its attention weights."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
        asks = self.norm2(query) if self.norm_first else query
        mixed, attention_weights = self.multihead_attn(asks, key, value, ignored, average_attn_weights=False)
        if self.norm_first:
            x = query + mixed
            return x + self._ff_block(self.norm3(x)), attention_weights
        x = self.norm2(query + mixed)
        return self.norm3(x + self._ff_block(x)), attention_weights


def decoder_layer(case: "BlockCase", weights: Tensors, query: Tensor, key: Tensor, value: Tensor, masks: Tensors):
    """norm2, multihead_attn, norm3, linear1 and linear2 of torch.nn.TransformerDecoderLayer, in float64"""
    size, before = case.sizes[0], case.block.get("norm_placement", "before") == "before"
    arguments = {"dropout": 0.0, "activation": case.block["activation"], "batch_first": True, "norm_first": before}
    half = DecoderHalf(size, case.heads, case.hidden, dtype=torch.float64, **arguments)
    names = {"attention_norm": "norm2", "attention.output_linear": "multihead_attn.out_proj", "feed_forward_norm": "norm3"}
    names |= {"feed_forward_in": "linear1", "feed_forward_out": "linear2"}
    parameters = {f"{theirs}.{x}": weights[f"{ours}.{x}"] for ours, theirs in names.items() for x in ("weight", "bias")}
    for x in ("weight", "bias"):
        parameters[f"multihead_attn.in_proj_{x}"] = torch.cat([weights[f"attention.{linear}.{x}"] for linear in LINEARS[:3]])
    ignored = ~masks["key_padding"] if "key_padding" in masks else None

    # If its self-attention adds nothing, the whole layer is this half.
    with torch.no_grad():
        half.self_attn.out_proj.weight.zero_()
        half.self_attn.out_proj.bias.zero_()
        whole = nn.TransformerDecoderLayer(size, case.heads, case.hidden, dtype=torch.float64, **arguments)
        whole.load_state_dict(half.state_dict() | parameters)
        asks = query if before else whole.norm1(query)
        expected, _ = functional_call(half, parameters, (asks, key, key, ignored))
        torch.testing.assert_close(whole(query, key, memory_key_padding_mask=ignored), expected)
    return functional_call(half, parameters, (query, key, value, ignored))


def gated(case: "BlockCase", weights: Tensors, query: Tensor, key: Tensor, value: Tensor, masks: Tensors):
    """F.rms_norm or F.layer_norm, the attention of other cases, torch.tanh, F.linear, F.gelu or F.silu, in float64"""
    kind, before = case.block.get("norm", "layer"), case.block.get("norm_placement", "before") == "before"
    activations = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}

    def normalised(x: Tensor, name: str) -> Tensor:
        if kind == "rms":
            return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], 1e-5)
        if kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
        return x

    def entrance(x: Tensor, name: str) -> Tensor:
        return normalised(x, f"{name}_norm") if before else x

    def added(x: Tensor, branch: Tensor, name: str) -> Tensor:
        y = x + torch.tanh(weights[f"{name}_gate"]) * branch
        return y if before else normalised(y, f"{name}_norm")

    inner = {name.removeprefix("attention."): x for name, x in weights.items() if name.startswith("attention.")}
    mixed, attention_weights = sdpa(case, inner, entrance(query, "attention"), key, value, masks)
    x = added(query, mixed, "attention")
    if case.hidden == 0:
        return x, attention_weights
    hidden = F.linear(entrance(x, "feed_forward"), weights["feed_forward_in.weight"], weights["feed_forward_in.bias"])
    hidden = activations[case.block.get("activation", "gelu")](hidden)
    branch = F.linear(hidden, weights["feed_forward_out.weight"], weights["feed_forward_out.bias"])
    return added(x, branch, "feed_forward"), attention_weights


def over_heads(mask: Tensor) -> Tensor:
    """[Lq, Lk] or [B, Lq, Lk] or [B, H, Lq, Lk], any axis but the last may be 1 -> the last form."""
    return mask[:, None] if mask.dim() == 3 else mask


# ----------------------------------------------------------------------------------------------------------------- the cases

ALL_TYPES = ("float64", "float32", "float16", "bfloat16")
WIDE = ("float64", "float32")


@dataclass(frozen=True)
class Case:
    name: str
    shows: str
    truth: Callable
    sizes: tuple[int, int, int, int] = (8, 12, 10, 16)  # dim_query, dim_key, dim_value, dim_output
    B: int = 2
    Lq: int = 4
    Lk: int = 6
    options: dict = field(default_factory=dict)  # options that are not at their default
    masks: dict[str, str] = field(default_factory=dict)  # builder -> axes; "-": a bias with some -inf; "!": rows without keys
    causal: str = ""
    dtypes: tuple[str, ...] = ALL_TYPES
    stored: str = "float32"  # type of inputs and weights in the file
    on_grid: bool = True  # whether their values are such that all four types hold them
    self_attention: bool = False
    sharpness: float = 1  # factor on the query and key projections: logits grow by its square
    rival_keys: bool = False  # keys come in pairs of almost the same logit, so that even large logits have near rivals
    autocast: str = ""

    @property
    def heads(self) -> int:
        return self.options.get("num_heads", 1)

    @property
    def kv_heads(self) -> int:
        return self.options.get("kv_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.options.get("head_dim", self.sizes[3] // self.heads)

    @property
    def value_head_dim(self) -> int:
        return self.options.get("value_head_dim", self.head_dim)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


def heads(n: int, **more) -> dict:
    return {"num_heads": n, "attention_weights": "per_head"} | more


def norm(kind: str, scope: str, **more) -> dict:
    return heads(2, qk_norm=kind, qk_norm_scope=scope, **more)


SQUARE = (16, 12, 10, 16)  # as many features in the query as in the output, which MultiheadAttention needs
SELF = {"sizes": (16, 16, 16, 16), "Lq": 5, "Lk": 5}
NO_BIASES = {f"{x}_bias": False for x in ("query", "key", "value", "output")}

CASES = (
    Case("reference", "the reference with all its tensors", reference),
    Case("float64", "the reference in full float64 precision", reference, dtypes=("float64",), stored="float64", on_grid=False),
    Case("float32", "the reference in full float32 precision", reference, dtypes=WIDE, on_grid=False),
    Case("bfloat16", "values rounded to bfloat16", reference, dtypes=("bfloat16",), stored="bfloat16", on_grid=False),
    Case("float16", "values rounded to float16", reference, dtypes=("float16",), stored="float16", on_grid=False),
    Case("autocast", "float32 module under autocast", reference, dtypes=("float32",), on_grid=False, autocast="bfloat16"),
    Case("one_query", "Lq = 1", reference, Lq=1),
    Case("one_key", "Lk = 1: every weight is one", reference, Lk=1),
    Case("self_attention", "forward(x, x, x)", reference, self_attention=True, **SELF),
    Case("self_attention_heads", "forward(x, x, x) with 4 heads", multihead, self_attention=True, options=heads(4), **SELF),
    Case("large_logits", "logits of several hundred", reference, dtypes=WIDE, on_grid=False, sharpness=30, rival_keys=True),
    # heads
    Case("heads_1", "one head", multihead, sizes=SQUARE, options=heads(1)),
    Case("heads_4", "4 heads", multihead, sizes=SQUARE, options=heads(4)),
    Case("heads_8", "8 heads", multihead, sizes=SQUARE, options=heads(8)),
    Case("heads_4_mean", "the mean of the weights over 4 heads", multihead, sizes=SQUARE, options={"num_heads": 4}),
    Case("sizes_differ", "odd and different sizes of everything", sdpa, sizes=(5, 9, 7, 12), B=3, Lq=5, Lk=7, options=heads(3)),
    Case("grouped_query", "4 heads share 2 key/value heads", sdpa, options=heads(4, kv_heads=2)),
    Case("multi_query", "4 heads share one key/value head", sdpa, options={"num_heads": 4, "kv_heads": 1}),
    Case("head_dim", "heads wider than dim_output / num_heads", sdpa, options=heads(2, head_dim=12)),
    Case("value_head_dim", "value heads of a size of their own", sdpa, options=heads(2, value_head_dim=5)),
    Case("no_biases", "no projection has a bias", sdpa, options=NO_BIASES),
    Case("no_qkv_biases", "only the output projection has a bias", sdpa, options=heads(2) | NO_BIASES | {"output_bias": True}),
    Case("scale_1", "logits that are not scaled (T5)", sdpa, options=heads(4, scale=1.0)),
    Case("no_weights", "no attention weights wanted", sdpa, options={"num_heads": 2, "attention_weights": "none"}),
    # query/key norms
    Case("rms_per_head", "RMSNorm of each head", sdpa, options=norm("rms", "per_head")),
    Case("rms_across_heads", "RMSNorm before the split", sdpa, options=norm("rms", "across_heads", qk_norm_eps=1e-5)),
    Case("rms_grouped_query", "RMSNorm of fewer key than query heads", sdpa, options=norm("rms", "across_heads", kv_heads=1)),
    Case("layer_per_head", "LayerNorm of each head", sdpa, options=norm("layer", "per_head", qk_norm_eps=1e-5)),
    Case("layer_across_heads", "LayerNorm before the split", sdpa, options=norm("layer", "across_heads")),
    # masks
    Case("key_padding", "some keys are padding", multihead, sizes=SQUARE, options=heads(2), masks={"key_padding": "B Lk"}),
    Case("lengths", "contexts of different lengths", sdpa, options=heads(2), masks={"lengths": "B"}),
    Case("dense_2_axes", "dense mask for all batch entries", sdpa, options=heads(2), masks={"dense": "Lq Lk"}),
    Case("dense_3_axes", "dense mask for all heads", sdpa, options=heads(2), masks={"dense": "B Lq Lk"}),
    Case("dense_4_axes", "dense mask for each head", multihead, sizes=SQUARE, options=heads(2), masks={"dense": "B H Lq Lk"}),
    Case("dense_broadcast", "dense mask for each head alone", sdpa, options=heads(2), masks={"dense": "1 H 1 Lk"}),
    Case("bias", "bias with its gradient", multihead, sizes=SQUARE, options=heads(2), masks={"bias": "B H Lq Lk"}),
    Case("bias_broadcast", "bias that batch entries share", sdpa, options=heads(2), masks={"bias": "1 H Lq Lk"}),
    Case("bias_forbids", "bias with -inf", sdpa, options=heads(2), masks={"bias": "-B H Lq Lk"}),
    Case("no_key", "query rows with no key, by a dense mask", sdpa, options=heads(2), masks={"dense": "!B H Lq Lk"}),
    Case("no_key_by_bias", "query rows with no key, by -inf", sdpa, options=heads(2), masks={"bias": "!B Lq Lk"}),
    Case("no_key_by_lengths", "a batch entry with no key", sdpa, masks={"lengths": "!B"}),
    Case("upper_left_more_keys", "causal, Lq < Lk", sdpa, options=heads(2), causal="upper_left"),
    Case("upper_left_more_queries", "causal, Lq > Lk", sdpa, Lq=6, Lk=4, options=heads(2), causal="upper_left"),
    Case("lower_right_more_keys", "causal, Lq < Lk", sdpa, options=heads(2), causal="lower_right"),
    Case("lower_right_more_queries", "causal, two rows have no key", sdpa, Lq=6, Lk=4, options=heads(2), causal="lower_right"),
    Case("padding_and_causal", "two masks", sdpa, options=heads(2), masks={"key_padding": "B Lk"}, causal="lower_right"),
    Case("all_at_once", "grouped heads, norms, a bias and two masks", sdpa, masks={"lengths": "B", "bias": "1 H Lq Lk"},
         options=norm("rms", "per_head", num_heads=4, kv_heads=2, value_head_dim=6), causal="upper_left"),
)  # fmt: skip


@dataclass(frozen=True)
class BlockCase(Case):
    block: dict = field(default_factory=dict)  # options of the block that are not at their default

    @property
    def hidden(self) -> int:
        return self.block.get("feed_forward", 4 * self.sizes[0])


DECODER = {"sizes": (16, 16, 16, 16), "options": heads(4), "masks": {"key_padding": "B Lk"}}
GATED = {"sizes": (8, 12, 10, 8)}

BLOCK_CASES = (
    BlockCase("block/norm_before", "LayerNorm before, gelu", decoder_layer, block={"activation": "gelu"}, **DECODER),
    BlockCase("block/norm_after", "LayerNorm after, relu", decoder_layer,
              block={"norm_placement": "after", "activation": "relu", "feed_forward": 24}, **DECODER),
    BlockCase("block/gate_scalar", "RMSNorm before, a gate of one number for each branch", gated, options=heads(2),
              block={"norm": "rms", "gate": "scalar", "activation": "gelu_tanh", "feed_forward": 20}, **GATED),
    BlockCase("block/gate_per_feature", "RMSNorm before, gates of features", gated, options=heads(4, kv_heads=2),
              masks={"lengths": "B"}, block={"norm": "rms", "gate": "per_feature", "activation": "silu"}, **GATED),
    BlockCase("block/gate_norm_after", "LayerNorm after, gates of features", gated, options=heads(2),
              block={"norm_placement": "after", "gate": "per_feature", "feed_forward": 12}, **GATED),
    BlockCase("block/attention_only", "no norm and no feed-forward branch", gated, options=heads(2),
              block={"norm": "none", "gate": "scalar", "feed_forward": 0}, **GATED),
)  # fmt: skip


def rounded(x: Tensor, step: float) -> Tensor:
    """On a grid of 8 significant bits, which is what bfloat16 has."""
    return (x / step).round().clamp(-256, 256) * step


def make_inputs(case: Case) -> Tensors:
    """Inputs, weights, masks and cotangents of a case, in the type that the file stores."""
    random = torch.Generator().manual_seed(case.seed)

    def store(x: Tensor, step: float) -> Tensor:
        return (rounded(x, step) if case.on_grid else x).to(getattr(torch, case.stored))

    def normal(*shape: int) -> Tensor:
        return store(torch.randn(shape, generator=random, dtype=torch.float64), 1 / 64)

    def uniform(rows: int, columns: int | None, fan_in: int, gain: float = 1) -> Tensor:
        shape = (rows,) if columns is None else (rows, columns)
        return store((2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1) * gain / math.sqrt(fan_in), 1 / 256)

    Eq, Ek, Ev, Eo = case.sizes
    H, G, d, e = case.heads, case.kv_heads, case.head_dim, case.value_head_dim
    tensors = {"query": normal(case.B, case.Lq, Eq)}
    if not case.self_attention:
        tensors |= {"key": normal(case.B, case.Lk, Ek), "value": normal(case.B, case.Lk, Ev)}
    for name, rows, columns in (("query", H * d, Eq), ("key", G * d, Ek), ("value", G * e, Ev), ("output", Eo, H * e)):
        gain = case.sharpness if name in ("query", "key") else 1
        tensors[f"weights.{name}_linear.weight"] = uniform(rows, columns, columns, gain)
        if case.options.get(f"{name}_bias", True):
            tensors[f"weights.{name}_linear.bias"] = uniform(rows, None, columns)
    if case.options.get("qk_norm"):
        across = case.options["qk_norm_scope"] == "across_heads"
        for name, size in (("query", H * d if across else d), ("key", G * d if across else d)):
            tensors[f"weights.{name}_norm.weight"] = 1 + normal(size) / 4
            if case.options["qk_norm"] == "layer":
                tensors[f"weights.{name}_norm.bias"] = normal(size) / 4

    if case.rival_keys:
        tensors["key"][:, 1::2] = tensors["key"][:, ::2] + unseen(tensors, normal(case.B, case.Lk // 2, Ek))
    for kind, axes in case.masks.items():
        tensors[f"mask.{kind}"] = make_mask(case, kind, axes, random, normal)
    tensors["cotangent.output"] = normal(case.B, case.Lq, Eo)
    if case.options.get("attention_weights") != "none":
        per_head = case.options.get("attention_weights") == "per_head"
        tensors["cotangent.attention_weights"] = normal(case.B, *([H] if per_head else []), case.Lq, case.Lk)
    return tensors


def make_block_inputs(case: BlockCase) -> Tensors:
    """The same for a block: the tensors of such a case's attention, and the block's own weights."""
    tensors = {name.replace("weights.", "weights.attention."): x for name, x in make_inputs(case).items()}
    random = torch.Generator().manual_seed(case.seed + 1)

    def normal(*shape: int) -> Tensor:
        return rounded(torch.randn(shape, generator=random, dtype=torch.float64) / 4, 1 / 64).float()

    Eq, hidden = case.sizes[0], case.hidden
    linears = [("feed_forward_in", hidden, Eq), ("feed_forward_out", Eq, hidden)]
    for name, rows, columns in linears if hidden else []:
        tensors |= {f"weights.{name}.weight": normal(rows, columns), f"weights.{name}.bias": normal(rows)}
    for branch in ("attention", "feed_forward") if hidden else ("attention",):
        if case.block.get("norm") != "none":
            tensors[f"weights.{branch}_norm.weight"] = 1 + normal(Eq)
        if case.block.get("norm", "layer") == "layer":
            tensors[f"weights.{branch}_norm.bias"] = normal(Eq)
        if "gate" in case.block:
            tensors[f"weights.{branch}_gate"] = 0.5 + normal(1 if case.block["gate"] == "scalar" else Eq)
    return tensors


def unseen(tensors: Tensors, x: Tensor) -> Tensor:
    """x [B, n, Ek] with its part that the queries of one head see reduced to a five-hundredth."""
    q = F.linear(tensors["query"], tensors["weights.query_linear.weight"], tensors["weights.query_linear.bias"]).double()
    seen_by = torch.matmul(q, tensors["weights.key_linear.weight"].double())  # [B, Lq, Ek]; logits are its products with keys
    seen = x.double() @ torch.linalg.pinv(seen_by) @ seen_by
    return (x - 0.998 * seen).to(x.dtype)


def make_mask(case: Case, kind: str, axes: str, random: torch.Generator, normal: Callable) -> Tensor:
    without_keys, forbids = axes.startswith("!"), axes[0] in "!-"
    sizes = {"B": case.B, "H": case.heads, "Lq": case.Lq, "Lk": case.Lk, "1": 1}
    shape = [sizes[axis] for axis in axes.lstrip("!-").split()]
    if kind == "lengths":
        shortest = 0 if without_keys else 2
        return torch.linspace(case.Lk, shortest, case.B).round().long()
    keep = torch.rand(shape, generator=random) > 0.4
    keep |= F.one_hot(torch.randint(case.Lk, shape[:-1], generator=random), case.Lk).bool()  # each row has a key
    if without_keys:
        keep[..., 1, :] = False  # but these
    if kind == "bias":
        return normal(*shape).masked_fill(~keep, -math.inf) if forbids else normal(*shape)
    return keep


def solve(case: Case, tensors: Tensors) -> Tensors:
    """Output, attention weights and all gradients, by the truth of the case in float64."""
    wide = {name: x.double().requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}
    weights = {name.removeprefix("weights."): x for name, x in wide.items() if name.startswith("weights.")}
    masks = {name.removeprefix("mask."): x for name, x in wide.items() if name.startswith("mask.")}
    key, value = wide.get("key", wide["query"]), wide.get("value", wide["query"])
    output, attention_weights = case.truth(case, weights, wide["query"], key, value, masks)

    wanted = case.options.get("attention_weights", "mean")
    if wanted == "mean" and attention_weights.dim() == 4:
        attention_weights = attention_weights.mean(1)
    results = {"output": output} if wanted == "none" else {"output": output, "attention_weights": attention_weights}
    inputs = {name: x for name, x in wide.items() if x.is_floating_point() and not name.startswith("cotangent.")}
    cotangents = [wide[f"cotangent.{name}"].detach() for name in results]
    gradients = torch.autograd.grad(list(results.values()), list(inputs.values()), cotangents)
    results |= {f"grad.{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    assert all(x.isfinite().all() for x in results.values()), f"{case.name}: not finite"
    return {name: x.detach() for name, x in results.items()}


def describe(case: Case, tensors: Tensors) -> dict[str, str]:
    options = dict(zip(("dim_query", "dim_key", "dim_value", "dim_output"), case.sizes, strict=True)) | case.options
    metadata = {"options": json.dumps(options), "dtypes": " ".join(case.dtypes), "dtype": case.stored, "shows": case.shows}
    metadata |= {"truth": case.truth.__doc__, "seed": str(case.seed)}
    if case.causal:
        metadata["causal"] = case.causal
    if case.rival_keys:
        metadata["largest_logit"] = f"{largest_logit(case, tensors):.1f}"
    if case.autocast:
        metadata |= {"autocast": case.autocast} | autocast_types(case, tensors)
    return metadata


def largest_logit(case: Case, tensors: Tensors) -> float:
    """The size of the logits of one head: to judge rounding by, not to compare with."""
    x = {name: tensor.double() for name, tensor in tensors.items()}
    q, k = (F.linear(x[s], x[f"weights.{s}_linear.weight"], x[f"weights.{s}_linear.bias"]) for s in ("query", "key"))
    return torch.matmul(q, k.mT).abs().max().item() / math.sqrt(case.head_dim)


def autocast_types(case: Case, tensors: Tensors) -> dict[str, str]:
    """The types that the reference returns under autocast. (The values to compare with are the exact ones.)"""
    weights = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    with torch.autocast("cpu", getattr(torch, case.autocast)):
        results = functional_call(CrossAttention(*case.sizes), weights, tuple(tensors[x] for x in ("query", "key", "value")))
    types = {"output_dtype": results[0].dtype, "attention_weights_dtype": results[1].dtype}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in types.items()}


def write_case(folder: Path, case: Case) -> None:
    tensors = make_inputs(case)
    write(folder / f"{case.name}.safetensors", tensors | solve(case, tensors), describe(case, tensors))


def write_block_case(folder: Path, case: BlockCase) -> None:
    tensors = make_block_inputs(case)
    metadata = describe(case, tensors) | {"block": json.dumps(case.block)}
    write(folder / f"{case.name}.safetensors", tensors | solve(case, tensors), metadata)


# ---------------------------------------------------------------------------------- the reference, initialised from a seed


def write_seeded_initialisation(folder: Path) -> None:
    """Only parameters: the C++ module, constructed after the same seed, must have the same bits."""
    sizes = (8, 12, 10, 16)
    torch.manual_seed(7)
    tensors = {f"weights.{name}": x for name, x in CrossAttention(*sizes).state_dict().items()}
    metadata = describe_reference(sizes, "initialisation from a seed", seed="7")
    write(folder / "seeded_initialisation.safetensors", tensors, metadata)


def write_reference_example(folder: Path) -> None:
    """The reference's example at its own sizes. Its 0.6 million weights come from the seed, which gives the C++ module the same
    bits; the last row of each proves it. Of each weight's gradient there are the sums over its rows and over its columns."""
    sizes = (128, 256, 256, 512)
    torch.manual_seed(0)
    module = CrossAttention(*sizes)
    last_rows = {f"last_row.{name}": x[-1].clone() for name, x in module.state_dict().items() if x.dim() == 2}
    inputs = {"query": torch.randn(2, 4, 128), "key": torch.randn(2, 6, 256), "value": torch.randn(2, 6, 256)}
    inputs |= {"cotangent.output": torch.randn(2, 4, 512), "cotangent.attention_weights": torch.randn(2, 4, 6)}

    results = {}
    for name, x in run_reference(module, inputs).items():
        if name.startswith("grad.weights.") and x.dim() == 2:
            results |= {name.replace("grad", "grad_sum_0", 1): x.sum(0), name.replace("grad", "grad_sum_1", 1): x.sum(1)}
        else:
            results[name] = x
    metadata = describe_reference(sizes, "the reference's example", seed="0", weights="seed")
    write(folder / "reference_example.safetensors", inputs | last_rows | results, metadata)


def run_reference(module: CrossAttention, inputs: Tensors) -> Tensors:
    """Output, attention weights and all gradients of a reference module, in float64 (which the module is left in)."""
    sizes = [module.get_submodule(name).in_features for name in LINEARS[:3]] + [module.output_linear.out_features]
    case = Case("", "", reference, sizes=tuple(sizes))
    weights = {f"weights.{name}": x for name, x in module.state_dict().items()}
    results = solve(case, inputs | weights)
    return results


def describe_reference(sizes: tuple[int, ...], shows: str, **more: str) -> dict[str, str]:
    options = dict(zip(("dim_query", "dim_key", "dim_value", "dim_output"), sizes, strict=True))
    metadata = {"options": json.dumps(options), "dtypes": "float64 float32", "dtype": "float32"}
    return metadata | {"shows": shows, "truth": reference.__doc__} | more


# -------------------------------------------------------------------------------------------------------------- TorchScript


class AnswerModel(nn.Module):
    """A larger model that holds the reference: which of 5 answers do words get from an image."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.fusion = CrossAttention(8, 12, 12, 16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        fused, attention_weights = self.fusion(self.embedding(tokens), features, features)
        return self.classifier(fused.mean(1)), attention_weights


def write_torchscript(folder: Path) -> None:
    """reference.pt, a scripted reference, inputs as `xattn run` takes them, and its results."""
    sizes = (8, 12, 12, 16)
    torch.manual_seed(1)
    module = CrossAttention(*sizes)
    inputs = {"query": torch.randn(2, 4, 8), "key": torch.randn(2, 6, 12), "value": torch.randn(2, 6, 12)}
    write(folder / "reference_inputs.safetensors", inputs, {"shows": "inputs for reference.pt"})
    inputs |= {"cotangent.output": torch.randn(2, 4, 16), "cotangent.attention_weights": torch.randn(2, 4, 6)}
    metadata = describe_reference(sizes, "weights from a TorchScript file", seed="1", weights="reference.pt")
    write(folder / "reference_torchscript.safetensors", inputs | run_reference(module, inputs), metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        write_archive(folder / "reference.pt", torch.jit.script(module))


def write_torchscript_model(folder: Path) -> None:
    """reference_in_model.pt, a traced larger model that holds the reference as `fusion`, and the results of both."""
    torch.manual_seed(2)
    model = AnswerModel()
    tokens, features = torch.randint(20, (2, 4)), torch.randn(2, 6, 12)
    inputs = {"query": model.embedding(tokens).detach(), "key": features, "value": features.clone()}
    inputs |= {"cotangent.output": torch.randn(2, 4, 16), "cotangent.attention_weights": torch.randn(2, 4, 6)}
    results = run_reference(model.fusion, inputs) | {"logits": model.double()(tokens, features.double())[0].detach()}
    metadata = describe_reference((8, 12, 12, 16), "weights from a larger model in a TorchScript file", seed="2")
    metadata |= {"weights": "reference_in_model.pt", "prefix": "fusion."}
    write(folder / "reference_in_model.safetensors", inputs | {"tokens": tokens} | results, metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that the trace holds for one size of K
        write_archive(folder / "reference_in_model.pt", torch.jit.trace(model.float(), (tokens, features)))


def write_archive(path: Path, module: torch.jit.ScriptModule) -> None:
    """torch.jit.save, without the debug records, which hold the paths of the machine that made them."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    reader, writer = torch._C.PyTorchFileReader(buffer), torch._C.PyTorchFileWriter(str(path))
    for record in reader.get_all_records():
        if not record.endswith(".debug_pkl") and record not in ("version", "byteorder") and not record.startswith(".data/"):
            data = reader.get_record(record)
            writer.write_record(record, data, len(data))
    writer.write_end_of_file()


# ------------------------------------------------------------------------------------------------------------- torch.export


class ExportedModel(nn.Module):
    """Holds the reference, and what else the files of torch.export have: tied weights, views, buffers, constants."""

    def __init__(self):
        super().__init__()
        self.fusion = CrossAttention(4, 6, 6, 8)
        self.embedding, self.unembedding = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.unembedding.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.every_second = nn.Parameter(torch.randn(3, 4)[:, ::2])
        pool = torch.randn(10)
        self.register_buffer("middle", pool[2:5])
        self.register_buffer("end", pool[4:].view(2, 3))
        self.register_buffer("expanded", torch.randn(2, 1).expand(2, 3))
        self.register_buffer("none", torch.empty(0, 2))
        self.register_buffer("positions", torch.arange(4), persistent=False)
        self.shift = torch.randn(4)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        query = self.embedding(tokens) + self.shift + self.positions[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.fusion(query, features, features)[0]


class AllTypes(nn.Module):
    """A buffer of every type that torch.export can write, and one without axes."""

    def __init__(self):
        super().__init__()
        names = "uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 float32 float64 bfloat16 bool complex32 complex64 "
        names += "complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
        for name in names.split():
            self.register_buffer(f"of_{name}", torch.tensor([0, 1, 2, 4]).to(getattr(torch, name)))
        self.register_buffer("scalar", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def write_exported(folder: Path, name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """NAME.pt2 and, in NAME.safetensors, the tensors that PyTorch reads from it; complex ones as pairs of float64."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of storages that no tensor shows in full
        torch.export.save(torch.export.export(model, inputs), buffer)
    copy_archive(buffer, folder / f"{name}.pt2", {"models/model.json": without_metadata})
    tensors = {key: x.detach().clone() for key, x in read(folder / f"{name}.pt2")[0].items()}
    pairs = {key: torch.view_as_real(x.to(torch.complex128)) for key, x in tensors.items() if x.is_complex()}
    write(folder / f"{name}.safetensors", tensors | pairs, {"shows": f"the tensors of {name}.pt2"})


def write_all_exported(folder: Path) -> list[str]:
    torch.manual_seed(3)
    write_exported(folder, "exported", ExportedModel(), (torch.randint(5, (2, 4)), torch.randn(2, 3, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of complex32
        write_exported(folder, "exported_types", AllTypes(), (torch.ones(1),))
    return [f"{name}.{suffix}" for name in ("exported", "exported_types") for suffix in ("pt2", "safetensors")]


def without_metadata(record: bytes) -> bytes:
    """The graph of a model without stack traces, which hold the paths of the machine that made it."""

    def strip(x):
        if isinstance(x, dict):
            return {key: {} if key == "metadata" else strip(value) for key, value in x.items()}
        return [strip(value) for value in x] if isinstance(x, list) else x

    return json.dumps(strip(json.loads(record)), separators=(",", ":")).encode()


def copy_archive(source: io.BytesIO, path: Path, changes: dict[str, Callable[[bytes], bytes]]) -> None:
    """An archive of PyTorch, with some of its records changed."""
    source.seek(0)
    reader, writer = torch._C.PyTorchFileReader(source), torch._C.PyTorchFileWriter(str(path))
    writer.set_min_version(6)
    for record in reader.get_all_records():
        if record not in ("byteorder", ".data/serialization_id", ".data/version"):  # the writer adds these
            data = changes.get(record, bytes)(reader.get_record(record))
            writer.write_record(record, data, len(data))
    writer.write_end_of_file()


# -------------------------------------------------------------------------------------------------------------- torch.save


class SmallModel(nn.Module):
    """Parameters, buffers, a list of modules, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](self.norm(self.first(x))))


class Callback:
    """An object of a class that no reader knows, with a tensor in it."""

    def __init__(self):
        self.best = torch.ones(2)


class AttributeDict(dict):
    """As Lightning saves hyperparameters."""


def objects_beside(model: Tensors) -> dict:
    """A checkpoint with what training programs save beside tensors, and with tensors that are not read."""
    weight = torch.arange(6.0).view(2, 3)
    model = {**model, "quantized": torch.quantize_per_tensor(weight, 0.5, 0, torch.qint8), "sparse": weight.to_sparse()}
    model["meta"] = torch.empty(2, 3, device="meta")
    objects = {"args": argparse.Namespace(lr=0.1, folder=Path("data")), "hyper_parameters": AttributeDict(width=3)}
    objects |= {"metrics": defaultdict(list, loss=[0.5]), "best": numpy.float64(0.25), "history": numpy.arange(4.0)}
    objects |= {"version": torch.torch_version.TorchVersion("2.0"), "log": io.BytesIO(b"text"), "callbacks": [Callback()]}
    return {"epoch": 3, **objects, "model": model}


SAVED_TYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint64 uint32 uint16 complex32 complex64 "
SAVED_TYPES += "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"


def write_saved(folder: Path) -> list[str]:
    """One small model as torch.save and torch.jit.save write it, and views and types of tensors. Returns the files' names."""
    torch.manual_seed(4)
    model, x = SmallModel(), torch.randn(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(folder / "state_dict.safetensors", state, {"shows": "the tensors of the small model", "seed": "4"})
    torch.save(model.state_dict(), folder / "state_dict.pt")
    checkpoint = {"epoch": 3, "loss": 0.5, "name": "small", "optimizer": optimizer.state_dict(), "model": model.state_dict()}
    torch.save(checkpoint, folder / "checkpoint.pt", pickle_protocol=4)
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(model.state_dict(), folder / "legacy.pt", **legacy)
    for protocol in (1, 4):
        torch.save(checkpoint, folder / f"legacy_protocol_{protocol}.pt", pickle_protocol=protocol, **legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of quantized tensors
        torch.save(objects_beside(model.state_dict()), folder / "objects.pt")
        torch.save(objects_beside(model.state_dict()), folder / "legacy_objects.pt", **legacy)
    torch.save(model, folder / "module.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        write_archive(folder / "scripted.pt", torch.jit.script(model))
        write_archive(folder / "traced.pt", torch.jit.trace(model.eval(), x))
        write_archive(folder / "frozen.pt", torch.jit.freeze(torch.jit.script(model)))

    base = torch.arange(12.0).view(3, 4)
    views = {"base": base, "transposed": base.t(), "columns": base[:, 1::2], "row": base[2], "expanded": base[0].expand(5, 4)}
    views |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2), "parameter": nn.Parameter(base[1])}
    torch.save(views, folder / "views.pt")
    torch.save(views, folder / "legacy_views.pt", **legacy)
    copies = {name: x.detach().clone() for name, x in views.items()}
    write(folder / "views.safetensors", copies, {"shows": "the tensors of views.pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of complex32
        six = torch.arange(6).view(2, 3)
        types = {name: six.to(getattr(torch, name)) for name in SAVED_TYPES.split()}
        torch.save(types, folder / "types.pt")
        untyped = {name for name in types if name.startswith(("uint16", "uint32", "uint64", "complex32", "float8"))}
        torch.save({name: types[name] for name in types if name not in untyped}, folder / "legacy_types.pt", **legacy)
    names = ("state_dict", "checkpoint", "objects", "module", "scripted", "traced", "frozen", "views", "types", "legacy")
    names += tuple(f"legacy_{name}" for name in ("protocol_1", "protocol_4", "objects", "views", "types"))
    return [*(f"{name}.pt" for name in names), "state_dict.safetensors", "views.safetensors"]


# -------------------------------------------------------------------------------------------------------- seeds of fuzzers


def write_seeds(folder: Path) -> None:
    """fuzz/TARGET/*, from the files in `folder`: inputs from which the fuzzers of scripts/fuzz.sh derive others. With these
    alone they reach 95 % of the lines of each reader."""

    def keep(target: str, name: str, data: bytes) -> None:
        path = folder / "fuzz" / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for name, data in safetensors_seeds(folder / "files").items():
        keep("safetensors", name, data)
    for name in ("views", "state_dict", "frozen", "traced"):
        keep("zip", name, (folder / "files" / f"{name}.pt").read_bytes())
    keep("zip", "cut_off", (folder / "files" / "views.pt").read_bytes()[:200])
    for path in sorted((folder / "files").glob("*.pt")):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                keep("pickle", path.stem, archive.read(f"{path.stem}/data.pkl"))
        else:
            keep("legacy", path.stem, path.read_bytes())
    for name, data in (pickle_seeds() | assembled_pickles()).items():
        keep("pickle", name, data)
    configs = json_seeds()
    for name, data in configs.items():
        keep("json", name, data)
    keep("zip", "exported", exported_seed(configs["config"]))
    for name, files in folder_seeds(folder / "files").items():
        keep("folder", name, b"".join(b"\n=== " + file.encode() + b"\n" + data for file, data in files.items()))


def safetensors_of(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_entry(dtype: object, shape: list[int], offsets: list[int]) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_seeds(files: Path) -> dict[str, bytes]:
    seeds = {name: (files / f"{name}.safetensors").read_bytes() for name in ("views", "state_dict", "exported_types")}
    other = {"a": ("F4", [3], [0, 2]), "b": ("F6_E2M3", [4], [2, 5]), "c": ("F99", [2], [5, 9])}
    other = {name: header_entry(*value) for name, value in other.items()}
    seeds["empty"] = safetensors_of({})
    seeds["other_types"] = safetensors_of({"__metadata__": None, **other}, bytes(9))
    seeds["wrong_type"] = safetensors_of({"a": header_entry(4, [], [0, 0])})
    seeds["wrong_value"] = safetensors_of({"a": True})
    seeds["no_elements_but_long"] = safetensors_of({"a": header_entry("F64", [2**62, 0], [0, 0])})
    seeds["long_shape"] = safetensors_of({"a": header_entry("F32", [0] * 65, [0, 0])})
    seeds["no_bool"] = safetensors_of({"a": header_entry("BOOL", [1], [0, 1]), "b": header_entry("U8", [1], [1, 2])}, b"\2\3")
    return seeds


def pickle_seeds() -> dict[str, bytes]:
    """As PyTorch and Python write them. Storages have 64 bytes, as the fuzzer's own do."""
    flat = torch.zeros(16)
    model = {"weight": flat, "view": flat[2:].view(2, 7).t(), "wide": torch.zeros(8, dtype=torch.float64)}
    model |= {"flags": nn.Parameter(torch.zeros(64, dtype=torch.bool), False), "new": torch.zeros(32, dtype=torch.uint16)}
    model["tagged"] = flat[:3]
    model["tagged"].tag = "an attribute"
    layers = nn.Sequential(nn.Linear(4, 4, False), nn.Sequential(nn.Linear(4, 4, False)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        layers = torch.jit.script(layers)
    values = {"text": "\\ \u00e4 \U0001f600", "real": 1.5, "truth": True, "long": 2**40, "longer": 2**100, "list": [1, 2, 3]}
    values |= {"bytes": b"abc", "array": bytearray(b"abc"), "set": {1}, "frozen": frozenset({2}), "pair": (1, 2)}
    saves = {"fits": lambda f: torch.save({"epoch": 3, "best": True, "model": model}, f)}
    saves["fits_protocol_5"] = lambda f: torch.save({"values": values, "model": model}, f, pickle_protocol=5)
    saves["fits_torchscript"] = lambda f: torch.jit.save(layers, f)
    saves["conjugate"] = lambda f: torch.save({"conjugate": torch.zeros(8, dtype=torch.complex64).conj()}, f)
    seeds = {"protocol_0": pickle.dumps(values, 0)}
    for name, save_to in saves.items():
        buffer = io.BytesIO()
        save_to(buffer)
        buffer.seek(0)
        seeds[name] = torch._C.PyTorchFileReader(buffer).get_record("data.pkl")
    return seeds


def assembled_pickles() -> dict[str, bytes]:
    """Of instructions that Python 2 and old versions of PyTorch wrote, and of tensors that are not read or not sound."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def call(module: str, name: str, arguments: bytes) -> bytes:
        return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"

    def storage(name: str = "FloatStorage", count: int = 16, part: bytes = b"") -> bytes:
        kind = f"ctorch\n{name}\n".encode()
        return b"(" + text("storage") + kind + text("0") + text("cpu") + b"J" + struct.pack("<i", count) + part + b"tQ"

    def tensor(stored: bytes, size: int = 2, last: bytes = b"") -> bytes:
        shape = b"K\0J" + struct.pack("<i", size) + b"\x85K\1\x85\x89"
        return call("torch._utils", "_rebuild_tensor_v2", stored + shape + call("collections", "OrderedDict", b"") + last)

    def saved(**values: bytes) -> bytes:
        return b"\x80\2}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."

    plain = tensor(storage())
    foreign = b"cnumpy\nndarray\n)R"
    return {
        "python_2": saved(
            short=b"U\3abc",
            string=b"T\3\0\0\0abc",
            quoted=b"S'a\\n\\x41\\''\n",
            escaped=b"V\\u00e9\\U0001f600\n",
            long=b"\x8b\3\0\0\0\xfe\xff\xff",
            digits=b"L12L\n",
            truth=b"I01\n",
            real=b"F-1.5e3\n",
            kept=b"N20p7\n0g7\n",
            marked=b"N(0(NN1",
            filled=b"(NNl",
            pairs=b"(NNd",
            instance=b"(iargparse\nNamespace\n",
            object=b"(cargparse\nNamespace\no",
            ordered=call("collections", "OrderedDict", b"]]" + text("weight") + b"a" + plain + b"aa"),
            weight=plain,
        ),
        "protocol_4_and_5": saved(
            wide=b"\x8d" + struct.pack("<Q", 3) + b"abc",
            bytes=b"C\3abc" + b"0B\3\0\0\0abc" + b"0\x8e" + struct.pack("<Q", 3) + b"abc",
            array=b"\x96" + struct.pack("<Q", 3) + b"abc",
            set=b"\x8f(K\1\x90",
            frozen=b"(K\1\x91",
            named=b"cargparse\nNamespace\n)}\x92",
            weight=plain,
        ),
        "other_values": saved(
            type=b"ctorch\nfloat32\n)R",
            marked=call("torch.jit._pickle", "build_intlist", b"]"),
            weight=plain,
        ),
        "text_for_storage": b"\x80\2P0\n.",
        "no_instruction": b"\x80\2\xff.",
        "object_for_model": saved(epoch=b"K\3", model=foreign),
        "not_read": saved(
            quantized=tensor(storage("QInt32Storage")),
            unknown=tensor(storage("NewStorage")),
            foreign=tensor(storage(), last=foreign),
            part=tensor(storage(part=b"(" + text("1") + b"K\2K\4t")),
        ),
        "beyond": saved(weight=tensor(storage(), 17)),
        "negative": saved(weight=tensor(storage(), -1)),
        "no_part": saved(weight=tensor(storage(part=b"(" + text("1") + b"K\2K\x10t"))),
    }


def json_seeds() -> dict[str, bytes]:
    entry = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": {"dtype": 7, "requires_grad": True}}
    entry["tensor_meta"] |= {"sizes": [{"as_int": 2}, {"as_int": 3}], "strides": [{"as_int": 3}, {"as_int": 1}], "layout": 7}
    entry["tensor_meta"] |= {"device": {"type": "cpu", "index": None}, "storage_offset": {"as_int": 1}}
    config = json.dumps({"config": {"weight": entry, "other": entry | {"path_name": "weight_1"}}}).encode()
    not_read = {"pickled": entry | {"use_pickle": True}, "sparse": entry | {"tensor_meta": entry["tensor_meta"] | {"layout": 1}}}
    for number in (29, 99):  # float8_e4m3fn, and none
        not_read[f"dtype_{number}"] = entry | {"tensor_meta": entry["tensor_meta"] | {"dtype": number}}
    metadata = {"total_size": 24, "shift": -1}
    index = {"metadata": metadata, "weight_map": {"weight": "model-00001-of-00002.safetensors"}}
    metadata |= {"list": [1.5e-30, True, None, [], {"a": False}], "text": "\" \\ \n \x01 \u00e4 \U0001f600"}
    return {
        "config": config,
        "empty": b'{"config": {}}',
        "beyond_double": b"[1e999]",
        "bool": config.replace(b'"dtype": 7', b'"dtype": 12'),
        "not_read": json.dumps({"config": not_read}).encode(),
        "index": json.dumps(index, indent=2).encode(),
        "index_in_utf8": b"\xef\xbb\xbf" + json.dumps(index, ensure_ascii=False).encode(),
    }


def exported_seed(config: bytes) -> bytes:
    """An archive with all fields of zip64, a comment and a compressed entry."""
    buffer = io.BytesIO()
    with mock.patch.object(zipfile, "ZIP64_LIMIT", 32), zipfile.ZipFile(buffer, "w") as archive:
        records = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", "models/model.json": b"{}"}
        records |= {"data/weights/weight_0": bytes(64), "data/weights/weight_1": bytes(64), "data/constants/tensor_0": b""}
        records["data/weights/model_weights_config.json"] = config
        records["data/constants/model_constants_config.json"] = b'{"config": {}}'
        for name, data in records.items():
            entry = zipfile.ZipInfo(f"x/{name}")
            entry.extra = b"UT\5\0\1\0\0\0\0"  # a time
            with archive.open(entry, "w", force_zip64=True) as record:
                record.write(data)
        archive.writestr(zipfile.ZipInfo("x/extra/deflated"), bytes(100), zipfile.ZIP_DEFLATED)
        archive.comment = b"a comment"
    return buffer.getvalue()


def folder_seeds(files: Path) -> dict[str, dict[str, bytes]]:
    """Folders as from_pretrained finds them, and some with a defect."""

    def index(**file_of: str) -> bytes:
        return json.dumps({"metadata": {"total_size": 8}, "weight_map": file_of}).encode()

    def state_dict(name: str) -> bytes:
        buffer = io.BytesIO()
        torch.save({name: torch.ones(2)}, buffer)
        return buffer.getvalue()

    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    a = safetensors_of({"a": header_entry("F32", [1], [0, 4])}, bytes(4))
    b = safetensors_of({"b": header_entry("F4", [2], [0, 1]), "c": header_entry("F32", [1], [1, 5])}, bytes(5))
    sharded = {"model.safetensors.index.json": index(a=names[0], b=names[1], c=names[1]), names[0]: a, names[1]: b}
    parts = {"pytorch_model.bin.index.json": index(a="1.bin", b="2.bin"), "1.bin": state_dict("a"), "2.bin": state_dict("b")}
    old = (files / "legacy_views.pt").read_bytes()
    return {
        "one_file": {"config.json": b"{}", "model.safetensors": (files / "views.safetensors").read_bytes()},
        "sharded": sharded,
        "sharded_state_dict": parts,
        "mixed": parts | {"2.bin": b},
        "folder_for_shard": {"2.bin/": b""} | {name: part for name, part in parts.items() if name != "2.bin"},
        "without_tensor": sharded | {names[1]: a},
        "adapter": {"adapter_config.json": b"{}", "adapter_model.bin": old},
        "no_weights": {"README.md": b"# A model\n", "onnx/": b"", "tf_model.h5": b"\x89HDF\r\n\x1a\n"},
        "git_lfs": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n"},
        "tar": {"pytorch_model.bin": bytes(257) + b"ustar" + bytes(8)},
        "no_bytes": {"model.safetensors": b""},
    }


# ------------------------------------------------------------------------------------------------------------- write and check


def write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """safetensors.torch.save, with the metadata in order: the package writes them in a different one each time."""
    metadata |= {"script": "scripts/make_fixtures.py", "torch": torch.__version__, "numpy": numpy.__version__}
    data = save({name: x.contiguous() for name, x in tensors.items()}, metadata)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def write_all(folder: Path) -> list[str]:
    """Returns the names of all files."""
    (folder / "block").mkdir(exist_ok=True)
    for case in CASES:
        write_case(folder, case)
    for case in BLOCK_CASES:
        write_block_case(folder, case)
    for part in (write_seeded_initialisation, write_reference_example, write_torchscript, write_torchscript_model):
        part(folder)
    (folder / "files").mkdir(exist_ok=True)
    exported = [f"files/{name}" for name in write_all_exported(folder / "files")]
    saved = [f"files/{name}" for name in write_saved(folder / "files")]
    write_seeds(folder)
    extra = ("seeded_initialisation", "reference_example", "reference_torchscript", "reference_inputs", "reference_in_model")
    names = [f"{name}.safetensors" for name in (*[case.name for case in (*CASES, *BLOCK_CASES)], *extra)]
    return [*names, "reference.pt", "reference_in_model.pt", *exported, *saved]


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    if path.suffix == ".pt2":
        program = torch.export.load(path)
        return program.state_dict | program.constants, {}
    if path.suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, weights_only=False)  # of TorchScript too
            tensors = saved.state_dict() if isinstance(saved, nn.Module) else saved.get("model", saved)
            plain = {x: y for x, y in tensors.items() if y.layout == torch.strided and not y.is_quantized and not y.is_meta}
            return plain, {}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def same_bytes(a: Tensor, b: Tensor, *_) -> bool:
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))  # it does not support all types


def differences(old_path: Path, new_path: Path) -> list[str]:
    """What differs between two files, beyond the versions of packages and the last bits of float64 results."""
    if not old_path.exists():
        return ["is missing"]
    (old, old_metadata), (new, new_metadata) = read(old_path), read(new_path)
    versions = {"torch", "numpy"}
    found = [f"metadata {x}" for x in sorted(new_metadata.keys() - versions) if old_metadata.get(x) != new_metadata[x]]
    found += [f"{name} is only in one" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        close = torch.allclose if a.dtype == torch.float64 else same_bytes
        if a.dtype != b.dtype or a.shape != b.shape or not close(a, b, 1e-9, 1e-12):
            found.append(f"{name} differs")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the fixtures of the C++ tests.", epilog="Example: %(prog)s --check")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there, and write none")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the files (default: tests/data)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    if arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            found = {name: differences(arguments.data / name, Path(folder) / name) for name in write_all(Path(folder))}
        for name, lines in found.items():
            print("\n".join(f"{name}: {line}" for line in lines), end="\n" if lines else "")
        print(f"{sum(not lines for lines in found.values())} of {len(found)} files agree")
        return int(any(found.values()))

    arguments.data.mkdir(parents=True, exist_ok=True)
    names = write_all(arguments.data)
    sizes = {name: (arguments.data / name).stat().st_size for name in names}
    for name, size in sizes.items():
        print(f"{size:9,}  {name}")
    print(f"{sum(sizes.values()):9,}  in {len(sizes)} files")
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # TorchScript writes some lines in the order of a set of strings
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    raise SystemExit(main())
