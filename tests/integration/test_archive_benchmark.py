"""benchmarks/archive.py with few tiles: what it measures can be measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "archive.py"


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [("list", 12_800, {"tiles": 640}), ("memory", 12_800, {"tiles": 640}), ("actors", 1, {"actors": 1})],
)
def test_it_measures(tmp_path, name, number, expected):
    command = [sys.executable, SCRIPT, "--work-dir", tmp_path, "--scale", "0.05", "--figure", name, str(number)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    assert found["figure"] == name and expected.items() <= found.items()
    assert all(found[key] >= 0 for key in found.keys() - {"figure"})
