"""Time labelling on this machine's CPU: bare engines, this pipeline, ultralytics' predict and SAHI, on the same tiles.

python benchmarks/labelling.py --images DIR --work-dir runs/labelling --json labelling.json

Scenes, weights and tiles are made once and kept in the work folder. Each contestant then has a process of its own, one
after the other, with all cores; nothing else should run. Counted is the steady state: tiles finished after the first
fifth, per second. All but our pipeline, which reads the GeoTIFFs, get their pixels in memory, and reading them is not
counted.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
import yaml
from common import TILE_PX, Image, machine, synthetic_piece, write_scene  # what the benchmarks share
from numpy.typing import NDArray

from softlabel.boxes import iou_matrix
from softlabel.config import Recipe, load_recipe
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader, list_scenes
from softlabel.labelling.header import read_header
from softlabel.labelling.weights import load_model
from softlabel.records import detections_from_row
from softlabel.store import commit, digest, read_soft_labels, read_table, read_tiles, shard_file

T = TypeVar("T")

_COLUMNS = 40  # tiles side by side in a scene
_CLASSES = ("plane", "ship", "car")
_ENGINES = (("pytorch", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
_PEERS = ("sahi", "ultralytics", "ultralytics_one_thread")
_TRIED = (1, 8, 32)  # batch sizes; the fastest is then used
_THRESHOLD, _IOU, _SCORE = 0.25, 0.9, 0.02  # boxes above it agree at this IoU with scores this near

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


class Boxes(NamedTuple):
    """What was found in one tile: boxes (N, 4) xyxy tile pixels, scores (N,) and class_ids (N,) of the best class."""

    boxes_N4: NDArray[np.float64]
    scores_N: NDArray[np.float64]
    class_ids_N: NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """What every contestant gets."""

    recipe: Recipe
    weights: Path
    tiles: Path
    folder: Path
    cores: int

    @property
    def rows(self) -> list[dict]:
        """The tiles, row by row of each scene."""
        return read_tiles(self.tiles)

    @property
    def checkpoint(self) -> Path:
        """The weights as ultralytics loads them."""
        return self.folder / f"{digest(str(self.weights))}.pt"


@dataclass(frozen=True)
class Timing:
    """One contestant: (seconds, tiles finished by then) in order, its boxes where they are compared, its settings."""

    events: list[tuple[float, int]]
    boxes: list[Boxes] | None = None
    note: str = ""

    @property
    def tiles_per_s(self) -> float:
        """After the first fifth of the tiles."""
        last_s, last = self.events[-1]
        first_s, first = next(event for event in self.events if event[1] >= last / 5)
        return (last - first) / (last_s - first_s)


def main() -> int:
    """Run every contestant, print the table, and write the JSON file."""
    arguments = _arguments()
    # Figures are those of a CPU; and ultralytics, imported above, set one OpenMP thread for every process below.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ.pop("OMP_NUM_THREADS", None)
    work = _prepare(arguments)
    timings = {}
    for name, contestant in _contestants(arguments.peer_tiles).items():
        print(f"{name} ...", flush=True)
        timings[name] = in_process(contestant, work)
        print(f"{name}: {timings[name].tiles_per_s:.1f} tiles/s {timings[name].note}", flush=True)
    found = results(timings, len(work.rows))
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="real images for a second scene (default: made-up pixels only)")
    parser.add_argument("--weights", type=Path, help="anchor-free .safetensors (default: train a yolov8n, 5 minutes)")
    parser.add_argument("--tiles", type=int, default=2000, help="tiles of 512 px to label, at least (default: 2000)")
    parser.add_argument(
        "--peer-tiles", type=int, default=500, help="tiles of them for SAHI and ultralytics on one thread"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("runs/labelling"), help="where what is made is kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our pipeline's recipe")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def _contestants(peer_tiles: int) -> dict[str, Callable[[Work], Timing]]:
    found: dict[str, Callable[[Work], Timing]] = {}
    for engine, precision in _ENGINES:
        found[f"bare_{engine}_{precision}"] = partial(_bare, engine=engine, precision=precision)
        found[f"pipeline_{engine}_{precision}"] = partial(_pipeline, engine=engine, precision=precision)
    found["ultralytics"] = _ultralytics
    found["ultralytics_one_thread"] = partial(_ultralytics, threads=1, num_tiles=peer_tiles)
    found["sahi"] = partial(_sahi, num_tiles=peer_tiles)
    return found


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


# The contestants.


def _bare(work: Work, engine: str, precision: str) -> Timing:
    """Prepare, forward, NMS, and nothing else."""
    from softlabel.labelling.teachers import label_job
    from softlabel.labelling.yolo import YoloDetector

    job = label_job(_with_engine(work.recipe, engine, precision), "bare", work.weights, work.tiles, None)
    detector = YoloDetector.from_weights(
        work.weights,
        job.nms,
        job.imgsz,
        engine=engine,
        precision=precision,
        threads=work.cores,
        batch_size=work.recipe.execution.batch_size,
    )
    return _timed(_tenths(work.rows), _read, detector.detect)


def _pipeline(work: Work, engine: str, precision: str) -> Timing:
    """`softlabel label` on a Ray of its own; a tile is finished when its shard is committed."""
    import ray

    from softlabel.labelling.run import label
    from softlabel.labelling.teachers import label_job

    recipe = _with_engine(work.recipe, engine, precision)
    job = label_job(recipe, f"{engine}_{precision}", work.weights, work.tiles, None)
    shutil.rmtree(job.folder(work.folder), ignore_errors=True)
    ray.init(address="local", include_dashboard=True)
    (store,) = label(recipe, [job], work.folder)
    ray.shutdown()
    paths = [shard_file(store, shard) for shard, _ in job.shards()]
    stamps = sorted((path.stat().st_mtime_ns / 1e9, read_table(path).num_rows) for path in paths)
    finished = itertools.accumulate(count for _, count in stamps)
    events = list(zip([seconds for seconds, _ in stamps], finished, strict=True))
    found = [detections_from_row(row) for row in read_soft_labels(store)]
    return Timing(events, [_boxes(item.boxes, item.best, item.class_ids) for item in found])


def _ultralytics(work: Work, threads: int | None = None, num_tiles: int | None = None) -> Timing:
    """ultralytics' own predict on lists of arrays.

    Used as documented it computes on one thread: importing it before torch sets OMP_NUM_THREADS to 1. It is measured
    like this, and with all cores, as everybody else.
    """
    from ultralytics import YOLO

    torch.set_num_threads(threads or work.cores)
    nms = work.recipe.label.nms(read_header(work.weights).yaml)
    settings = {"conf": nms.floor, "iou": nms.iou, "max_det": nms.max_det, "imgsz": TILE_PX, "device": "cpu"}
    model = YOLO(str(work.checkpoint))

    def predict(images: list[Image], batch: int) -> list:
        parts = (images[start : start + batch] for start in range(0, len(images), batch))
        return [result for part in parts for result in model.predict(part, verbose=False, **settings)]

    rows = work.rows[:: max(1, len(work.rows) // num_tiles)] if num_tiles else work.rows
    batch = _fastest(_TRIED, partial(predict, _read_bgr(rows[: max(_TRIED)])))
    timing = _timed(_tenths(rows), _read_bgr, partial(predict, batch=batch), boxes=_boxes_of_result)
    return replace(timing, note=f"batches of {batch}, {len(rows)} tiles")


def _sahi(work: Work, num_tiles: int) -> Timing:
    """SAHI on strips of a scene one tile high. Below a confidence of 0.1 it merges slices by NMS, whatever is asked."""
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    torch.set_num_threads(work.cores)
    logging.getLogger("sahi").setLevel(logging.ERROR)  # it says at every call that it merges by NMS
    options: dict[str, Any] = {"model_path": str(work.checkpoint), "image_size": TILE_PX, "device": "cpu"}
    options["confidence_threshold"] = work.recipe.label.floor
    model = AutoDetectionModel.from_pretrained("ultralytics", **options)
    slicing: dict[str, Any] = {"slice_height": TILE_PX, "slice_width": TILE_PX, "perform_standard_pred": False}
    slicing |= {"overlap_height_ratio": 0, "overlap_width_ratio": 0}

    def predict(strip: Image, batch: int) -> list:
        return get_sliced_prediction(strip, model, **slicing, batch_size=batch, verbose=0).object_prediction_list

    strips = [list(group) for _, group in itertools.groupby(work.rows, lambda row: (row["scene_id"], row["window"][1]))]
    strips = strips[:: max(1, min(len(work.rows) // num_tiles, len(strips) // 5))]
    batch = _fastest(_TRIED, partial(predict, _read_strip(strips[0])))
    timing = _timed(strips, _read_strip, partial(predict, batch=batch))
    return replace(timing, note=f"batches of {batch}, {sum(map(len, strips))} tiles")


def _with_engine(recipe: Recipe, engine: str, precision: str) -> Recipe:
    label = recipe.label.model_copy(update={"engine": engine, "precision": precision})
    return recipe.model_copy(update={"label": label})


def _timed(
    groups: Sequence[list[dict]],
    read: Callable[[list[dict]], T],
    work: Callable[[T], list],
    boxes: Callable[[Any], Boxes] | None = None,
) -> Timing:
    """The time of ``work`` over all tiles, group by group; reading pixels and taking boxes is not counted."""
    events, found, elapsed, finished = [], [], 0.0, 0
    for rows in groups:
        pixels = read(rows)
        started = time.monotonic()
        results = work(pixels)
        elapsed, finished = elapsed + time.monotonic() - started, finished + len(rows)
        events.append((elapsed, finished))
        found += [boxes(result) for result in results] if boxes else []
        print(f"  {finished} tiles, {finished / elapsed:.1f} tiles/s", flush=True)
    return Timing(events, found if boxes else None)


def _tenths(rows: list[dict]) -> list[list[dict]]:
    step = -(-len(rows) // 10)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _fastest(sizes: Sequence[int], work: Callable[..., object]) -> int:
    """The batch size with which ``work`` takes least time, after one call to warm up."""
    work(batch=sizes[0])
    seconds = {}
    for size in sizes:
        started = time.monotonic()
        work(batch=size)
        seconds[size] = time.monotonic() - started
    return min(seconds, key=lambda size: seconds[size])


def _read(rows: list[dict]) -> list[Image]:
    reader = TileReader()
    return [reader.read(row) for row in rows]


def _read_bgr(rows: list[dict]) -> list[Image]:
    return [np.ascontiguousarray(image[..., ::-1]) for image in _read(rows)]


def _read_strip(rows: list[dict]) -> Image:
    return np.concatenate(_read(rows), axis=1)


def _boxes(boxes_N4: NDArray, scores_N: NDArray, class_ids_N: NDArray) -> Boxes:
    """Those that can take part in the comparison."""
    keep = scores_N > _THRESHOLD - 2 * _SCORE
    return Boxes(boxes_N4[keep].astype(np.float64), scores_N[keep].astype(np.float64), class_ids_N[keep].astype(int))


def _boxes_of_result(result: Any) -> Boxes:
    found = result.boxes.data.numpy()
    return _boxes(found[:, :4], found[:, 4], found[:, 5])


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
        asked = mine.scores_N > _THRESHOLD
        near = iou_matrix(mine.boxes_N4[asked], other.boxes_N4) >= _IOU
        near &= np.abs(mine.scores_N[asked, None] - other.scores_N[None]) <= _SCORE
        near &= mine.class_ids_N[asked, None] == other.class_ids_N[None]
        hits += int(near.any(axis=1).sum())
        total += int(asked.sum())
    return hits, total


def results(timings: dict[str, Timing], num_tiles: int) -> dict:
    """All numbers, as the JSON file has them. The ratios without an engine's name are the fastest engine's."""
    rates = {name: timing.tiles_per_s for name, timing in timings.items()}
    engines = [f"{engine}_{precision}" for engine, precision in _ENGINES]
    best = max(engines, key=lambda engine: rates[f"pipeline_{engine}"])
    per_engine = {engine: _ratios(rates, engine) for engine in engines}
    flat = {f"{name}_{engine}": ratio for engine in engines for name, ratio in per_engine[engine].items()}
    theirs = timings["ultralytics"].boxes or []
    return {
        "machine": machine(),
        "tiles": num_tiles,
        "best_engine": best,
        "tiles_per_s": rates,
        "notes": {name: timing.note for name, timing in timings.items() if timing.note},
        "ratios": {**per_engine[best], **flat},
        "agreement": {engine: agreement(theirs, timings[f"pipeline_{engine}"].boxes or []) for engine in engines},
    }


def _ratios(rates: dict[str, float], engine: str) -> dict[str, float]:
    ours = rates[f"pipeline_{engine}"]
    return {"vs_bare_engine": ours / rates[f"bare_{engine}"], **{f"vs_{peer}": ours / rates[peer] for peer in _PEERS}}


def _table(found: dict) -> str:
    rates, ratios, agreed = found["tiles_per_s"], found["ratios"], found["agreement"]
    return "\n".join([*_head(found), *_engine_rows(rates, ratios, agreed), "", *_peer_rows(rates, found["notes"]), ""])


def _head(found: dict) -> Iterator[str]:
    about = found["machine"]
    libraries = ", ".join(f"{name} {about[name]}" for name in ("torch", "openvino", "ray", "ultralytics", "sahi"))
    yield f"\n{found['tiles']} tiles of {TILE_PX} px on {about['cpu']}, {about['cores']} cores; {libraries};"
    yield f"{about['date']}, commit {about['commit']}. Tiles per second after the first fifth.\n"


def _engine_rows(rates: dict, ratios: dict, agreed: dict) -> Iterator[str]:
    yield (
        "| engine | bare | pipeline | of bare | x SAHI | x ultralytics, all cores |"
        " x ultralytics as it comes, one thread | their boxes matched | ours matched |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for engine, matched in agreed.items():
        factors = " | ".join(f"{ratios[f'vs_{name}_{engine}']:.2f}" for name in ("bare_engine", *_PEERS))
        shares = " | ".join(
            f"{matched[f'matched_of_{whose}']:.2%} of {matched[f'boxes_of_{whose}']}" for whose in ("theirs", "ours")
        )
        name = engine.replace("_", " ")
        yield f"| {name} | {rates[f'bare_{engine}']:.1f} | {rates[f'pipeline_{engine}']:.1f} | {factors} | {shares} |"


def _peer_rows(rates: dict, notes: dict) -> Iterator[str]:
    yield "| others | tiles/s | with |\n|---|---|---|"
    for peer in _PEERS:
        yield f"| {peer.replace('_', ' ')} | {rates[peer]:.1f} | {notes[peer]} |"


if __name__ == "__main__":
    sys.exit(main())
