"""An OWL-ViT or OWLv2 of toy size, and its training on made-up scenes.

python benchmarks/tiny_owlvit.py --output tests/assets/tiny-owlvit

transformers has no training loss for them: here each object is answered for by the patch that its centre lies in and by
those around it that it covers, as in YOLOX (Ge et al., arXiv:2107.08430, "multi positives"). A class is a phrase, drawn
anew for each batch, and others of which there is no object stand beside them.
"""

import argparse
import itertools
import math
import string
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
)

from softlabel.config import Synthetic
from softlabel.imagery.layouts import lay_out
from softlabel.imagery.synthetic import render, truth_boxes

_KINDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor),
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor),
}
_LETTERS = string.ascii_lowercase + string.digits + "-,.'"
_PAD, _BEGIN, _END = "!", "<|startoftext|>", "<|endoftext|>"
_MAX_TOKENS = 16  # as in the published models


def make_tokenizer(words: Sequence[str], max_tokens: int = _MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer that has few tokens for each of these words, and spells all others."""
    merges: list[Any] = []
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(parts)):
            pair = "".join(parts[:i]), parts[i]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    # The end is where the text is read off, as the token of the highest number; number 0 means no text.
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([_PAD, *tokens, _BEGIN, _END]))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=_END,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=max_tokens,
    )


def make(
    kind: str,
    words: Sequence[str],
    *,
    image_size: int,
    patch_size: int,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    text_size: int | None = None,
    max_tokens: int = _MAX_TOKENS,
) -> tuple[Any, Any]:
    """An untrained model and its processor.

    Args:
        kind: owlvit or owlv2.
        words: What its tokenizer need not spell.
        image_size: Side of what the image tower sees, in pixels.
        patch_size: Of a patch, in pixels.
        hidden_size: Of both towers.
        text_size: Of the text tower, if it is another.
        num_hidden_layers: Of both towers.
        num_attention_heads: Of both towers.
        max_tokens: Of a prompt, its beginning and end included.
    """
    config_class, model_class, image_class, processor_class = _KINDS[kind]
    tokenizer = make_tokenizer(words, max_tokens)
    tower = {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }
    text_size = text_size or hidden_size
    text = {
        **tower,
        "hidden_size": text_size,
        "intermediate_size": 4 * text_size,
        "num_attention_heads": max(1, num_attention_heads * text_size // hidden_size),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**tower, "image_size": image_size, "patch_size": patch_size}
    model = model_class(config_class(text_config=text, vision_config=vision, projection_dim=text_size)).eval()
    size = {"height": image_size, "width": image_size}
    return model, processor_class(image_processor=image_class(size=size, crop_size=size), tokenizer=tokenizer)


def save(folder: Path, model: Any, processor: Any) -> None:
    """As a folder that transformers reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


SIDE, SCENE = 96, 384  # px of a tile and of a scene
PATCH = 6  # px: a car is two of them wide and three long
CLASSES = ("car", "plane", "ship")
UNSEEN = {"plane": "a small plane seen from above", "ship": "a big boat in the harbour", "car": "the car parked here"}
"""Phrases that training leaves out."""

_NOUNS = {
    "plane": ("plane", "airplane", "aircraft", "planes", "jet"),
    "ship": ("ship", "boat", "vessel", "ships", "boats"),
    "car": ("car", "cars", "vehicle", "automobile"),
}
_ABSENT = [
    "train", "bridge", "house", "tree", "crane", "road", "runway", "field", "lake", "container", "roof", "cloud",
    "river", "tower", "truck", "bus", "tank", "pool", "court", "horse", "person", "dog", "helicopter", "wall",
    "fence", "garden", "beach", "forest", "island", "pier", "barge", "rail", "station",
]  # fmt: skip
_BEFORE = ("", "a ", "the ", "one ", "a small ", "a big ", "a white ", "a photo of a ", "an image of a ", "some ")
_AFTER = ("", "", "", " seen from above", " from above", " from the air", " in a satellite image", " on the ground")
_HERE = (" parked here", " in the harbour", " at the airport", " on the water")
_IMAGE = 0


def words() -> list[str]:
    """What the tokenizer need not spell."""
    phrases = [*_BEFORE, *_AFTER, *_HERE, *UNSEEN.values(), *_ABSENT, *(n for names in _NOUNS.values() for n in names)]
    return list(dict.fromkeys(" ".join(phrases).split()))


def phrase(noun: str, rng: np.random.Generator) -> str:
    """Something around a noun; never what is to be tried later."""
    while (found := f"{rng.choice(_BEFORE)}{noun}{rng.choice(_AFTER + _HERE)}") in UNSEEN.values():
        pass
    return found


def nonsense(rng: np.random.Generator) -> str:
    """A word that nobody knows, of which there is nothing in any image: so a word that was never heard finds little."""
    return "".join(rng.choice(list(string.ascii_lowercase), rng.integers(3, 10)))


def made_tiles(num_scenes: int, seed: int) -> list[tuple[Any, Any, Any]]:
    """All tiles of so many made-up scenes, in the order of the scenes: uint8 (96, 96, 3), xyxy boxes (N, 4) in pixels
    and class ids (N,). Of an object cut by the border there is what is left, if that is three tenths."""
    settings = Synthetic(num_scenes=num_scenes, scene_size_px=SCENE, difficulty=0.1)
    found = []
    for index in range(num_scenes):
        layout = lay_out(settings, seed, index)
        image, truth = render(layout, settings, seed, index), truth_boxes(layout, SCENE)
        boxes = np.array([box for _, box in truth], np.float32).reshape(-1, 4)
        ids = np.array([CLASSES.index(label) for label, _ in truth], np.int64)
        for x, y in itertools.product(range(0, SCENE, SIDE), repeat=2):
            inside = np.clip(boxes - [x, y, x, y], 0, SIDE).astype(np.float32)
            share = np.prod(inside[:, 2:] - inside[:, :2], axis=1) / np.maximum(
                np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1
            )
            kept = share >= 0.3
            found.append((image[y : y + SIDE, x : x + SIDE], inside[kept], ids[kept]))
    return found


def turned(tile: tuple[Any, Any, Any], turn: int) -> tuple[Any, Any, Any]:
    """One of the eight ways to lay a square tile."""
    image, boxes, ids = tile
    if turn >= 4:
        image, boxes = image[:, ::-1], np.stack([SIDE - boxes[:, 2], boxes[:, 1], SIDE - boxes[:, 0], boxes[:, 3]], 1)
    for _ in range(turn % 4):
        image, boxes = np.rot90(image), np.stack([boxes[:, 1], SIDE - boxes[:, 2], boxes[:, 3], SIDE - boxes[:, 0]], 1)
    return image, boxes, ids


def assigned(boxes: Any) -> tuple[Any, Any]:
    """Which patches answer for which boxes: of each box the patch with its centre, and those whose own centre lies in
    its middle half; a patch in two of them answers for the smaller. (P,) patches and (P,) boxes, as indices."""
    side = SIDE // PATCH
    owner: dict[Any, Any] = {}
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centres = (np.arange(side) + 0.5) * PATCH
    for index in np.argsort(-areas):
        x0, y0, x1, y1 = boxes[index]
        cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        columns = np.flatnonzero(np.abs(centres - cx) < w / 4)
        rows = np.flatnonzero(np.abs(centres - cy) < h / 4)
        for row in rows:
            for column in columns:
                owner[row * side + column] = index
    for index in range(len(boxes)):
        cx, cy = (boxes[index, :2] + boxes[index, 2:]) / 2
        owner[min(int(cy // PATCH), side - 1) * side + min(int(cx // PATCH), side - 1)] = index
    return np.array(list(owner), np.int64), np.array(list(owner.values()), np.int64)


def train(minutes: float, seed: int = 0, num_scenes: int = 400, batch: int = 32) -> tuple[Any, Any]:
    """A model trained on made-up scenes for so long."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = make(
        "owlvit", words(), image_size=SIDE, patch_size=PATCH, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4, max_tokens=24,
    )  # fmt: skip
    with torch.no_grad():
        head = model.class_head
        for layer, bias in ((head.logit_shift, -0.8), (head.logit_scale, 5.0)):  # scores begin at about 0.01
            layer.weight.mul_(0.1)
            layer.bias.fill_(bias)
        for parameter in model.box_head.parameters():
            parameter.mul_(0.1)
    model.train()
    tiles = made_tiles(num_scenes, seed)
    filled = [tile for tile in tiles if len(tile[1])]
    empty = [tile for tile in tiles if not len(tile[1])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    began, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        share = (time.monotonic() - began) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * max(0.02, math.cos(share * math.pi / 2))
        chosen = [
            turned(among[i], int(rng.integers(8)))
            for among, count in ((filled, batch - batch // 8), (empty, batch // 8))
            for i in rng.choice(len(among), count, replace=False)
        ]
        loss = _loss(model, processor, chosen, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{(time.monotonic() - began) / 60:5.1f} min  step {step}  loss {loss.item():.3f}", flush=True)
        step += 1
    return model.eval(), processor


def _loss(model: Any, processor: Any, chosen: list, rng: np.random.Generator) -> torch.Tensor:
    pixels = _pixels(processor, np.stack([tile[_IMAGE] for tile in chosen]))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.image_embedder(pixel_values=pixels)[0]
    features = features.float().flatten(1, 2)
    texts = [phrase(str(rng.choice(_NOUNS[name])), rng) for name in CLASSES]
    absent = [*rng.choice(_ABSENT, 3, replace=False), nonsense(rng), nonsense(rng)]
    texts += [phrase(str(noun), rng) for noun in absent]
    tokens = processor.tokenizer(texts, padding="max_length", return_tensors="pt")
    queries = model.owlvit.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    logits, _ = model.class_predictor(features, queries[None].expand(len(chosen), -1, -1))
    boxes = model.box_predictor(features, features)
    wanted = torch.zeros_like(logits)
    found, targets = [], []
    for i, (_, truth, ids) in enumerate(chosen):
        if len(truth):
            patches, owners = assigned(truth)
            wanted[i, patches, ids[owners]] = 1
            found.append(boxes[i, patches])
            targets.append(torch.from_numpy(truth[owners] / SIDE))
    count = max(1, int(wanted.sum()))
    loss = sigmoid_focal_loss(logits, wanted, reduction="sum") / count
    if found:
        ours = box_convert(torch.cat(found), "cxcywh", "xyxy")
        theirs = torch.cat(targets)
        loss = loss + generalized_box_iou_loss(ours, theirs, reduction="mean") + 5 * (ours - theirs).abs().mean()
    return loss


def _pixels(processor: Any, images: Any) -> torch.Tensor:
    tiles = list(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))
    return processor.image_processor(images=tiles, input_data_format="channels_first", return_tensors="pt")[
        "pixel_values"
    ]


def main() -> int:
    """Train and save; benchmarks/open_vocabulary.py measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of training (default: 30)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    arguments = parser.parse_args()
    model, processor = train(arguments.minutes)
    save(arguments.output, model.half(), processor)  # 3.5 MB: it is kept with the tests
    return 0


if __name__ == "__main__":
    sys.exit(main())
