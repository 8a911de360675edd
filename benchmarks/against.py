"""Is labelling as fast as it was at another commit? Both in turns, in one run.

python benchmarks/against.py --commit f563709 --weights yolov5n.pt --work-dir runs/against --json against.json

The other commit is unpacked into the work folder and runs with what is installed. Each engine labels the same made-up
scene by `jobs/label.py`, one commit after the other and then the other way round, since a machine's speed drifts. A
rate is that of the store's summary, from the first shard in the actor's hands to the last one committed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from common import TILE_PX, machine, synthetic_piece, write_scene

from softlabel.detectors.describe import read_header

_HERE = Path(__file__).resolve().parents[1]
_ENGINES = (("pytorch", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
_PIECES = 64


def main() -> int:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=48, help="of 40 tiles of 512 px each")
    parser.add_argument("--rounds", type=int, default=2, help="each has both commits once")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    scene = work / "scenes" / f"{arguments.rows}.tif"
    pieces = [synthetic_piece(index) for index in range(_PIECES)]
    write_scene(scene, (40 * TILE_PX, arguments.rows * TILE_PX), lambda index: pieces[index * 37 % _PIECES])
    there = _checked_out(arguments.commit, work / "code")
    found: dict[str, Any] = {"machine": machine(), "commit": arguments.commit, "rates": {}}
    print("| engine | before, tiles/s | now, tiles/s | now / before |\n|---|---|---|---|", flush=True)
    for engine, precision in _ENGINES:
        recipe = work / f"{engine}-{precision}.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(scene, arguments.weights.resolve(), engine, precision)))
        rates: dict[Path, list[float]] = {there: [], _HERE: []}
        for number in range(arguments.rounds):
            for code in (there, _HERE) if number % 2 == 0 else (_HERE, there):
                rates[code].append(_rate(code, recipe, work / "run"))
        before, now = rates[there], rates[_HERE]
        found["rates"][f"{engine} {precision}"] = {"before": before, "now": now}
        words = (", ".join(f"{rate:.1f}" for rate in one) for one in (before, now))
        ratio = statistics.mean(now) / statistics.mean(before)
        print(f"| {engine} {precision} | {' | '.join(words)} | {ratio:.3f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _checked_out(commit: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=_HERE, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive)
    return folder


def _recipe(scene: Path, weights: Path, engine: str, precision: str) -> dict:
    return {
        "name": "against",
        "classes": list(read_header(weights).classes),
        "tiles": {"scenes": str(scene), "size_px": TILE_PX},
        "label": {"weights": str(weights), "imgsz": TILE_PX, "engine": engine, "precision": precision},
    }


def _rate(code: Path, recipe: Path, run_dir: Path) -> float:
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "jobs/label.py", "--config", str(recipe), "--run-dir", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    subprocess.run(command, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (done,) = run_dir.glob("label-*/done.json")
    return float(json.loads(done.read_text())["speed"]["tiles_per_s"])


if __name__ == "__main__":
    sys.exit(main())
