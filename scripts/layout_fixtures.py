#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/layouts: cross-attention weights as other libraries name them, and the results of their own classes.

    python3 scripts/layout_fixtures.py                          write all families
    python3 scripts/layout_fixtures.py --output FOLDER t5 wan   write two of them elsewhere

Needs torch, numpy, safetensors, transformers, diffusers, accelerate, einops, einops-exts, and for one or two families each
flamingo-pytorch, open-flamingo, perceiver-pytorch, x-transformers, openai-whisper, mlx[cpu], timm, kornia, open_clip_torch
and bidirectional-cross-attention. A family whose package is
missing is named and skipped, and the script then fails. For each FAMILY it writes

    FAMILY.safetensors                the weights of a tiny model under the names that such files have: a cross-attention layer
                                      with its neighbours, all of them redrawn, so that no bias is zero and no norm is one
    FAMILY.expect.safetensors         of the attention layer alone: query [B, Lq, Eq], context [B, Lk, Ec] or key and
                                      value, maybe mask (bool, true = may attend), output [B, Lq, Eo] of its output projection,
                                      maybe weights [B, H, Lq, Lk]
    FAMILY.block.expect.safetensors   for some, the same of the Transformer layer around it: query enters the branch of
                                      the cross-attention, output leaves the feed-forward branch

`query` is the input of the layer, before norms of its own (metadata `input_norm`). A second context that shares the query is
ip_context. Metadata, all text:

    family, class, versions           the origin
    layout, prefix                    a row of LAYOUTS below, and the prefix of its names
    num_heads, kv_heads, scale        kv_heads if fewer; scale if not the square root of 1 / size of a head
    qk_norm, qk_norm_eps              "rms per_head", "rms across_heads"
    input_norm, input_norm_eps        "query NAME, context NAME"
    ip_scale                          factor of the second context
    positions                         the tensor of learned positions, which `query` and the others already contain
    base, base_prefix                 another family that has the rest of the layer, and its prefix there
    block                             JSON: names of tensors as in the file, the rest by the names of CrossAttentionBlockOptions
    note                              anything else of importance

Each output is computed a second time, from LAYOUTS and the weights as written, and must agree: that proves the table.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from make_fixtures import CrossAttention

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "layouts"
B, LQ, LK = 2, 3, 5
TOLERANCE = 1e-5
Tensors = dict[str, Tensor]
Names = tuple[str, ...]


# --------------------------------------------------------------------------------------------------------------- the layouts


@dataclass(frozen=True)
class Linear:
    """A projection in a file: part `part` of `parts` equal ones of a tensor, counted along the output features."""

    weight: str
    bias: str
    part: int = 0
    parts: int = 1
    bias_parts: int = 0  # where they differ from the parts of the weight


@dataclass(frozen=True)
class Layout:
    """How a family names the parts of a layer. The names in its file show which biases, norms and second contexts a layer has."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    transposed: bool = False  # weights are [in, out]
    scale: float | None = None  # None: the square root of 1 / size of a head
    qk_norms: tuple[tuple[str, str], ...] = ()  # pairs of names that norms of queries and keys may have
    input_norms: tuple[str, str] = ("", "")  # norms of the layer itself, of the query and of the context
    second: tuple[tuple[str, str, str], ...] = ()  # key, value and key norm of a second context
    bias_kv: bool = False  # the layer has bias_k and bias_v, which no mask hides
    ignored: Names = ()  # may follow the layer's prefix, too; all names that begin so, if it ends in a point


def linear(name: str) -> Linear:
    return Linear(f"{name}.weight", f"{name}.bias")


def fused(name: str, part: int, parts: int) -> Linear:
    return Linear(f"{name}.weight", f"{name}.bias", part, parts)


def separate(query: str, key: str, value: str, output: str, **more) -> Layout:
    return Layout(linear(query), linear(key), linear(value), linear(output), **more)


def key_value_fused(query: str, key_value: str, output: str, **more) -> Layout:
    return Layout(linear(query), fused(key_value, 0, 2), fused(key_value, 1, 2), linear(output), **more)


def torch_layout(packed: bool) -> Layout:
    weights = ["in_proj_weight"] * 3 if packed else [f"{x}_proj_weight" for x in "qkv"]
    parts = [Linear(x, "in_proj_bias", i, 3 if packed else 1, 3) for i, x in enumerate(weights)]
    return Layout(*parts, linear("out_proj"), bias_kv=True)


DIFFUSERS = separate(
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    qk_norms=(("norm_q", "norm_k"),),
    second=(("add_k_proj", "add_v_proj", "norm_added_k"), ("processor.to_k_ip.0", "processor.to_v_ip.0", "")),
)
TIMM_NORMS = (("q_norm", "k_norm"),)
LAYER_NORM = tuple(f"output.LayerNorm.{x}" for x in ("weight", "bias", "gamma", "beta"))
LAYOUTS = {
    "torch_packed": torch_layout(packed=True),
    "torch_separate": torch_layout(packed=False),
    "out_proj": separate("q_proj", "k_proj", "v_proj", "out_proj"),
    "o_proj": separate(
        "q_proj", "k_proj", "v_proj", "o_proj", qk_norms=(("q_norm", "k_norm"), ("q_layer_norm", "k_layer_norm"))
    ),
    "bert": separate("self.query", "self.key", "self.value", "output.dense", ignored=LAYER_NORM),
    "albert": separate("query", "key", "value", "dense", ignored=("LayerNorm.",)),
    "qformer": separate("attention.query", "attention.key", "attention.value", "output.dense", ignored=LAYER_NORM),
    "t5": separate("q", "k", "v", "o", scale=1.0, ignored=("relative_attention_bias.weight",)),
    "whisper_openai": separate("query", "key", "value", "out"),
    "gpt2": key_value_fused("q_attn", "c_attn", "c_proj", transposed=True, ignored=("bias", "masked_bias")),
    "flamingo": key_value_fused("to_q", "to_kv", "to_out", input_norms=("norm", "")),
    "perceiver_hf": separate(
        "self.query", "self.key", "self.value", "output.dense", input_norms=("self.layernorm1", "self.layernorm2")
    ),
    "perceiver_lucidrains": key_value_fused("fn.to_q", "fn.to_kv", "fn.to_out", input_norms=("norm", "norm_context")),
    "diffusers": DIFFUSERS,
    "wan_original": separate("q", "k", "v", "o", qk_norms=(("norm_q", "norm_k"),), second=(("k_img", "v_img", "norm_k_img"),)),
    "ip_adapter_original": dataclasses.replace(DIFFUSERS, second=(("to_k_ip", "to_v_ip", ""),)),
    "blip_vision": Layout(*(fused("qkv", i, 3) for i in range(3)), linear("projection")),
    "timm": Layout(*(fused("qkv", i, 3) for i in range(3)), linear("proj"), qk_norms=TIMM_NORMS, ignored=("pos_embed",)),
    "timm_separate": separate("q", "k", "v", "proj"),
    "timm_key_value": key_value_fused("q", "kv", "proj"),
    "timm_pool": key_value_fused(
        "q", "kv", "proj", qk_norms=TIMM_NORMS, ignored=("latent", "norm.", "mlp.", "pos_embed")
    ),
    "clip_pool": separate("q_proj", "k_proj", "v_proj", "c_proj", ignored=("positional_embedding",)),
    "pixart_original": key_value_fused("q_linear", "kv_linear", "proj"),
    "pix2struct": separate("query", "key", "value", "output", scale=1.0),
    "lightglue": separate("to_qk", "to_qk", "to_v", "to_out", ignored=("ffn.",)),
    "bidirectional": separate("to_qk", "context_to_qk", "context_to_v", "to_out", ignored=("to_v.", "context_to_out.")),
    "to_kv": key_value_fused("to_q", "to_kv", "to_out"),
    "to_kv_sequential": key_value_fused("to_q", "to_kv", "to_out.0"),
    "fc": separate("fc_q", "fc_k", "fc_v", "fc_o"),
    "espnet": separate("linear_q", "linear_k", "linear_v", "linear_out"),
    "xlm": separate("q_lin", "k_lin", "v_lin", "out_lin"),
    "annotated": separate(*(f"linears.{i}" for i in range(4))),
    "linear": separate("q_linear", "k_linear", "v_linear", "out"),
    "w": separate("w_q", "w_k", "w_v", "w_o"),
    "d2l": separate("W_q", "W_k", "W_v", "W_o"),
    "flash_attn": key_value_fused("Wq", "Wkv", "out_proj"),
    "x_transformers": separate("to_q", "to_k", "to_v", "to_out"),
    "mlx": separate("query_proj", "key_proj", "value_proj", "out_proj"),
    "reference": separate("query_linear", "key_linear", "value_linear", "output_linear"),
}


# ---------------------------------------------------------------------------------------- the data of a family, and its drawing


@dataclass
class Block:
    """Names as in the file, in front of ".weight" and ".bias"; gates are tensors themselves."""

    query: Tensor
    output: Tensor
    norm: str
    norm_placement: str
    norm_eps: float
    activation: str
    attention_norm: str
    feed_forward_norm: str
    feed_forward_in: str
    feed_forward_out: str
    # feed_forward_out(activation(feed_forward_in(x)) * feed_forward_multiplier(x)); of one name, the multiplier is the first half
    feed_forward_multiplier: str = ""
    attention_gate: str = ""
    feed_forward_gate: str = ""

    @property
    def parts(self) -> int:
        return 2 if self.feed_forward_multiplier == self.feed_forward_in else 1

    def describe(self, file: Tensors, transposed: bool) -> str:
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self) if x.name not in ("query", "output")}
        gate = file[self.attention_gate].numel() if self.attention_gate else 0
        fields["gate"] = {0: "none", 1: "scalar"}.get(gate, "per_feature")
        fields["feed_forward"] = file[f"{self.feed_forward_in}.weight"].shape[1 if transposed else 0] // self.parts
        if self.norm == "layer" and not any(f"{self.feed_forward_norm}.{x}" in file for x in ("bias", "beta")):
            fields["norm_bias"] = False
        return json.dumps({name: x for name, x in fields.items() if x != ""}, sort_keys=True)


@dataclass
class Made:
    """The data of a family: a file, one layer of it, and that layer's inputs and outputs."""

    layout: str
    file: Tensors
    prefix: str
    attention: object  # the module whose class computed the output, or a sentence
    inputs: Tensors
    output: Tensor
    heads: int
    weights: Tensor | None = None
    kv_heads: int | None = None
    scale: float | None = None
    qk_norm_eps: float | None = None
    input_norm_eps: float | None = None
    ip_scale: float | None = None
    packages: Names = ()
    note: str = ""
    positions: str = ""
    base: str = ""
    base_prefix: str = ""
    rest: Tensors = field(default_factory=dict)  # of the layer, if not in this file
    block: Block | None = None


