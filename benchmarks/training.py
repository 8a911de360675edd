"""Time an epoch of ours against ultralytics' own trainer, on the same images, sizes, threads and loader workers.

python benchmarks/training.py --config overhead --set tiles.scenes=DIR/images --set ...

Three models are trained in turn from scratch on the recipe's train_1, validated after every epoch, with
the student's args: ultralytics' own trainer with its anchor-free yolov5n on the tiles written out as PNG and txt, our
trainer under Ray Train with the same model, and ours with yolov5n-anchor. The first epoch of each (start-up, filling
the cache) is not counted.

--steps N instead times N training steps (augmentation, forward, loss, backward) of each model and what `train.soft`
adds to them: class vectors, weights and an ignore band of as many boxes as there are objects. Plain and soft steps take
turns on the same tiles.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import ray
import torch
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from softlabel import rotated
from softlabel.config import Model, Recipe, Soft
from softlabel.detectors.soft_loss import soften
from softlabel.detectors.weights import build_model, default_train_args
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader, read_tile
from softlabel.recipe_file import load_recipe
from softlabel.store import summary
from softlabel.training.dataset import TileDataset, looked_up, soft_rows
from softlabel.training.job import train_job, validation_split
from softlabel.training.run import train
from softlabel.training.soft import Softness
from softlabel.training.targets import Target, truth_targets

Rows = Iterator[tuple[str, list[float]]]


def main() -> int:
    """Train the three and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, help="time so many steps, plain and soft, instead of epochs")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tiles = tile(recipe, scratch)
        args = {**recipe.train.student.args, "epochs": arguments.epochs}
        if arguments.steps:
            _print_steps(recipe, tiles, args, arguments.steps)
            return 0
        rows = list(contest(recipe, tiles, args, scratch, ("yolov5n.yaml", "yolov5n-anchor.yaml")))
        print("\n| trainer and model | seconds per epoch | median |\n|---|---|---|")
        for name, seconds in rows:
            print(f"| {name} | {', '.join(f'{s:.1f}' for s in seconds)} | {statistics.median(seconds):.1f} |")
    return 0


def _print_steps(recipe: Recipe, tiles: Path, args: dict, steps: int) -> None:
    torch.set_num_threads(max(1, int(recipe.execution.cpus_per_worker)))
    hard = truth_targets(tiles, "train_1")
    soft = [replace(target, soft=_made_soft(target, len(recipe.classes), i)) for i, target in enumerate(hard)]
    print("\n| model | plain step | soft step | more |\n|---|---|---|---|")
    for name in ("yolov5n.yaml", "yolo26n.yaml", "yolov5n-anchor.yaml"):
        runs = [_Steps(recipe, name, args, targets) for targets in (hard, soft)]
        seconds: list[list[float]] = [[], []]
        for step in range(steps + 2):
            for run, times in zip(runs, seconds, strict=True):
                times.append(run.step(step))
        plain, softened = (statistics.median(times[2:]) for times in seconds)
        print(f"| {name} | {plain:.3f} s | {softened:.3f} s | {softened / plain - 1:+.1%} |")


def _made_soft(target: Target, num_classes: int, seed: int) -> Softness:
    """Vectors and weights as a teacher's, and as many boxes between the thresholds as there are objects."""
    generator = np.random.default_rng(seed)
    count = len(target.boxes)
    scores = generator.uniform(0.3, 0.9, count).astype(np.float32)
    regions = rotated.upright(target.boxes) + np.array([*generator.normal(0, 20, 2), 0, 0, 0], np.float32)
    vectors = np.eye(num_classes, dtype=np.float32)[target.class_ids] * scores[:, None]
    keeps = np.zeros((count, num_classes), np.float32)
    return Softness(vectors, scores, np.ones_like(scores), regions.astype(np.float32), keeps)


