"""benchmarks/gpu.py at toy size, where there is no GPU: what it measures can be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
WITHOUT_RAY = ["forward", "detect", "decode", "owlvit"]
WITH_RAY = ["pipeline", "training", "search", "experiment"]


@pytest.mark.parametrize(
    "stages",
    [WITHOUT_RAY, *(pytest.param([stage], marks=[pytest.mark.long, pytest.mark.timeout(900)]) for stage in WITH_RAY)],
)
def test_every_stage_gives_its_figures(tmp_path, stages):
    command = [sys.executable, BENCHMARK, "--work-dir", tmp_path / "work", "--json", tmp_path / "found.json"]
    ran = subprocess.run([*command, "--stages", *stages], capture_output=True, text=True, env=no_gpu())
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found[0]["device"] == "no GPU"
    for stage in stages:
        *figures, last = [one for one in found if one.get("stage") == stage]
        assert figures and last["seconds"] > 0 and "failed" not in last


def no_gpu():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