class Draw:
    """All numbers of a family, from a seed of its own."""

    def __init__(self, family: str):
        seed = zlib.crc32(family.encode())
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for what models draw themselves, before it is redrawn

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def weight(self, name: str, x: Tensor) -> Tensor:
        """As after training: norms about one, gates neither zero nor one, linears that keep the size of their inputs."""
        is_norm = x.dim() == 1 and name.endswith(("weight", "gamma"))
        if "gate" in name.rsplit(".", 1)[-1] or "alpha" in name.rsplit(".", 1)[-1]:
            return 0.6 + 0.3 * self.normal(*x.shape)
        if is_norm:
            return 1 + 0.3 * self.normal(*x.shape)
        return self.normal(*x.shape) * (0.3 if x.dim() < 2 else 1.3 / (x.numel() / x.shape[0]) ** 0.5)

    @torch.no_grad()
    def fill(self, module: nn.Module) -> nn.Module:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weight(name, parameter))
        return module.eval()

    @torch.no_grad()
    def shrink(self, *modules: nn.Module) -> None:
        """Makes what enters a norm of queries or keys so small that its eps shows."""
        for module in modules:
            for parameter in module.parameters():
                parameter *= 0.02

    def padding(self) -> Tensor:
        """[B, Lk]: the first of the batch has all keys, the second one lacks the last two."""
        return torch.arange(LK) < torch.tensor([[LK], [LK - 2]])

    def dense(self, heads: int = 1) -> Tensor:
        """[B, heads, Lq, Lk], each row with a key."""
        mask = self.normal(B, heads, LQ, LK) > 0
        mask[..., 1] = True
        return mask


def additive(mask: Tensor, lowest: float = torch.finfo(torch.float32).min) -> Tensor:
    """[B, 1 | H, 1 | Lq, Lk], zero where a query may attend."""
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    return torch.zeros(mask.shape).masked_fill(~mask, lowest)


@dataclass
class Call:
    """The inputs and outputs of one call of a module."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    result: object = None

    def get(self, name: str, position: int | None = None) -> Tensor:
        return self.kwargs[name] if name in self.kwargs else self.args[position]

    @property
    def output(self) -> Tensor:
        return self.result[0] if isinstance(self.result, tuple) else self.result


@torch.no_grad()
def watch(run: Callable[[], object], *modules: nn.Module) -> list[Call]:
    """Runs, and returns the one call of each of these modules, then that of `run`."""
    calls = [Call() for _ in modules]

    def record(call: Call) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
            assert call.result is None, "called twice"
            call.args, call.kwargs, call.result = args, kwargs, result

        return hook

    handles = [x.register_forward_hook(record(call), with_kwargs=True) for x, call in zip(modules, calls, strict=True)]
    result = run()
    for handle in handles:
        handle.remove()
    return [*calls, Call(result=result)]


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: x for name, x in tensors.items()}


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    result = {}
    for name, x in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = x
    assert len(result) == len(tensors)
    return result


# ----------------------------------------------------------------------------------------------------------------- the registry

FAMILIES: dict[str, Callable[[Draw], Made]] = {}


def family(*names: str, **variants: tuple) -> Callable:
    """Registers a function under its names, or under each name of `variants` with the arguments given there."""

    def register(make: Callable) -> Callable:
        for name in names:
            FAMILIES[name] = make
        for name, arguments in variants.items():
            FAMILIES[name] = lambda draw, arguments=arguments: make(draw, *arguments)
        return make

    return register


# ----------------------------------------------------------------------------------------------------------- torch and the like


class Fusion(nn.Module):
    """A model with a torch.nn.MultiheadAttention in it."""

    def __init__(self, dim: int, heads: int, **options):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads)
        self.cross_attention = nn.MultiheadAttention(dim, heads, **options)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim))


@family(
    torch_packed=({}, "torch_packed"),
    torch_separate=({"kdim": 24, "vdim": 20}, "torch_separate"),
    torch_bias_kv=({"add_bias_kv": True}, "torch_packed"),
)
def torch_multihead(draw: Draw, options: dict, layout: str) -> Made:
    model = draw.fill(Fusion(16, 4, batch_first=True, **options))
    inputs = {"query": draw.normal(B, LQ, 16), "mask": draw.padding()}
    if "kdim" in options:
        inputs |= {"key": draw.normal(B, LK, options["kdim"]), "value": draw.normal(B, LK, options["vdim"])}
    else:
        inputs["context"] = draw.normal(B, LK, 16)
    return torch_made(model.cross_attention, layout, under("fusion.", model.state_dict()), "fusion.cross_attention.", inputs)


@torch.no_grad()
def torch_made(module: nn.MultiheadAttention, layout: str, file: Tensors, prefix: str, inputs: Tensors, **more) -> Made:
    key, value = inputs.get("key", inputs.get("context")), inputs.get("value", inputs.get("context"))
    ordered = [x if module.batch_first else x.transpose(0, 1) for x in (inputs["query"], key, value)]
    options = {"key_padding_mask": ~inputs["mask"] if "mask" in inputs else None, "average_attn_weights": False}
    output, weights = module(*ordered, **options)
    output = output if module.batch_first else output.transpose(0, 1)
    if module.bias_k is not None:
        more["note"] = (
            "bias_k and bias_v are one more key and value behind the last, for every query: weights [B, H, Lq, Lk + 1]"
        )
    return Made(layout, file, prefix, module, inputs, output, module.num_heads, weights, **more)


@family(torch_decoder_layer=(True,), torch_decoder_layer_no_bias=(False,))
def torch_decoder_layer(draw: Draw, bias: bool) -> Made:
    """nn.TransformerDecoder, sequence first."""
    model = draw.fill(nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, dropout=0, bias=bias), 1))
    layer, mask = model.layers[0], draw.padding()
    x, context = draw.normal(LQ, B, 16), draw.normal(LK, B, 16)
    call, result = watch(lambda: layer(x, context, memory_key_padding_mask=~mask), layer.multihead_attn)
    inputs = {"query": call.args[0].transpose(0, 1), "context": context.transpose(0, 1), "mask": mask}
    name = "decoder.layers.0."
    block = Block(
        inputs["query"],
        result.output.transpose(0, 1),
        *("layer", "after", layer.norm2.eps, "relu"),
        *(name + x for x in ("norm2", "norm3", "linear1", "linear2")),
    )
    file = under("decoder.", model.state_dict())
    made = torch_made(layer.multihead_attn, "torch_packed", file, f"{name}multihead_attn.", inputs, block=block)
    assert torch.allclose(made.output, call.output.transpose(0, 1), atol=1e-6)
    return made


@family("detr_original")
def detr_original(draw: Draw) -> Made:
    """The modules of the original DETR, whose decoder layer has the names of torch's, called as it calls them."""
    parts = {"transformer": nn.Transformer(16, 4, 1, 1, 24), "input_proj": nn.Conv2d(8, 16, 1)}
    model = draw.fill(nn.ModuleDict(parts | {"query_embed": nn.Embedding(LQ, 16), "class_embed": nn.Linear(16, 4)}))
    target, position, memory = draw.normal(B, LQ, 16), draw.normal(B, LK, 16), draw.normal(B, LK, 16)
    query = target + model["query_embed"].weight.detach()
    inputs = {"query": query, "key": memory + position, "value": memory, "mask": draw.padding()}
    attention = model["transformer"].decoder.layers[0].multihead_attn
    prefix = "transformer.decoder.layers.0.multihead_attn."
    note = "by definition: DETR adds positions to query and key, not to value, and calls torch.nn.MultiheadAttention"
    return torch_made(attention, "torch_packed", model.state_dict(), prefix, inputs, note=note)


@family("reference")
@torch.no_grad()
def reference(draw: Draw) -> Made:
    """The class of this project's README."""
    parts = {"embedding": nn.Embedding(8, 16), "fusion": CrossAttention(16, 24, 20, 12), "classifier": nn.Linear(12, 3)}
    model = draw.fill(nn.ModuleDict(parts))
    inputs = {"query": draw.normal(B, LQ, 16), "key": draw.normal(B, LK, 24), "value": draw.normal(B, LK, 20)}
    output, weights = model["fusion"](**inputs)
    name = "by definition: CrossAttention of README.md"
    return Made("reference", model.state_dict(), "fusion.", name, inputs, output, 1, weights[:, None])


# ----------------------------------------------------------------------------------------------------------------- transformers

HF = ("transformers",)
TINY = {"attention_heads": 4, "ffn_dim": 24}


def hugging_face(name: str, config: object, draw: Draw) -> nn.Module:
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return draw.fill(getattr(transformers, name)._from_config(config, attn_implementation="eager"))


