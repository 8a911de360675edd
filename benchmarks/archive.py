"""What an archive costs beside its pixels: listing its tiles, opening a shard, a driver's memory, and how actors scale.

python benchmarks/archive.py --work-dir runs/archive-benchmark

Tiles are rows that were made, without imagery. Labelling is real but for what reads and what finds: a reader that makes
a row without pixels, and an engine that waits and finds nothing. Each figure is printed as JSON as soon as it is there.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from common import machine, watch_shards  # what the benchmarks share

from softlabel.config import Recipe
from softlabel.detectors.families import Teacher
from softlabel.labelling.job import LabelJob
from softlabel.records import Detections, Nms, soft_labels_table
from softlabel.shards import shard_file
from softlabel.store import is_done, write_table
from softlabel.tile_table import SHARD_TILES, read_shard, write_tiles

Figures = Iterator[dict[str, Any]]
_CLASSES = ("car", "plane", "ship")
_TILES = (10_000, 640_000, 10_000_000)
_FEW, _MANY = 50_000, 1_000_000
_ACTORS = (1, 2, 4, 8)
_OPENED = 200  # shards, to see how long one takes
_SECONDS = 60  # that a run of the scaling takes if an actor does nothing but wait
_WAIT_S = 0.5  # for a shard


def main() -> int:
    """Run all stages, each figure in a process of its own, whose memory is its alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/archive-benchmark"), help="what is made is kept here"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of every number of tiles (1)")
    parser.add_argument("--figure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.work_dir.resolve()
    if arguments.figure:
        name, number = arguments.figure
        print(json.dumps({"figure": name, **_FIGURES[name](folder, int(number), arguments.scale)}), flush=True)
        return 0
    print(json.dumps(machine()), flush=True)
    for name, numbers in (("list", _TILES), ("memory", (_FEW, _MANY)), ("actors", _ACTORS)):
        for number in numbers:
            command = [sys.executable, __file__, "--work-dir", str(folder), "--scale", str(arguments.scale)]
            subprocess.run([*command, "--figure", name, str(number)], check=True)
    return 0


def _tiles(folder: Path, count: int) -> tuple[Path, float]:
    """A table of so many tiles, made if it is not there, and in how many seconds."""
    tiles, started = folder / f"tiles-{count}", time.monotonic()
    if not (tiles / "shards.parquet").exists():
        write_tiles(tiles, _rows(count))
    return tiles, time.monotonic() - started


def _rows(count: int) -> Iterator[dict]:
    for i in range(count):
        scene, column, row = f"scene-{i // 10_000:06d}.tif", i % 100 * 512, i // 100 % 100 * 512
        yield {
            "tile_id": f"{scene}#{column}_{row}_512x512",
            "scene_id": scene,
            "scene_uri": f"/archive/{scene}",
            "scene_stamp": "1-2",
            "window": (column, row, 512, 512),
            "bands": (1, 2, 3),
            "group": scene,
            "crs": "EPSG:32633",
            "transform": (0.5, 0.0, 400_000.0, 0.0, -0.5, 5_400_000.0),
        }


def _job(tiles: Path, name: str) -> LabelJob:
    fingerprint = {"weights": "none", "classes": list(_CLASSES)}
    teacher = Teacher("none", "none", fingerprint, len(_CLASSES), None, Nms(), "none", "none")
    return LabelJob(name, teacher, tiles, None)


def listed(folder: Path, count: int, scale: float) -> dict[str, Any]:
    """What a driver does before the first pixel, and what a reader does for a shard."""
    tiles, making_s = _tiles(folder, int(count * scale))
    before, started = _peak_mb(), time.monotonic()
    work = {(0, shard): number for shard, number in _job(tiles, "list").shards()}
    seconds = time.monotonic() - started
    memory = _peak_mb() - before
    shards = random.Random(0).choices(list(work), k=_OPENED)
    opened = [_timed(lambda shard=shard: read_shard(tiles, shard, ("tile_id", "window"), None)) for _, shard in shards]
    return {
        "tiles": sum(work.values()),
        "made_in_s": round(making_s, 1),
        "list_s": round(seconds, 3),
        "list_mb": round(memory, 1),
        "shard_ms": round(statistics.median(opened) * 1e3, 2),
    }


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def memory(folder: Path, count: int, scale: float) -> dict[str, Any]:
    """The driver's memory, and how fast a run is in which nothing takes time."""
    return {"tiles": int(count * scale), **_labelled(folder, int(count * scale), actors=1, wait_s=0.0)}


def scaled(folder: Path, actors: int, scale: float) -> dict[str, Any]:
    """How many shards a second so many actors get through, of which each takes half a second."""
    count = int(actors * _SECONDS * scale / _WAIT_S) * SHARD_TILES
    found = _labelled(folder, count, actors=actors, wait_s=_WAIT_S)
    return {
        "actors": actors,
        "of_ideal": round(found["steady_tiles_per_s"] * _WAIT_S / SHARD_TILES / actors, 3),
        **found,
    }


def _labelled(folder: Path, count: int, actors: int, wait_s: float) -> dict[str, Any]:
    import ray

    from softlabel.labelling import run as labelling

    tiles, _ = _tiles(folder, count)
    execution = {"actors": actors, "cpus_per_actor": 0.1, "reader_cpus_per_actor": 0.1}
    recipe = Recipe.model_validate(
        {"name": "archive", "classes": _CLASSES, "tiles": {"scenes": "none"}, "execution": execution}
    )
    job = _job(tiles, f"fake-{actors}")
    shutil.rmtree(job.folder(folder), ignore_errors=True)
    ray.init(address="local", include_dashboard=True)
    fakes: dict[str, Any] = {
        "_Labeller": type("Waiting", (_Waiting,), {"wait_s": wait_s}),
        "read_item": _without_pixels,
    }
    with mock.patch.multiple(labelling, **fakes), watch_shards() as stamps:
        started = time.monotonic()
        (store,) = labelling.label(recipe, [job], folder)
        seconds = time.monotonic() - started
    ray.shutdown()
    if not is_done(store):
        raise SystemExit(f"{store} is not done")
    half = sorted(stamps)[len(stamps) // 2 :]
    steady = sum(tiles for _, tiles in half[1:]) / max(half[-1][0] - half[0][0], 1e-9)
    return {"seconds": round(seconds, 1), "steady_tiles_per_s": round(steady, 1), "driver_mb": round(_peak_mb(), 1)}


def _without_pixels(jobs: Sequence[LabelJob], folders: Sequence[Path], _read: Any, item: pa.Table) -> pa.Table:
    """A shard's row as a reader makes it, of its tiles' names alone."""
    index, shard = item["job"][0].as_py(), item["shard"][0].as_py()
    rows = jobs[index].tile_rows(shard, ("tile_id",))
    return pa.table({"job": [index], "shard": [shard], "tile_id": [rows["tile_id"].to_pylist()]})


class _Waiting:
    """An actor whose model takes its time for a shard, and finds nothing."""

    wait_s = 0.0

    def __init__(self, jobs: Sequence[LabelJob], stores: Sequence[Path], _threads: int, _batch: int | None) -> None:
        self._stores, self._model = stores, threading.Lock()

    def __call__(self, read: pa.Table) -> pa.Table:
        index, shard, (tile_ids,) = read["job"][0].as_py(), read["shard"][0].as_py(), read["tile_id"].to_pylist()
        with self._model:
            begin = time.time()
            time.sleep(self.wait_s)
            end = time.time()
        count, nothing = len(tile_ids), Detections(np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32))
        none = [None] * count
        labels = soft_labels_table(3, tile_ids, [nothing] * count, none, none, [False] * count, set())
        write_table(shard_file(self._stores[index], shard), labels)
        row = {
            **{
                "job": index,
                "shard": shard,
                "tiles": count,
                "empty": 0,
                "rejected": 0,
                "boxes": 0,
                "pixels": 0,
                "km2": 0.0,
            },
            **{"busy_s": end - begin, "begin": begin, "end": time.time(), "actor": str(os.getpid()), "device": "none"},
        }
        return pa.table({key: [value] for key, value in row.items()})


_FIGURES = {"list": listed, "memory": memory, "actors": scaled}


if __name__ == "__main__":
    sys.exit(main())
