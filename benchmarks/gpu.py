"""Measure all that a GPU does, stage by stage: labelling, OWL-ViT, training, a search, an experiment.

python benchmarks/gpu.py --weights yolov8n.safetensors --work-dir runs/gpu --json gpu.json

Each stage is a process of its own with a time limit, and prints each figure as JSON as soon as it has it, so that a
machine that is lent for minutes gives what it could. All together end within eight minutes on one H100 with 16 cores.
Where there is no GPU the same code runs at toy size. Scenes are made up (or pieces of --images); without --weights
there are no boxes to speak of.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    TILE_PX,
    Image,
    decode_rate,
    machine,
    second_half,
    synthetic_piece,
    untrained,
    watch_shards,
    write_scene,
)

from softlabel.config import Recipe
from softlabel.detectors.yolo import YoloDetector
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.run import tile
from softlabel.recipe_file import load_recipe
from softlabel.records import Nms
from softlabel.store import summary
from softlabel.tile_table import read_tiles

_PIECES = 64  # different ones in a scene
_CLASSES = ["plane", "ship", "car"]
_READERS = (1, 4, 8, None)


@dataclass(frozen=True)
class Size:
    """Of what is measured: on a GPU, and where there is none."""

    batch: int
    passes: int
    tiles_in_memory: int
    tiles_on_side: int
    training_tiles: int
    epochs: int
    changes: tuple[str, ...]  # to the demo


_FULL = Size(64, 60, 4096, 128, 487, 4, ())
_FEW = (
    "tiles.synthetic.num_scenes=12",
    "train.teacher.args.epochs=1",
    "train.student.args.epochs=1",
    "label.floor=1.0e-7",  # such a teacher is sure of nothing, and its students need boxes
    "train.thresholds=[1.0e-6, 1.0e-5]",
    "search.space={train.threshold: {min: 1.0e-6, max: 1.0e-5}}",
)
_TOY = Size(2, 2, 8, 4, 8, 2, _FEW)


@dataclass(frozen=True)
class Work:
    """What every stage gets."""

    folder: Path
    weights: Path | None
    images: str | None
    device: torch.device
    size: Size

    @property
    def precision(self) -> str:
        """What `auto` means there."""
        return "float16" if self.device.type == "cuda" else "float32"


Figures = Iterator[dict[str, Any]]


def main() -> int:
    """Run the stages that are asked for, one after the other."""
    arguments = _arguments()
    cuda = torch.cuda.is_available()
    work = Work(
        arguments.work_dir.resolve(),
        arguments.weights.resolve() if arguments.weights else None,
        arguments.images,
        torch.device("cuda" if cuda else "cpu"),
        _FULL if cuda else _TOY,
    )
    work.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        for figures in STAGES[arguments.stage][0](work):
            print(json.dumps({"stage": arguments.stage, **figures}), flush=True)
        return 0
    device = torch.cuda.get_device_name() if cuda else "no GPU"
    found: list[dict] = [{"machine": machine(), "device": device}]
    print(json.dumps(found[0]), flush=True)
    for stage in arguments.stages or STAGES:
        found += _run_apart(stage, STAGES[stage][1])
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if all("failed" not in one for one in found) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="of a YOLO with classes plane, ship and car (default: untrained)")
    parser.add_argument("--images", help="folder of images whose pieces scenes are made of (default: made-up pixels)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/gpu"), help="where what is made is kept")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="some of them (default: all)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def _run_apart(stage: str, limit_s: float) -> list[dict]:
    """The figures of a stage in a process of its own, printed as they come, with the GPU memory that it took."""
    started, peak, found = time.monotonic(), [0.0], []
    process = subprocess.Popen([sys.executable, *sys.argv, "--stage", stage], stdout=subprocess.PIPE, text=True)
    ender = threading.Timer(limit_s, process.kill)
    ender.start()
    watching = threading.Thread(target=_watch_memory, args=(process, peak), daemon=True)
    watching.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith('{"stage"'):
            found.append(json.loads(line))
    code = process.wait()
    ender.cancel()
    seconds = round(time.monotonic() - started, 1)
    last: dict[str, Any] = {"stage": stage, "seconds": seconds, "peak_gpu_mib": peak[0]}
    if code:
        last["failed"] = f"exit status {code}" + (f" at its limit of {limit_s} s" if seconds >= limit_s else "")
    print(json.dumps(last), flush=True)
    return [*found, last]


def _watch_memory(process: subprocess.Popen, peak: list[float]) -> None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while shutil.which(query[0]) and process.poll() is None:
        answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
        peak[0] = max([peak[0], *(float(word) for word in answer if word.isdigit())])
        time.sleep(0.5)


# Labelling.


def forward(work: Work) -> Figures:
    """The model alone on tiles that are there, and with NMS of the whole batch: as it comes, and as one launch."""
    from softlabel.detectors.batch_nms import START
    from softlabel.detectors.pipeline import CudaQueue

    for precision in dict.fromkeys(("float32", work.precision)):
        detector = _detector(work, precision)
        network, selection = detector._engine._forward, detector._selection(detector.geometry((TILE_PX, TILE_PX)))  # type: ignore[attr-defined]
        tiles = torch.from_numpy(np.stack(_pieces(work, work.size.batch))).to(work.device)

        def with_nms(tiles: torch.Tensor, network: Any = network, selection: Any = selection) -> Any:
            return selection.of_batch(network(tiles)[0], START)

        runs: dict[str, Callable[[torch.Tensor], Any]] = {"forward": network, "forward_nms": with_nms}
        with torch.inference_mode():
            yield {f"{name}_{precision}": _rate(run, tiles, work) for name, run in runs.items()}
            if work.device.type == "cuda":
                queue = CudaQueue(work.device)
                with queue.computing():
                    replay = queue.captured(with_nms, tiles)
                    assert replay is not None
                    yield {f"forward_nms_graph_{precision}": _rate(replay, tiles, work)}


def _rate(run: Callable[[torch.Tensor], Any], tiles: torch.Tensor, work: Work) -> float:
    """Tiles per second."""
    for _ in range(3):
        run(tiles)
    _wait(work)
    started = time.monotonic()
    for _ in range(work.size.passes):
        run(tiles)
    _wait(work)
    return round(work.size.passes * len(tiles) / (time.monotonic() - started), 1)


def _wait(work: Work) -> None:
    if work.device.type == "cuda":
        torch.cuda.synchronize()


def detect(work: Work) -> Figures:
    """Tiles in memory through the detector, shard by shard with the next one started, and through ultralytics."""
    images = _pieces(work, work.size.tiles_in_memory)
    detector = _detector(work, work.precision)
    shards = [images[start : start + 64] for start in range(0, len(images), 64)]
    detector.detect(images[: 8 * work.size.batch])
    started, waiting, boxes = time.monotonic(), [], 0
    for shard in shards:
        waiting.append(detector.start(shard))
        if len(waiting) > 3:
            boxes += sum(len(found.boxes) for found in waiting.pop(0)())
    boxes += sum(len(found.boxes) for finish in waiting for found in finish())
    seconds = time.monotonic() - started
    effort = detector._pipeline._effort if detector._pipeline else None
    yield {"detect": round(len(images) / seconds, 1), "boxes_per_tile": boxes / len(images), "effort": effort}
    yield {"ultralytics_predict": _ultralytics_rate(work, images[: max(8, len(images) // 2)])}


def _ultralytics_rate(work: Work, images: list[Image]) -> float:
    from ultralytics import YOLO

    from softlabel.detectors.weights import load_model

    model, _ = load_model(_weights(work))
    path = work.folder / "checkpoint.pt"
    torch.save({"model": model, "train_args": {"task": "detect", "imgsz": TILE_PX}}, path)
    settings = {
        "conf": 0.01,
        "iou": 0.7,
        "max_det": 1000,
        "imgsz": TILE_PX,
        "device": str(work.device),
        "verbose": False,
    }
    settings |= {"half": work.precision == "float16", "batch": work.size.batch}
    yolo = YOLO(str(path))
    bgr = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    yolo.predict(bgr[: work.size.batch], **settings)
    started = time.monotonic()
    for start in range(0, len(bgr), work.size.batch):
        yolo.predict(bgr[start : start + work.size.batch], **settings)
    return round(len(bgr) / (time.monotonic() - started), 1)


def decode(work: Work) -> Figures:
    """Tiles of a deflate GeoTIFF to pixels, by one core and by all."""
    started = time.monotonic()
    _, tiles = _scene(work, work.size.tiles_on_side)
    rows = read_tiles(tiles)
    yield {"scene_tiles": len(rows), "scene_seconds": round(time.monotonic() - started, 1)}
    cores = len(os.sched_getaffinity(0))
    for count in dict.fromkeys((1, cores)):
        yield {f"decode_{count}_cores": decode_rate(rows[: max(8, 256 * count)], count)}


def pipeline(work: Work) -> Figures:
    """`softlabel label` of a deflate GeoTIFF with so many readers; a small one where few readers would take long."""
    import ray

    from softlabel.labelling.job import label_job
    from softlabel.labelling.run import label

    ray.init(address="local", include_dashboard=True)
    for readers in _READERS if work.size is _FULL else (None,):
        side = work.size.tiles_on_side // (4 if readers == 1 else 2 if readers else 1)
        recipe, tiles = _scene(work, side)
        execution = {**recipe.execution.model_dump(), "gpus_per_actor": int(work.device.type == "cuda")}
        if work.device.type == "cuda":
            execution["reader_cpus_per_actor"] = readers
        recipe = recipe.model_copy(update={"execution": recipe.execution.model_validate(execution)})
        job = label_job(recipe, f"readers-{readers or 'all'}", _weights(work), tiles, None)
        with watch_shards() as stamps:
            (store,) = label(recipe, [job], work.folder)
        found = {"steady_tiles_per_s": second_half(sorted(stamps)), **(summary(store)["speed"] or {})}
        yield {"readers": readers or "all", "tiles": summary(store)["requested"], **found}
    ray.shutdown()


# What a transformer, a trainer, a search and an experiment make of it.


def owlvit(work: Work) -> Figures:
    """OWL-ViT of base size with eight prompts: the detector, and the image tower and heads alone."""
    from owlvit import _PROMPTS
    from tiny_owlvit import make, save, words

    from softlabel.detectors.owlvit import OwlVitDetector
    from softlabel.detectors.queries import Queries

    torch.manual_seed(0)
    side, width, layers = (768, 768, 12) if work.size is _FULL else (64, 64, 2)
    model, processor = make(
        "owlvit", words(), image_size=side, patch_size=32, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=layers, text_size=512,
    )  # fmt: skip
    folder = work.folder / "owlvit"
    folder.mkdir(exist_ok=True)
    save(folder, model, processor)
    images = _pieces(work, work.size.tiles_in_memory // 2)
    for precision in dict.fromkeys((work.precision, "float32")):
        detector = OwlVitDetector(
            folder,
            Queries(tuple((p,) for p in _PROMPTS)),
            Nms(0.5, 0.5),
            precision=precision,
            batch_size=work.size.batch,
        )
        detector.detect(images[: 6 * work.size.batch])
        started = time.monotonic()
        detector.detect(images)
        rate = len(images) / (time.monotonic() - started)
        network = detector._engine._forward  # type: ignore[attr-defined]
        pixels = torch.rand(work.size.batch, 3, side, side, device=work.device)

        def tower(_: torch.Tensor, network: Any = network, pixels: torch.Tensor = pixels) -> Any:
            return network.of_pixels(pixels)

        with torch.inference_mode():
            alone = _rate(tower, pixels, work)
        yield {f"owlvit_{precision}": round(rate, 1), f"owlvit_alone_{precision}": alone}


def training(work: Work) -> Figures:
    """Seconds of each epoch after the first: ultralytics' own trainer, and ours under Ray Train."""
    import training as epochs  # the benchmark beside this

    recipe = _training_recipe(work)
    scratch = work.folder / "training"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    tiles = tile(recipe, work.folder)
    args = {**recipe.train.student.args, "epochs": work.size.epochs}
    for name, seconds in epochs.contest(recipe, tiles, args, scratch, ("yolov8n.yaml",)):
        yield {"trainer": name, "seconds_per_epoch": [round(one, 2) for one in seconds]}


