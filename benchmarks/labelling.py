"""Time labelling on this machine's CPU: bare engines, this pipeline, ultralytics' predict and SAHI, on the same tiles.

python benchmarks/labelling.py --images DIR --work-dir runs/labelling --json labelling.json

Scenes, weights and tiles are made once and kept in the work folder. Each contestant then has a process of its own, one
after the other, with all cores; nothing else should run. Counted is the steady state: tiles finished after the first
fifth, per second.

A machine's speed drifts within the hour that this takes. So the pipeline with an engine is compared with what ran just
before and just after it: half of the tiles through the bare engine, and a share of them through every other tool.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
import yaml
from common import TILE_PX, Image, machine, synthetic_piece, write_scene  # what the benchmarks share
from contestants import IOU, SCORE, THRESHOLD, Boxes, Share, Timing, Work, bare, pipeline, sahi, ultralytics
from numpy.typing import NDArray

from softlabel.boxes import iou_matrix
from softlabel.config import Recipe
from softlabel.detectors.describe import read_header
from softlabel.detectors.weights import load_model
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.run import tile
from softlabel.labelling.run import KEEP_MEMORY
from softlabel.recipe_file import load_recipe
from softlabel.store import commit, digest

_COLUMNS = 40  # tiles side by side in a scene
_CLASSES = ("plane", "ship", "car")
_ENGINES = (("pytorch", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
_PEERS = ("sahi", "ultralytics", "ultralytics_one_thread")
_COMPARED = ("bare_engine", "bare_engine_kept_memory", *_PEERS)
_ROUNDS = len(_ENGINES) + 1  # of the others: before the first engine, between them, and after the last

Timings = dict[str, list[Timing]]
"""Of each contestant, in the order in which they were taken."""

# An epoch of 576 images takes half a minute on two cores; objects keep the size in pixels that they have at 512.
_TRAINING = {
    "name": "labelling-teacher",
    "classes": list(_CLASSES),
    "tiles": {
        "synthetic": {"num_scenes": 160, "scene_size_px": 512, "difficulty": 0.2},
        "size_px": 256,
        "background": 0.25,
        "split": {"train_1": 1.0, "train_2": 0.0, "test": 0.0, "validation": 0.1},
    },
    "train": {
        "teacher": {
            "model": "yolov8n.yaml",
            "args": {
                "epochs": 6, "imgsz": 256, "batch": 8, "nbs": 8, "optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 1,
                "mosaic": 0.0, "scale": 0.2, "cache": "ram",
            },
        }
    },
}  # fmt: skip


def main() -> int:
    """Run every contestant, print the table, and write the JSON file."""
    arguments = _arguments()
    # Figures are those of a CPU; and ultralytics, imported above, set one OpenMP thread for every process below.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ.pop("OMP_NUM_THREADS", None)
    work = _prepare(arguments)
    found = results(_race(work, max(1, len(work.rows) // arguments.peer_tiles)), len(work.rows))
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="real images for a second scene (default: made-up pixels only)")
    parser.add_argument("--weights", type=Path, help="anchor-free .safetensors (default: train a yolov8n, 5 minutes)")
    parser.add_argument("--tiles", type=int, default=2000, help="tiles of 512 px to label, at least (default: 2000)")
    parser.add_argument("--peer-tiles", type=int, default=1000, help="of them for SAHI, and ultralytics on one thread")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/labelling"), help="where what is made is kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our pipeline's recipe")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def _race(work: Work, peers_of: int) -> Timings:
    """Everybody's times; of the others but ultralytics on all cores, with every ``peers_of``-th tile alone."""
    timings: Timings = {}

    def run(name: str, contestant: Callable[..., Timing], *arguments: Any) -> None:
        print(f"{name} ...", flush=True)
        timing = in_process(contestant, work, *arguments)
        timings.setdefault(name, []).append(timing)
        print(f"{name}: {_rate([timing]):.1f} tiles/s {timing.note}", flush=True)

    def run_peers(index: int) -> None:
        few = Share(index * peers_of, _ROUNDS * peers_of)
        run("sahi", sahi, few)
        run("ultralytics", ultralytics, Share(index, _ROUNDS))
        run("ultralytics_one_thread", ultralytics, few, 1)

    run_peers(0)
    for index, (engine, precision) in enumerate(_ENGINES):
        run(f"bare_{engine}_{precision}", bare, Share(0, 2), engine, precision)
        run(f"pipeline_{engine}_{precision}", pipeline, engine, precision)
        run(f"bare_{engine}_{precision}", bare, Share(1, 2), engine, precision)
        with patch.dict(os.environ, GLIBC_TUNABLES=KEEP_MEMORY):
            run(f"kept_{engine}_{precision}", bare, Share(0, 1), engine, precision)
        run_peers(index + 1)
    return timings


