"""How fast is labelling with words? This detector, a bare loop, a whole forward pass, and transformers' pipeline.

python benchmarks/owlvit.py --json owlvit.json

The model is an OWL-ViT of base size (patch 32, 768 px) with random weights, and 8 prompts; the tiles are noise, 640 px.
Contestants take turns for some rounds, and medians are compared, since a machine's speed drifts.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from PIL import Image
from tiny_owlvit import make, save, words
from transformers import pipeline
from transformers.utils import logging

from softlabel.detectors.owlvit import OwlVitDetector
from softlabel.detectors.queries import Queries
from softlabel.records import Nms

_PROMPTS = ("a plane", "a ship", "a car", "a bridge", "a tree", "a house", "a truck", "a train")
_BATCH = 4
_FLOOR = 0.5


def main() -> int:
    """Time all, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=16, help="per round (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rates = measure(arguments.tiles, arguments.rounds, arguments.threads)
    found = {"machine": machine(), "threads": arguments.threads, "tiles": arguments.tiles, "rates": rates}
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def measure(num_tiles: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Tiles per second of each contestant in each round."""
    torch.manual_seed(0)
    model, processor = make(
        "owlvit", words(), image_size=768, patch_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        text_size=512,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (640, 640, 3), dtype=np.uint8) for _ in range(num_tiles)]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), model, processor)
        queries = Queries(tuple((prompt,) for prompt in _PROMPTS))
        detector = OwlVitDetector(Path(folder), queries, Nms(_FLOOR, 0.5), threads=threads, batch_size=_BATCH)
    logging.set_verbosity_error()
    zero_shot = pipeline(
        "zero-shot-object-detection", model=model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    contestants: dict[str, Callable[[list], Any]] = {
        "softlabel": detector.detect,
        "bare": lambda tiles: _bare(model, processor, tiles),
        "forward": lambda tiles: _forward(model, processor, tiles),
        "pipeline": lambda tiles: [
            zero_shot(Image.fromarray(tile), candidate_labels=list(_PROMPTS), threshold=_FLOOR) for tile in tiles
        ],
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for name, run in contestants.items():
        run(images[:_BATCH] if name != "pipeline" else images[:1])  # warm
    for _ in range(rounds):
        for name, run in contestants.items():
            tiles = images[: max(2, num_tiles // 8)] if name == "pipeline" else images  # it is slow enough
            started = time.monotonic()
            run(tiles)
            rates[name].append(len(tiles) / (time.monotonic() - started))
            print(f"{name}: {rates[name][-1]:.2f} tiles/s", flush=True)
    return rates


@torch.inference_mode()
def _bare(model: Any, processor: Any, tiles: list) -> list:
    """The image tower and heads in batches, preprocessing included, the text encoded before; nothing is kept."""
    tokens = processor.tokenizer(list(_PROMPTS), padding="max_length", return_tensors="pt")
    text = model.owlvit.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    found = []
    for start in range(0, len(tiles), _BATCH):
        batch = tiles[start : start + _BATCH]
        pixels = processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
        features = model.image_embedder(pixel_values=pixels)[0].flatten(1, 2)
        logits, _ = model.class_predictor(features, text[None].expand(len(batch), -1, -1))
        found.append((logits.sigmoid(), model.box_predictor(features, features)))
    return found


@torch.inference_mode()
def _forward(model: Any, processor: Any, tiles: list) -> list:
    """transformers' forward pass in batches, the text with every one, and its own post-processing."""
    found = []
    for start in range(0, len(tiles), _BATCH):
        batch = tiles[start : start + _BATCH]
        inputs = processor(text=[list(_PROMPTS)] * len(batch), images=batch, return_tensors="pt")
        outputs = model(**inputs)
        sizes = [tile.shape[:2] for tile in batch]
        found += processor.post_process_grounded_object_detection(outputs, threshold=_FLOOR, target_sizes=sizes)
    return found


def _table(found: dict) -> str:
    median = {name: statistics.median(rates) for name, rates in found["rates"].items()}
    about = found["machine"]
    what = {
        "softlabel": "softlabel (class vectors kept, NMS)",
        "bare": "bare loop: image tower and heads, text cached",
        "forward": "forward() with its text every time",
        "pipeline": 'pipeline("zero-shot-object-detection")',
    }
    rows = [
        f"| {what[name]} | {rate:.2f} | {median['softlabel'] / rate:.2f} | "
        f"{', '.join(f'{one:.2f}' for one in found['rates'][name])} |"
        for name, rate in median.items()
    ]
    return "\n".join(
        [
            f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}",
            "",
            "| | tiles/s, median | softlabel is | rounds |",
            "|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
