"""The labelling step: tiles to soft labels, as one Ray Data job.

Work is dealt out in shards, the row groups of the tiles file. A shard's rows are committed to a file of that shard's
name by rename, so a shard done twice (a retried task, a rerun) is still there once, and a rerun does what is missing.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from tqdm import tqdm

from softlabel.config import Execution, Label, Recipe, dump_recipe
from softlabel.errors import RecipeError, SceneError, StoreError
from softlabel.imagery.scenes import TileReader
from softlabel.labelling.lease import Lease
from softlabel.labelling.weights import read_header
from softlabel.labelling.yolo import YoloDetector, fingerprint
from softlabel.records import (
    LABELLED,
    LOSS_NAMES,
    REJECTED,
    Detections,
    Nms,
    Truth,
    soft_labels_schema,
)
from softlabel.store import (
    TILES_FILE,
    finish,
    is_done,
    read_json,
    read_table,
    shard_file,
    step_dir,
    summary,
    write_json,
    write_table,
    write_text,
)

STORE = "store.json"
_READER_CPUS = 0.25  # reading waits for disks more than it computes; a whole CPU each would starve the model actors


@dataclass(frozen=True)
class LabelJob:
    """One teacher over some splits of one tile set."""

    name: str
    weights: Path
    tiles: Path
    splits: tuple[str, ...] | None
    num_classes: int
    imgsz: int
    nms: Nms
    with_losses: bool = False

    def identity(self) -> dict:
        """All that determines the store."""
        return {
            "teacher": fingerprint(self.weights, self.imgsz, self.nms),
            "tiles": self.tiles.name,
            "splits": list(self.splits) if self.splits is not None else None,
            "with_losses": self.with_losses,
        }

    def folder(self, run_dir: Path) -> Path:
        """Where its store is."""
        return step_dir(run_dir, f"label-{self.name}", self.identity())


def label_job(recipe: Recipe, name: str, weights: Path | str, tiles: Path, splits: Sequence[str] | None,
              *, with_losses: bool = False) -> LabelJob:  # fmt: skip
    """The job of a teacher under a recipe's settings.

    Raises:
        WeightsError: The weights cannot be read.
        RecipeError: The weights know other classes than the recipe.
    """
    header = read_header(weights)
    if header.classes != recipe.classes:
        raise RecipeError(
            f"{weights} knows the classes {', '.join(header.classes)}, the recipe has {', '.join(recipe.classes)}: "
            "give `classes` as the weights have them, in their order"
        )
    settings: Label = recipe.label
    nms = settings.nms(header.yaml)
    imgsz = settings.imgsz or header.imgsz
    return LabelJob(
        name,
        Path(weights),
        tiles,
        None if splits is None else tuple(splits),
        len(header.classes),
        imgsz,
        nms,
        with_losses,
    )


def recipe_label_job(recipe: Recipe, tiles: Path) -> LabelJob:
    """The job that a recipe's own ``label`` section describes.

    Raises:
        RecipeError: It names no weights.
    """
    if recipe.label.weights is None:
        raise RecipeError("label.weights is not set: name the teacher's .safetensors, --set label.weights=PATH")
    return label_job(recipe, "labels", Path(recipe.label.weights).resolve(), tiles, recipe.label.splits)


def finished_store(job: LabelJob, run_dir: Path) -> Path:
    """The store that a job has filled.

    Raises:
        StoreError: It has not, or not all of it.
    """
    folder = job.folder(run_dir)
    if not is_done(folder):
        raise StoreError(f"{folder} is not finished: run `softlabel label` with the same recipe and --set first")
    return folder


def label(recipe: Recipe, jobs: Sequence[LabelJob], run_dir: Path) -> list[Path]:
    """Run labelling jobs that are not done yet, all in one Ray Data run, and return their stores.

    Raises:
        StoreError: A store was made by something else, another run is writing it, its counts do not balance, or too
            many tiles were rejected.
    """
    folders = [job.folder(run_dir) for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        _claim(folder, job, recipe)
    with ExitStack() as held:
        leases = [held.enter_context(Lease(folder)) for folder in folders if not is_done(folder)]
        missing = {i: _missing_shards(job, folders[i]) for i, job in enumerate(jobs) if not is_done(folders[i])}
        if any(missing.values()):
            _run(recipe.execution, jobs, folders, missing, leases)
        for i in missing:
            _finish(jobs[i], folders[i])
    for folder in folders:
        _check_rejected(folder, recipe.label.max_rejected_fraction)
    return folders


def _claim(folder: Path, job: LabelJob, recipe: Recipe) -> None:
    identity = job.identity()
    if not (folder / STORE).exists():
        write_json(folder / STORE, identity)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        return
    found = read_json(folder / STORE)
    differing = sorted(key for key in identity if found.get(key) != identity[key])
    if differing:
        differences = "; ".join(f"{key}: store {found.get(key)}, asked {identity[key]}" for key in differing)
        raise StoreError(f"{folder} was made by something else ({differences}): use another --run-dir")


def _shards(job: LabelJob) -> list[tuple[int, int]]:
    """(shard, tiles asked for in it) of the shards that hold any."""
    shards = []
    with pq.ParquetFile(job.tiles / TILES_FILE) as file:
        for shard in range(file.num_row_groups):
            count = len(_asked(file.read_row_group(shard, columns=["split"]), job.splits))
            if count:
                shards.append((shard, count))
    return shards


def _missing_shards(job: LabelJob, folder: Path) -> list[tuple[int, int]]:
    return [(shard, count) for shard, count in _shards(job) if not shard_file(folder, shard).exists()]


def _asked(table: pa.Table, splits: tuple[str, ...] | None) -> pa.Table:
    return table if splits is None else table.filter(pc.is_in(table["split"], pa.array(splits, pa.string())))


def _run(
    execution: Execution, jobs: Sequence[LabelJob], folders: Sequence[Path], missing: dict, leases: Sequence[Lease]
) -> None:
    _check_room(execution)
    work = [{"job": i, "shard": shard} for i, shards in missing.items() for shard, _ in shards]
    total = sum(count for shards in missing.values() for _, count in shards)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts tiles, not blocks
    context.target_max_block_size = None  # a block is a shard: the model must see it whole to commit it whole
    results = (
        ray.data.from_items(work, override_num_blocks=len(work))
        .map_batches(partial(_read_shard, jobs), batch_size=1, num_cpus=_READER_CPUS)
        .map_batches(
            _Labeller,
            batch_size=None,
            compute=_pool(execution),
            num_cpus=execution.cpus_per_actor,
            num_gpus=execution.gpus_per_actor or None,
            fn_constructor_args=(jobs, folders, execution),
        )
    )
    with tqdm(total=total, unit="tile", desc="labelling", mininterval=2) as bar:
        for row in results.iter_rows():
            for lease in leases:
                lease.check()
            bar.update(row["tiles"])
            bar.set_postfix_str(f"{jobs[row['job']].name}: {row['boxes']} boxes in the last {row['tiles']} tiles")


def _pool(execution: Execution) -> ray.data.ActorPoolStrategy:
    if isinstance(execution.actors, int):
        return ray.data.ActorPoolStrategy(size=execution.actors)
    low, high = execution.actors
    return ray.data.ActorPoolStrategy(min_size=low, max_size=high)


def _check_room(execution: Execution) -> None:
    """An actor pool that takes every CPU starves the readers and waits for ever, without a word."""
    actors = execution.actors if isinstance(execution.actors, int) else execution.actors[0]
    cluster = ray.cluster_resources()
    for resource, needed in (
        ("CPU", actors * execution.cpus_per_actor + _READER_CPUS),
        ("GPU", actors * execution.gpus_per_actor),
    ):
        there = cluster.get(resource, 0)
        if needed > there:
            raise RecipeError(
                f"labelling needs {needed:g} {resource} ({actors} actors and a reader), the cluster has {there:g}: "
                f"lower execution.actors or execution.{resource.lower()}s_per_actor"
            )


def _read_shard(jobs: Sequence[LabelJob], batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Pixels of one shard's tiles; a tile that cannot be read carries its reason instead."""
    index, shard = int(batch["job"][0]), int(batch["shard"][0])
    job = jobs[index]
    with pq.ParquetFile(job.tiles / TILES_FILE) as file:
        rows = _asked(file.read_row_group(shard), job.splits).to_pylist()
    reader = TileReader()
    images, reasons, retryable = [], [], []
    for row in rows:
        image, reason, retry = _read_tile(reader, row)
        images.append(image)
        reasons.append(reason)
        retryable.append(retry)
    reader.close()
    return {
        "job": np.full(len(rows), index),
        "shard": np.full(len(rows), shard),
        "tile_id": np.array([row["tile_id"] for row in rows], object),
        "image": _ragged(images),
        "reason": np.array(reasons, object),
        "retryable": np.array(retryable),
    }


