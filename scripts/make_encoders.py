#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains two encoders in PyTorch and writes them as TorchScript modules, for the example vqa to use frozen:

    python3 scripts/make_encoders.py --output DIR
    vqa train --image-encoder DIR/image_encoder.pt --text-encoder DIR/text_encoder.pt

Needs torch and safetensors. With --pretrained, both are made of networks that others trained: see pretrained_encoders.py.

    image_encoder.pt    boards float32 [B, 1, 24, 24], ink from 0 to 1 -> features [B, C, 3, 3]
    text_encoder.pt     words int64 [N, T], padded with 0 behind -> states [N, T, C]; where there is padding they are zero

C is 64; with --pretrained it is 640 and 384.

The image encoder learns to name what is in each cell of a board, from training digits only: of every digit's images each fifth is
held out, as in the C++ program. The text encoder learns, from questions alone, to tell from the state of any word what the whole
question asks: its kind and what its slots stand for. It never sees a board or an answer.

Word 0 is the padding, word 1 ends a question, the others follow in the order of their first use in the grammar: those of all
phrases, then those of all forms. text_encoder.pt keeps them in this order, without the first two, in its extra file vocabulary.txt.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parent.parent / "src" / "examples" / "data"
FEATURES = 64
EMPTY = 10  # the class of a cell without a digit, after the ten digits
END = 1  # the word behind each question
FIRST_WORD = 2
SLOTS = {
    "cell": [str(i) for i in range(9)],
    "line": [str(i) for i in range(6)],
    "side": ["left", "right", "above", "below"],
    "digit": [str(i) for i in range(10)],
    "parity": ["even", "odd"],
    "order": ["larger", "smaller"],
}
KINDS = ["place", "relation", "count", "exist", "compare", "largest", "smallest"]
MOST = {"cell": 2}  # slots of this name in one form; of all others one


def check(ok, message):
    if not ok:
        raise ValueError(message)


