"""Installed from a wheel, far from the checkout: recipes come along, and the first commands work in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from softlabel.store import summary

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` of an environment with the wheel alone; what it depends on comes from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(REPO / "softlabel", source / "softlabel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / "bin"


def run(installed, folder, *words):
    """A command in that environment, as its user would call it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PATH"] = f"{installed}:{environment['PATH']}"
    found = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_the_demo_is_there(installed, tmp_path):
    where = run(installed, tmp_path, "python", "-c", "import softlabel; print(softlabel.__file__)")
    assert where.startswith(str(installed.parent))
    out = run(installed, tmp_path, "softlabel", "demo", "--dry-run")
    assert f"# demo into {tmp_path / 'runs' / 'demo'}" in out and "# scenes: 60 made up" in out
    recipe = ["--config", "synthetic.yaml", "--dry-run"]
    assert "name: synthetic" in run(installed, tmp_path, "softlabel", "tile", *recipe)
    assert list(tmp_path.iterdir()) == []


def test_it_labels(installed, tmp_path, weights):
    small = ["tiles.synthetic.num_scenes=12", "tiles.synthetic.scene_size_px=192", "execution.cpus_per_actor=0.5"]
    settings = [word for value in (*small, f"label.weights={weights}") for word in ("--set", value)]
    out = run(installed, tmp_path, "softlabel", "label", "--config", "demo", *settings)
    store = Path(out.splitlines()[-1])
    assert store.parent == tmp_path / "runs" / "demo" and summary(store)["labelled"] > 0
    shown = run(installed, tmp_path, "softlabel", "show", str(store))
    assert Path(shown.splitlines()[-1]).is_file()