def _rate(timings: Sequence[Timing]) -> float:
    """Tiles per second of all of them."""
    tiles, seconds = map(sum, zip(*(timing.steady for timing in timings), strict=True))
    return tiles / seconds


def in_process(function: Callable, *arguments: Any) -> Any:
    """What ``function`` returns in a fresh process, so that no threads, settings or caches are left from another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# What all of them work on.


def _prepare(arguments: argparse.Namespace) -> Work:
    folder = arguments.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = _scenes(folder, arguments.tiles, arguments.images)
    weights = arguments.weights.resolve() if arguments.weights else in_process(_train, folder)
    recipe_file = folder / "recipe.yaml"
    values = {"scenes": str(scenes), "size_px": TILE_PX}
    label = {"imgsz": TILE_PX}
    classes = list(read_header(weights).classes)
    recipe_file.write_text(yaml.safe_dump({"name": "labelling", "classes": classes, "tiles": values, "label": label}))
    recipe = load_recipe(recipe_file, arguments.set)
    work = Work(recipe, weights, tile(recipe, folder), folder, len(os.sched_getaffinity(0)))
    _write_checkpoint(work)
    return work


def _scenes(folder: Path, num_tiles: int, images: Path | None) -> Path:
    """A folder with a scene of made-up pixels and, given images, one of those, half the tiles each."""
    real = [uri for _, uri in list_scenes(str(images))] if images else []
    scenes = folder / f"scenes-{digest([num_tiles, real])}"
    each = -(-num_tiles // (2 if real else 1))
    size_wh = min(_COLUMNS, each) * TILE_PX, -(-each // _COLUMNS) * TILE_PX
    write_scene(scenes / "synthetic.tif", size_wh, synthetic_piece)
    if real:
        write_scene(scenes / "real.tif", size_wh, partial(_real_piece, real))
    return scenes


def _real_piece(images: Sequence[str], index: int) -> Image:
    """A piece of one image after the other; one that is too small is enlarged."""
    bgr: NDArray = np.asarray(cv2.imread(images[index % len(images)], cv2.IMREAD_COLOR))
    scale = max(1.0, TILE_PX / min(bgr.shape[:2]))
    bgr = cv2.resize(bgr, None, fx=scale, fy=scale) if scale > 1 else bgr
    y, x = np.random.default_rng(index).integers(0, np.array(bgr.shape[:2]) - TILE_PX, endpoint=True)
    return np.ascontiguousarray(bgr[y : y + TILE_PX, x : x + TILE_PX, ::-1])


def _train(folder: Path) -> Path:
    """A teacher that finds something, by softlabel's own trainer; trained before, it is not trained again."""
    import ray

    from softlabel.training.job import train_job, validation_split
    from softlabel.training.run import train
    from softlabel.training.targets import WEIGHTS

    cores = len(os.sched_getaffinity(0))
    recipe = Recipe.model_validate({**_TRAINING, "execution": {"cpus_per_worker": cores}})
    tiles = tile(recipe, folder)
    val = validation_split(tiles, "train_1", "truth")
    job = train_job(recipe, folder, "teacher", recipe.train.teacher, tiles=tiles, split="train_1", val_split=val)
    if not (job.folder / WEIGHTS).exists():
        ray.init(address="local", include_dashboard=True)
        train(recipe, [job], folder)
        ray.shutdown()
    return job.folder / WEIGHTS


def _write_checkpoint(work: Work) -> None:
    """The same tensors, in float32, in the form that ``YOLO(path)`` loads."""
    model, header = load_model(work.weights)
    train_args = {"task": "detect", "imgsz": header.imgsz}
    commit(work.checkpoint, lambda path: torch.save({"model": model, "train_args": train_args}, path))


# What is told of them.


def agreement(theirs: Sequence[Boxes], ours: Sequence[Boxes]) -> dict[str, float]:
    """How many of either's boxes above the threshold the other has too."""
    of_theirs, of_ours = _matched(theirs, ours), _matched(ours, theirs)
    return {
        "boxes_of_theirs": of_theirs[1],
        "matched_of_theirs": of_theirs[0] / max(of_theirs[1], 1),
        "boxes_of_ours": of_ours[1],
        "matched_of_ours": of_ours[0] / max(of_ours[1], 1),
    }