def saved(model: nn.Module) -> Tensors:
    """Tensors by the names that save_pretrained writes, which may differ from the module's."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def config_of(name: str, **options) -> object:
    return getattr(importlib.import_module("transformers"), name)(**options)


TOKENS = {"vocab_size": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ENCODER_DECODER = {"encoder_layers": 1, "decoder_layers": 1} | {
    f"{side}_{name}": x for side in ("encoder", "decoder") for name, x in TINY.items()
}


@family(
    bart=("BartConfig", "BartForConditionalGeneration", "after"),
    mbart=("MBartConfig", "MBartForConditionalGeneration", "before"),
    m2m_100=("M2M100Config", "M2M100ForConditionalGeneration", "before"),
    marian=("MarianConfig", "MarianMTModel", "after"),
    pegasus=("PegasusConfig", "PegasusForConditionalGeneration", "before"),
    whisper=("WhisperConfig", "WhisperForConditionalGeneration", "before"),
    musicgen=("MusicgenDecoderConfig", "MusicgenForCausalLM", "before"),
)
def bart_like(draw: Draw, config_name: str, model_name: str, placement: str) -> Made:
    options = TOKENS | ENCODER_DECODER | {"d_model": 16, "max_position_embeddings": 8}
    if config_name == "WhisperConfig":
        options |= {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8}
        del options["max_position_embeddings"]
    if config_name == "MusicgenDecoderConfig":
        options = {"vocab_size": 8, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
        options |= {"num_codebooks": 1, "max_position_embeddings": 8}
        config = importlib.import_module("transformers.models.musicgen.configuration_musicgen").MusicgenDecoderConfig(**options)
    else:
        config = config_of(config_name, **options)
    model = hugging_face(model_name, config, draw)
    outer = "decoder." if config_name == "MusicgenDecoderConfig" else ""  # as the whole model has it
    layer, name = model.model.decoder.layers[0], f"{outer}model.decoder.layers.0."
    mask = None if config_name == "WhisperConfig" else draw.padding()
    x, context = draw.normal(B, LQ, 16), draw.normal(B, LK, 16)
    bias = None if mask is None else additive(mask)

    attention, norm = layer.encoder_attn, layer.encoder_attn_layer_norm
    call, norm_call, result = watch(
        lambda: layer(x, encoder_hidden_states=context, encoder_attention_mask=bias), attention, norm
    )
    inputs = {"query": call.get("hidden_states", 0), "context": context} | ({} if mask is None else {"mask": mask})
    block = Block(
        norm_call.args[0] if placement == "before" else inputs["query"],
        result.output,
        *("layer", placement, norm.eps, activation(layer.activation_fn)),
        *(name + x for x in ("encoder_attn_layer_norm", "final_layer_norm", "fc1", "fc2")),
    )
    file, prefix = under(outer, saved(model)), f"{name}encoder_attn."
    return Made("out_proj", file, prefix, attention, inputs, call.output, 4, call.result[1], packages=HF, block=block)


def activation(function: object) -> str:
    """The name of an activation, found by its values."""
    x = torch.linspace(-3, 3, 50)
    given = function(x)
    (name,) = (name for name, f in ACTIVATIONS.items() if torch.allclose(f(x), given, atol=1e-6))
    return name


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


@family("detr")
def detr(draw: Draw) -> Made:
    backbone = config_of(
        "ResNetConfig", embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    options = ENCODER_DECODER | {"d_model": 16, "num_queries": LQ, "num_labels": 2, "use_pretrained_backbone": False}
    config = config_of("DetrConfig", use_timm_backbone=False, backbone=None, backbone_config=backbone, **options)
    model = hugging_face("DetrForObjectDetection", config, draw)
    layer, mask, context = model.model.decoder.layers[0], draw.padding(), draw.normal(B, LK, 16)
    positions = {
        "object_queries_position_embeddings": draw.normal(B, LQ, 16),
        "spatial_position_embeddings": draw.normal(B, LK, 16),
    }
    options = positions | {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask)}
    call, _ = watch(lambda: layer(draw.normal(B, LQ, 16), **options), layer.encoder_attn)
    inputs = {"query": call.get("hidden_states") + call.get("position_embeddings"), "value": context, "mask": mask}
    inputs["key"] = context + call.get("encoder_position_embeddings")
    note = "positions are added to query and key, not to value; in memory out_proj is called o_proj, in files it is out_proj"
    prefix = "model.decoder.layers.0.encoder_attn."
    made = Made(
        "out_proj", saved(model), prefix, layer.encoder_attn, inputs, call.output, 4, call.result[1], packages=HF, note=note
    )
    made.file = {name: x for name, x in made.file.items() if "backbone" not in name}
    return made


@family("siglip")
def siglip(draw: Draw) -> Made:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hugging_face("SiglipVisionModel", config_of("SiglipVisionConfig", image_size=8, patch_size=4, **options), draw)
    head = getattr(model, "vision_model", model).head
    context = draw.normal(B, LK, 16)
    call, _ = watch(lambda: head(context), head.attention)
    file = renamed(under("vision_model.", saved(model)), ("vision_model.vision_model.", "vision_model."))
    inputs = {"query": head.probe.detach().expand(B, 1, 16).contiguous(), "context": context}
    assert torch.equal(call.args[0], inputs["query"])
    note = "the query is the tensor vision_model.head.probe, the same for all; the residual behind it is the output itself"
    return torch_made(head.attention, "torch_packed", file, "vision_model.head.attention.", inputs, packages=HF, note=note)


def bert_block(name: str, x: Tensor, result: Tensor, layer: nn.Module) -> Block:
    norm, act = layer.crossattention.output.LayerNorm, layer.intermediate.intermediate_act_fn
    names = ("crossattention.output.LayerNorm", "output.LayerNorm", "intermediate.dense", "output.dense")
    return Block(x, result, "layer", "after", norm.eps, activation(act), *(name + n for n in names))


@family(bert=(False,), bert_old=(True,))
def bert(draw: Draw, is_old: bool) -> Made:
    options = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = config_of("BertConfig", max_position_embeddings=8, is_decoder=True, add_cross_attention=True, **options)
    model = hugging_face("BertLMHeadModel", config, draw)
    layer, mask, context = model.bert.encoder.layer[0], draw.padding(), draw.normal(B, LK, 16)
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask)}
    cross = layer.crossattention
    call, dense, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), cross.self, cross.output.dense)
    inputs, name = {"query": call.args[0], "context": context, "mask": mask}, "bert.encoder.layer.0."
    more = {"packages": HF, "block": bert_block(name, call.args[0], result.output, layer)}
    prefix, file = f"{name}crossattention.", saved(model)
    if is_old:  # as in files converted from TensorFlow
        file = renamed(file, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        more["note"] = "by renaming"
    return Made("bert", file, prefix, cross.self, inputs, dense.output, 4, call.result[1], **more)


@family(blip=(1,), albef=(2,))
def blip(draw: Draw, depth: int) -> Made:
    """ALBEF by renaming: its text encoder has the same class, but cross-attention in the upper layers only."""
    text = {"vocab_size": 12, "hidden_size": 16, "encoder_hidden_size": 24, "intermediate_size": 20, "projection_dim": 8}
    text |= {"num_hidden_layers": depth, "num_attention_heads": 4, "max_position_embeddings": 8}
    vision = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = config_of("BlipConfig", text_config=text, vision_config=vision, projection_dim=8)
    model = hugging_face("BlipForConditionalGeneration", config, draw)
    layer, context = model.text_decoder.bert.encoder.layer[depth - 1], draw.normal(B, LK, 24)
    cross = layer.crossattention
    options = {"encoder_hidden_states": context}  # no mask: this version of the class does not pass it to the attention
    call, dense, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), cross.self, cross.output.dense)
    inputs, file, outer, note = {"query": call.args[0], "context": context}, saved(model), "text_decoder.", ""
    if depth == 2:
        outer, note = "text_encoder.", "by renaming; the lower layers have no cross-attention"
        file = {
            x: tensor for x, tensor in file.items() if "layer.0.crossattention" not in x and not x.startswith("vision_model")
        }
        file = renamed(file, ("text_decoder.", "text_encoder."))
    name = f"{outer}bert.encoder.layer.{depth - 1}."
    block, prefix = bert_block(name, call.args[0], result.output, layer), f"{name}crossattention."
    more = {"packages": HF, "block": block, "note": note}
    return Made("bert", file, prefix, cross.self, inputs, dense.output, 4, call.result[1], **more)


@family("blip_vision")
def blip_vision(draw: Draw) -> Made:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hugging_face("BlipVisionModel", config_of("BlipVisionConfig", image_size=4, patch_size=2, **options), draw)
    attention = model.encoder.layers[0].self_attn
    call, _ = watch(lambda: model(draw.normal(B, 3, 4, 4)), attention)
    inputs = {"query": call.get("hidden_states", 0)}
    inputs["context"] = inputs["query"]
    file, prefix = under("vision_model.", saved(model)), "vision_model.encoder.layers.0.self_attn."
    return Made("blip_vision", file, prefix, attention, inputs, call.output, 4, call.result[1], packages=HF)


@family(qformer=("qformer", "qformer."), qformer_lavis=("bert", "Qformer.bert."))
def qformer(draw: Draw, layout: str, outer: str) -> Made:
    options = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    options |= {"cross_attention_frequency": 2, "encoder_hidden_size": 24, "use_qformer_text_input": False}
    model = hugging_face("Blip2QFormerModel", config_of("Blip2QFormerConfig", **options), draw)
    layer, mask, context = model.encoder.layer[0], draw.padding(), draw.normal(B, LK, 24)
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask), "query_length": LQ}
    attention, dense = layer.crossattention.attention, layer.crossattention.output.dense
    call, output, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), attention, dense)
    inputs = {"query": call.get("hidden_states", 0), "context": context, "mask": mask}
    file, note = under(outer, saved(model)) | {"query_tokens": draw.normal(1, LQ, 16)}, ""
    if layout == "bert":
        file = renamed(file, ("attention.attention.", "attention.self."), ("layernorm.", "embeddings.LayerNorm."))
        note = "by renaming"
    name = f"{outer}encoder.layer.0."
    names = ("crossattention.output.LayerNorm", "output_query.LayerNorm", "intermediate_query.dense", "output_query.dense")
    eps, act = layer.crossattention.output.LayerNorm.eps, activation(layer.intermediate_query.intermediate_act_fn)
    block = Block(inputs["query"], result.output, "layer", "after", eps, act, *(name + n for n in names))
    prefix, more = f"{name}crossattention.", {"packages": HF, "note": note, "block": block}
    return Made(layout, file, prefix, attention, inputs, output.output, 4, call.result[1], **more)


@family(t5=("relu",), t5_gated=("gated-gelu",))
def t5(draw: Draw, feed_forward: str) -> Made:
    options = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    config = config_of("T5Config", vocab_size=12, relative_attention_num_buckets=4, feed_forward_proj=feed_forward, **options)
    model = hugging_face("T5ForConditionalGeneration", config, draw)
    layer, mask, context = model.decoder.block[0], draw.padding(), draw.normal(B, LK, 16)
    attention, around = layer.layer[1].EncDecAttention, layer.layer[1]
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask)}
    call, branch, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), attention, around)
    inputs, name = {"query": call.args[0], "context": context, "mask": mask}, "decoder.block.0.layer."
    file, prefix = saved(model), f"{name}1.EncDecAttention."
    file[f"{prefix}relative_attention_bias.weight"] = draw.normal(4, 4)  # in old files, and never used
    dense = f"{name}2.DenseReluDense."
    first = "wi" if feed_forward == "relu" else "wi_0"
    block = Block(
        branch.args[0],
        result.output,
        *("rms", "before", around.layer_norm.variance_epsilon, activation(layer.layer[2].DenseReluDense.act)),
        *(f"{name}1.layer_norm", f"{name}2.layer_norm", dense + first, f"{dense}wo"),
        feed_forward_multiplier="" if feed_forward == "relu" else f"{dense}wi_1",
    )
    more = {"scale": 1.0, "packages": HF, "block": block}
    return Made("t5", file, prefix, attention, inputs, call.output, 4, call.result[2], **more)


@family("pix2struct")
def pix2struct(draw: Draw) -> Made:
    options = {"vocab_size": 12, "hidden_size": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    text = options | {"relative_attention_num_buckets": 4, "decoder_start_token_id": 0}
    vision = {"hidden_size": 16, "patch_embed_hidden_size": 8, "d_ff": 24, "d_kv": 4, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "seq_len": 8, "patch_size": 2}
    config = config_of("Pix2StructConfig", text_config=text, vision_config=vision)
    model = hugging_face("Pix2StructForConditionalGeneration", config, draw)
    layer, mask, context = model.decoder.layer[0], draw.padding(), draw.normal(B, LK, 16)
    around, dense = layer.encoder_decoder_attention, layer.mlp
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask)}
    call, branch, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), around.attention, around)
    inputs, name = {"query": call.get("hidden_states", 0), "context": context, "mask": mask}, "decoder.layer.0."
    names = ("encoder_decoder_attention.layer_norm", "mlp.layer_norm")
    names += tuple(f"mlp.DenseReluDense.{x}" for x in ("wi_0", "wo", "wi_1"))
    styles = ("rms", "before", around.layer_norm.variance_epsilon, activation(dense.DenseReluDense.act))
    block = Block(branch.get("hidden_states", 0), result.output, *styles, *(name + n for n in names))
    more = {"scale": 1.0, "packages": HF, "block": block}
    prefix = f"{name}encoder_decoder_attention.attention."
    return Made("pix2struct", saved(model), prefix, around.attention, inputs, call.output, 4, **more)


@family("lightglue_hf")
def lightglue_hf(draw: Draw) -> Made:
    """One layer: its self-attention has rotary embeddings, its cross-attention none."""
    options = {"descriptor_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = config_of("LightGlueConfig", **options)
    config._attn_implementation = "eager"
    module = importlib.import_module("transformers.models.lightglue.modeling_lightglue")
    model = draw.fill(nn.ModuleDict({"transformer_layers": nn.ModuleList([module.LightGlueTransformerLayer(config, 0)])}))
    attention, mask = model["transformer_layers"][0].cross_attention, draw.padding()
    # the class shapes keys as it shapes queries, so both images have as many points
    inputs = {"query": draw.normal(B, LK, 16), "context": draw.normal(B, LK, 16), "mask": mask}
    options = {"encoder_hidden_states": inputs["context"], "encoder_attention_mask": additive(mask)}
    call, _ = watch(lambda: attention(inputs["query"], **options), attention)
    prefix = "transformer_layers.0.cross_attention."
    return Made("o_proj", model.state_dict(), prefix, attention, inputs, call.output, 4, call.result[1], packages=HF)


@family("albert")
def albert(draw: Draw) -> Made:
    options = {"vocab_size": 12, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    options |= {"intermediate_size": 24, "max_position_embeddings": 8}
    model = hugging_face("AlbertModel", config_of("AlbertConfig", **options), draw)
    attention, x = model.encoder.albert_layer_groups[0].albert_layers[0].attention, draw.normal(B, LK, 16)
    call, _ = watch(lambda: attention(x), attention.dense)
    prefix = "encoder.albert_layer_groups.0.albert_layers.0.attention."
    return Made("albert", saved(model), prefix, attention, {"query": x, "context": x}, call.output, 4, packages=HF)


@family("distilbert")
def distilbert(draw: Draw) -> Made:
    options = {"vocab_size": 12, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 8}
    model = hugging_face("DistilBertModel", config_of("DistilBertConfig", **options), draw)
    attention, x = model.transformer.layer[0].attention, draw.normal(B, LK, 16)
    call, _ = watch(lambda: attention(x), attention)
    inputs = {"query": x, "context": x}
    return Made("xlm", saved(model), "transformer.layer.0.attention.", attention, inputs, call.output, 4, packages=HF)


@family("gpt2")
def gpt2(draw: Draw) -> Made:
    options = {"vocab_size": 12, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_inner": 24}
    model = hugging_face("GPT2LMHeadModel", config_of("GPT2Config", add_cross_attention=True, **options), draw)
    layer, mask, context = model.transformer.h[0], draw.padding(), draw.normal(B, LK, 16)
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask)}
    attention, norm = layer.crossattention, layer.ln_cross_attn
    call, entered, result = watch(lambda: layer(draw.normal(B, LQ, 16), **options), attention, norm)
    inputs, name = {"query": call.args[0], "context": context, "mask": mask}, "transformer.h.0."
    file, prefix = saved(model), f"{name}crossattention."
    file[f"{prefix}bias"] = torch.ones(8, 8, dtype=torch.uint8).tril()[None, None]  # a causal mask: in old files, never used
    file[f"{prefix}masked_bias"] = torch.tensor(-10000.0)
    names = ("ln_cross_attn", "ln_2", "mlp.c_fc", "mlp.c_proj")
    styles = ("layer", "before", norm.eps, activation(layer.mlp.act))
    block = Block(entered.args[0], result.output, *styles, *(name + n for n in names))
    return Made("gpt2", file, prefix, attention, inputs, call.output, 4, call.result[1], packages=HF, block=block)


def gated_block(name: str, x: Tensor, result: Tensor, layer: nn.Module, gates: Names) -> Block:
    styles = ("rms", "before", layer.input_layernorm.variance_epsilon, activation(layer.mlp.act_fn))
    names = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", *gates)
    return Block(x, result, *styles, *(name + n for n in names))


@family("mllama")
def mllama(draw: Draw) -> Made:
    options = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"intermediate_size": 40, "cross_attention_layers": [1], "max_position_embeddings": 16}
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    del options["decoder_start_token_id"]
    model = hugging_face("MllamaForCausalLM", config_of("MllamaTextConfig", **options), draw)
    layer, mask = model.model.layers[1], draw.dense()
    x, context = draw.normal(B, LQ, 32), draw.normal(B, LK, 32)
    options = {"cross_attention_states": context, "cross_attention_mask": additive(mask), "attention_mask": None}
    attention = layer.cross_attn
    draw.shrink(attention.q_proj, attention.k_proj)
    call, result = watch(lambda: layer(x, full_text_row_masked_out_mask=None, **options), attention)
    inputs, name = {"query": call.get("hidden_states"), "context": context, "mask": mask}, "language_model.model.layers.1."
    block = gated_block(name, x, result.output, layer, ("cross_attn_attn_gate", "cross_attn_mlp_gate"))
    more = {"kv_heads": 2, "qk_norm_eps": attention.q_norm.variance_epsilon, "packages": HF, "block": block}
    file, prefix = under("language_model.", saved(model)), f"{name}cross_attn."
    return Made("o_proj", file, prefix, attention, inputs, call.output, 4, call.result[1], **more)


@family(idefics=(False, "float"), idefics_qk_norm=(True, "vector"))
def idefics(draw: Draw, qk_layer_norms: bool, alpha_type: str) -> Made:
    vision = {"embed_dim": 24, "image_size": 4, "patch_size": 4, "intermediate_size": 20, "num_hidden_layers": 1}
    options = {"vocab_size": 12, "additional_vocab_size": 2, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 4, "cross_layer_interval": 1, "max_position_embeddings": 8, "alpha_type": alpha_type}
    options |= {"vision_config": vision | {"num_attention_heads": 2}, "qk_layer_norms": qk_layer_norms}
    model = hugging_face("IdeficsForVisionText2Text", config_of("IdeficsConfig", **options), draw)
    layer, mask = model.model.gated_cross_attn_layers[0], draw.dense()
    x, context = draw.normal(B, LQ, 16), draw.normal(B, LK, 24)
    options = {
        "image_hidden_states": context,
        "image_attention_mask": additive(mask),
        "cross_attention_gate": torch.ones(B, LQ),
    }
    attention = layer.cross_attn
    if qk_layer_norms:
        draw.shrink(attention.q_proj, attention.k_proj)
    call, result = watch(lambda: layer(x, **options), attention)
    inputs, name = {"query": call.get("hidden_states"), "context": context, "mask": mask}, "model.gated_cross_attn_layers.0."
    block = gated_block(name, x, result.output, layer, ("alpha_cross_attn", "alpha_dense"))
    more = {"qk_norm_eps": attention.q_layer_norm.variance_epsilon} if qk_layer_norms else {}
    more |= {"packages": HF, "block": block}
    return Made("o_proj", saved(model), f"{name}cross_attn.", attention, inputs, call.output, 4, call.result[1], **more)


@family("moonshine")
def moonshine(draw: Draw) -> Made:
    options = {"vocab_size": 12, "hidden_size": 12, "intermediate_size": 16, "max_position_embeddings": 8}
    options |= {
        f"{side}_{name}": x
        for side in ("encoder", "decoder")
        for name, x in {"num_hidden_layers": 1, "num_attention_heads": 2}.items()
    }
    config = config_of("MoonshineConfig", pad_head_dim_to_multiple_of=8, **options)
    model = hugging_face("MoonshineForConditionalGeneration", config, draw)
    layer, mask, context = model.model.decoder.layers[0], draw.padding(), draw.normal(B, LK, 12)
    attention, norm, x = layer.encoder_attn, layer.post_attention_layernorm, draw.normal(B, LQ, 12)
    positions = model.model.decoder.rotary_emb(x, torch.arange(LQ)[None])
    options = {"encoder_hidden_states": context, "encoder_attention_mask": additive(mask), "position_embeddings": positions}
    call, entered, result = watch(lambda: layer(x, **options), attention, norm)
    inputs = {"query": call.args[0] if call.args else call.get("hidden_states"), "context": context, "mask": mask}
    file = {name: x for name, x in saved(model).items() if ".decoder." in name}
    note = "heads of 6 are padded to 8 with zeros inside the class, which changes nothing"
    name = "model.decoder.layers.0."
    block = Block(
        entered.args[0],
        result.output,
        *("layer", "before", norm.eps, activation(layer.mlp.activation_fn)),
        *(name + x for x in ("post_attention_layernorm", "final_layernorm", "mlp.fc1", "mlp.fc2")),
        feed_forward_multiplier=f"{name}mlp.fc1",
    )
    more = {"packages": HF, "note": note, "block": block}
    return Made("o_proj", file, f"{name}encoder_attn.", attention, inputs, call.output, 2, call.result[1], **more)


@family("perceiver")
def perceiver(draw: Draw) -> Made:
    options = {"num_latents": LQ, "d_latents": 16, "d_model": 24, "num_blocks": 1, "num_self_attends_per_block": 1}
    options |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 8, "v_channels": 16}
    options |= {"self_attention_widening_factor": 1, "cross_attention_widening_factor": 1}
    model = hugging_face("PerceiverModel", config_of("PerceiverConfig", **options), draw)
    layer, mask = model.encoder.cross_attention, draw.padding()
    x, context = draw.normal(B, LQ, 16), draw.normal(B, LK, 24)
    inside = layer.attention.self
    options = {"inputs": context, "inputs_mask": additive(mask), "output_attentions": True}
    call, dense, _ = watch(lambda: layer(x, **options), inside, layer.attention.output.dense)
    inputs = {"query": x, "context": context, "mask": mask}
    more = {"input_norm_eps": inside.layernorm1.eps, "packages": HF, "note": "queries and keys are 4 wide a head, values 8"}
    prefix = "encoder.cross_attention.attention."
    return Made("perceiver_hf", saved(model), prefix, inside, inputs, dense.output, 2, call.result[1], **more)


@family("sam")
def sam(draw: Draw) -> Made:
    options = {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = config_of("SamMaskDecoderConfig", iou_head_hidden_dim=8, iou_head_depth=2, **options)
    config._attn_implementation = "eager"
    decoder = importlib.import_module("transformers.models.sam.modeling_sam").SamMaskDecoder
    model = draw.fill(decoder(config))
    attention = model.transformer.layers[0].cross_attn_token_to_image
    image = draw.normal(B, LK, 16)
    inputs = {"query": draw.normal(B, LQ, 16), "key": image + draw.normal(B, LK, 16), "value": image}
    call, _ = watch(lambda: attention(**{name: x[:, None] for name, x in inputs.items()}), attention)
    note = "positions are added to query and key, not to value; heads share half the width; the class takes [B, prompts, L, E]"
    more = {"packages": HF, "note": note}
    prefix = "mask_decoder.transformer.layers.0.cross_attn_token_to_image."
    file = {name: x for name, x in under("mask_decoder.", model.state_dict()).items() if "hypernetworks" not in name}
    return Made("out_proj", file, prefix, attention, inputs, call.output[:, 0], 4, call.result[1], **more)


# ------------------------------------------------------------------------------------------------------------------- diffusers

DIFFUSION = ("diffusers",)


def diffusion(name: str, draw: Draw, **options) -> nn.Module:
    return draw.fill(getattr(importlib.import_module("diffusers"), name)(**options))


def diffusers_made(model: nn.Module, attention: nn.Module, prefix: str, inputs: Tensors, **more) -> Made:
    bias = additive(inputs["mask"], -10000.0)[:, 0] if "mask" in inputs else None
    call, _ = watch(lambda: attention(inputs["query"], inputs["context"], attention_mask=bias), attention)
    return Made(
        "diffusers", model.state_dict(), prefix, attention, inputs, call.output, attention.heads, packages=DIFFUSION, **more
    )


def unet(draw: Draw) -> nn.Module:
    options = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
    options |= {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
    return diffusion(
        "UNet2DConditionModel", draw, sample_size=4, in_channels=4, out_channels=4, attention_head_dim=2, **options
    )


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2."


@family("unet")
def unet_family(draw: Draw) -> Made:
    model = unet(draw)
    inputs = {"query": draw.normal(B, LQ, 8), "context": draw.normal(B, LK, 12)}
    return diffusers_made(
        model, model.get_submodule(UNET[:-1]), UNET, inputs, note="attention_head_dim of the config is num_heads"
    )


@family("ldm")
def ldm(draw: Draw) -> Made:
    """The single file of Stable Diffusion, by renaming; of the U-Net only the transformer and its neighbours."""
    made, outer = unet_family(draw), "model.diffusion_model."
    pairs = (("down_blocks.0.attentions.0.", f"{outer}input_blocks.1.1."), ("conv_in.", f"{outer}input_blocks.0.0."))
    made.file = {name: x for name, x in made.file.items() if name.startswith(("down_blocks.0.attentions.", "conv_in."))}
    made.file = renamed(made.file, *pairs)
    made.prefix, made.note = renamed({made.prefix: None}, *pairs).popitem()[0], "by renaming"
    return made


@family("ip_adapter")
def ip_adapter(draw: Draw) -> Made:
    model = unet(draw)
    projection = {"proj.weight": draw.normal(4 * 12, 6), "proj.bias": draw.normal(4 * 12)}  # 4 tokens of 12 from a vector of 6
    projection |= {"norm.weight": 1 + 0.3 * draw.normal(12), "norm.bias": draw.normal(12)}
    adapter = {f"1.to_{x}_ip.weight": draw.normal(8, 12) * 0.4 for x in "kv"}
    model._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": adapter}, low_cpu_mem_usage=False)
    attention = model.get_submodule(UNET[:-1])
    attention.processor.scale = [0.6]
    inputs = {"query": draw.normal(B, LQ, 8), "context": draw.normal(B, LK, 12), "ip_context": draw.normal(B, 4, 12)}
    inputs["mask"] = draw.padding()
    contexts = (inputs["context"], [inputs["ip_context"][:, None]])
    bias = additive(inputs["mask"], -10000.0)[:, 0]
    call, _ = watch(lambda: attention(inputs["query"], contexts, attention_mask=bias), attention)
    more = {"ip_scale": 0.6, "packages": DIFFUSION, "note": "the mask is for `context` only"}
    return Made("diffusers", model.state_dict(), UNET, attention.processor, inputs, call.output, attention.heads, **more)


def whole_unet(draw: Draw) -> nn.Module:
    """Four layers with cross-attention: one on the way down, two on the way up, one in the middle."""
    options = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    options |= {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
    return diffusion(
        "UNet2DConditionModel", draw, sample_size=4, in_channels=4, out_channels=4, attention_head_dim=2, **options
    )


@family("unet_whole")
def unet_whole(draw: Draw) -> Made:
    model, prefix = whole_unet(draw), "mid_block.attentions.0.transformer_blocks.0.attn2."
    inputs = {"query": draw.normal(B, LQ, 8), "context": draw.normal(B, LK, 12)}
    made = diffusers_made(model, model.get_submodule(prefix[:-1]), prefix, inputs, note="of the U-Net only the attentions")
    made.file = {name: x for name, x in made.file.items() if ".attn" in name}
    return made


@family(
    ip_adapter_down=("down_blocks.0.attentions.0", 1),
    ip_adapter_up=("up_blocks.0.attentions.1", 5),
    ip_adapter_mid=("mid_block.attentions.0", 7),
)
def ip_adapter_file(draw: Draw, block: str, number: int) -> Made:
    """An adapter's own file, which diffusers itself puts into the U-Net of unet_whole; then one of its layers."""
    model, prefix = whole_unet(Draw("unet_whole")), f"{block}.transformer_blocks.0.attn2."
    rest = {name.removeprefix(prefix): x for name, x in model.state_dict().items() if name.startswith(prefix)}
    image = {"proj.weight": draw.normal(4 * 12, 6), "proj.bias": draw.normal(4 * 12)}
    image |= {"norm.weight": 1 + 0.3 * draw.normal(12), "norm.bias": draw.normal(12)}
    adapter = {f"{i}.to_{x}_ip.weight": draw.normal(8, 12) * 0.4 for i in (1, 3, 5, 7) for x in "kv"}
    model._load_ip_adapter_weights({"image_proj": image, "ip_adapter": adapter}, low_cpu_mem_usage=False)
    attention = model.get_submodule(prefix[:-1])
    attention.processor.scale = [0.6]
    inputs = {"query": draw.normal(B, LQ, 8), "context": draw.normal(B, LK, 12), "ip_context": draw.normal(B, 4, 12)}
    contexts = (inputs["context"], [inputs["ip_context"][:, None]])
    call, _ = watch(lambda: attention(inputs["query"], contexts), attention)
    file = under("image_proj.", image) | under("ip_adapter.", adapter)
    more = {"ip_scale": 0.6, "packages": DIFFUSION, "rest": rest, "base": "unet_whole", "base_prefix": prefix}
    more["note"] = "odd numbers are places among all attentions, self included, in order down, up, mid"
    name, heads = f"ip_adapter.{number}.", attention.heads
    return Made("ip_adapter_original", file, name, attention.processor, inputs, call.output, heads, **more)


