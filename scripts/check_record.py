#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that `xattn verify` proves what scripts/record.py records of PyTorch models, and fails for other weights.

    .venv/bin/python scripts/check_record.py [--program build/xattn]

Needs torch, NumPy and safetensors. Says nothing but the number of layers if all is well.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from make_fixtures import CrossAttention
from record import record


class Model(torch.nn.Module):
    """A layer of each kind between others, as in a model of your own."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Linear(6, 16)
        self.reference = CrossAttention(16, 24, 20, 12)
        self.batch_first = torch.nn.MultiheadAttention(16, 4, kdim=24, vdim=20, batch_first=True)
        self.sequence_first = torch.nn.MultiheadAttention(16, 2, bias=False)
        self.decoder = torch.nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x, key, value, padding, forbidden, bias):
        x = self.embedding(x)
        self.reference(query=x, key=key, value=value)
        self.batch_first(x, key, value, key_padding_mask=padding, attn_mask=bias, need_weights=False)
        y = x.transpose(0, 1)
        self.sequence_first(y, y, value=y, attn_mask=forbidden)
        return self.decoder(x, x, memory_mask=torch.zeros(forbidden.shape).masked_fill(forbidden, -torch.inf))


LAYERS = ("reference", "batch_first", "sequence_first", "decoder.multihead_attn")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=Path("build/xattn"))
    program = parser.parse_args().program.resolve()
    torch.manual_seed(0)
    model = Model().eval()
    for parameter in model.parameters():  # no bias is zero
        torch.nn.init.normal_(parameter, std=0.5)
    padding, forbidden = torch.arange(5) >= torch.tensor([[5], [3]]), torch.ones(3, 3).triu(1).bool()
    masks = (padding.float().masked_fill(padding, -torch.inf), forbidden, torch.randn(2 * 4, 3, 5))
    inputs = (torch.randn(2, 3, 6), torch.randn(2, 5, 24), torch.randn(2, 5, 20), *masks)
    with tempfile.TemporaryDirectory() as folder:
        good, bad, pickled, fixture = (Path(folder) / x for x in ("good.safetensors", "bad.safetensors", "good.pt", "fixture"))
        save_file(model.state_dict(), good)
        save_file({name: x + 0.01 for name, x in model.state_dict().items()}, bad)
        torch.save(model.state_dict(), pickled)
        for layer in LAYERS:
            record(model, layer, fixture, lambda: model(*inputs))
            for weights, expected in ((good, 0), (pickled, 0), (bad, 1)):
                command = [program, "verify", weights, "--expect", fixture, "--device", "cpu"]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode != expected:
                    sys.exit(f"check_record.py: {layer} of {weights.name}: {result.stdout}{result.stderr}")
    print(f"{len(LAYERS)} layers: xattn gives what PyTorch gave")


if __name__ == "__main__":
    main()
