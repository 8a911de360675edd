"""How many tiles a second can the host bring to a GPU and back? Labelling on a made-up device that takes no time.

python benchmarks/host.py --work-dir runs/host --json host.json

The device answers every pass at once, with the same 71 boxes a tile; all else is real, as on a machine with one GPU
(which Ray is told to count): reading tasks, Ray's object store, the labelling actor with its pipeline of passes, and
the store. So these are limits that no GPU can exceed:

- the actor alone, with pixels in memory: what one process makes of an endlessly fast model,
- `softlabel label` with nothing to read: readers hand over the same pixels again and again,
- `softlabel label` of a deflate GeoTIFF, beside what as many cores decode that do nothing else.

Rates and CPU times are those of the second half of the tiles.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import ray
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

from softlabel.config import Execution, Recipe
from softlabel.detectors.batch_nms import Effort, Kept
from softlabel.detectors.letterbox import Letterbox
from softlabel.detectors.pipeline import Pipeline
from softlabel.detectors.selection import Selection
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.labelling import labeller, run
from softlabel.labelling.job import LabelJob, label_job
from softlabel.labelling.labeller import Labeller
from softlabel.labelling.reading import read_shard
from softlabel.recipe_file import load_recipe
from softlabel.records import Detections, Nms
from softlabel.store import STORE, write_json
from softlabel.tile_table import read_tiles

_CLASSES = ("plane", "ship", "car")
_SIDE, _PIECES, _NAMES = 64, 16, 4  # tiles on a side of a scene, different ones in it, and names that it has
_BATCH, _BOXES, _ROOM = 64, 71, 256
_SHARDS = 160  # through the actor alone
_CALLS = 4  # as many at once as labelling makes to an actor with a GPU


def main() -> int:
    """Measure one after the other, and print each figure at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("runs/host"), help="where what is made is kept")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    folder = arguments.work_dir.resolve()
    recipe = _recipe(folder)
    job = label_job(recipe, "host", untrained(folder, _CLASSES), tile(recipe, folder), None)
    cores = len(os.sched_getaffinity(0))
    pixels = np.random.default_rng(0).integers(0, 256, (TILE_PX, TILE_PX, 3), np.uint8)
    found: dict[str, Any] = {"machine": machine()}
    print(json.dumps(found["machine"]), flush=True)
    for name, measure in (
        ("actor alone", partial(_actor_alone, job, folder)),
        ("nothing to read", partial(_labelling, recipe, job, folder, cores, lambda row: pixels)),
        ("deflate GeoTIFF", partial(_labelling, recipe, job, folder, cores, run.read_tile)),
        ("decoding alone", partial(_decoding, job, max(1, cores - 1))),
    ):
        found[name] = measure()
        print(json.dumps({name: found[name]}), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _recipe(folder: Path) -> Recipe:
    """A recipe over a scene that is there under four names."""
    first, pieces = folder / f"scenes-{_SIDE}" / "0.tif", [synthetic_piece(index) for index in range(_PIECES)]
    # Row by row another order, so that neighbours differ.
    write_scene(first, (_SIDE * TILE_PX, _SIDE * TILE_PX), lambda index: pieces[(index + index // _SIDE * 7) % _PIECES])
    for name in range(1, _NAMES):
        first.with_name(f"{name}.tif").unlink(missing_ok=True)
        os.link(first, first.with_name(f"{name}.tif"))
    values = [f"tiles.scenes={first.parent}", f"tiles.size_px={TILE_PX}", f"label.imgsz={TILE_PX}"]
    recipe = load_recipe("demo", [*values, "tiles.synthetic=null", "tiles.background=null", f"classes={[*_CLASSES]}"])
    return recipe.model_copy(update={"execution": Execution(actors=1, gpus_per_actor=1)})


# A device that takes no time.


class _Device:
    """Memory, copies and waiting of a device that is done with everything at once."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    def upload(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles

    def computing(self) -> AbstractContextManager:
        return nullcontext()

    def download(self, found: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> "_Device":
        for there, here in zip(found, into, strict=True):
            here.copy_(there)
        return self

    def synchronize(self) -> None:
        pass

    def captured(self, run: Callable, tiles: torch.Tensor) -> None:
        return None


class _Passes(Pipeline):
    """Passes that find the same in every tile, at once."""

    def __init__(self) -> None:
        super().__init__(
            lambda tiles: (tiles, None), _Device(), _BATCH, may_shrink=False, whole_batches=False, capturable=False
        )
        generator = np.random.default_rng(0)
        corners, sizes = generator.random((_BATCH, _ROOM, 2)) * 450, generator.random((_BATCH, _ROOM, 2)) * 50 + 5
        scores = generator.random((_BATCH, _ROOM, len(_CLASSES) + 1))
        rows = np.concatenate([corners, corners + sizes, scores], -1).astype(np.float32)
        effort = torch.tensor([[1, 1, _BOXES]]).expand(_BATCH, 3)
        self._kept = Kept(torch.from_numpy(rows), torch.full((_BATCH,), _BOXES), effort)

    def _run(self, selection: Selection, tiles: torch.Tensor, effort: Effort) -> Kept:
        return Kept(*(part[: len(tiles)] for part in (self._kept.rows, self._kept.count, self._kept.effort)))


class _Detector:
    """What a Labeller asks of a detector."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        size = (TILE_PX, TILE_PX)
        self._passes = _Passes()
        self._selection = Selection(Letterbox.of(size, TILE_PX, 32), len(_CLASSES), None, Nms(), False)

    def start(self, images: Sequence[Image]) -> Callable[[], list[Detections]]:
        return self._passes.start(images, self._selection)


class _Actor(run._Labeller):
    """A labelling actor on that device."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        labeller.load = lambda *_, **__: _Detector()  # type: ignore[assignment]


# The measurements.


def _actor_alone(job: LabelJob, folder: Path) -> dict[str, float]:
    """Shards that are in memory, as many at once as Ray Data hands over."""
    store = _empty_store(job, folder)
    reader = TileReader()
    few = [shard for shard, _ in job.shards()][:8]
    tables = [read_shard(0, job, store, shard, reader.read) for shard in few]
    with mock.patch.object(labeller, "load", lambda *_, **__: _Detector()), ThreadPoolExecutor(_CALLS) as pool:
        label = Labeller([job], [store], 1, _BATCH)
        label(tables[0])
        started, used = time.monotonic(), time.process_time()
        tiles = sum(row["tiles"][0].as_py() for row in pool.map(label, (tables * _SHARDS)[:_SHARDS]))
        seconds, used = time.monotonic() - started, time.process_time() - used
    return {"tiles_per_s": round(tiles / seconds, 1), "cpu_ms_per_tile": round(1e3 * used / tiles, 3)}


def _labelling(recipe: Recipe, job: LabelJob, folder: Path, cores: int, read: Callable) -> dict[str, Any]:
    """`softlabel label` with a GPU that is only counted: tiles per second, and the CPU time of each kind of process."""
    _empty_store(job, folder)
    # Of a size that is soon in use whole: to touch a page of it for the first time is dearer than to copy into it.
    store = {"object_store_memory": 500_000_000}
    ray.init(address="local", num_cpus=cores, num_gpus=1, include_dashboard=False, **store)
    with (
        mock.patch.object(run, "_Labeller", _Actor),
        mock.patch.object(run, "read_tile", read),
        watch_shards() as stamps,
        _watch_cpu() as times,
    ):
        run.label(recipe, [job], folder)
    ray.shutdown()
    stamps.sort()
    half = len(stamps) // 2
    tiles, (began, ended) = sum(count for _, count in stamps[half:]), (stamps[half - 1][0], stamps[-1][0])
    first, *_, last = (when for when in sorted(times) if began <= when <= ended)
    spent = times[last] - times[first]
    share = tiles * (last - first) / (ended - began)
    per_tile = {name: round(1e3 * seconds / share, 3) for name, seconds in spent.items()}
    return {"tiles_per_s": second_half(stamps), "cpu_ms_per_tile": per_tile}


@contextmanager
def _watch_cpu() -> Iterator[dict[float, Counter[str]]]:
    """Seconds that this process and those below it have computed, by what they do, twice a second."""
    found: dict[float, Counter[str]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            found[time.time()] = _cpu_times()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        over.set()
        watching.join()


def _cpu_times() -> Counter[str]:
    found = Counter({"driver": sum(psutil.Process().cpu_times()[:2])})
    for process in psutil.Process().children(recursive=True):
        try:
            title, seconds = " ".join(process.cmdline()), sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
        # A reader that waits for its next task says that it is idle.
        reads = "read_item" in title or "ray::IDLE" in title
        found["readers" if reads else "actor" if "(_Actor)" in title else "Ray's own"] += seconds
    return found


def _decoding(job: LabelJob, cores: int) -> dict[str, Any]:
    """What the cores that the actor leaves decode where nothing else runs."""
    return {"cores": cores, "tiles_per_s": decode_rate(read_tiles(job.tiles), cores)}


def _empty_store(job: LabelJob, folder: Path) -> Path:
    store = job.folder(folder)
    shutil.rmtree(store, ignore_errors=True)
    write_json(store / STORE, job.identity())
    return store


if __name__ == "__main__":
    sys.exit(main())
