#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures `transcribe` against transformers, CTranslate2 and ONNX Runtime on the same weights, sound and machine, and prints a table.

    python3 scripts/get_whisper.py
    python3 scripts/measure_speech.py
    python3 scripts/measure_speech.py --onnx-python .venv-onnx/bin/python

Two models: tiny.en with its real weights writes down 44 seconds of speech; one of the shape of Whisper small, with random weights
that never end a text, writes 100 tokens about 28 seconds. Every run is a process of its own, which first warms up on the same sound
(a program of ours does not), and of several runs the fastest counts. Columns: seconds for the spectrogram, for the encoder, for the
contexts of cross-attention and the search (of others in one number), milliseconds of this for a token, seconds for word times, the
whole as a share of the sound's duration, and the largest memory of the process in MB with everything that it has loaded.

Needs what check_speech.py needs, and faster-whisper; ten to twenty minutes on two cores. The rows of ONNX Runtime need a Python with
optimum-onnx[onnxruntime], which takes an earlier transformers and so an environment of its own; without --onnx-python they are
left out. torch.compile is applied to the encoder only: the compiled decoder, with a cache of fixed size, was slower than the eager one.
"""

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

OWN = Path(__file__).resolve()
RUNTIMES = {
    "xattn": "transcribe",
    "xattn words": "transcribe --words",
    "transformers eager": "transformers, eager",
    "transformers sdpa": "transformers, SDPA",
    "transformers compile": "transformers, SDPA, encoder by torch.compile",
    "transformers words": "transformers, eager, word times",
    "onnxruntime float32": "ONNX Runtime, by optimum",
    "ctranslate2 float32": "CTranslate2, float32",
    "ctranslate2 int8": "CTranslate2, int8",
}
SOUNDS = {"tiny": "two_cities.wav", "small": "endgame_nagg_nell.wav"}
MOST = 100  # tokens of the random model's text


def make_small(data: Path) -> None:
    """A random model of the shape of Whisper small, for transformers and for CTranslate2."""
    import torch
    from ctranslate2.converters.transformers import WhisperLoader
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    tiny, folder = data / "tiny.en", data / "small"
    config = WhisperConfig.from_pretrained(tiny, d_model=768, encoder_layers=12, decoder_layers=12, encoder_attention_heads=12,
                                           decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072)
    model = WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    told = json.loads((tiny / "generation_config.json").read_text())
    first = told["no_timestamps_token_id"] + 1
    told["suppress_tokens"] += [told["eos_token_id"], *range(first + 1, config.vocab_size)]
    told |= {"max_length": MOST + 1, "alignment_heads": [[layer, head] for layer in (6, 8, 10) for head in (0, 5, 9)]}
    (folder / "generation_config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    ctranslate2 = data / "small-ct2"
    ctranslate2.mkdir(exist_ok=True)
    spec = WhisperLoader().get_model_spec(model)
    spec.config.add_attribute("suppress_ids", told["suppress_tokens"])
    spec.config.add_attribute("suppress_ids_begin", told["begin_suppress_tokens"])
    spec.config.add_attribute("alignment_heads", told["alignment_heads"])
    spec.config.add_attribute("lang_ids", [])
    spec.register_vocabulary((data / "tiny.en-ct2" / "vocabulary.txt").read_text().splitlines())
    spec.validate()
    spec.save(str(ctranslate2))
    (ctranslate2 / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())


class Stopwatch:
    """Adds up the time of the calls of a function or an object, in whose place it stands."""

    def __init__(self, run):
        self.run, self.seconds = run, 0.0

    def __call__(self, *arguments, **options):
        begin = time.perf_counter()
        try:
            return self.run(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - begin

    def __getattr__(self, name):
        return getattr(self.run, name)


def run_transformers(folder: Path, samples, kind: str, threads: int) -> dict:
    import torch
    from transformers import WhisperForConditionalGeneration

    torch.set_num_threads(threads)
    attention = "sdpa" if kind in ("sdpa", "compile") else "eager"
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    if kind == "compile":
        torch._inductor.config.freezing = True
        model.model.encoder.forward = torch.compile(model.model.encoder.forward)
    encoder = Stopwatch(model.model.encoder.forward)
    model.model.encoder.forward = encoder
    with torch.no_grad():
        return generate(model, encoder, folder, samples, return_token_timestamps=kind == "words")


def run_onnxruntime(folder: Path, samples, kind: str, threads: int) -> dict:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForSpeechSeq2Seq

    torch.set_num_threads(threads)
    sessions = onnxruntime.SessionOptions()
    sessions.intra_op_num_threads = threads
    exported = folder.with_name(folder.name + "-onnx")
    if not exported.exists():
        ORTModelForSpeechSeq2Seq.from_pretrained(folder, export=True).save_pretrained(exported)
    model = ORTModelForSpeechSeq2Seq.from_pretrained(exported, session_options=sessions)
    encoder = Stopwatch(model.encoder.forward)
    model.encoder.forward = encoder
    return generate(model, encoder, folder, samples)


def generate(model, encoder: Stopwatch, folder: Path, samples, **options) -> dict:
    """Writes the text twice, by transformers' generate; the second time counts."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    extract = Stopwatch(extractor.__call__)
    options |= {"return_timestamps": True, "return_segments": True}
    if folder.name == "small":
        options["max_new_tokens"] = MOST
    for _ in range(2):
        extract.seconds = encoder.seconds = 0.0
        begin = time.perf_counter()
        features = extract(samples, sampling_rate=16_000, return_tensors="pt", truncation=False, padding="longest").input_features
        out = model.generate(features, **options)
        all_seconds = time.perf_counter() - begin
    tokens = sum(len(x["tokens"]) for x in out["segments"][0])
    return {"mel": extract.seconds, "encoder": encoder.seconds, "all": all_seconds, "tokens": tokens}