def _read_tile(reader: TileReader, row: dict) -> tuple[np.ndarray, str, bool]:
    try:
        return reader.read(row), "", False
    except SceneError as error:
        return np.zeros((1, 1, 3), np.uint8), str(error), error.retryable


def _ragged(images: list[np.ndarray]) -> np.ndarray:
    column = np.empty(len(images), object)
    column[:] = images
    return column


_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))


class _Labeller:
    """Holds one teacher at a time, labels whole shards and commits them."""

    def __init__(self, jobs: Sequence[LabelJob], folders: Sequence[Path], execution: Execution) -> None:
        self._jobs, self._folders, self._batch_size = jobs, folders, execution.batch_size
        self._loaded: tuple[int, YoloDetector] | None = None
        if not execution.gpus_per_actor:
            torch.set_num_threads(max(1, math.ceil(execution.cpus_per_actor)))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        index, shard = int(batch["job"][0]), int(batch["shard"][0])
        job = self._jobs[index]
        truths = _read_truths(job, shard) if job.with_losses else None
        found: dict[int, dict] = {}
        readable = [i for i, reason in enumerate(batch["reason"]) if not reason]
        for start in range(0, len(readable), self._batch_size):
            chunk = readable[start : start + self._batch_size]
            images = [np.asarray(batch["image"][i]) for i in chunk]
            rows = _label_images(self._detector(index), images, [truths[i] for i in chunk] if truths else None)
            found.update(zip(chunk, rows, strict=True))
        for i, reason in enumerate(batch["reason"]):
            row = found.setdefault(i, _row(_NOTHING, reason, bool(batch["retryable"][i])))
            row["tile_id"] = batch["tile_id"][i]
        schema = soft_labels_schema(job.num_classes)
        if truths is not None:
            schema = schema.with_metadata({LOSS_NAMES: ",".join(self._detector(index).loss_names())})
        table = pa.Table.from_pylist([found[i] for i in range(len(found))], schema)
        write_table(shard_file(self._folders[index], shard), table)
        return {"job": [index], "tiles": [len(table)], "boxes": [sum(len(row["boxes"]) for row in found.values())]}

    def _detector(self, index: int) -> YoloDetector:
        if self._loaded is None or self._loaded[0] != index:
            job = self._jobs[index]
            self._loaded = index, YoloDetector.from_weights(job.weights, job.nms, job.imgsz)
        return self._loaded[1]


