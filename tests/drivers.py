"""Jobs in a process of their own, as a user starts them, for tests that kill them or what they started."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from softlabel.recipe_file import dump_recipe
from softlabel.shards import read_soft_labels
from softlabel.storage import is_remote

JOBS = Path(__file__).parents[1] / "jobs"
LABEL, SEARCH = JOBS / "label.py", JOBS / "search.py"


class Driver:
    """`python jobs/label.py`, or another job, on a recipe."""

    def __init__(self, recipe, run_dir, *flags, job=LABEL, env=None, wrapper=()):
        run_dir.mkdir(parents=True, exist_ok=True)
        config = run_dir.with_name(f"{run_dir.name}.yaml")
        config.write_text(dump_recipe(recipe))
        in_bucket = is_remote(run_dir)
        self._log = Path(tempfile.mkstemp(suffix=".log")[1]) if in_bucket else config.with_suffix(".log")
        self.run_dir, self._every_s = run_dir, 0.1 if in_bucket else 0.01
        command = [*wrapper, sys.executable, str(job), "--config", str(config), "--run-dir", str(run_dir), *flags]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})})

    @property
    def said(self):
        return self._log.read_text()

    @property
    def shards(self):
        return list(self.run_dir.glob("label-*/shards/*/*.parquet"))

    def wait_until(self, condition, seconds=300):
        """Until the condition holds (True) or the driver has ended (False)."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.process.kill()  # or its Ray would live on beside the tests that follow
                raise AssertionError(self.said)
            time.sleep(self._every_s)
        return True

    def wait(self, seconds=300):
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said) from None


def by_tile(folder):
    """The rows of a finished store by tile, each there once."""
    rows = list(read_soft_labels(folder))
    assert len({row["tile_id"] for row in rows}) == len(rows)
    return {row["tile_id"]: row for row in rows}


def assert_same(found, expected):
    """The same tiles with the same boxes: within 0.01 px and 1e-4 of a score. Of two boxes whose scores differ by less
    than the last bits of a float, either may come first."""
    assert found.keys() == expected.keys()
    for tile_id, row in found.items():
        assert row["status"] == expected[tile_id]["status"], row["reason"]
        assert len(row["boxes"]) == len(expected[tile_id]["boxes"]), tile_id
        if row["boxes"]:
            apart = np.abs(_in_tolerances(row)[:, None] - _in_tolerances(expected[tile_id])).max(axis=2)
            assert apart.min(axis=0).max() <= 1 and apart.min(axis=1).max() <= 1, tile_id


def _in_tolerances(row):
    return np.hstack([np.array(row["boxes"]) / 0.01, np.array(row["scores"]) / 1e-4])