@family("pixart")
def pixart(draw: Draw) -> Made:
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    options |= {"cross_attention_dim": 24, "sample_size": 4, "caption_channels": 12, "num_embeds_ada_norm": 8}
    model = diffusion("PixArtTransformer2DModel", draw, **options)
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    return diffusers_made(model, model.transformer_blocks[0].attn2, "transformer_blocks.0.attn2.", inputs)


@family("pixart_original")
def pixart_original(draw: Draw) -> Made:
    """By renaming and joining, as the converter of diffusers does, backwards."""
    made = pixart(draw)
    own = {name.removeprefix(made.prefix): x for name, x in made.file.items() if name.startswith(made.prefix)}
    file = {f"q_linear.{x}": own[f"to_q.{x}"] for x in ("weight", "bias")}
    file |= {f"kv_linear.{x}": torch.cat((own[f"to_k.{x}"], own[f"to_v.{x}"])) for x in ("weight", "bias")}
    file |= {f"proj.{x}": own[f"to_out.0.{x}"] for x in ("weight", "bias")}
    made.prefix, made.layout, made.note = "blocks.0.cross_attn.", "pixart_original", "by renaming and joining"
    made.file = under(made.prefix, file) | {"blocks.0.scale_shift_table": draw.normal(6, 16)}
    return made


