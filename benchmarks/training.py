"""Time an epoch of ours against ultralytics' own trainer, on the same images, sizes, threads and loader workers.

python benchmarks/training.py --config overhead --set tiles.scenes=DIR/images --set ...

Three models are trained in turn from scratch on the recipe's train_1, validated after every epoch, with
the student's args: ultralytics' own trainer with its anchor-free yolov5n on the tiles written out as PNG and txt, our
trainer under Ray Train with the same model, and ours with yolov5n-anchor. The first epoch of each (start-up, filling
the cache) is not counted.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import cv2
import ray
import torch
import yaml
from ultralytics import YOLO

from softlabel.config import Model, Recipe
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.recipe_file import load_recipe
from softlabel.store import summary
from softlabel.training.job import train_job, validation_split
from softlabel.training.run import train
from softlabel.training.targets import Target, truth_targets


def main() -> int:
    """Train the three and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tiles = tile(recipe, scratch)
        args = {**recipe.train.student.args, "epochs": arguments.epochs}
        rows = {"ultralytics' own trainer, yolov5n.yaml": _theirs(recipe, tiles, args, scratch)}
        rows |= _ours(recipe, tiles, args, scratch)
        print("\n| trainer and model | seconds per epoch | median |\n|---|---|---|")
        for name, seconds in rows.items():
            print(f"| {name} | {', '.join(f'{s:.1f}' for s in seconds)} | {statistics.median(seconds):.1f} |")
    return 0


def _theirs(recipe: Recipe, tiles: Path, args: dict, scratch: Path) -> list[float]:
    for kind, split in (("train", "train_1"), ("val", validation_split(tiles, "train_1", "truth"))):
        _write_out(truth_targets(tiles, split), scratch / "data", kind)
    data = {"path": str(scratch / "data"), "train": "images/train", "val": "images/val"}
    data_yaml = scratch / "data.yaml"
    data_yaml.write_text(yaml.safe_dump({**data, "names": dict(enumerate(recipe.classes))}))
    seconds: list[float] = []
    model = YOLO("yolov5n.yaml")
    model.add_callback("on_fit_epoch_end", lambda trainer: seconds.append(trainer.epoch_time))
    threads = max(1, int(recipe.execution.cpus_per_worker))  # it would take one less than there are
    model.add_callback("on_train_start", lambda trainer: torch.set_num_threads(threads))
    own = {"data": str(data_yaml), "project": str(scratch), "name": "theirs", "device": "cpu", "plots": False}
    model.train(**{**args, **own, "pretrained": False})
    return seconds[1 : args["epochs"]]


def _ours(recipe: Recipe, tiles: Path, args: dict, scratch: Path) -> dict[str, list[float]]:
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
        for name in ("yolov5n.yaml", "yolov5n-anchor.yaml")
    }
    ray.init(address="local", include_dashboard=True)
    try:
        train(recipe, list(jobs.values()), scratch)
    finally:
        ray.shutdown()
    return {name: [row["seconds"] for row in summary(job.folder)["history"]][1:] for name, job in jobs.items()}


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
