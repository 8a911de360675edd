"""From finished stores to what others use: layers of scenes, data sets of tiles, one store out of several.

Work is dealt out in groups of shards, as Ray Data tasks. Every file appears by rename and is the same whoever writes
it, so a task that is retried does no harm. Only counts come back to the driver.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray

import softlabel
from softlabel import shards
from softlabel.errors import SceneError, SoftlabelError, StoreError
from softlabel.imagery.scenes import TileReader, read_tile
from softlabel.lease import Lease
from softlabel.packing import pack_store
from softlabel.records import EMPTY, LABELLED, REJECTED, Detections
from softlabel.results import datasets, geo
from softlabel.results.fuse import fuse_job, fuse_shard
from softlabel.results.merge import Method
from softlabel.results.names import teacher_name
from softlabel.results.scenes import Scene, read_scenes
from softlabel.results.stores import LabelledTile, Store, num_shards, open_store, read_all, read_shard
from softlabel.results.subtype import SubtypeJob, subtype_shard
from softlabel.shards import STATUSES
from softlabel.store import (
    DONE,
    STORE,
    finish,
    is_done,
    read_json,
    summary,
    write_json,
    write_table,
    write_text,
)
from softlabel.terminal import progress, say

Format = Literal["geoparquet", "geojson", "coco", "yolo", "yolo-obb", "dota"]
_YOLO = ("yolo", "yolo-obb")
MARKER = "export.json"
FAILED = "failed.jsonl"

_MAX_SHARDS = 16  # in a task: about a thousand tiles
_TASKS_PER_CPU = 4
_GPU_SHARE = 0.25  # for a task whose crops go through a model: it spends most of its time on reading pixels
_MAX_UNREAD = 0.05  # share of labelled tiles whose scenes may be gone: the default of label.max_rejected_fraction


def export(store: Path, output: Path, fmt: Format, threshold: float, merge: Method, iou: float) -> dict[str, Any]:
    """Write a finished store's boxes above ``threshold`` in another format into ``output``.

    geoparquet and geojson are a file per scene with every object once (softlabel.results.geo); the others are data
    sets of tiles with their pictures (softlabel.results.datasets), for which ``merge`` and ``iou`` do not matter. Tiles
    that were rejected or are empty are left out and counted. Scenes that cannot be written, and tiles whose pixels
    cannot be read any more, are listed in failed.jsonl. A rerun writes everything anew, by rename.

    Returns:
        What done.json in ``output`` says: the settings and the counts.

    Raises:
        StoreError: The store is not finished, ``output`` holds something else, or there is nothing to write.
    """
    job = _ExportJob(open_store(store), output, fmt, threshold, merge, iou)
    made_from = {"store": job.store.folder.name, "format": fmt}
    _claim(output, made_from)
    by_scene = fmt in geo.SUFFIX
    task = _export_scenes if by_scene else _export_tiles
    counts, failures = _spread(job.store, partial(task, job), f"export {fmt}")
    failures.sort(key=lambda failure: list(failure.values()))  # they come in the order in which tasks end
    if failures:
        write_text(output / FAILED, "".join(json.dumps(failure) + "\n" for failure in failures))
    what = "scenes" if by_scene else "tiles"
    problem = f", {len(failures)} {what} failed, the first: {_failure_in_words(failures[0])}" if failures else ""
    in_words = _tiles_in_words(counts) + problem
    if not counts["written"]:
        raise StoreError(f"nothing of {store} can be exported: {in_words}")
    if not by_scene:
        _write_index(job)
    settings = {"threshold": threshold, **({"merge": merge, "iou": iou} if by_scene else {})}
    finish(output, {**made_from, **settings, **counts, "failed": len(failures)})
    say(f"{counts['boxes']} boxes in {counts['written']} {what} (of {in_words}) in {output}")
    return summary(output)


def fuse(stores: Sequence[Path], weights: Sequence[float], threshold: float, iou: float, run_dir: Path) -> Path:
    """Fuse the stores of several teachers over the same tiles into one (softlabel.results.fuse), below ``run_dir``.

    A tile that any teacher rejected is rejected with that reason. What was finished before is not done again; what was
    begun is resumed.

    Returns:
        The new store's folder, which every reader of a store can read.

    Raises:
        StoreError: A store is not finished, they are of different tiles, splits or classes, a weight is missing or not
            above 0, or another run is writing the result.
    """
    job = fuse_job(stores, weights, threshold, iou, run_dir)
    if not is_done(job.output):
        _write_store("fused", job.output, job.identity(), job.stores[0], partial(fuse_shard, job))
    counts = summary(job.output)
    say(f"{counts['boxes']} boxes of {len(job.stores)} teachers (of {_tiles_in_words(counts)}) in {job.output}")
    return job.output


def subtype(job: SubtypeJob, *, retry_rejected: bool = False) -> Path:
    """Split a class of a store into finer ones (softlabel.results.subtype), beside it.

    A tile whose scene can no longer be read is rejected with its reason. What was finished before is not done again;
    what was begun is resumed.

    Args:
        job: Which class of which store to split, and by what.
        retry_rejected: Make anew the shards with tiles that could not be read.

    Returns:
        The new store's folder, which every reader of a store can read.

    Raises:
        StoreError: Another run is writing the result, the store is broken or the model cannot be loaded; or, once all
            is done, more than a twentieth of the labelled tiles could not be read.
    """
    again = retry_rejected and is_done(job.output) and bool(summary(job.output)["retryable"])
    if again or not is_done(job.output):
        gpus = _GPU_SHARE if job.attribute.runs_model and ray.cluster_resources().get("GPU") else 0.0
        make = partial(subtype_shard, job, read_tile)
        _write_store("subtypes", job.output, job.identity(), job.store, make, gpus=gpus, again=again)
    counts = summary(job.output)
    say(f"{counts['boxes']} boxes with finer classes (of {_tiles_in_words(counts)}) in {job.output}")
    _check_unread(job, counts)
    return job.output


def _check_unread(job: SubtypeJob, counts: dict) -> None:
    before = summary(job.store.folder)
    unread = counts[REJECTED] - before[REJECTED]
    if not unread:
        return
    remedy = f"see {job.output / 'rejected'}, restore their scenes, and run the same command with --retry-rejected"
    problem = f"{unread} of {before[LABELLED]} labelled tiles could not be read and were rejected: {remedy}"
    if unread > _MAX_UNREAD * before[LABELLED]:
        raise StoreError(problem)
    say(problem)


@dataclass(frozen=True)
class _ExportJob:
    store: Store
    output: Path
    fmt: Format
    threshold: float
    merge: Method
    iou: float


def _claim(output: Path, made_from: dict) -> None:
    """Take a folder for an export: a new or empty one, or that of an earlier export of the same store and format."""
    marker = output / MARKER
    if not marker.exists() and output.exists() and any(output.iterdir()):
        raise StoreError(f"{output} holds something that is no export: give --output a new folder")
    if marker.exists() and read_json(marker) != made_from:
        raise StoreError(f"{output} holds an export of {read_json(marker)}, not of {made_from}: give another --output")
    write_json(marker, made_from)
    for name in (DONE, FAILED):
        (output / name).unlink(missing_ok=True)


def _spread(
    store: Store,
    task: Callable[[dict], dict[str, list]],
    description: str,
    lease: Lease | None = None,
    gpus: float = 0.0,
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Run a task over all shards, in groups of consecutive ones; return the sum of its counts, and what ``failed``."""
    shards = num_shards(store)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(_MAX_SHARDS, shards // (_TASKS_PER_CPU * cpus)))
    work = [{"first": first, "stop": min(first + size, shards)} for first in range(0, shards, size)]
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts tiles, not blocks
    results = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
        partial(_told, task), batch_size=1, num_cpus=1, num_gpus=gpus or None
    )
    counts: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    with progress(total=store.num_tiles, unit="tile", desc=description) as bar:
        for row in results.iter_rows():
            if mistake := row.pop("mistake"):
                raise StoreError(mistake)
            if lease is not None:
                lease.check()
            failures += json.loads(row.pop("failed", "[]"))
            counts.update(row)
            bar.update(sum(row[status] for status in STATUSES))
    if sum(counts[status] for status in STATUSES) != store.num_tiles:
        raise StoreError(f"{store.folder} does not balance ({dict(counts)} of {store.num_tiles} tiles): label again")
    return counts, failures