@family(sana=({},), sana_qk_norm=({"qk_norm": "rms_norm_across_heads"},))
def sana(draw: Draw, qk_norm: dict) -> Made:
    options = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    options |= {"num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "cross_attention_dim": 24}
    model = diffusion("SanaTransformer2DModel", draw, caption_channels=12, sample_size=4, **options, **qk_norm)
    attention = model.transformer_blocks[0].attn2
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    more = {"qk_norm_eps": attention.norm_q.eps} if qk_norm else {}
    if qk_norm:
        draw.shrink(attention.to_q, attention.to_k)
    return diffusers_made(model, attention, "transformer_blocks.0.attn2.", inputs, **more)


@family("ltx")
def ltx(draw: Draw) -> Made:
    options = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    model = diffusion("LTXVideoTransformer3DModel", draw, cross_attention_dim=24, caption_channels=12, **options)
    attention = model.transformer_blocks[0].attn2
    draw.shrink(attention.to_q, attention.to_k)
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    return diffusers_made(model, attention, "transformer_blocks.0.attn2.", inputs, qk_norm_eps=attention.norm_q.eps)


def wan_model(draw: Draw, **options) -> nn.Module:
    options |= {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 20}
    options |= {"freq_dim": 8, "ffn_dim": 24, "num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 8}
    return diffusion("WanTransformer3DModel", draw, **options)


@family("wan")
def wan(draw: Draw) -> Made:
    model = wan_model(draw)
    attention = model.blocks[0].attn2
    draw.shrink(attention.to_q, attention.to_k)
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 16)}
    return diffusers_made(model, attention, "blocks.0.attn2.", inputs, qk_norm_eps=attention.norm_q.eps)