def _training_recipe(work: Work) -> Recipe:
    count = -(-work.size.training_tiles * 100 // 90)
    cuda = work.device.type == "cuda"
    args = {"imgsz": 640, "batch": 16, "nbs": 16, "workers": 8, "cache": "ram", "optimizer": "AdamW", "lr0": 0.001}
    args |= {} if cuda else {"imgsz": 64, "workers": 0}
    return Recipe.model_validate(
        {
            "name": "gpu-training",
            "classes": _CLASSES,
            "tiles": {
                "synthetic": {"num_scenes": count, "scene_size_px": 256, "difficulty": 0.2},
                "size_px": 256,
                "split": {"train_1": 1.0, "train_2": 0.0, "test": 0.0, "validation": 0.1},
            },
            "train": {
                "student": {"model": "yolov8n.yaml", "args": args if cuda else {**args, "imgsz": 64, "workers": 0}}
            },
            "execution": {"gpus_per_worker": int(cuda), "cpus_per_worker": 8 if cuda else 1},
        }
    )


def search(work: Work) -> Figures:
    """Two students at a time on one device."""
    yield from _timed(work, "search", ("search.trials=4", "execution.gpus_per_worker=0.5", *work.size.changes))


def experiment(work: Work) -> Figures:
    """The demo's experiment from scenes to report."""
    yield from _timed(work, "experiment", work.size.changes)


def _timed(work: Work, verb: str, changes: tuple[str, ...]) -> Figures:
    from softlabel.cli import main as softlabel

    run_dir = work.folder / verb
    shutil.rmtree(run_dir, ignore_errors=True)
    if work.device.type == "cpu":
        changes = tuple(change for change in changes if "gpus_per" not in change)
    sets = [word for change in changes for word in ("--set", change)]
    started = time.monotonic()
    code = softlabel([verb, "--config", "demo", "--run-dir", str(run_dir), *sets])
    yield {"seconds_in_all": round(time.monotonic() - started, 1), "exit_status": code}
    if code:
        raise SystemExit(code)


# What they work on.


def _weights(work: Work) -> Path:
    return work.weights or untrained(work.folder, _CLASSES)


def _detector(work: Work, precision: str) -> YoloDetector:
    size = work.size.batch
    return YoloDetector.from_weights(
        _weights(work), Nms(), TILE_PX, engine="pytorch", precision=precision, batch_size=size
    )


def _pieces(work: Work, count: int) -> list[Image]:
    """So many tiles, of which as many differ as a scene has pieces."""
    path = work.folder / "pieces.npy"  # for the stages after the first
    if not path.exists():
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            found = list(pool.map(partial(_piece, work.images), range(_PIECES if work.size is _FULL else 4)))
        np.save(path, np.stack(found))
    few = np.load(path)
    return [few[i % len(few)] for i in range(count)]


def _piece(images: str | None, index: int) -> Image:
    if images is None:
        return synthetic_piece(index)
    from labelling import _real_piece

    return _real_piece([uri for _, uri in list_scenes(images)], index)


def _scene(work: Work, side: int) -> tuple[Recipe, Path]:
    """A square scene of so many tiles on a side, and its tiles."""
    folder = work.folder / f"scene-{side}"
    pieces = _pieces(work, _PIECES if work.size is _FULL else 4)
    write_scene(folder / "scene.tif", (side * TILE_PX, side * TILE_PX), partial(_repeated, pieces, side))
    values = [f"tiles.scenes={folder}", f"tiles.size_px={TILE_PX}", f"label.imgsz={TILE_PX}"]
    recipe = load_recipe("demo", [*values, "tiles.synthetic=null", "tiles.background=null", f"classes={_CLASSES}"])
    recipe = recipe.model_copy(update={"execution": recipe.execution.__class__()})
    return recipe, tile(recipe, work.folder)


def _repeated(pieces: list[Image], side: int, index: int) -> Image:
    """Row by row another order, so that neighbours differ."""
    return pieces[(index + index // side * 7) % len(pieces)]


STAGES: dict[str, tuple[Callable[[Work], Figures], float]] = {
    "forward": (forward, 60),
    "detect": (detect, 60),
    "decode": (decode, 120),
    "pipeline": (pipeline, 150),
    "owlvit": (owlvit, 60),
    "training": (training, 150),
    "search": (search, 150),
    "experiment": (experiment, 180),
}
"""What is measured, in this order, and after how many seconds it is ended."""

if __name__ == "__main__":
    sys.exit(main())