def load_digits(path):
    """-> images [N, 8, 8] and labels [N] of the training digits, then of those held out."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    check({"images", "labels"} <= tensors.keys(), f"{path}: must hold the tensors images and labels, but has {sorted(tensors)}")
    images, labels = tensors["images"], tensors["labels"]
    check(images.dtype == labels.dtype == torch.uint8, f"{path}: images and labels must be uint8")
    check(images.dim() == 3 and images.shape[1:] == (8, 8), f"{path}: images must be [N, 8, 8], but are {list(images.shape)}")
    check(labels.shape == images.shape[:1], f"{path}: there must be one label for each image")
    check(bool((images <= 16).all() and (labels < 10).all()), f"{path}: ink must lie in 0 to 16, labels in 0 to 9")
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        places = (labels == digit).nonzero().flatten()
        check(len(places) >= 5, f"{path}: there must be at least five images of a {digit}")
        held_out[places[4::5]] = True
    images, labels = images.float() / 16, labels.long()
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def slots_of(form):
    return [word[1:-1] for word in form if is_slot(word)]


def is_slot(word):
    return word.startswith("{") and word.endswith("}")


class Grammar:
    """phrases[slot][value] and forms[kind] are lists of word lists; see questions.txt."""

    def __init__(self, path):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        self.phrases = {slot: [[] for _ in values] for slot, values in SLOTS.items()}
        self.forms = {kind: [] for kind in KINDS}
        of_phrases, of_forms = [], []
        for number, line in enumerate(lines, 1):
            if not line or line.startswith("#"):
                continue
            where = f"{path}:{number}"
            head, colon, body = line.partition(":")
            head = head.split()
            is_phrases = len(head) == 3 and head[0] == "slot"
            check(
                colon and (is_phrases or len(head) == 1),
                f"{where}: a line must be 'slot NAME VALUE: PHRASE | PHRASE' or 'KIND: FORM', but is '{line}'",
            )
            if is_phrases:
                of_phrases += self.add_phrases(head[1], head[2], body, where)
            else:
                of_forms += self.add_form(head[0], body, where)
        for slot, values in SLOTS.items():
            for i, value in enumerate(values):
                check(self.phrases[slot][i], f"{path}: there is no line 'slot {slot} {value}: PHRASE'")
        for kind, forms in self.forms.items():
            check(forms, f"{path}: there is no line '{kind}: FORM'")
        self.vocabulary = list(dict.fromkeys(of_phrases + of_forms))
        self.number = {word: i for i, word in enumerate(self.vocabulary, FIRST_WORD)}

    def add_phrases(self, slot, value, body, where):
        """-> their words"""
        check(slot in SLOTS, f"{where}: the slot must be one of {', '.join(SLOTS)}, but is '{slot}'")
        values = SLOTS[slot]
        check(value in values, f"{where}: the value of {slot} must be one of {', '.join(values)}, but is '{value}'")
        phrases = [phrase.split() for phrase in body.split("|")]
        check(all(phrases), f"{where}: a phrase is empty")
        self.phrases[slot][values.index(value)] += phrases
        return [word for phrase in phrases for word in phrase]

    def add_form(self, kind, body, where):
        """-> its words that are no slots"""
        check(kind in KINDS, f"{where}: the kind must be one of {', '.join(KINDS)}, but is '{kind}'")
        form = body.split()
        check(form, f"{where}: the form is empty")
        for slot in slots_of(form):
            check(slot in SLOTS, f"{where}: the slot must be one of {', '.join(SLOTS)}, but is '{slot}'")
            most = 2 if slot == "cell" else 1
            check(slots_of(form).count(slot) <= most, f"{where}: a form may have {{{slot}}} at most {most} times")
        self.forms[kind].append(form)
        return [word for word in form if not is_slot(word)]

    def draw_question(self, rng):
        """-> word numbers with END behind them, and the meaning: kind, both cells, the other slots; -1 where there is none."""
        kind = rng.randrange(len(KINDS))
        form = rng.choice(self.forms[KINDS[kind]])
        words, values = [], {name: [] for name in SLOTS}
        for word in form:
            if is_slot(word):
                slot = word[1:-1]
                values[slot].append(rng.randrange(len(SLOTS[slot])))
                words += rng.choice(self.phrases[slot][values[slot][-1]])
            else:
                words.append(word)
        first, second = (values["cell"] + [-1, -1])[:2]
        others = [(values[slot] + [-1])[0] for slot in SLOTS if slot != "cell"]
        return [self.number[word] for word in words] + [END], [kind, first, second, *others]


MEANING = {"kind": len(KINDS), "cell": 9, "other cell": 9} | {s: len(v) for s, v in SLOTS.items() if s != "cell"}


class ImageEncoder(nn.Sequential):
    """The one of the C++ program: halves the picture three times; then each place sees its neighbours."""

    def __init__(self):
        super().__init__(
            *convolution(1, 32, 3, padding=1),
            nn.MaxPool2d(2),  # [B, 32, 12, 12]
            *convolution(32, 64, 3, padding=1),
            nn.MaxPool2d(2),  # [B, 64, 6, 6]
            *convolution(64, FEATURES, 2, stride=2),  # [B, 64, 3, 3]
            *convolution(FEATURES, FEATURES, 3, padding=1),
        )


def convolution(inputs, outputs, size, **options):
    return nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()


class TextEncoder(nn.Module):
    """The one of the C++ program: a recurrent network that reads the words forwards and backwards, added to the words."""

    def __init__(self, words: int):
        super().__init__()
        self.embedding = nn.Embedding(words, FEATURES, padding_idx=0)
        self.gru = nn.GRU(FEATURES, FEATURES // 2, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor) -> Tensor:
        lengths = words.ne(0).sum(1).cpu()
        embedded = self.embedding(words)
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        read, _ = self.gru(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(read, batch_first=True, total_length=words.size(1))
        return embedded + padded


def draw_boards(digits, count, jitter, generator):
    """-> boards [count, 1, 24, 24] of 2 to 6 digits, and the content of each cell [count, 9]: a digit or EMPTY."""
    images, labels = digits
    drawn = torch.randint(len(labels), (count, 9), generator=generator)
    filled = torch.randint(2, 7, (count, 1), generator=generator)
    keep = torch.rand(count, 9, generator=generator).argsort(1) < filled  # `filled` cells of each board
    cells = images[drawn].flatten(0, 1)
    if jitter:
        cells = jittered(cells, generator)
    cells = cells.view(count, 9, 8, 8) * keep[:, :, None, None]
    boards = cells.view(count, 3, 3, 8, 8).transpose(2, 3).reshape(count, 1, 24, 24)
    return boards, torch.where(keep, labels[drawn], EMPTY)


def jittered(images, generator):
    """Each image [N, 8, 8] turned, scaled, sheared, shifted and inked a little differently, and with noise."""
    n = len(images)

    def draw(*shape):
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    maps = torch.eye(2, 3) + 0.15 * draw(2, 3)
    grid = F.affine_grid(maps, [n, 1, 8, 8], align_corners=False)
    inked = F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1) * (1 + 0.2 * draw(1, 1))
    return inked + 0.05 * torch.randn(inked.shape, generator=generator)


def draw_questions(grammar, count, rng):
    """-> words int64 [count, T], padded with 0 behind, and meanings int64 [count, 8]"""
    questions, meanings = zip(*(grammar.draw_question(rng) for _ in range(count)), strict=True)
    words = nn.utils.rnn.pad_sequence([torch.tensor(question) for question in questions], batch_first=True)
    return words, torch.tensor(meanings)


def train(name, modules, steps, loss_of):
    """Minimises loss_of() over the parameters of `modules`."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1, pct_start=0.1)
    begin = time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    check(math.isfinite(loss.item()), f"{name}: the loss is not finite")
    for module in modules:
        module.eval()


