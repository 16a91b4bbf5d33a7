#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares `transcribe` with transformers, and with faster-whisper if it is installed, on real speech with real weights.

    python3 scripts/get_whisper.py
    python3 scripts/check_speech.py

All three get the same samples, in float32, and search greedily. Every token must be that of transformers. Of the words, 99 % must
begin and end within 0.06 seconds of what OpenAI's method gives on the attention weights of transformers' model.

Needs torch, numpy, safetensors, tokenizers, transformers, soundfile and samplerate; about a minute on one core.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import samplerate
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from speech_fixtures import RATE, Decoder, word_times

WITHIN, SHARE = 0.06, 0.99  # seconds, and the share of words
SILENCE = {"no_speech_threshold": 0.6}


def read(path: Path) -> numpy.ndarray:
    """As transcribe reads it."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = samples.mean(1, dtype=numpy.float32)
    return samples if rate == RATE else samplerate.resample(samples, RATE / rate, "sinc_medium").astype(numpy.float32)


@torch.no_grad()
def by_transformers(model, decoder: Decoder, samples: numpy.ndarray) -> tuple[list[int], list[list[float]]]:
    """All tokens, and the times of all words."""
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt", truncation=False, padding="longest").input_features
    window, end = 2 * model.config.max_source_positions, model.generation_config.eos_token_id
    options = {"return_timestamps": True, "return_segments": True, "return_dict_in_generate": True, "temperature": 0.0}
    segments = model.generate(features, logprob_threshold=-1.0, **SILENCE, **options)["segments"][0]
    tokens = [x for segment in segments for x in segment["tokens"].tolist()]
    first = model.generation_config.no_timestamps_token_id + 1
    words, seek = [], 0
    while segments:  # those of the same window have the same result
        own = [x for x in segments if x["result"] is segments[0]["result"]]
        segments = segments[len(own) :]
        frames = min(window, features.shape[-1] - seek)
        sound = torch.nn.functional.pad(features[..., seek : seek + frames], (0, window - frames))
        text = [x for segment in own for x in segment["tokens"].tolist() if x < end]
        memory = model.model.encoder(sound).last_hidden_state
        times, _ = word_times(model, decoder, memory, [model.generation_config.decoder_start_token_id], text, "en", frames)
        words += (times + seek / 100).tolist()
        last = own[-1]["tokens"].tolist()
        seek += 2 * (last[-1] - first) if segments and min(last[-2:]) >= first else frames
    return tokens, words


def by_faster_whisper(folder: Path, samples: numpy.ndarray) -> list[int] | None:
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        return None
    model = WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)
    options = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False, "compression_ratio_threshold": None}
    segments, _ = model.transcribe(samples, language="en", log_prob_threshold=-1.0, **SILENCE, **options)
    return [x for segment in segments for x in segment.tokens]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares transcribe with transformers and faster-whisper.")
    parser.add_argument("--program", type=Path, default=Path("build/transcribe"))
    parser.add_argument("--data", type=Path, default=Path("build/whisper"), help="what get_whisper.py has written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = arguments.data / "tiny.en"
    if not folder.is_dir():
        parser.error(f"{folder} is missing; scripts/get_whisper.py makes it")
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    decoder = Decoder(folder / "tokenizer.json")
    differences, failed = [], False
    for path in sorted(arguments.data.glob("*.wav")):
        command = [arguments.program, path, "--model", folder, "--threads", "1", "--json", "--words"]
        own = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        tokens = [x for segment in own["segments"] for x in segment["tokens"]]
        words = [[word["start"], word["end"]] for segment in own["segments"] for word in segment["words"]]
        samples = read(path)
        expected, times = by_transformers(model, decoder, samples)
        same = tokens == expected
        failed |= not same or len(words) != len(times)
        if len(words) == len(times):
            differences.append(numpy.abs(numpy.array(words) - numpy.array(times)).max(1))
        line = f"{path.name}: {len(tokens)} tokens, {'those' if same else 'NOT those'} of transformers"
        other = by_faster_whisper(arguments.data / "tiny.en-ct2", samples)
        if other is not None:
            # Its segments end with the timestamp that begins the next window, or do not.
            marks = lambda x: [token for token in x if token < model.generation_config.eos_token_id]
            line += f", {'those' if marks(other) == marks(tokens) else 'NOT those'} of faster-whisper"
            failed |= marks(other) != marks(tokens)
        print(f"{line}; {len(words)} of {len(times)} words", flush=True)
    differences = numpy.concatenate(differences)
    share = (differences <= WITHIN + 1e-6).mean()
    print(f"{100 * share:.1f} % of {len(differences)} words within {WITHIN} s, the largest difference is {differences.max():.2f} s")
    return int(failed or share < SHARE)


if __name__ == "__main__":
    sys.exit(main())