def run_ctranslate2(folder: Path, samples, kind: str, threads: int) -> dict:
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type=kind, cpu_threads=threads)
    model.encode = encode = Stopwatch(model.encode)
    model.feature_extractor = extract = Stopwatch(model.feature_extractor)
    options = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False, "compression_ratio_threshold": None}
    options |= {"log_prob_threshold": None, "no_speech_threshold": None, "language": "en"}
    if folder.name.startswith("small"):  # it writes half as many tokens as it may
        told = json.loads((folder.parent / "small" / "generation_config.json").read_text())
        options |= {"max_new_tokens": 2 * MOST, "suppress_tokens": told["suppress_tokens"]}
    for _ in range(2):
        extract.seconds = encode.seconds = 0.0
        begin = time.perf_counter()
        segments = list(model.transcribe(samples, **options)[0])
        all_seconds = time.perf_counter() - begin
    tokens = sum(len(x.tokens) for x in segments)
    return {"mel": extract.seconds, "encoder": encode.seconds, "all": all_seconds, "tokens": tokens}


def run_one(arguments) -> int:
    """In a process of its own: prints the seconds of one runtime as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from check_speech import read

    samples = read(arguments.data / arguments.sound)
    runtime, kind = arguments.run.split()
    run = {"transformers": run_transformers, "onnxruntime": run_onnxruntime, "ctranslate2": run_ctranslate2}[runtime]
    folder = arguments.data / (arguments.model + ("-ct2" if runtime == "ctranslate2" else ""))
    print(json.dumps(run(folder, samples, kind, arguments.threads)))
    return 0


def measure(arguments, runtime: str, size: str, threads: int) -> dict:
    """A run in a new process, with its largest memory."""
    model, sound = ("tiny.en" if size == "tiny" else "small"), SOUNDS[size]
    if runtime.startswith("xattn"):
        command = [arguments.program, arguments.data / sound, "--model", arguments.data / model, "--json"]
        command += ["--threads", threads, *(["--words"] if "words" in runtime else [])]
    else:
        python = arguments.onnx_python if runtime.startswith("onnxruntime") else sys.executable
        command = [python, OWN, "--run", runtime, "--model", model, "--sound", sound, "--threads", threads]
        command += ["--data", arguments.data]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [str(x) for x in command]
    if runtime.startswith("onnxruntime") and not (arguments.data / f"{model}-onnx").exists():
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)  # exports: not to be measured
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    out = json.loads(text.splitlines()[-1])
    if "seconds" in out:
        out = out["seconds"] | {"all": sum(out["seconds"].values()), "tokens": out["tokens"]}
    return out | {"memory": usage.ru_maxrss / 1024}


def row(name: str, result: dict, duration: float) -> str:
    words = result.get("words", 0.0)
    search = result["all"] - result["mel"] - result["encoder"] - words
    contexts = f"{result['contexts']:.3f} + {search - result['contexts']:.3f}" if "contexts" in result else f"{search:.3f}"
    token = 1000 * (search - result.get("contexts", 0.0)) / max(1, result["tokens"])
    cells = [name, f"{result['mel']:.3f}", f"{result['encoder']:.3f}", contexts, f"{token:.2f}", f"{words:.3f}" if words else ""]
    cells += [f"{result['all']:.2f}", f"{result['all'] / duration:.4f}", f"{result['memory']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures transcribe against transformers, CTranslate2 and ONNX Runtime.")
    parser.add_argument("--program", type=Path, default=Path("build/transcribe"))
    parser.add_argument("--data", type=Path, default=Path("build/whisper"), help="what get_whisper.py has written")
    parser.add_argument("--sizes", nargs="*", default=list(SOUNDS), choices=list(SOUNDS))
    parser.add_argument("--runtimes", nargs="*", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--onnx-python", type=Path, help="a Python with optimum-onnx[onnxruntime]")
    parser.add_argument("--runs", type=int, default=1, help="of each; the fastest counts")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    for name in ("--run", "--model", "--sound"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        arguments.threads = arguments.threads[0]
        return run_one(arguments)
    import soundfile

    if not arguments.onnx_python:
        arguments.runtimes = [runtime for runtime in arguments.runtimes if not runtime.startswith("onnxruntime")]
    if "small" in arguments.sizes and not (arguments.data / "small-ct2" / "model.bin").exists():
        making = multiprocessing.get_context("spawn").Process(target=make_small, args=(arguments.data,))  # its memory is its own
        making.start()
        making.join()
    for size in arguments.sizes:
        duration = soundfile.info(arguments.data / SOUNDS[size]).duration
        for threads in arguments.threads:
            print(f"\n{size}, {threads} thread{'s' if threads > 1 else ''}\n")
            print("| | mel, s | encoder, s | contexts + search, s | ms a token | words, s | all, s | of real time | MB |")
            print("|---|---|---|---|---|---|---|---|---|")
            results = {}
            for _ in range(arguments.runs):
                for runtime in arguments.runtimes:
                    result = measure(arguments, runtime, size, threads)
                    if runtime not in results or result["all"] < results[runtime]["all"]:
                        results[runtime] = result
            for runtime, result in results.items():
                print(row(RUNTIMES[runtime], result, duration), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