def _read_truths(job: LabelJob, shard: int) -> list[Truth]:
    with pq.ParquetFile(job.tiles / TILES_FILE) as file:
        table = _asked(file.read_row_group(shard, columns=["split", "truth"]), job.splits)
    return [Truth.from_row(truth) for truth in table["truth"].to_pylist()]


def _label_images(detector: YoloDetector, images: list[np.ndarray], truths: list[Truth] | None) -> list[dict]:
    if truths is None:
        return [_row(detections) for detections in detector.detect(images)]
    return [_row(found, losses=losses) for found, losses in detector.detect_with_losses(images, truths)]


def _row(found: Detections, reason: str = "", retryable: bool = False, losses: list[float] | None = None) -> dict:
    return {
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "objectness": None if found.objectness is None else found.objectness.tolist(),
        "saturated": found.saturated,
        "losses": losses,
        "status": REJECTED if reason else LABELLED,
        "reason": reason or None,
        "retryable": retryable,
    }


def _finish(job: LabelJob, folder: Path) -> None:
    """Check that requested = labelled + rejected, write the view of what was rejected, and mark the store done."""
    requested = sum(count for _, count in _shards(job))
    counts = {"requested": requested, LABELLED: 0, REJECTED: 0, "boxes": 0, "saturated": 0}
    rejected = []
    for shard, _ in _shards(job):
        table = read_table(shard_file(folder, shard))
        counts["boxes"] += pc.sum(pc.list_value_length(table["boxes"])).as_py() or 0
        counts["saturated"] += pc.sum(table["saturated"]).as_py() or 0
        bad = table.filter(pc.equal(table["status"], REJECTED))
        counts[LABELLED] += len(table) - len(bad)
        counts[REJECTED] += len(bad)
        rejected.append(bad.select(["tile_id", "reason", "retryable"]))
    if counts[LABELLED] + counts[REJECTED] != requested:
        raise StoreError(f"{folder} does not balance ({counts}): delete it and label again")
    if counts[REJECTED]:
        write_table(folder / "rejected" / "rejected.parquet", pa.concat_tables(rejected))
    finish(folder, {"name": job.name, **counts})


def _check_rejected(folder: Path, max_fraction: float) -> None:
    counts = summary(folder)
    share = counts[REJECTED] / max(counts["requested"], 1)
    if share > max_fraction:
        raise StoreError(
            f"{counts[REJECTED]} of {counts['requested']} tiles were rejected ({share:.0%}; label.max_rejected_fraction"
            f" is {max_fraction:.0%}): see the reasons in {folder / 'rejected'}"
        )