@family("wan_i2v")
def wan_i2v(draw: Draw) -> Made:
    model = wan_model(draw, image_dim=20, added_kv_proj_dim=16)
    attention = model.blocks[0].attn2
    draw.shrink(attention.to_q, attention.to_k, attention.add_k_proj)
    text = 512  # the class takes the last 512 tokens for text
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, text, 16), "ip_context": draw.normal(B, LK, 16)}
    joined = torch.cat((inputs["ip_context"], inputs["context"]), 1)
    call, _ = watch(lambda: attention(inputs["query"], joined), attention)
    more = {"ip_scale": 1.0, "qk_norm_eps": attention.norm_q.eps, "packages": DIFFUSION}
    more["note"] = "the class takes both contexts as one: those of the image first, then 512 of text"
    return Made("diffusers", model.state_dict(), "blocks.0.attn2.", attention, inputs, call.output, attention.heads, **more)


@family(wan_original=(wan,), wan_i2v_original=(wan_i2v,))
def wan_original(draw: Draw, make: Callable) -> Made:
    """By renaming, as the converter of diffusers does, backwards."""
    pairs = (("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0.", "o."), ("norm_added_k.", "norm_k_img."))
    pairs += (("add_k_proj.", "k_img."), ("add_v_proj.", "v_img."), *((f"to_{x}.", f"{x}.") for x in "qkv"))
    pairs += (("ffn.net.0.proj.", "ffn.0."), ("ffn.net.2.", "ffn.2."), ("norm2.", "norm3."))
    made = make(draw)
    made.file = {name: x for name, x in made.file.items() if name.startswith("blocks.")}
    made.file, made.prefix = renamed(made.file, *pairs), "blocks.0.cross_attn."
    made.layout, made.note = "wan_original", "by renaming"
    return made


# --------------------------------------------------------------------------------------------------------------- other packages


def part_of(package: str, file: str) -> ModuleType:
    """Imports one file of a package without running its __init__."""
    folder = importlib.util.find_spec(package)
    if folder is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(folder.origin).parent / file
    spec = importlib.util.spec_from_file_location(f"{package}.{file.removesuffix('.py').replace('/', '.')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flamingo_made(layer: nn.Module, file: Tensors, name: str, x: Tensor, media: Tensor, locations: Tensor, **more) -> Made:
    call, result = watch(lambda: layer(x, media, media_locations=locations), layer.attn)
    inputs = {"query": x, "context": media.flatten(1, 2)} | more.pop("mask", {})
    eps = layer.attn.norm.eps
    names = ("attn.norm", "ff.0", "ff.1", "ff.3")
    gates = {"attention_gate": f"{name}attn_gate", "feed_forward_gate": f"{name}ff_gate"}
    styles = ("layer", "before", eps, activation(layer.ff[2]))
    block = Block(x, result.output, *styles, *(name + n for n in names), **gates)
    more |= {"input_norm_eps": eps, "block": block}
    return Made("flamingo", file, f"{name}attn.", layer.attn, inputs, call.output, layer.attn.heads, **more)


@family("flamingo")
def flamingo(draw: Draw) -> Made:
    package = importlib.import_module("flamingo_pytorch")
    modules = {"layer": package.GatedCrossAttentionBlock(dim=16, dim_head=6, heads=2, ff_mult=2)}
    modules["resampler"] = package.PerceiverResampler(dim=16, depth=1, dim_head=6, heads=2, num_latents=LK, ff_mult=1)
    layer, resampler = (draw.fill(x) for x in modules.values())
    file = under("layers.0.1.", layer.state_dict()) | under("perceiver_resampler.", resampler.state_dict())
    file |= {"token_emb.weight": draw.normal(12, 16), "layers.0.0.norm.gamma": draw.normal(16)}
    file |= {"layers.0.0.attn_out.weight": draw.normal(16, 12), "layers.0.0.ff_out.1.weight": draw.normal(16, 16)}
    locations = torch.zeros(B, LQ, dtype=torch.bool)
    locations[:, 0] = True
    x, media = draw.normal(B, LQ, 16), draw.normal(B, 1, LK, 16)
    return flamingo_made(layer, file, "layers.0.1.", x, media, locations, packages=("flamingo-pytorch",))


@family("open_flamingo")
def open_flamingo(draw: Draw) -> Made:
    helpers = part_of("open_flamingo", "src/helpers.py")
    layer = draw.fill(helpers.GatedCrossAttentionBlock(dim=16, dim_visual=24, dim_head=6, heads=2, ff_mult=2))
    resampler = draw.fill(helpers.PerceiverResampler(dim=24, depth=1, dim_head=4, heads=2, num_latents=3, ff_mult=1))
    name = "lang_encoder.transformer.blocks.0.gated_cross_attn_layer."
    file = under("perceiver.", resampler.state_dict()) | under(name, layer.state_dict())
    locations = torch.tensor([[True, False, True], [True, False, False]])  # a picture, a word, another picture
    time = locations.cumsum(1)
    mask = time[:, None, :, None] == torch.tensor([1, 1, 1, 2, 2, 2])  # 3 latents of each
    x, media = draw.normal(B, LQ, 16), draw.normal(B, 2, 3, 24)
    note = "each word attends to the last picture before it; a word before the first gets zeros from the attention"
    more = {"mask": {"mask": mask}, "packages": ("open-flamingo",), "note": note}
    return flamingo_made(layer, file, name, x, media, locations, **more)


@family("perceiver_lucidrains")
def perceiver_lucidrains(draw: Draw) -> Made:
    package = importlib.import_module("perceiver_pytorch")
    options = {"num_freq_bands": 1, "depth": 1, "max_freq": 2.0, "input_channels": 21, "input_axis": 1, "num_latents": LQ}
    options |= {
        "latent_dim": 16,
        "cross_heads": 2,
        "latent_heads": 2,
        "cross_dim_head": 6,
        "latent_dim_head": 4,
        "num_classes": 3,
    }
    model = draw.fill(package.Perceiver(**options))
    layer, mask = model.layers[0].cross_attn, draw.padding()
    x, context = draw.normal(B, LQ, 16), draw.normal(B, LK, 24)
    call, _ = watch(lambda: layer(x, context=context, mask=mask), layer)
    inputs = {"query": x, "context": context, "mask": mask}
    more = {"input_norm_eps": layer.norm.eps, "packages": ("perceiver-pytorch",)}
    more["note"] = "files of other versions have layers.0.0. in front"
    prefix = "layers.0.cross_attn."
    return Made("perceiver_lucidrains", model.state_dict(), prefix, layer.fn, inputs, call.output, layer.fn.heads, **more)


@family(to_kv=("to_kv", "", True), to_kv_sequential=("to_kv_sequential", ".0", False))
def to_kv(draw: Draw, layout: str, ending: str, biased: bool) -> Made:
    """perceiver-pytorch's class without its norms, as others have it; with a bias of keys and values alone."""
    package = importlib.import_module("perceiver_pytorch.perceiver_pytorch")
    attention = package.Attention(16, 24, heads=2, dim_head=6)
    attention.to_kv = nn.Linear(24, 24, bias=biased)
    draw.fill(attention)
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    call, _ = watch(lambda: attention(inputs["query"], context=inputs["context"], mask=inputs["mask"]), attention)
    prefix = "layers.0.cross_attn."
    file = under(prefix, renamed(attention.state_dict(), ("to_out.", f"to_out{ending}.")))
    more = {"packages": ("perceiver-pytorch",), "note": "by renaming" if ending else ""}
    return Made(layout, file, prefix, attention, inputs, call.output, attention.heads, **more)


@family("bidirectional")
def bidirectional(draw: Draw) -> Made:
    package = importlib.import_module("bidirectional_cross_attention")
    attention = draw.fill(package.BidirectionalCrossAttention(dim=16, context_dim=24, heads=2, dim_head=6))
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    options = {"context_mask": inputs["mask"], "return_attn": True}
    call, _ = watch(lambda: attention(inputs["query"], inputs["context"], **options), attention)
    file, more = under("joint.", attention.state_dict()), {"packages": ("bidirectional-cross-attention",)}
    return Made("bidirectional", file, "joint.", attention, inputs, call.output, attention.heads, call.result[2], **more)


@family(lightglue=(4, "transformers.0."), lighterglue=(1, "cross_attn.0."))
def lightglue(draw: Draw, heads: int, outer: str) -> Made:
    """The names of the class, and those of the published files; of two directions the first."""
    block = draw.fill(importlib.import_module("kornia.feature.lightglue").CrossBlock(16, heads))
    mask = draw.padding()
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 16), "mask": mask}
    entered = []  # `to_out` is called for both directions
    block.to_out.register_forward_hook(lambda _module, _args, result: entered.append(result))
    with torch.no_grad():
        block(inputs["query"], inputs["context"], mask[:, None, None])
    prefix = outer if outer.startswith("cross_attn") else f"{outer}cross_attn."
    file = under(prefix, block.state_dict())
    return Made("lightglue", file, prefix, block, inputs, entered[0], heads, packages=("kornia",))