def _told(task: Callable[[dict], dict[str, list]], batch: dict) -> dict[str, list]:
    """What a task returns; a user's mistake goes to the driver as text, since Ray would bury an exception."""
    try:
        return {**task(batch), "mistake": [""]}
    except SoftlabelError as error:
        return {"mistake": [str(error)]}


def _as_row(counts: Counter[str], keys: Sequence[str]) -> dict[str, list]:
    return {key: [counts[key]] for key in (*STATUSES, *keys)}


def _export_scenes(job: _ExportJob, batch: dict) -> dict[str, list]:
    counts: Counter[str] = Counter()
    failed: list[dict[str, str]] = []
    first, stop = int(batch["first"][0]), int(batch["stop"][0])
    for scene in read_scenes(job.store, first, stop, job.threshold):
        counts.update(scene.counts)
        if not scene.counts[LABELLED]:
            continue  # an empty file would say that nothing is there
        try:
            counts.update({"written": 1, "boxes": _export_scene(job, scene)})
        except SceneError as error:
            failed.append({"scene_id": scene.scene_id, "reason": str(error)})
    return {**_as_row(counts, ("written", "boxes")), "failed": [json.dumps(failed)]}


def _export_scene(job: _ExportJob, scene: Scene) -> int:
    """Write a scene's file and return the number of boxes in it."""
    path = geo.scene_file(job.output, scene.scene_id, job.fmt)
    path.unlink(missing_ok=True)  # what an earlier export left must not stand for a scene that fails now
    found = scene.merged(job.merge, job.iou)
    geo.write_scene(path, geo.to_frame(found, job.store.classes, teacher_name(job.store.teacher)), job.fmt)
    return len(found.boxes)