def make_image_encoder(training, held_out, steps, generator):
    encoder, head = ImageEncoder(), nn.Linear(FEATURES, EMPTY + 1)

    def scores_of(boards):
        return head(encoder(boards).flatten(2).transpose(1, 2))  # [B, 9, 11]

    def loss_of():
        boards, contents = draw_boards(training, 32, True, generator)
        return F.cross_entropy(scores_of(boards).flatten(0, 1), contents.flatten())

    train("image encoder", [encoder, head], steps, loss_of)
    with torch.no_grad():
        boards, contents = draw_boards(held_out, 1000, False, generator)
        right = scores_of(boards).argmax(-1) == contents
    filled = contents != EMPTY
    print(f"image encoder: on boards of held-out digits {100 * right[filled].float().mean():.2f} % of the digits and ", end="")
    print(f"{100 * right[~filled].float().mean():.2f} % of the empty cells are named rightly")
    return encoder


def make_text_encoder(grammar, steps, rng):
    encoder, head = TextEncoder(FIRST_WORD + len(grammar.vocabulary)), nn.Linear(FEATURES, sum(MEANING.values()))

    def scores_of(words):
        """-> of every word: one score vector for each part of the meaning"""
        return head(encoder(words))[words.ne(0)].split(list(MEANING.values()), dim=-1)

    def loss_of():
        words, meanings = draw_questions(grammar, 64, rng)
        of_words = meanings.repeat_interleave(words.ne(0).sum(1), dim=0)  # [words, 8]
        parts = zip(scores_of(words), of_words.T, strict=True)
        return sum(F.cross_entropy(s, m, ignore_index=-1, reduction="sum") for s, m in parts) / (of_words >= 0).sum()

    train("text encoder", [encoder, head], steps, loss_of)
    with torch.no_grad():
        words, meanings = draw_questions(grammar, 1000, rng)
        of_words = meanings.repeat_interleave(words.ne(0).sum(1), dim=0)
        found = torch.stack([s.argmax(-1) for s in scores_of(words)], dim=1)
    asked = of_words >= 0
    right = 100 * (found == of_words)[asked].float().mean()
    print(f"text encoder: from the states of single words {right:.2f} % of what the questions ask is told rightly")
    return encoder


def make_pretrained(training, held_out, grammar, seed):
    """-> both encoders"""
    import pretrained_encoders  # needs more packages than the rest

    generator = torch.Generator().manual_seed(seed)
    boards = draw_boards(training, 1000, True, generator), draw_boards(held_out, 1000, False, generator)
    words, _ = draw_questions(grammar, 100, random.Random(seed))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrained_encoders.download(folder)
        text_encoder = pretrained_encoders.make_text_encoder(folder, grammar.vocabulary, words)
        return pretrained_encoders.make_image_encoder(folder, *boards), text_encoder


def save(module, path, example, extra_files=None):
    """Saves `module` as TorchScript, then compares the file's results for `example` with the module's."""
    torch.jit.script(module.eval()).save(str(path), _extra_files=extra_files or {})
    with torch.no_grad():
        check(torch.equal(torch.jit.load(str(path))(example), module(example)), f"{path}: does not give what was trained")
    print(f"{path}: {path.stat().st_size} bytes")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to; made if it is missing")
    parser.add_argument("--seed", type=int, default=1, help="of all random numbers (default: 1)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--small", action="store_true", help="a few steps only: the files work, but know little; for checks")
    how.add_argument("--pretrained", action="store_true", help="EfficientNet-Lite0 and MiniLM, downloaded, instead of training")
    parser.add_argument("--digits", type=Path, default=DATA / "digits.safetensors", metavar="FILE")
    parser.add_argument("--grammar", type=Path, default=DATA / "questions.txt", metavar="FILE")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the products are small, and the result does not depend on the number of cores
    training, held_out = load_digits(arguments.digits)
    grammar = Grammar(arguments.grammar)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{arguments.output}: is no folder to write to: {error}") from error

    if arguments.pretrained:
        image_encoder, text_encoder = make_pretrained(training, held_out, grammar, arguments.seed)
    else:
        image_steps, text_steps = (10, 10) if arguments.small else (3000, 3000)
        image_encoder = make_image_encoder(training, held_out, image_steps, torch.Generator().manual_seed(arguments.seed))
        text_encoder = make_text_encoder(grammar, text_steps, random.Random(arguments.seed))

    save(image_encoder, arguments.output / "image_encoder.pt", torch.rand(2, 1, 24, 24))
    vocabulary = "".join(word + "\n" for word in grammar.vocabulary)
    words, _ = draw_questions(grammar, 4, random.Random(arguments.seed))
    save(text_encoder, arguments.output / "text_encoder.pt", words, {"vocabulary.txt": vocabulary})


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError) as error:
        sys.exit(f"make_encoders.py: {error}")
