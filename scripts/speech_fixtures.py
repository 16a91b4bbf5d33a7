#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/speech: a sound, tiny Whisper models, and what transformers makes of the sound with them.

    python3 scripts/speech_fixtures.py                   write all
    python3 scripts/speech_fixtures.py --output FOLDER   elsewhere

Needs torch, numpy, safetensors, tokenizers and transformers.

    sound.wav            2.3 seconds of noises and tones, 16 kHz, 16 bits
    english/             a model with 80 bins, windows of one second, and random weights, as a folder of Hugging Face
    multilingual/        the same with 128 bins, languages and tasks
    NAME.expect.safetensors
        mel [bins, frames]        by WhisperFeatureExtractor, of the whole sound
        memory [1, 50, E]         the output of the encoder for the first window
        logits [10, V]            behind each of the first tokens, which are `read` [10]
        greedy, beams [T]         what is written about the whole sound, with times, by greedy search and by three beams
        times, beam_times [S, 2]  the times of the segments in these texts
        word_times [W, 2]         of the words of the first window
      and in the metadata words, the tokens of these words as JSON; language; versions

Word times follow OpenAI's program, with transformers' own filter, time warping and rules of words: the decoder reads the text of a
window once more, without timestamps.
"""

import argparse
import importlib.metadata
import json
import logging
import warnings
import wave
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper import generation_whisper, tokenization_whisper

from layout_fixtures import Draw, hugging_face, saved, write

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "speech"
RATE, SECONDS = 16_000, 2.3
WINDOW = 100  # frames
E, HEADS, LAYERS, LONGEST, MOST = 16, 2, 2, 40, 30  # MOST: tokens that may follow a prompt
LANGUAGES = ("en", "de", "ja")
BYTES = 245  # are suppressed, so that there are words
OPENING, CLOSING = "\"'“¡¿([{-", "\"'.。,，!！?？:：”)]}、"
WORDS = "the of and to in it was age best times worst wisdom season light hope ( ) . , ? ! -".split()


def make_sound() -> numpy.ndarray:
    """int16 [n]"""
    generator = torch.Generator().manual_seed(7)
    time = torch.arange(int(RATE * SECONDS)) / RATE
    tone = torch.sin(2 * torch.pi * (200 + 900 * torch.sin(3 * time)) * time) * torch.sin(9 * time) ** 2
    noise = torch.randn(time.shape, generator=generator) * torch.cos(5 * time) ** 4
    return ((0.5 * tone + 0.15 * noise).clamp(-1, 1) * 32_767).round().to(torch.int16).numpy()


def characters() -> list[str]:
    """How a byte-level vocabulary spells the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def make_vocabulary(multilingual: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens of texts and the marks."""
    texts = characters() + [f"Ġ{word}" for word in WORDS] + ["ing", "éĤ", "ðŁĺ"]  # the last two end inside a character
    marks = ["<|endoftext|>", "<|startoftranscript|>"]
    marks += [f"<|{x}|>" for x in LANGUAGES] if multilingual else ["<|en|>"]
    marks += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokens = {text: i for i, text in enumerate(texts)}
    return tokens, {mark: len(tokens) + i for i, mark in enumerate(marks)}


def write_tokenizer(folder: Path, tokens: dict[str, int], marks: dict[str, int]) -> None:
    model = {"type": "BPE", "vocab": tokens, "merges": []}
    added = [{"id": i, "content": mark, "special": True} for mark, i in marks.items()]
    added = [x | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for x in added]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    whole = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=0, ensure_ascii=False))


class Decoder:
    """As much of a tokenizer as transformers' rules of words ask for."""

    def __init__(self, path: Path):
        self.tokenizer = Tokenizer.from_file(str(path))
        self.eos_token_id = self.tokenizer.token_to_id("<|endoftext|>")

    def decode(self, tokens: list[int], decode_with_timestamps: bool = False) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def word_times(model, decoder: Decoder, memory: Tensor, prompt: list[int], text: list[int], language: str, frames: int):
    """The words of a text about a window with so many frames of sound: their times [W, 2] in seconds, and their tokens."""
    told = model.generation_config
    tokens = [*prompt, told.no_timestamps_token_id, *text, told.eos_token_id]
    run = model(encoder_outputs=(memory,), decoder_input_ids=torch.tensor([tokens]), output_attentions=True)
    weights = torch.stack([run.cross_attentions[layer][0, head] for layer, head in told.alignment_heads])
    weights = weights[..., : frames // 2]
    weights = weights / weights.sum(-1, keepdim=True)
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = generation_whisper._median_filter((weights - mean) / std, model.config.median_filter_width).mean(0)
    rows, columns = generation_whisper._dynamic_time_warping(-weights[len(prompt) : -1].double().numpy())
    entered = columns[numpy.pad(numpy.diff(rows), (1, 0), constant_values=1).astype(bool)] * 0.02
    words = tokenization_whisper
    split = words._split_tokens_on_unicode if language == "ja" else words._split_tokens_on_spaces
    texts, tokens_of_words, _ = split(decoder, text)
    borders = numpy.cumsum([0] + [len(x) for x in tokens_of_words])
    alone, parts = list(texts), [[i] for i in range(len(texts))]
    words._merge_punctuations(texts, tokens_of_words, parts, OPENING, CLOSING)
    # A word keeps its own times, whatever punctuation joins it.
    is_opening = lambda i: alone[i].startswith(" ") and alone[i].strip() in OPENING
    own = [next((i for i in x if not is_opening(i)), x[-1]) for x in parts]
    return torch.tensor([[entered[borders[i]], entered[borders[i + 1]]] for i in own]), tokens_of_words


@torch.no_grad()
def write_model(folder: Path, name: str, sound: numpy.ndarray) -> None:
    multilingual = name == "multilingual"
    tokens, marks = make_vocabulary(multilingual)
    first_timestamp = marks["<|notimestamps|>"] + 1
    vocabulary = first_timestamp + WINDOW // 2 + 1
    end, start = marks["<|endoftext|>"], marks["<|startoftranscript|>"]
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    sizes = {f"{side}_{x}": n for side in ("encoder", "decoder") for x, n in (("layers", LAYERS), ("attention_heads", HEADS))}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": E, "vocab_size": vocabulary}
    sizes |= {"max_source_positions": WINDOW // 2, "max_target_positions": LONGEST, "num_mel_bins": 128 if multilingual else 80}
    config = WhisperConfig(suppress_tokens=None, begin_suppress_tokens=None, median_filter_width=5, **sizes, **special)
    draw = Draw(f"speech {name} {8 if multilingual else 6}")  # seeds whose texts have many words and segments
    model = hugging_face("WhisperForConditionalGeneration", config, draw)
    # Few tokens are repeated, and they depend on the sound.
    decoder = model.model.decoder
    decoder.layer_norm.weight[::2] *= -1
    decoder.embed_positions.weight *= 3
    for layer in decoder.layers:
        layer.encoder_attn.out_proj.weight *= 3
    prompt_length = 3 if multilingual else 1
    told = {"max_length": MOST + prompt_length, "max_initial_timestamp_index": 20, "is_multilingual": multilingual} | special
    told |= {"no_timestamps_token_id": marks["<|notimestamps|>"], "prev_sot_token_id": marks["<|startofprev|>"]}
    told |= {"suppress_tokens": [*range(BYTES), *(x for mark, x in marks.items() if mark != "<|endoftext|>")]}
    told |= {"begin_suppress_tokens": [tokens["Ġthe"], end], "alignment_heads": [[1, 0], [0, 1], [1, 1]]}
    if multilingual:
        told |= {"lang_to_id": {f"<|{x}|>": marks[f"<|{x}|>"] for x in LANGUAGES}}
        told |= {"task_to_id": {x: marks[f"<|{x}|>"] for x in ("translate", "transcribe")}}
    model.generation_config = type(model.generation_config).from_dict(told)

    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    write(own / "model.safetensors", saved(model), {"format": "pt"}, "scripts/speech_fixtures.py")
    config.architectures = ["WhisperForConditionalGeneration"]
    (own / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True))
    (own / "generation_config.json").write_text(json.dumps(told, indent=1))
    write_tokenizer(own, tokens, marks)

    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    samples = sound.astype(numpy.float32) / 32_768
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt", truncation=False, padding="longest").input_features
    memory = model.model.encoder(features[..., :WINDOW]).last_hidden_state
    options = {"return_timestamps": True, "return_segments": True, "temperature": 0.0, "return_dict_in_generate": True}
    options |= {"max_new_tokens": MOST}  # a max_length would grow from window to window
    options |= {"no_speech_threshold": 0.6, "logprob_threshold": -1.0}
    options |= {"task": "transcribe"} if multilingual else {}
    prompt, language = [start], "en"
    if multilingual:
        (detected,) = model.detect_language(features[..., :WINDOW]).tolist()
        language = {x: mark for mark, x in marks.items()}[detected].strip("<|>")
        prompt += [detected, marks["<|transcribe|>"]]
    results = {}
    for search, times, beams in (("greedy", "times", 1), ("beams", "beam_times", 3)):
        segments = model.generate(features, num_beams=beams, **options)["segments"][0]
        results[search] = torch.cat([x["tokens"] for x in segments])
        results[times] = torch.tensor([[float(x["start"]), float(x["end"])] for x in segments], dtype=torch.float64)
    segments = model.generate(features[..., :WINDOW], **options)["segments"][0]
    segments = [x for x in segments if x["result"] is segments[0]["result"]]  # those of the first window
    text = [x for segment in segments for x in segment["tokens"].tolist() if x < end]
    read = (prompt + results["greedy"].tolist())[:10]
    logits = model(encoder_outputs=(memory,), decoder_input_ids=torch.tensor([read])).logits[0]
    decoder = Decoder(own / "tokenizer.json")
    seconds, words = word_times(model, decoder, memory, prompt, text, language, WINDOW)
    metadata = {"language": language, "words": json.dumps(words)}
    metadata["versions"] = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("transformers", "torch", "numpy"))
    results |= {"mel": features[0], "memory": memory, "logits": logits, "read": torch.tensor(read), "word_times": seconds}
    write(folder / f"{name}.expect.safetensors", results, metadata, "scripts/speech_fixtures.py")
    print(f"{name}: {len(results['greedy'])} tokens, {len(results['beams'])} by beams, {len(words)} words, language {language}")
    print("  ", results["greedy"].tolist(), results["times"].tolist())
    print("  ", results["beams"].tolist(), metadata["words"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the fixtures of speech to text.")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the files (default: tests/data/speech)")
    folder = parser.parse_args().output
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    sound = make_sound()
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.astype("<i2").tobytes())
    for name in ("english", "multilingual"):
        write_model(folder, name, sound)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
