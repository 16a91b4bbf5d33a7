#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/stacks: the weights of tiny Transformers, and inputs and outputs of their encoders and decoders.

    python3 scripts/stack_fixtures.py                          write all families
    python3 scripts/stack_fixtures.py --output FOLDER t5 bart  write two of them elsewhere

Needs torch, numpy, safetensors, transformers, timm and openai-whisper. For each FAMILY it writes

    FAMILY.safetensors             the weights of a model as its own class saves them, all of them redrawn
    FAMILY.STACK.safetensors       for each stack: x [B, L, E], what enters the first layer, and output [B, L, E], what leaves
                                   the last layer or the norm behind it; maybe mask [B, L] (bool, true = may attend), and in a
                                   decoder memory [B, Lk, Ek], maybe with memory_mask [B, Lk]

and buckets.safetensors: T5's buckets of the distances -200 to 200, of 32 buckets in all. Metadata of a stack: family, class,
versions; kind, "encoder" or "decoder"; prefix; and what no tensor shows: config, the config.json of the model, or num_heads,
norm_placement and activation; causal, "false" for a decoder without a causal mask.
"""

import argparse
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from layout_fixtures import ENCODER_DECODER, TOKENS, Draw, Tensors, config_of, hugging_face, saved, timm_vit, watch, write

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "stacks"
B, L, LK, E, HEADS = 2, 4, 5, 8, 2


@dataclass
class Stack:
    kind: str
    prefix: str
    stack: nn.Module  # of the class that computed the output
    inputs: Tensors
    output: Tensor
    told: dict[str, str] = field(default_factory=dict)
    package: str = ""


def padding(length: int) -> Tensor:
    """[B, length]: the second of the batch lacks its last two."""
    return torch.arange(length) < torch.tensor([[length], [length - 2]])


def seen(kind: str, prefix: str, stack: nn.Module, first: nn.Module, run: Callable[[], object], **inputs: Tensor) -> Stack:
    """Runs a stack whose first layer is `first`; `inputs` are those beside x. The result has a last_hidden_state."""
    call, result = watch(run, first)
    output = result.result.last_hidden_state
    return Stack(kind, prefix, stack, {"x": call.get("hidden_states", 0)} | inputs, output)


FAMILIES: dict[str, Callable[[Draw], tuple[Tensors, dict[str, Stack]]]] = {}


def family(**variants: tuple) -> Callable:
    """Registers a function under each name with the arguments given there."""

    def register(make: Callable) -> Callable:
        for name, arguments in variants.items():
            FAMILIES[name] = lambda draw, arguments=arguments: make(draw, *arguments)
        return make

    return register


# ---------------------------------------------------------------------------------------------------------------- the families


@family(torch_after=("after", "relu"), torch_before=("before", "gelu"))
@torch.no_grad()
def torch_transformer(draw: Draw, placement: str, activation: str) -> tuple[Tensors, dict[str, Stack]]:
    """nn.Transformer with norms before; with norms after, stacks without a last norm, and layers of different sizes."""
    options = {"dropout": 0.0, "activation": activation, "batch_first": True, "norm_first": placement == "before"}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, HEADS, 12, **options),
        *(2, nn.LayerNorm(E) if placement == "before" else None),
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(E, HEADS, 12, **options), 2, nn.LayerNorm(E) if placement == "before" else None
    )
    if placement == "after":
        encoder.layers[1] = nn.TransformerEncoderLayer(E, HEADS, 20, **options)
    model = draw.fill(nn.ModuleDict({"embedding": nn.Embedding(3, E), "encoder": encoder, "decoder": decoder}))
    told = {"num_heads": str(HEADS), "norm_placement": placement, "activation": activation}
    x, mask = draw.normal(B, LK, E), padding(LK)
    memory = encoder(x, src_key_padding_mask=~mask)
    y, self_mask = draw.normal(B, L, E), padding(L)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    output = decoder(
        y, memory, tgt_mask=causal, tgt_key_padding_mask=~self_mask, memory_key_padding_mask=~mask, tgt_is_causal=True
    )
    inputs = {"x": y, "mask": self_mask, "memory": memory, "memory_mask": mask}
    return model.state_dict(), {
        "encoder": Stack("encoder", "encoder.", encoder, {"x": x, "mask": mask}, memory, told),
        "decoder": Stack("decoder", "decoder.", decoder, inputs, output, told),
    }


def described(model: nn.Module, **stacks: Stack) -> tuple[Tensors, dict[str, Stack]]:
    """A model of transformers, with its config.json."""
    for stack in stacks.values():
        stack.told |= {"config": model.config.to_json_string(use_diff=False)}
        stack.package = "transformers"
    return saved(model), stacks


SEQUENCES = TOKENS | ENCODER_DECODER | {"d_model": E, "encoder_layers": 2, "decoder_layers": 2}
SEQUENCES |= {"encoder_attention_heads": HEADS, "decoder_attention_heads": 4, "encoder_ffn_dim": 12, "decoder_ffn_dim": 16}


@family(bart=("BartConfig", "BartForConditionalGeneration"), mbart=("MBartConfig", "MBartForConditionalGeneration"))
def bart(draw: Draw, config: str, name: str) -> tuple[Tensors, dict[str, Stack]]:
    model = hugging_face(name, config_of(config, max_position_embeddings=8, **SEQUENCES), draw)
    encoder, decoder = model.model.encoder, model.model.decoder
    mask, self_mask, memory = padding(LK), padding(L), draw.normal(B, LK, E)
    options = {"attention_mask": self_mask.long(), "encoder_hidden_states": memory, "encoder_attention_mask": mask.long()}
    x, y = draw.normal(B, LK, E), draw.normal(B, L, E)
    return described(
        model,
        encoder=seen(
            *("encoder", "model.encoder.", encoder, encoder.layers[0]),
            lambda: encoder(inputs_embeds=x, attention_mask=mask.long()),
            mask=mask,
        ),
        decoder=seen(
            *("decoder", "model.decoder.", decoder, decoder.layers[0]),
            lambda: decoder(inputs_embeds=y, use_cache=False, **options),
            **{"mask": self_mask, "memory": memory, "memory_mask": mask},
        ),
    )


@family(whisper=())
def whisper(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    """Its class takes no masks of padding."""
    options = {"num_mel_bins": 3, "max_source_positions": LK, "max_target_positions": 8}
    model = hugging_face("WhisperForConditionalGeneration", config_of("WhisperConfig", **SEQUENCES, **options), draw)
    encoder, decoder = model.model.encoder, model.model.decoder
    sound, memory, y = draw.normal(B, 3, 2 * LK), draw.normal(B, LK, E), draw.normal(B, L, E)
    decode = {"inputs_embeds": y, "encoder_hidden_states": memory, "use_cache": False}
    return described(
        model,
        encoder=seen("encoder", "model.encoder.", encoder, encoder.layers[0], lambda: encoder(sound)),
        decoder=seen("decoder", "model.decoder.", decoder, decoder.layers[0], lambda: decoder(**decode), memory=memory),
    )


@family(whisper_openai=())
def whisper_openai(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    """OpenAI's own class, whose file has no config.json."""
    module = importlib.import_module("whisper.model")
    model = draw.fill(module.Whisper(module.ModelDimensions(3, LK, E, HEADS, 2, 12, 8, E, HEADS, 2)))
    encoder, decoder, told = model.encoder, model.decoder, {"num_heads": str(HEADS)}
    sound, memory = draw.normal(B, 3, 2 * LK), draw.normal(B, LK, E)
    words = torch.randint(12, (B, L), generator=draw.generator)
    with module.disable_sdpa():
        entered, heard = watch(lambda: encoder(sound), encoder.blocks[0])
        decoded, normed, _ = watch(lambda: decoder(words, memory), decoder.blocks[0], decoder.ln)
    inputs = {"x": decoded.args[0], "memory": memory}
    return model.state_dict(), {
        "encoder": Stack("encoder", "encoder.", encoder, {"x": entered.args[0]}, heard.output, dict(told), "openai-whisper"),
        "decoder": Stack("decoder", "decoder.", decoder, inputs, normed.output, dict(told), "openai-whisper"),
    }


