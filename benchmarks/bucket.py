"""What labelling asks of a bucket: requests for each shard of 64 tiles, by kind, and those of a run as such.

python benchmarks/bucket.py --weights yolov5n.pt --work-dir runs/bucket

Two runs of `jobs/label.py`, one of a few shards and one of many, in a bucket of moto's server, through a connection
that counts (tests/buckets.py has both). What the longer one asks for more, by its shards, is what a shard costs. The
scene is on a disk: of imagery, a tile costs as many requests as its blocks in the file.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml
from common import TILE_PX, machine, synthetic_piece, write_scene

from softlabel.detectors.describe import read_header

_HERE = Path(__file__).resolve().parents[1]
_SHARDS = (40, 200)
_TILE_PX = 64


def main() -> int:
    """Count, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.append(str(_HERE / "tests"))
    from buckets import Faults, environment, serve

    print(json.dumps(machine()), flush=True)
    asked: list[Counter[str]] = []
    with serve("s3") as (url, bucket), Faults(url) as counting:
        for shards in _SHARDS:
            recipe = _recipe(arguments.work_dir.resolve(), shards, arguments.weights.resolve())
            before = Counter(counting.requests)
            _label(recipe, f"s3://{bucket}/{shards}", environment("s3", counting.url))
            asked.append(Counter(counting.requests) - before)
            print(json.dumps({"shards": shards, **asked[-1]}), flush=True)
    few, many = _SHARDS
    per_shard = {kind: (asked[1][kind] - asked[0][kind]) / (many - few) for kind in asked[1]}
    once = {kind: asked[0][kind] - few * each for kind, each in per_shard.items()}
    print(json.dumps({"per_shard": {kind: round(each, 2) for kind, each in per_shard.items()}}), flush=True)
    print(json.dumps({"of_a_run": {kind: round(count) for kind, count in once.items()}}), flush=True)
    return 0


def _recipe(work: Path, shards: int, weights: Path) -> Path:
    """Of a scene whose tiles are so many shards."""
    scene = work / f"{shards}.tif"
    write_scene(scene, (TILE_PX, shards * TILE_PX), synthetic_piece)  # 8 x 8 tiles of 64 px to each piece
    path = work / f"{shards}.yaml"
    values = {
        "name": "bucket",
        "classes": list(read_header(weights).classes),
        "tiles": {"scenes": str(scene), "size_px": _TILE_PX},
        "label": {"weights": str(weights), "imgsz": _TILE_PX, "engine": "pytorch"},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def _label(recipe: Path, run_dir: str, environment: dict[str, str]) -> None:
    command = [sys.executable, str(_HERE / "jobs" / "label.py"), "--config", str(recipe), "--run-dir", run_dir]
    subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