# timm's ViT with an attention pool, and parts of its other models.
TIMM = ("timm",)


def timm_vit(draw: Draw, **options) -> nn.Module:
    module = importlib.import_module("timm.models.vision_transformer")
    options = {"depth": 1} | options | {"img_size": 4, "patch_size": 2, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 1.5}
    return draw.fill(module.VisionTransformer(num_classes=3, **options))


@family(timm_vit=({},), timm_vit_qk_norm=({"qk_norm": True},))
def timm_vit_family(draw: Draw, options: dict) -> Made:
    model = timm_vit(draw, **options)
    attention, x = model.blocks[0].attn, draw.normal(B, LK, 16)
    more = {"packages": TIMM}
    if options:
        with torch.no_grad():
            attention.qkv.weight[:32] *= 0.02
            attention.qkv.bias[:32] *= 0.02
        more["qk_norm_eps"] = attention.q_norm.eps
    call, _ = watch(lambda: attention(x), attention)
    return Made("timm", model.state_dict(), "blocks.0.attn.", attention, {"query": x, "context": x}, call.output, 4, **more)


@family("timm_pool")
def timm_pool(draw: Draw) -> Made:
    model = timm_vit(draw, global_pool="map")
    return timm_pool_made(draw, model.attn_pool, model.state_dict(), "attn_pool.")


@family(
    timm_pool_qk_norm=({"qk_norm": True, "latent_dim": 12, "latent_len": 3},),
    timm_pool_positions=({"pos_embed": "abs", "feat_size": LK},),
)
def timm_pool_alone(draw: Draw, options: dict) -> Made:
    module = importlib.import_module("timm.layers")
    pool = draw.fill(module.AttentionPoolLatent(16, num_heads=4, norm_layer=module.LayerNorm, **options))
    if "qk_norm" in options:
        draw.shrink(pool.q, pool.kv)
    return timm_pool_made(draw, pool, under("head.attn_pool.", pool.state_dict()), "head.attn_pool.")


def timm_pool_made(draw: Draw, pool: nn.Module, file: Tensors, prefix: str) -> Made:
    x, more = draw.normal(B, LK, 16), {"packages": TIMM, "note": "the query is the tensor latent, the same for all"}
    call, _ = watch(lambda: pool(x), pool.proj)
    inputs = {"query": pool.latent.detach().expand(B, -1, -1).contiguous(), "context": x}
    if pool.pos_embed is not None:
        inputs["context"], more["positions"] = x + pool.pos_embed.detach(), "pos_embed"
    if not isinstance(pool.q_norm, nn.Identity):
        more["qk_norm_eps"] = pool.q_norm.eps
    return Made("timm_pool", file, prefix, pool, inputs, call.output, pool.num_heads, **more)


@family(clip_pool=("open_clip.modified_resnet",), timm_attention_pool=("timm.layers",))
def clip_pool(draw: Draw, name: str) -> Made:
    """The attention pool of CLIP's ResNets: the mean of all tokens attends to itself and to them."""
    module = importlib.import_module(name)
    if name == "timm.layers":
        pool, layout, positions = module.AttentionPool2d(16, 2, out_features=12, num_heads=4), "timm", "pos_embed"
    else:
        pool, layout, positions = module.AttentionPool2d(2, 16, 4, 12), "clip_pool", "positional_embedding"
    draw.fill(pool)
    image = draw.normal(B, 16, 2, 2)
    with torch.no_grad():
        output = pool(image)
        x = image.flatten(2).transpose(1, 2)
        x = torch.cat((x.mean(1, keepdim=True), x), 1) + getattr(pool, positions)
    inputs, prefix = {"query": x[:, :1], "context": x}, "visual.attnpool."
    more = {"packages": ("timm" if layout == "timm" else "open_clip_torch",), "positions": positions}
    return Made(layout, under(prefix, pool.state_dict()), prefix, pool, inputs, output.reshape(B, 1, 12), 4, **more)


@family("cait")
def cait(draw: Draw) -> Made:
    attention = draw.fill(importlib.import_module("timm.models.cait").ClassAttn(16, num_heads=4, qkv_bias=True))
    x, prefix = draw.normal(B, LK, 16), "blocks_token_only.0.attn."
    call, _ = watch(lambda: attention(x), attention)
    inputs = {"query": x[:, :1], "context": x}
    file = under(prefix, attention.state_dict())
    return Made("timm_separate", file, prefix, attention, inputs, call.output.reshape(B, 1, 16), 4, packages=TIMM)


@family("pvt")
def pvt(draw: Draw) -> Made:
    attention = draw.fill(importlib.import_module("timm.models.pvt_v2").Attention(16, num_heads=4, qkv_bias=True))
    x, prefix = draw.normal(B, 4, 16), "stages.3.blocks.0.attn."
    call, _ = watch(lambda: attention(x, (2, 2)), attention)
    file = under(prefix, attention.state_dict())
    return Made("timm_key_value", file, prefix, attention, {"query": x, "context": x}, call.output, 4, packages=TIMM)


class Plain(nn.Module):
    """Attention by its definition, with the linears at the places that a layout names; heads of keys and values may differ."""

    def __init__(self, layout: Layout, heads: int, inner: int, value_inner: int, bias: bool):
        super().__init__()
        self.layout, self.heads = layout, heads
        sizes = {layout.query.weight: (16, inner), layout.output.weight: (value_inner, 16)}
        sizes[layout.value.weight] = (24, value_inner)
        sizes[layout.key.weight] = (24, inner * layout.key.parts)
        for name, (width, out) in sizes.items():
            *path, last = name.removesuffix(".weight").split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(width, out, bias=bias))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        def project(where: Linear, y: Tensor) -> Tensor:
            y = self.get_submodule(where.weight.removesuffix(".weight"))(y).chunk(where.parts, -1)[where.part]
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (project(w, y) for w, y in ((self.layout.query, x), (self.layout.key, context), (self.layout.value, context)))
        output = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return self.get_submodule(self.layout.output.weight.removesuffix(".weight"))(output.transpose(1, 2).flatten(2))


@family(
    meshed_memory=("fc", "decoder.layers.0.enc_att.attention.", 20, True),
    espnet=("espnet", "decoder.decoders.0.src_attn.", 16, True),
    annotated=("annotated", "decoder.layers.0.src_attn.", 16, True),
    tutorial_linear=("linear", "decoder.layers.0.cross_attn.", 16, True),
    tutorial_w=("w", "decoder.layers.0.cross_attention_block.", 16, False),
    d2l=("d2l", "decoder.blks.block0.cross_attention.", 16, False),
    flash_attn=("flash_attn", "transformer.layers.0.cross_attn.", 16, True),
)
def plain(draw: Draw, layout: str, prefix: str, value_inner: int, bias: bool) -> Made:
    module = draw.fill(Plain(LAYOUTS[layout], 4, 16, value_inner, bias))
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": draw.padding()}
    with torch.no_grad():
        output = module(inputs["query"], inputs["context"], inputs["mask"])
    name = f"by definition, with the names of {layout}"
    return Made(layout, under(prefix, module.state_dict()), prefix, name, inputs, output, 4)


@family("x_transformers")
def x_transformers(draw: Draw) -> Made:
    package = importlib.import_module("x_transformers")
    options = {"cross_attend": True, "cross_attn_dim_context": 24, "ff_mult": 1}
    layers = package.Decoder(dim=16, depth=1, heads=4, attn_dim_head=6, **options)
    model = draw.fill(package.TransformerWrapper(num_tokens=12, max_seq_len=8, attn_layers=layers))
    attention, mask = model.attn_layers.layers[1][1], draw.padding()
    inputs = {"query": draw.normal(B, LQ, 16), "context": draw.normal(B, LK, 24), "mask": mask}
    options = {"context": inputs["context"], "context_mask": mask}
    call, _ = watch(lambda: attention(inputs["query"], **options), attention)
    note = "no name says which of the layers attends to a context: with cross_attend they are self, cross, feed-forward in turn"
    more = {"packages": ("x-transformers",), "note": note}
    return Made("x_transformers", model.state_dict(), "attn_layers.layers.1.1.", attention, inputs, call.output, 4, **more)


@family("whisper_openai")
def whisper_openai(draw: Draw) -> Made:
    module = importlib.import_module("whisper.model")
    model = draw.fill(module.Whisper(module.ModelDimensions(4, 8, 16, 4, 1, 12, 8, 16, 4, 1)))
    layer, context = model.decoder.blocks[0], draw.normal(B, LK, 16)
    attention, norm = layer.cross_attn, layer.cross_attn_ln
    with module.disable_sdpa():
        call, norm_call, result = watch(lambda: layer(draw.normal(B, LQ, 16), context), attention, norm)
    inputs, name = {"query": call.args[0], "context": context}, "decoder.blocks.0."
    names = ("cross_attn_ln", "mlp_ln", "mlp.0", "mlp.2")
    styles = ("layer", "before", norm.eps, activation(layer.mlp[1]))
    block = Block(norm_call.args[0], result.output, *styles, *(name + n for n in names))
    more = {"packages": ("openai-whisper",), "block": block}
    more["note"] = (
        "the class gives logits, not weights; queries and keys are each scaled by the fourth root of 1 / size of a head"
    )
    weights = call.result[1].softmax(-1)
    return Made("whisper_openai", model.state_dict(), f"{name}cross_attn.", attention, inputs, call.output, 4, weights, **more)


@family("mlx")
def mlx(draw: Draw) -> Made:
    mx, mlx_nn = importlib.import_module("mlx.core"), importlib.import_module("mlx.nn")
    mx.set_default_device(mx.cpu)
    model = mlx_nn.TransformerDecoder(1, 16, 4, 24)
    attention = mlx_nn.MultiHeadAttention(16, 4, key_input_dims=24, value_input_dims=20, value_dims=24, value_output_dims=12)
    model.layers[0].cross_attention = attention
    flat = importlib.import_module("mlx.utils").tree_flatten(model.parameters())
    file = {name: draw.weight(name, torch.empty(*x.shape)) for name, x in flat}
    model.load_weights([(name, mx.array(x.numpy())) for name, x in file.items()])
    inputs = {"query": draw.normal(B, LQ, 16), "key": draw.normal(B, LK, 24), "value": draw.normal(B, LK, 20)}
    mask = draw.padding()
    arrays = [mx.array(x.numpy()) for x in inputs.values()]
    output = attention(*arrays, mask=mx.array(additive(mask).numpy()))
    inputs["mask"] = mask
    more = {
        "packages": ("mlx",),
        "note": "queries and keys are 4 wide a head, values 6; the defaults have one width and no bias",
    }
    return Made("mlx", file, "layers.0.cross_attention.", attention, inputs, torch.tensor(output.tolist()), 4, **more)


