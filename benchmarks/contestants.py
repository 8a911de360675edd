"""Whom benchmarks/labelling.py times over the same tiles: bare engines, this pipeline, ultralytics' predict and SAHI.

Each runs in a process of its own. All but our pipeline, which reads the GeoTIFFs, get their pixels in memory, and
reading them is not counted.
"""

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from common import TILE_PX, Image, watch_shards  # what the benchmarks share
from numpy.typing import NDArray

from softlabel.config import Recipe, default_iou
from softlabel.detectors.describe import read_header
from softlabel.imagery.scenes import TileReader
from softlabel.records import detections_from_row
from softlabel.shards import read_soft_labels
from softlabel.store import digest
from softlabel.tile_table import read_tiles

T = TypeVar("T")

THRESHOLD, IOU, SCORE = 0.25, 0.9, 0.02  # boxes above it agree at this IoU with scores this near
_TRIED = (1, 8, 32)  # batch sizes; the fastest is then used


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
class Share:
    """Every ``of``-th tile, or strip of tiles, from number ``first`` on."""

    first: int
    of: int

    def take(self, items: list[T]) -> list[T]:
        """The share of these."""
        return items[self.first :: self.of]


@dataclass(frozen=True)
class Timing:
    """Of one contestant: (seconds, tiles finished by then) in order, boxes where they are compared, its settings."""

    events: list[tuple[float, int]]
    boxes: list[Boxes] | None = None
    note: str = ""

    @property
    def steady(self) -> tuple[int, float]:
        """Tiles after the first fifth, and their seconds."""
        last_s, last = self.events[-1]
        first_s, first = next(event for event in self.events if event[1] >= last / 5)
        return last - first, last_s - first_s


def bare(work: Work, share: Share, engine: str, precision: str) -> Timing:
    """Prepare, forward, NMS, and nothing else."""
    from softlabel.detectors.yolo import YoloDetector
    from softlabel.labelling.job import label_job

    job = label_job(_with_engine(work.recipe, engine, precision), "bare", work.weights, work.tiles, None)
    detector = YoloDetector.from_weights(
        work.weights,
        job.teacher.nms,
        job.teacher.imgsz,
        engine=engine,
        precision=precision,
        threads=work.cores,
        batch_size=work.recipe.execution.batch_size,
    )
    return _timed(_tenths(share.take(work.rows)), _read, detector.detect)


def pipeline(work: Work, engine: str, precision: str) -> Timing:
    """`softlabel label` on a Ray of its own; a tile is finished when its shard is committed."""
    import ray

    from softlabel.labelling.job import label_job
    from softlabel.labelling.run import label

    recipe = _with_engine(work.recipe, engine, precision)
    job = label_job(recipe, f"{engine}_{precision}", work.weights, work.tiles, None)
    shutil.rmtree(job.folder(work.folder), ignore_errors=True)
    ray.init(address="local", include_dashboard=True)
    with watch_shards() as stamps:
        (store,) = label(recipe, [job], work.folder)
    ray.shutdown()
    stamps.sort()
    finished = itertools.accumulate(count for _, count in stamps)
    events = list(zip([seconds for seconds, _ in stamps], finished, strict=True))
    found = [detections_from_row(row) for row in read_soft_labels(store)]
    return Timing(events, [_boxes(item.boxes, item.best, item.class_ids) for item in found])


def ultralytics(work: Work, share: Share, threads: int | None = None) -> Timing:
    """ultralytics' own predict on lists of arrays.

    Used as documented it computes on one thread: importing it before torch sets OMP_NUM_THREADS to 1. It is measured
    like this, and with all cores, as everybody else.
    """
    from ultralytics import YOLO

    torch.set_num_threads(threads or work.cores)
    nms = work.recipe.label.nms(default_iou(read_header(work.weights).yaml))
    settings = {"conf": nms.floor, "iou": nms.iou, "max_det": nms.max_det, "imgsz": TILE_PX, "device": "cpu"}
    model = YOLO(str(work.checkpoint))

    def predict(images: list[Image], batch: int) -> list:
        parts = (images[start : start + batch] for start in range(0, len(images), batch))
        return [result for part in parts for result in model.predict(part, verbose=False, **settings)]

    rows = share.take(work.rows)
    batch = _fastest(_TRIED, partial(predict, _read_bgr(rows[: max(_TRIED)])))
    return _timed(_tenths(rows), _read_bgr, partial(predict, batch=batch), _boxes_of_result, f"batches of {batch}")


def sahi(work: Work, share: Share) -> Timing:
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
    strips = share.take(strips)
    batch = _fastest(_TRIED, partial(predict, _read_strip(strips[0])))
    return _timed(strips, _read_strip, partial(predict, batch=batch), note=f"batches of {batch}")


def _with_engine(recipe: Recipe, engine: str, precision: str) -> Recipe:
    label = recipe.label.model_copy(update={"engine": engine, "precision": precision})
    return recipe.model_copy(update={"label": label})


def _timed(
    groups: Sequence[list[dict]],
    read: Callable[[list[dict]], T],
    work: Callable[[T], list],
    boxes: Callable[[Any], Boxes] | None = None,
    note: str = "",
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
    return Timing(events, found if boxes else None, note)


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
    keep = scores_N > THRESHOLD - 2 * SCORE
    return Boxes(boxes_N4[keep].astype(np.float64), scores_N[keep].astype(np.float64), class_ids_N[keep].astype(int))


def _boxes_of_result(result: Any) -> Boxes:
    found = result.boxes.data.numpy()
    return _boxes(found[:, :4], found[:, 4], found[:, 5])
