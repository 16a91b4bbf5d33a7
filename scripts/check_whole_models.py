#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that from_pretrained reads the models that the tests load, train by one step and write back.

    .venv/bin/python scripts/check_whole_models.py [--program build/xattn_tests]

Needs torch and transformers. Says nothing but the number of models if all is well.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "models"


def check(ok: bool, message: str) -> None:
    if not ok:
        sys.exit(f"check_whole_models.py: {message}")


@torch.no_grad()
def check_model(original: Path, written: Path) -> None:
    shutil.copy(original / "config.json", written)
    (architecture,) = transformers.AutoConfig.from_pretrained(original).architectures
    inputs, logits = load_file(original / "expect.safetensors"), load_file(written / "logits.safetensors")
    del inputs["logits"]
    for folder, expected in ((original, logits["before"]), (written, logits["after"])):
        model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
        check(not any(report.values()), f"{folder}: from_pretrained reports {report}")
        own = model.eval()(**inputs).logits
        difference = (own - expected).abs().max() / expected.abs().max()
        check(difference <= 1e-5, f"{folder}: logits differ by {difference} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=Path("build/xattn_tests"))
    program = parser.parse_args().program.resolve()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = sorted(x.name for x in DATA.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        tests = [program, "--gtest_brief=1", "--gtest_filter=WholeModelTest.*AndBack"]
        subprocess.run(tests, check=True, env=os.environ | {"XATTN_KEEP_MODELS": folder}, stdout=subprocess.DEVNULL)
        for name in models:
            check((Path(folder) / name).is_dir(), f"{name}: the tests wrote no such model")
            check_model(DATA / name, Path(folder) / name)
    print(f"{len(models)} models: from_pretrained reads what xattn wrote, and computes the same")


if __name__ == "__main__":
    main()