def _export_tiles(job: _ExportJob, batch: dict) -> dict[str, list]:
    counts: Counter[str] = Counter()
    reader, failed = TileReader(), []
    for shard in range(int(batch["first"][0]), int(batch["stop"][0])):
        for tile in read_shard(job.store, shard):
            counts[tile.status] += 1
            if tile.status != LABELLED:
                continue
            try:
                counts.update({"written": 1, "boxes": _export_tile(job, reader, tile)})
            except SceneError as error:
                failed.append({"tile_id": tile.tile["tile_id"], "reason": str(error)})
    reader.close()
    return {**_as_row(counts, ("written", "boxes")), "failed": [json.dumps(failed)]}


def _export_tile(job: _ExportJob, reader: TileReader, tile: LabelledTile) -> int:
    """Write a tile's picture and, except for COCO, its labels; return the number of boxes."""
    image, found = datasets.image_file(tile.tile, by_split=job.fmt in _YOLO), tile.found.above(job.threshold)
    # What an earlier export left must not stand for a tile that cannot be read any more.
    (job.output / image).unlink(missing_ok=True)
    datasets.write_png(job.output / image, reader.read(tile.tile))
    width, height = tile.tile["window"][2:]
    if job.fmt == "dota":
        path = job.output / "labelTxt" / f"{image.stem}.txt"
        write_text(path, datasets.dota_labels(found, job.store.classes))
    elif job.fmt in _YOLO:
        labels = datasets.yolo_labels if job.fmt == "yolo" else datasets.yolo_obb_labels
        write_text(job.output / datasets.label_file(image), labels(found, (width, height)))
    return len(found.boxes)


def _write_index(job: _ExportJob) -> None:
    """Write the file that ties the pictures together; those that could not be read are left out."""
    if job.fmt == "dota":
        return  # a picture and its labels have the same name
    if job.fmt in _YOLO:
        splits = sorted(path.name for path in (job.output / "images").iterdir())
        datasets.write_yolo_config(job.output, job.store.classes, splits)
        return
    info = {
        "description": f"soft labels by softlabel {softlabel.__version__}",
        "store": job.store.folder.name,
        "teacher": teacher_name(job.store.teacher),
        "fingerprint": job.store.teacher,
        "threshold": job.threshold,
    }
    datasets.write_coco(job.output / datasets.ANNOTATIONS, partial(_pictured, job), job.store.classes, info)


def _pictured(job: _ExportJob) -> Iterator[tuple[dict, Detections]]:
    for tile in read_all(job.store):
        if tile.status == LABELLED and (job.output / datasets.image_file(tile.tile, by_split=False)).exists():
            yield tile.tile, tile.found.above(job.threshold)


def _failure_in_words(failure: dict[str, str]) -> str:
    return failure["reason"] if "tile_id" in failure else f"{failure['scene_id']}: {failure['reason']}"


def _tiles_in_words(counts: dict[str, int]) -> str:
    empty = f", {counts[EMPTY]} empty" if counts.get(EMPTY) else ""
    return f"{counts[LABELLED]} labelled tiles{empty}, {counts[REJECTED]} rejected"


def _write_store(
    name: str,
    folder: Path,
    identity: dict,
    source: Store,
    make: Callable[[int], pa.Table],
    *,
    gpus: float = 0.0,
    again: bool = False,
) -> None:
    """Write a store of the same tiles as another, shard by shard with ``make``; resume where an earlier run stopped.

    Args:
        name: What the store is called in its summary, and the work on a terminal.
        folder: Where to.
        identity: What determines it.
        source: A store of the same tiles.
        make: Makes the rows of a shard, none where it has no tile.
        gpus: The GPUs that a task reserves.
        again: Whether the store is finished, and shards with retryable tiles are made anew.
    """
    write_json(folder / STORE, identity)
    with Lease(folder) as lease:
        if again:
            (folder / DONE).unlink(missing_ok=True)
        _spread(source, partial(_write_shards, folder, make, again), name, lease, gpus)
        counts = pack_store(folder, source.tiles, source.splits)
        finish(folder, {"name": name, "requested": source.num_tiles, **counts})


def _write_shards(folder: Path, make: Callable[[int], pa.Table], again: bool, batch: dict) -> dict[str, list]:
    counts: Counter[str] = Counter()
    for shard in range(int(batch["first"][0]), int(batch["stop"][0])):
        table = _written(folder, shard, partial(make, shard), again)
        if not len(table):
            continue
        counts.update(table["status"].to_pylist())
    return _as_row(counts, ())


def _written(folder: Path, shard: int, make: Callable[[], pa.Table], again: bool) -> pa.Table:
    """The rows of a shard: those already there, else those made and, if there are any, committed."""
    table = shards.read_shard(folder, shard)
    if table is not None and not (again and shards.retryable_ids(table)):
        return table
    table = make()
    if len(table):
        write_table(shards.shard_file(folder, shard), table)
    return table
