#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes src/examples/data/digits.safetensors, the handwriting that the examples are trained and tested on.

Needs scikit-learn, which ships the data, and nothing from the network:

    python3 -m venv /tmp/digits && /tmp/digits/bin/pip install scikit-learn && /tmp/digits/bin/python scripts/make_digits.py

Every run writes the same bytes.
"""

import json
import pathlib
import struct

import numpy
from sklearn.datasets import load_digits

METADATA = {
    "title": "Optical Recognition of Handwritten Digits",
    "authors": "E. Alpaydin and C. Kaynak, 1998",
    "doi": "10.24432/C50P49",
    "source": "UCI Machine Learning Repository, https://archive.ics.uci.edu/dataset/80; "
    "its test part, 1797 digits by 13 people, as sklearn.datasets.load_digits ships it",
    "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "changes": "pixels and labels stored as uint8 in one safetensors file; values and order are unchanged",
    "images": "[1797, 8, 8], ink from 0 to 16",
    "labels": "[1797], 0 to 9",
    "written_by": "scripts/make_digits.py",
}


def safetensors_bytes(tensors, metadata):
    """uint8 arrays in the format of https://github.com/huggingface/safetensors.

    Its Python package writes the metadata in a random order; this keeps the file the same from run to run.
    """
    header, data = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": "U8", "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def main():
    digits = load_digits()
    images, labels = digits.images.astype(numpy.uint8), digits.target.astype(numpy.uint8)
    assert (images == digits.images).all() and images.shape == (1797, 8, 8) and images.max() == 16
    path = pathlib.Path(__file__).parent.parent / "src" / "examples" / "data" / "digits.safetensors"
    path.write_bytes(safetensors_bytes({"images": images, "labels": labels}, METADATA))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
