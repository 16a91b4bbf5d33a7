#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/models: tiny whole models as save_pretrained writes them, and what they compute.

    python3 scripts/model_fixtures.py                   write all models
    python3 scripts/model_fixtures.py --output FOLDER   write them elsewhere

Needs torch, numpy, safetensors and transformers. For each of MODELS it writes a folder with

    model.safetensors     the weights, all of them redrawn
    config.json           only what differs from the class's defaults, as save_pretrained writes it
    expect.safetensors    the inputs of the class, by their names, and its logits [B, L, vocabulary]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from layout_fixtures import ENCODER_DECODER, TOKENS, Draw, Tensors, config_of, hugging_face, saved, write
from torch import Tensor, nn

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "models"
B, L, E = 2, 4, 8


def words(draw: Draw) -> Tensor:
    return torch.randint(3, 12, (B, L), generator=draw.generator)


def blip(draw: Draw) -> tuple[nn.Module, Tensors]:
    """Captions: a vision model and a text decoder, whose projection to the vocabulary is tied to its embeddings."""
    text = {"vocab_size": 12, "hidden_size": E, "encoder_hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "attention_probs_dropout_prob": 0.0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "hidden_dropout_prob": 0.0, "pad_token_id": 0}
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 4, "patch_size": 2}
    config = config_of("BlipConfig", text_config=text, vision_config=vision, projection_dim=4)
    model = hugging_face("BlipForConditionalGeneration", config, draw)
    return model, {"pixel_values": draw.normal(B, 3, 4, 4), "input_ids": words(draw)}


def whisper(draw: Draw) -> tuple[nn.Module, Tensors]:
    """Other numbers of heads in encoder and decoder; the projection to the vocabulary is tied to the embeddings."""
    options = TOKENS | ENCODER_DECODER | {"d_model": E, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
    options |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 12, "decoder_ffn_dim": 16}
    options |= {"num_mel_bins": 3, "max_source_positions": 5, "max_target_positions": 8}
    model = hugging_face("WhisperForConditionalGeneration", config_of("WhisperConfig", **options), draw)
    return model, {"input_features": draw.normal(B, 3, 10), "decoder_input_ids": words(draw)}


MODELS: dict[str, Callable[[Draw], tuple[nn.Module, Tensors]]] = {"blip": blip, "whisper": whisper}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the fixtures of whole models.")
    parser.add_argument("--output", type=Path, default=DATA, help="where the folders are written (default: tests/data/models)")
    output = parser.parse_args().output
    for name, make in MODELS.items():
        model, inputs = make(Draw(f"model {name}"))
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        script = "scripts/model_fixtures.py"
        write(folder / "model.safetensors", saved(model), {"format": "pt"}, script)
        config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        write(folder / "expect.safetensors", inputs | {"logits": model(**inputs).logits}, {"class": type(model).__name__}, script)


if __name__ == "__main__":
    main()
