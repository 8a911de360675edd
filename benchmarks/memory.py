"""Peak memory of labelling few tiles and many: it must not grow with the archive.

python benchmarks/memory.py --work-dir runs/memory --json memory.json

Each size has a process with a Ray of its own; the object store is of one size for both. Every half second the memory of
all the processes of the run is added up: what a process has alone, its share of what it has with others, and the object
store's pages once, held by a process or not. Nothing else should run.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
import yaml
from common import TILE_PX, machine, synthetic_piece, write_scene  # what the benchmarks share

from softlabel.config import Recipe
from softlabel.detectors.header import Header
from softlabel.detectors.weights import build_model, save_weights
from softlabel.imagery.run import tile
from softlabel.recipe_file import load_recipe

_CLASSES = ("plane", "ship", "car")
_SMALL_PX = 128
_COLUMNS = 100  # tiles side by side in a scene
_EVERY_S = 0.5
_SHARED = Path("/dev/shm")  # where Ray keeps its object store
_MB = 1e6


@dataclass
class Peak:
    """The most that was seen at once, in MB, and of which processes it consisted then."""

    total: float = 0
    parts: dict[str, float] = field(default_factory=dict)


def main() -> int:
    """Label both sizes, print a table, and write the JSON file."""
    arguments = _arguments()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ.pop("OMP_NUM_THREADS", None)  # ultralytics sets one thread when it is imported
    folder = arguments.work_dir.resolve()
    weights = _write_weights(folder / "weights.safetensors")
    peaks = {}
    for num_tiles in arguments.tiles:
        recipe = _recipe(folder, num_tiles, arguments.set)
        tiles = tile(recipe, folder)
        print(f"labelling {num_tiles} tiles ...", flush=True)
        peaks[num_tiles] = _peak(recipe, weights, tiles, folder, arguments.object_store_mb)
        print(f"{num_tiles} tiles: {peaks[num_tiles].total:.0f} MB", flush=True)
    found = _results(peaks, arguments.object_store_mb)
    print(_table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, nargs=2, default=[2000, 20000], metavar=("FEW", "MANY"))
    parser.add_argument("--object-store-mb", type=int, default=256, help="of Ray's object store (default: 256)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/memory"), help="where what is made is kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def _recipe(folder: Path, num_tiles: int, overrides: list[str]) -> Recipe:
    """A recipe over one scene of that many tiles, which is written if it is not there."""
    size_wh = min(_COLUMNS, num_tiles) * _SMALL_PX, -(-num_tiles // _COLUMNS) * _SMALL_PX
    scene = folder / f"scene-{num_tiles}.tif"
    write_scene(scene, size_wh, synthetic_piece)
    path = folder / f"recipe-{num_tiles}.yaml"
    values = {"scenes": str(scene), "size_px": _SMALL_PX}
    path.write_text(yaml.safe_dump({"name": f"memory-{num_tiles}", "classes": list(_CLASSES), "tiles": values}))
    return load_recipe(path, overrides)


def _write_weights(path: Path) -> Path:
    """An untrained yolov5n whose scores all lie above the floor, so that every tile has boxes."""
    torch.manual_seed(0)
    model = build_model("yolov5n.yaml", len(_CLASSES))
    for sequence in model.model[-1].cv3:
        torch.nn.init.constant_(sequence[-1].bias, -3)
    save_weights(path, model, Header(model.yaml, _CLASSES, _SMALL_PX, {}))
    return path


def _peak(recipe: Recipe, weights: Path, tiles: Path, folder: Path, object_store_mb: int) -> Peak:
    """Label in a process of its own, and watch."""
    before_mb = _shared_mb()
    process = get_context("spawn").Process(target=_label, args=(recipe, weights, tiles, folder, object_store_mb))
    process.start()
    peak, known = Peak(), {psutil.Process(process.pid)}
    while process.is_alive():
        known = _family(known)
        total, parts = _memory_mb(known, before_mb)
        if total > peak.total:
            peak = Peak(total, parts)
        time.sleep(_EVERY_S)
    process.join()
    if process.exitcode:
        raise SystemExit(f"labelling ended with {process.exitcode}")
    return peak


def _label(recipe: Recipe, weights: Path, tiles: Path, folder: Path, object_store_mb: int) -> None:
    import ray

    from softlabel.labelling.job import label_job
    from softlabel.labelling.run import label

    job = label_job(recipe, recipe.name, weights, tiles, None)
    shutil.rmtree(job.folder(folder), ignore_errors=True)
    ray.init(address="local", include_dashboard=True, object_store_memory=object_store_mb * 1_000_000)
    label(recipe, [job], folder)
    ray.shutdown()


def _family(known: set[psutil.Process]) -> set[psutil.Process]:
    """Those that live, with all below them; one whose parent died is still known from before."""
    found = set()
    for process in known:
        try:
            found |= {process, *process.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
    return found


def _memory_mb(processes: set[psutil.Process], before_mb: float) -> tuple[float, dict[str, float]]:
    """Together, and by name of process; the object store is one of the names."""
    parts: defaultdict[str, float] = defaultdict(float)
    mapped = 0.0
    for process in processes:
        try:
            name, sizes = _name(process), _rollup(process.pid)
        except (psutil.NoSuchProcess, OSError):
            continue  # it ended meanwhile
        parts[name] += sizes["Pss"] - sizes["Pss_Shmem"]
        mapped += sizes["Pss_Shmem"]
    # A page that its writer let go of is in the store, but in no process's mapping any more.
    parts["object store"] = max(mapped, _shared_mb() - before_mb)
    return sum(parts.values()), dict(sorted(parts.items(), key=lambda part: -part[1]))


def _rollup(pid: int) -> dict[str, float]:
    """Fields of /proc/PID/smaps_rollup in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {key: float(value.split()[0]) * 1024 / _MB for key, value in (line.split(":") for line in lines)}


def _name(process: psutil.Process) -> str:
    """What Ray calls a worker, else the program or script that runs."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].split("(")[0]
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return Path(script.split()[0]).name


def _shared_mb() -> float:
    return psutil.disk_usage(str(_SHARED)).used / _MB


def _results(peaks: dict[int, Peak], object_store_mb: int) -> dict:
    few, many = peaks
    return {
        "machine": machine(),
        "object_store_mb": object_store_mb,
        "peak_mb": {str(num_tiles): peak.total for num_tiles, peak in peaks.items()},
        "ratio": peaks[many].total / peaks[few].total,
        "parts_mb": {str(num_tiles): peak.parts for num_tiles, peak in peaks.items()},
    }


def _table(found: dict) -> str:
    lines = [
        f"\ntiles of {_SMALL_PX} px from a scene of {TILE_PX} px blocks, object store of {found['object_store_mb']} MB,"
        f" {found['machine']['cpu']}, {found['machine']['cores']} cores, {found['machine']['date']}, commit "
        f"{found['machine']['commit']}\n",
        "| tiles | peak MB | of it |\n|---|---|---|",
    ]
    for num_tiles, peak in found["peak_mb"].items():
        large = [(name, size) for name, size in found["parts_mb"][num_tiles].items() if size > peak / 100]
        parts = ", ".join(
            f"{name} {size:.0f}" for name, size in [*large, ("others", peak - sum(size for _, size in large))]
        )
        lines.append(f"| {num_tiles} | {peak:.0f} | {parts} |")
    return "\n".join([*lines, f"\nMany are {found['ratio']:.3f} of few.\n"])


if __name__ == "__main__":
    sys.exit(main())
