"""What does it cost to read a tile, by how its scene is stored and by how many shards one task reads?

python benchmarks/reading.py --size 12288 --work-dir runs/reading --json reading.json

One scene in four layouts. Each is read as labelling does, in tasks of some shards of 64 tiles with a reader that has
opened nothing yet, and the CPU time of it all is shared out evenly: time on the clock would count what runs beside. For
a plain JPEG, whose rows can only be decoded from its first on, also what libjpeg-turbo takes to decode it once, and
once at an eighth of its size, which is little more than its Huffman code and so the least that skipped rows cost.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import rasterio
import rasterio.shutil
from common import TILE_PX, machine, synthetic_piece, write_scene

from softlabel.imagery.scenes import TileReader, describe_scene
from softlabel.store import commit
from softlabel.tile_table import SHARD_TILES

_SHARDS_PER_TASK = (16, 4, 1)
_PIECES = 16
_LAYOUTS: dict[str, dict[str, Any]] = {
    "GeoTIFF, deflate, blocks of 512": {
        "driver": "GTiff",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
    },
    "GeoTIFF, deflate, a strip per row": {"driver": "GTiff", "compress": "deflate", "tiled": False, "blockysize": 1},
    "GeoTIFF, JPEG, blocks of 512": {
        "driver": "GTiff",
        "compress": "jpeg",
        "photometric": "ycbcr",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
    },
    "JPEG": {"driver": "JPEG", "quality": 90},
}


def main() -> int:
    """Measure every layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=12288, help="side of the scene in pixels")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    work = arguments.work_dir / str(arguments.size)
    source = work / "scene.tif"
    pieces = [synthetic_piece(index) for index in range(_PIECES)]
    write_scene(source, (arguments.size, arguments.size), lambda index: pieces[index * 7 % _PIECES])
    found: dict[str, Any] = {"machine": machine(), "size_px": arguments.size, "ms_per_tile": {}}
    print("| layout | " + " | ".join(f"shards a task: {n}" for n in _SHARDS_PER_TASK) + " |", flush=True)
    print("|---" * (len(_SHARDS_PER_TASK) + 1) + "|")
    for number, (name, layout) in enumerate(_LAYOUTS.items()):
        scene = _stored(source, work / f"layout{number}", layout)
        rows = _rows(scene)
        times = {shards: _cpu_ms(_read, rows, shards) / len(rows) for shards in _SHARDS_PER_TASK}
        found["ms_per_tile"][name] = times
        print(f"| {name} | " + " | ".join(f"{ms:.1f} ms" for ms in times.values()) + " |", flush=True)
    for name, flag in (("decoded once", cv2.IMREAD_COLOR), ("at an eighth", cv2.IMREAD_REDUCED_COLOR_8)):
        found[f"jpeg_{name}_ms"] = _cpu_ms(cv2.imread, str(scene), flag) / len(rows)
        print(f"libjpeg-turbo, the JPEG {name}: {found[f'jpeg_{name}_ms']:.1f} ms a tile")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _stored(source: Path, path: Path, layout: dict[str, Any]) -> Path:
    if not path.exists():
        with rasterio.open(source) as dataset, rasterio.Env(GDAL_PAM_ENABLED=False):
            commit(path, lambda temporary: rasterio.shutil.copy(dataset, temporary, **layout))
    return path


def _rows(scene: Path) -> list[dict]:
    info = describe_scene(str(scene), (1, 2, 3), None)
    same = {"scene_uri": str(scene), "scene_stamp": info.stamp, "bands": list(info.bands), "stretch": None}
    places = range(0, info.width - TILE_PX + 1, TILE_PX)
    return [{**same, "window": [left, top, TILE_PX, TILE_PX]} for top in places for left in places]


def _read(rows: list[dict], shards: int) -> None:
    step = shards * SHARD_TILES
    for first in range(0, len(rows), step):
        reader = TileReader()
        for row in rows[first : first + step]:
            reader.read(row)
        reader.close()


def _cpu_ms(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    work(*arguments)
    return (time.process_time() - start) * 1000


if __name__ == "__main__":
    sys.exit(main())