def _matched(boxes: Sequence[Boxes], others: Sequence[Boxes]) -> tuple[int, int]:
    """How many of ``boxes`` above the threshold are among ``others``, and how many there are.

    NMS left no two boxes of a class so near each other that both could be the match of one.
    """
    hits = total = 0
    for mine, other in zip(boxes, others, strict=True):
        asked = mine.scores_N > THRESHOLD
        near = iou_matrix(mine.boxes_N4[asked], other.boxes_N4) >= IOU
        near &= np.abs(mine.scores_N[asked, None] - other.scores_N[None]) <= SCORE
        near &= mine.class_ids_N[asked, None] == other.class_ids_N[None]
        hits += int(near.any(axis=1).sum())
        total += int(asked.sum())
    return hits, total


def results(timings: Timings, num_tiles: int) -> dict:
    """All numbers, as the JSON file has them. The ratios without an engine's name are the fastest engine's."""
    rates = {name: _rate(runs) for name, runs in timings.items()}
    engines = [f"{engine}_{precision}" for engine, precision in _ENGINES]
    best = max(engines, key=lambda engine: rates[f"pipeline_{engine}"])
    per_engine = {engine: _ratios(timings, engine, index) for index, engine in enumerate(engines)}
    flat = {f"{name}_{engine}": ratio for engine in engines for name, ratio in per_engine[engine].items()}
    theirs = _in_order([run.boxes or [] for run in timings["ultralytics"]])
    return {
        "machine": machine(),
        "tiles": num_tiles,
        "best_engine": best,
        "tiles_per_s": rates,
        "rounds": {name: [_rate([run]) for run in runs] for name, runs in timings.items()},
        "notes": {peer: ", ".join(dict.fromkeys(run.note for run in timings[peer])) for peer in _PEERS},
        "ratios": {**per_engine[best], **flat},
        "agreement": {engine: agreement(theirs, timings[f"pipeline_{engine}"][0].boxes or []) for engine in engines},
    }


def _ratios(timings: Timings, engine: str, index: int) -> dict[str, float]:
    """Of an engine's pipeline to what ran just before and just after it."""
    ours = _rate(timings[f"pipeline_{engine}"])
    near = {f"vs_{peer}": ours / _rate(timings[peer][index : index + 2]) for peer in _PEERS}
    bare_too = {"vs_bare_engine": f"bare_{engine}", "vs_bare_engine_kept_memory": f"kept_{engine}"}
    return {**{name: ours / _rate(timings[bare]) for name, bare in bare_too.items()}, **near}


def _in_order(shares: Sequence[list[Boxes]]) -> list[Boxes]:
    """What was found in every tile, of what was found in every n-th from the first, the second ... on."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def _table(found: dict) -> str:
    rates, ratios, agreed = found["tiles_per_s"], found["ratios"], found["agreement"]
    return "\n".join([*_head(found), *_engine_rows(rates, ratios, agreed), "", *_peer_rows(found), ""])


def _head(found: dict) -> Iterator[str]:
    about = found["machine"]
    libraries = ", ".join(f"{name} {about[name]}" for name in ("torch", "openvino", "ray", "ultralytics", "sahi"))
    yield f"\n{found['tiles']} tiles of {TILE_PX} px on {about['cpu']}, {about['cores']} cores; {libraries};"
    yield f"{about['date']}, commit {about['commit']}. Tiles per second after the first fifth.\n"


def _engine_rows(rates: dict, ratios: dict, agreed: dict) -> Iterator[str]:
    yield (
        "| engine | bare | pipeline | of bare | of bare, memory kept | x SAHI | x ultralytics, all cores |"
        " x ultralytics as it comes, one thread | their boxes matched | ours matched |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for engine, matched in agreed.items():
        factors = " | ".join(f"{ratios[f'vs_{name}_{engine}']:.2f}" for name in _COMPARED)
        shares = " | ".join(
            f"{matched[f'matched_of_{whose}']:.2%} of {matched[f'boxes_of_{whose}']}" for whose in ("theirs", "ours")
        )
        name = engine.replace("_", " ")
        yield f"| {name} | {rates[f'bare_{engine}']:.1f} | {rates[f'pipeline_{engine}']:.1f} | {factors} | {shares} |"


def _peer_rows(found: dict) -> Iterator[str]:
    yield "| others | tiles/s | rounds | with |\n|---|---|---|---|"
    for peer in _PEERS:
        rounds = ", ".join(f"{rate:.1f}" for rate in found["rounds"][peer])
        yield f"| {peer.replace('_', ' ')} | {found['tiles_per_s'][peer]:.1f} | {rounds} | {found['notes'][peer]} |"


if __name__ == "__main__":
    sys.exit(main())
