"""What several benchmarks need: large scenes out of small pieces, and words on the machine."""

import argparse
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.windows import Window

from softlabel.cli import main
from softlabel.config import Synthetic
from softlabel.imagery.layouts import lay_out
from softlabel.imagery.scenes import TileReader
from softlabel.imagery.synthetic import CRS, GSD_M, render
from softlabel.labelling.speed import Speed
from softlabel.store import commit

Image = NDArray[np.uint8]
TILE_PX = 512


def write_scene(path: Path, size_wh: tuple[int, int], piece: Callable[[int], Image]) -> None:
    """A compressed, tiled GeoTIFF put together from 512 px pieces, row by row, unless it is there already."""
    if not path.exists():
        print(f"writing {path}, {size_wh[0]} x {size_wh[1]} px", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        commit(path, lambda temporary: _write_mosaic(temporary, size_wh, piece))


def _write_mosaic(path: Path, size_wh: tuple[int, int], piece: Callable[[int], Image]) -> None:
    width, height = size_wh
    columns = -(-width // TILE_PX)
    size = {"width": width, "height": height, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    layout = {"tiled": True, "bigtiff": "if_safer", "blockxsize": TILE_PX, "blockysize": TILE_PX, "compress": "deflate"}
    place = {"crs": CRS, "transform": from_origin(400_000, 5_400_000, GSD_M, GSD_M)}
    with (
        rasterio.open(path, "w", driver="GTiff", num_threads="all_cpus", **size, **layout, **place) as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for top in range(0, height, TILE_PX):
            first = top // TILE_PX * columns
            strip = np.concatenate(list(pool.map(piece, range(first, first + columns))), axis=1)
            strip = strip[: height - top, :width]
            file.write(strip.transpose(2, 0, 1), window=Window(0, top, *strip.shape[1::-1]))


def synthetic_piece(index: int) -> Image:
    """Made-up scene number ``index`` of the project's generator, (512, 512, 3)."""
    settings = Synthetic(num_scenes=1, scene_size_px=TILE_PX, difficulty=0.2)
    return render(lay_out(settings, 0, index), settings, 0, index)


@contextmanager
def watch_shards() -> Iterator[list[tuple[float, int]]]:
    """When each shard of the labelling within was committed, in seconds of the clock, and how many tiles it had."""
    found: list[tuple[float, int]] = []
    add = Speed.add

    def noted(speed: Speed, row: dict) -> None:
        found.append((row["end"], row["tiles"]))
        add(speed, row)

    with mock.patch.object(Speed, "add", noted):
        yield found


def second_half(stamps: list[tuple[float, int]]) -> float | None:
    """Tiles per second of the shards that were committed last: the first were read while the model was loaded."""
    half = len(stamps) // 2
    if not half:
        return None
    seconds = stamps[-1][0] - stamps[half - 1][0]
    return round(sum(count for _, count in stamps[half:]) / max(seconds, 1e-9), 1)


def decode_rate(rows: Sequence[dict], cores: int) -> float:
    """Tiles per second that so many processes read which do nothing else, each a part of the rows."""
    step = -(-len(rows) // cores)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(_read, [rows[:1]] * cores))
        started = time.monotonic()
        list(pool.map(_read, [rows[start : start + step] for start in range(0, len(rows), step)]))
    return round(len(rows) / (time.monotonic() - started), 1)


def _read(rows: Sequence[dict]) -> None:
    reader = TileReader()
    for row in rows:
        reader.read(row)


def untrained(folder: Path, classes: Sequence[str]) -> Path:
    """Weights of a YOLOv8n that has learned nothing, made in a folder unless they are there already."""
    import torch  # for those benchmarks alone that need it

    from softlabel.detectors.header import Header
    from softlabel.detectors.weights import build_model, save_weights

    path = folder / "untrained.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = build_model("yolov8n.yaml", len(classes))
        save_weights(path, model, Header(model.yaml, tuple(classes), TILE_PX, {}))
    return path


def run_recipe(verb: str, purpose: str) -> tuple[int, argparse.Namespace]:
    """Run (or finish, or find done) a verb of softlabel with the flags of this process: its exit status, and the
    flags."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    overrides = [word for value in arguments.set for word in ("--set", value)]
    return main([verb, "--config", arguments.config, "--run-dir", str(arguments.run_dir), *overrides]), arguments


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit_id = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    libraries = ("torch", "openvino", "ray", "ultralytics", "sahi")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit_id,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        **{name: _version(name) for name in libraries},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