@family(t5=("relu", 128), t5_gated=("gated-gelu", 10))
def t5(draw: Draw, feed_forward: str, max_distance: int) -> tuple[Tensors, dict[str, Stack]]:
    """Sequences of 12, so that distances fall into all kinds of buckets."""
    options = {"d_model": E, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS}
    options |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": max_distance, "vocab_size": 12}
    config = config_of("T5Config", feed_forward_proj=feed_forward, decoder_start_token_id=0, **options)
    model = hugging_face("T5ForConditionalGeneration", config, draw)
    mask, self_mask, memory = padding(LK), padding(12), draw.normal(B, LK, E)
    x, y = draw.normal(B, 12, E), draw.normal(B, 12, E)
    options = {"attention_mask": self_mask.long(), "encoder_hidden_states": memory, "encoder_attention_mask": mask.long()}
    encoder, decoder = model.encoder, model.decoder
    return described(
        model,
        encoder=seen(
            *("encoder", "encoder.", encoder, encoder.block[0]),
            lambda: encoder(inputs_embeds=x, attention_mask=self_mask.long()),
            mask=self_mask,
        ),
        decoder=seen(
            *("decoder", "decoder.", decoder, decoder.block[0]),
            lambda: decoder(inputs_embeds=y, use_cache=False, **options),
            **{"mask": self_mask, "memory": memory, "memory_mask": mask},
        ),
    )


