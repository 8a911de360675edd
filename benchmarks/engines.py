"""What does it cost to start each engine, how fast is it then, and from how many tiles on does it pay?

python benchmarks/engines.py --weights yolov8n.safetensors --json engines.json

Each engine that runs here starts twice in a process of its own: with an empty folder for what compilers keep on disk,
and with what the first start left there. Start: from loading the weights to the boxes of the first batch, PyTorch being
imported already. Rate: tiles of made-up pixels in memory, 512 px, by `detect`. Takes the GPU that it finds, else CPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, synthetic_piece

from softlabel.detectors import families
from softlabel.detectors.describe import read_header
from softlabel.detectors.engine_choice import resolve
from softlabel.detectors.families import Teacher
from softlabel.errors import RecipeError
from softlabel.records import Nms

_ENGINES = ("pytorch", "pytorch_compile", "openvino", "tensorrt")
_PIECES = 16


def main() -> int:
    """Measure every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of steady labelling")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--engine", help="measure this one, in this process")
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(_measured(arguments.weights, arguments.engine, arguments.seconds)))
        return 0
    found: dict = {"machine": machine(), "engines": {name: _started_twice(arguments, name) for name in _runnable()}}
    print("| engine | precision | first start | later start | tiles/s | pays from |\n|---|---|---|---|---|---|")
    for name, row in found["engines"].items():
        print(
            f"| {name} | {row['precision']} | {row['first_start_s']:.1f} s | {row['start_s']:.1f} s "
            f"| {row['tiles_per_s']:,.1f} | {_pays_from(row, found['engines']['pytorch'])} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def _runnable() -> list[str]:
    cuda, names = torch.cuda.is_available(), []
    for name in _ENGINES:
        try:
            resolve(name, "auto", cuda=cuda, with_losses=False)
        except RecipeError as error:
            print(f"{name} is left out: {error}", flush=True)
        else:
            names.append(name)
    return names


def _started_twice(arguments: argparse.Namespace, engine: str) -> dict:
    with tempfile.TemporaryDirectory() as kept:
        first, later = (_apart(arguments, engine, Path(kept)) for _ in range(2))
    return {**later, "first_start_s": first["start_s"]}


def _apart(arguments: argparse.Namespace, engine: str, kept: Path) -> dict:
    command = [sys.executable, __file__, "--weights", str(arguments.weights), "--engine", engine]
    command += ["--seconds", str(arguments.seconds)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(weights: Path, asked: str, seconds: float) -> dict:
    cuda = torch.cuda.is_available()
    engine, precision = resolve(asked, "auto", cuda=cuda, with_losses=False)
    header = read_header(weights)
    nms = Nms(0.01, 0.7, 300)
    teacher = Teacher(header.family, weights, {}, len(header.classes), 512, nms, engine, precision)
    pieces = [synthetic_piece(index) for index in range(_PIECES)]
    start = time.perf_counter()
    detector = families.load(teacher, threads=None if cuda else os.cpu_count(), batch_size=64 if cuda else None)
    detector.detect(pieces * (4 if cuda else 1))
    began = time.perf_counter()
    count = 0
    while (now := time.perf_counter()) < began + seconds:
        count += len(detector.detect(pieces * (64 if cuda else 4)))
    return {"precision": precision, "start_s": began - start, "tiles_per_s": count / (now - began)}


def _pays_from(row: dict, pytorch: dict) -> str:
    """Tiles from which on a first start is made up for."""
    saved = 1 / pytorch["tiles_per_s"] - 1 / row["tiles_per_s"]
    if row is pytorch:
        return ""
    more = max(0.0, row["first_start_s"] - pytorch["first_start_s"])
    return f"{more / saved:,.0f} tiles" if saved > 0 else "never"


if __name__ == "__main__":
    sys.exit(main())