class _Steps:
    """A model in training, without Ray and optimizer."""

    def __init__(self, recipe: Recipe, name: str, args: dict, targets: list[Target]) -> None:
        torch.manual_seed(0)
        hyp = get_cfg(overrides={**default_train_args(name), **args})
        self._model = build_model(name, len(recipe.classes))
        self._model.args, self._batch = hyp, hyp.batch
        self._model.criterion = self._model.init_criterion()
        self._rows = soft_rows(targets) if targets[0].soft else None
        if self._rows is not None:
            soften(self._model.criterion, Soft(class_targets="vector", weight_power=1.0, ignore_above=0.1), None)
        data = {"names": dict(enumerate(recipe.classes)), "nc": len(recipe.classes), "channels": 3}
        options = {"imgsz": hyp.imgsz, "batch_size": hyp.batch, "augment": True, "hyp": hyp, "data": data}
        self._dataset = TileDataset(targets, read_tile, cache="ram", **options)

    def step(self, number: int) -> float:
        """Seconds of one; two of one number draw the same."""
        random.seed(number)
        np.random.seed(number)
        started = time.monotonic()
        indices = random.sample(range(len(self._dataset)), self._batch)
        batch = self._dataset.collate_fn([self._dataset[i] for i in indices])
        if self._rows is not None:
            batch = looked_up(batch, self._rows)
        loss, _ = self._model.loss({**batch, "img": batch["img"].float() / 255})
        loss.sum().backward()
        self._model.zero_grad()
        return time.monotonic() - started


def contest(recipe: Recipe, tiles: Path, args: dict, scratch: Path, models: Sequence[str]) -> Rows:
    """Who trains, and the seconds of its epochs after the first: ultralytics' trainer with the first model, ours with
    each."""
    yield f"ultralytics' own trainer, {models[0]}", _theirs(recipe, tiles, args, scratch, models[0])
    yield from _ours(recipe, tiles, args, scratch, models)


def _theirs(recipe: Recipe, tiles: Path, args: dict, scratch: Path, name: str) -> list[float]:
    for kind, split in (("train", "train_1"), ("val", validation_split(tiles, "train_1", "truth"))):
        _write_out(truth_targets(tiles, split), scratch / "data", kind)
    data = {"path": str(scratch / "data"), "train": "images/train", "val": "images/val"}
    data_yaml = scratch / "data.yaml"
    data_yaml.write_text(yaml.safe_dump({**data, "names": dict(enumerate(recipe.classes))}))
    seconds: list[float] = []
    model = YOLO(name)
    model.add_callback("on_fit_epoch_end", lambda trainer: seconds.append(trainer.epoch_time))
    device = "0" if recipe.execution.gpus_per_worker else "cpu"
    if device == "cpu":
        threads = max(1, int(recipe.execution.cpus_per_worker))  # it would take one less than there are
        model.add_callback("on_train_start", lambda trainer: torch.set_num_threads(threads))
    own = {"data": str(data_yaml), "project": str(scratch), "name": "theirs", "device": device, "plots": False}
    no_check = patch("ultralytics.engine.trainer.check_amp", lambda model: True)  # it would download a model
    with no_check if device != "cpu" else nullcontext():
        model.train(**{**args, **own, "pretrained": False})
    return seconds[1 : args["epochs"]]


def _ours(recipe: Recipe, tiles: Path, args: dict, scratch: Path, models: Sequence[str]) -> Rows:
    jobs = {
        f"ours under Ray Train, {name}": train_job(
            recipe,
            scratch,
            name.removesuffix(".yaml"),
            Model(model=name, args=args),
            tiles=tiles,
            split="train_1",
            val_split=validation_split(tiles, "train_1", "truth"),
        )
        for name in models
    }
    ray.init(address="local", include_dashboard=True)
    try:
        train(recipe, list(jobs.values()), scratch)
    finally:
        ray.shutdown()
    for name, job in jobs.items():
        yield name, [row["seconds"] for row in summary(job.folder)["history"]][1:]


def _write_out(targets: list[Target], folder: Path, kind: str) -> None:
    """Tiles as PNG with YOLO txt beside them."""
    images, labels = folder / "images" / kind, folder / "labels" / kind
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    reader = TileReader()
    for i, target in enumerate(targets):
        pixels = reader.read(target.tile)
        cv2.imwrite(str(images / f"{i}.png"), pixels[..., ::-1])
        height, width = pixels.shape[:2]
        lines = [
            f"{c} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}"
            for c, (x1, y1, x2, y2) in zip(target.class_ids, target.boxes, strict=True)
        ]
        (labels / f"{i}.txt").write_text("\n".join(lines))
    reader.close()


if __name__ == "__main__":
    sys.exit(main())