@family(bert=())
def bert(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    options = {"vocab_size": 12, "hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    options |= {"intermediate_size": 12}
    model = hugging_face("BertForMaskedLM", config_of("BertConfig", max_position_embeddings=8, **options), draw)
    mask, x, encoder = padding(LK), draw.normal(B, LK, E), model.bert.encoder
    run = lambda: model.bert(inputs_embeds=x, attention_mask=mask.long())
    return described(model, encoder=seen("encoder", "bert.encoder.", encoder, encoder.layer[0], run, mask=mask))


@family(vit=())
def vit(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    options = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 12}
    config = config_of("ViTConfig", image_size=4, patch_size=2, num_channels=1, **options)
    model, image = hugging_face("ViTForImageClassification", config, draw), draw.normal(B, 1, 4, 4)
    layers = next(x for x in model.vit.modules() if isinstance(x, nn.ModuleList))
    return described(model, encoder=seen("encoder", "vit.", model.vit, layers[0], lambda: model.vit(image)))


@family(timm=())
def timm(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    model, image = timm_vit(draw, depth=2), draw.normal(B, 3, 4, 4)
    call, normed, _ = watch(lambda: model(image), model.blocks[0], model.norm)
    told = {"num_heads": "4", "norm_placement": "before", "activation": "gelu"}
    return model.state_dict(), {
        "encoder": Stack("encoder", "", model, {"x": call.args[0]}, normed.output, told, "timm"),
    }


@family(blip=())
def blip(draw: Draw) -> tuple[Tensors, dict[str, Stack]]:
    """Its encoder of questions attends to the image, and to words before and after; its class takes no mask for the image."""
    text = {"vocab_size": 12, "hidden_size": E, "encoder_hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 2}
    text |= {"num_attention_heads": HEADS, "max_position_embeddings": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 4, "patch_size": 2}
    config = config_of("BlipConfig", text_config=text, vision_config=vision, projection_dim=4)
    model = hugging_face("BlipForQuestionAnswering", config, draw)
    image, memory, mask = draw.normal(B, 3, 4, 4), draw.normal(B, LK, 12), padding(L)
    words = torch.randint(3, 12, (B, L), generator=draw.generator)
    inputs = {"mask": mask, "memory": memory}
    options = {"input_ids": words, "attention_mask": mask.long(), "encoder_hidden_states": memory}
    vision, question, answer = model.vision_model, model.text_encoder, model.text_decoder.bert
    asked = seen("decoder", "text_encoder.encoder.", question, question.encoder.layer[0], lambda: question(**options), **inputs)
    asked.told |= {"causal": "false"}
    run = lambda: answer(is_decoder=True, use_cache=False, **options)
    return described(
        model,
        vision_model=seen("encoder", "vision_model.", vision, vision.encoder.layers[0], lambda: vision(image)),
        text_encoder=asked,
        text_decoder=seen("decoder", "text_decoder.bert.encoder.", answer, answer.encoder.layer[0], run, **inputs),
    )


# ------------------------------------------------------------------------------------------------------------------------ files


def write_family(folder: Path, name: str) -> int:
    """Returns how many bytes."""
    file, stacks = FAMILIES[name](Draw(name))
    script = "scripts/stack_fixtures.py"
    paths = [folder / f"{name}.safetensors"]
    write(paths[0], file, {"format": "pt", "family": name}, script)
    for part, stack in stacks.items():
        versions = {stack.package: importlib.metadata.version(stack.package)} if stack.package else {}
        versions["torch"] = torch.__version__
        metadata = {"family": name, "kind": stack.kind, "prefix": stack.prefix} | stack.told
        metadata["class"] = f"{type(stack.stack).__module__}.{type(stack.stack).__qualname__}"
        metadata["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
        paths.append(folder / f"{name}.{part}.safetensors")
        write(paths[-1], stack.inputs | {"output": stack.output}, metadata, script)
    return sum(x.stat().st_size for x in paths)


def write_buckets(folder: Path) -> None:
    attention = importlib.import_module("transformers.models.t5.modeling_t5").T5Attention
    options = {"num_buckets": 32, "max_distance": 128}
    buckets = {
        name: attention._relative_position_bucket(torch.arange(-200, 201), bidirectional=name == "bidirectional", **options)
        for name in ("bidirectional", "one_sided")
    }
    write(folder / "buckets.safetensors", buckets, {"class": "T5Attention"}, "scripts/stack_fixtures.py")


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the fixtures of whole encoders and decoders.")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the files (default: tests/data/stacks)")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of: {', '.join(FAMILIES)} (default: all)")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - FAMILIES.keys()
    if unknown:
        parser.error(f"unknown family: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.families or FAMILIES:
        print(f"{write_family(arguments.output, name):9,}  {name}", flush=True)
    if not arguments.families:
        write_buckets(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