# ----------------------------------------------------------------------------------------------- the same again, from the table


class Reader:
    """The tensors of one layer, by a row of LAYOUTS; remembers which names were used."""

    def __init__(self, layout: Layout, tensors: Tensors):
        self.layout, self.tensors, self.used = layout, tensors, set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.tensors[name].double()

    def project(self, x: Tensor, where: Linear) -> Tensor:
        weight = self[where.weight].mT if self.layout.transposed else self[where.weight]
        bias = self[where.bias].chunk(where.bias_parts or where.parts)[where.part] if where.bias in self else None
        return F.linear(x, weight.chunk(where.parts)[where.part if where.parts > 1 else 0], bias)

    def norm(self, x: Tensor, name: str, eps: float | None, kind: str = "") -> Tensor:
        """Without a kind, layer if it has a bias, else rms."""
        old = f"{name}.gamma" in self
        weight, bias = self[f"{name}.{'gamma' if old else 'weight'}"], f"{name}.{'beta' if old else 'bias'}"
        if bias in self or kind == "layer":
            return F.layer_norm(x, weight.shape, weight, self[bias] if bias in self else None, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def heads(self, x: Tensor, heads: int, norm: str, eps: float | None) -> Tensor:
        """[B, L, H * d] to [B, H, L, d], with a norm over what its weight is as wide as."""
        size = len(self.tensors[f"{norm}.weight"]) if norm else 0
        if size == x.shape[-1]:
            x, size = self.norm(x, norm, eps), 0
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return self.norm(x, norm, eps) if size else x

    def qk_norms(self) -> tuple[str, str]:
        return next((x for x in self.layout.qk_norms if f"{x[0]}.weight" in self), ("", ""))


def compute(made: Made, query: Tensor) -> tuple[Tensor, Tensor, set[str]]:
    """Output, weights, and the names used, in float64."""
    layout = LAYOUTS[made.layout]
    own = {name.removeprefix(made.prefix): x for name, x in made.file.items() if name.startswith(made.prefix)}
    read = Reader(layout, own | made.rest)
    inputs = {name: x if x.dtype == torch.bool else x.double() for name, x in made.inputs.items()}
    key, value = inputs.get("key", inputs.get("context")), inputs.get("value", inputs.get("context"))
    query, G, eps = query.double(), made.kv_heads or made.heads, made.qk_norm_eps
    if layout.input_norms[0]:
        query = read.norm(query, layout.input_norms[0], made.input_norm_eps)
    if layout.input_norms[1]:
        key = value = read.norm(key, layout.input_norms[1], made.input_norm_eps)

    norms = read.qk_norms()
    q = read.heads(read.project(query, layout.query), made.heads, norms[0], eps)
    k = read.heads(read.project(key, layout.key), G, norms[1], eps)
    v = read.heads(read.project(value, layout.value), G, "", None)
    mask = inputs.get("mask", torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool))
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    if layout.bias_kv and "bias_k" in read:
        k, v = (
            torch.cat((x, read[name].unflatten(-1, (G, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)), 2)
            for x, name in ((k, "bias_k"), (v, "bias_v"))
        )
        mask = F.pad(mask, (0, 1), value=True)

    scale = q.shape[-1] ** -0.5 if layout.scale is None else layout.scale

    def attend(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(made.heads // x.shape[1], 1) for x in (k, v))
        weights = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2), weights

    merged, weights = attend(k, v, mask)
    if "ip_context" in inputs:
        second = next(x for x in layout.second if f"{x[0]}.weight" in read)
        k = read.heads(read.project(inputs["ip_context"], linear(second[0])), G, second[2], eps)
        v = read.heads(read.project(inputs["ip_context"], linear(second[1])), G, "", None)
        merged = merged + made.ip_scale * attend(k, v, torch.tensor(True))[0]
    return read.project(merged, layout.output), weights, read.used


def compute_block(made: Made) -> Tensor:
    """The output of a block, in float64."""
    block, layout = made.block, LAYOUTS[made.layout]
    read = Reader(layout, made.file)
    before = block.norm_placement == "before"

    def norm(x: Tensor, name: str) -> Tensor:
        return read.norm(x, name, block.norm_eps, block.norm)

    def attend(x: Tensor) -> Tensor:
        own_norm = layout.input_norms[0] and made.prefix + layout.input_norms[0] == block.attention_norm
        return compute(made, norm(x, block.attention_norm) if before and not own_norm else x)[0]

    def feed_forward(x: Tensor) -> Tensor:
        x = norm(x, block.feed_forward_norm) if before else x
        parts = block.parts
        hidden = ACTIVATIONS[block.activation](read.project(x, fused(block.feed_forward_in, parts - 1, parts)))
        if block.feed_forward_multiplier:
            hidden = hidden * read.project(x, fused(block.feed_forward_multiplier, 0, parts))
        return read.project(hidden, linear(block.feed_forward_out))

    x = block.query.double()
    branches = (
        (attend, block.attention_gate, block.attention_norm),
        (feed_forward, block.feed_forward_gate, block.feed_forward_norm),
    )
    for branch, gate, name in branches:
        x = x + branch(x) * (read[gate].tanh().flatten() if gate else 1)
        x = x if before else norm(x, name)
    return x


def check(name: str, made: Made) -> None:
    """Checks that LAYOUTS and the metadata describe the layer completely."""
    layout = LAYOUTS[made.layout]
    output, weights, used = compute(made, made.inputs["query"])
    agree(f"{name}: output", made.output, output)
    if made.weights is not None:
        agree(f"{name}: weights", made.weights, weights)
    if made.block:
        agree(f"{name}: output of the block", made.block.output, compute_block(made))
    assert (made.scale or 1.0) == (layout.scale or 1.0)
    present = {x.removeprefix(made.prefix) for x in made.file if x.startswith(made.prefix)}
    assert present, f"{name}: nothing has the prefix {made.prefix}"
    unused = {x for x in present - used if not any(x == i or (i[-1] == "." and x.startswith(i)) for i in layout.ignored)}
    assert not unused, f"{name}: unused {sorted(unused)}"
    mask = made.inputs.get("mask")
    assert mask is None or mask.any(-1).all(), f"{name}: a query has no key"


def agree(what: str, given: Tensor, computed: Tensor) -> None:
    assert given.shape == computed.shape, f"{what}: {list(given.shape)}, but by the table {list(computed.shape)}"
    difference = (given - computed).abs().max().item()
    assert difference < TOLERANCE, f"{what}: differs from the table's by {difference:.2g}"


# ------------------------------------------------------------------------------------------------------------------------ files


def describe(name: str, made: Made) -> dict[str, str]:
    layout = LAYOUTS[made.layout]
    is_text = isinstance(made.attention, str)
    metadata = {"family": name, "layout": made.layout, "prefix": made.prefix, "num_heads": str(made.heads)}
    metadata["class"] = made.attention if is_text else f"{type(made.attention).__module__}.{type(made.attention).__qualname__}"
    versions = {x: importlib.metadata.version(x) for x in made.packages} | {"torch": torch.__version__}
    metadata["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    own = Reader(layout, {x.removeprefix(made.prefix): tensor for x, tensor in made.file.items() if x.startswith(made.prefix)})
    if own.qk_norms()[0]:
        size, width = (len(own.tensors[f"{own.qk_norms()[0]}.weight"]), own.tensors[layout.query.weight].shape[0])
        kind = "layer" if f"{own.qk_norms()[0]}.bias" in own else "rms"
        metadata["qk_norm"] = f"{kind} {'across_heads' if size == width else 'per_head'}"
    if any(layout.input_norms):
        sides = zip(("query", "context"), layout.input_norms, strict=True)
        metadata["input_norm"] = ", ".join(f"{side} {norm}" for side, norm in sides if norm)
    optional = ("kv_heads", "scale", "qk_norm_eps", "input_norm_eps", "ip_scale", "positions", "note", "base", "base_prefix")
    return metadata | {x: str(getattr(made, x)) for x in optional if getattr(made, x) not in (None, "")}


def write(path: Path, tensors: Tensors, metadata: dict[str, str], script: str = "scripts/layout_fixtures.py") -> None:
    """safetensors.torch.save, with the metadata in order: the package writes them in a different one each time."""
    metadata |= {"script": script}
    data = save({name: x.detach().clone().contiguous() for name, x in tensors.items()}, metadata)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def write_family(folder: Path, name: str) -> int:
    """Returns how many bytes."""
    made = FAMILIES[name](Draw(name))
    check(name, made)
    metadata = describe(name, made)
    results = made.inputs | {"output": made.output} | ({} if made.weights is None else {"weights": made.weights})
    paths = [folder / f"{name}.safetensors", folder / f"{name}.expect.safetensors"]
    write(paths[0], made.file, {"format": "pt", "family": name})
    write(paths[1], results, dict(metadata))
    if made.block:
        paths.append(folder / f"{name}.block.expect.safetensors")
        around = {x: tensor for x, tensor in made.inputs.items() if x in ("context", "key", "value", "mask")}
        block = {"block": made.block.describe(made.file, LAYOUTS[made.layout].transposed)}
        write(paths[2], around | {"query": made.block.query, "output": made.block.output}, metadata | block)
    return sum(x.stat().st_size for x in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the fixtures of published weight layouts.")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the files (default: tests/data/layouts)")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of: {', '.join(FAMILIES)} (default: all)")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - FAMILIES.keys()
    if unknown:
        parser.error(f"unknown family: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    arguments.output.mkdir(parents=True, exist_ok=True)

    total, missing = 0, []
    for name in arguments.families or FAMILIES:
        try:
            size = write_family(arguments.output, name)
        except ModuleNotFoundError as error:
            missing.append(f"{name} (needs {error.name})")
            continue
        total += size
        print(f"{size:9,}  {name}", flush=True)
    print(f"{total:9,}  in {len(arguments.families or FAMILIES) - len(missing)} families")
    if missing:
        print(f"not written: {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
