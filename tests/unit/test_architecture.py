"""Who may import whom: read from the sources, so that no import is missed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softlabel

ROOT = Path(softlabel.__file__).parent
GROUND = {
    "softlabel",
    "softlabel.errors",
    "softlabel.config",
    "softlabel.recipe_file",
    "softlabel.records",
    "softlabel.boxes",
    "softlabel.terminal",
    "softlabel.calibration",
    "softlabel.store",
}
TOP = {
    "softlabel.categorize",
    "softlabel.cli",
    "softlabel.experiment",
    "softlabel.plan",
    "softlabel.search_experiment",
    "softlabel.session",
}
RAY = {
    "session.py",
    "labelling/run.py",
    "results/run.py",
    "search/groups.py",
    "search/run.py",
    "search/trainable.py",
    "search/tuning.py",
    "training/run.py",
    "training/trainer.py",
}
TRANSFORMERS = {"labelling/owlvit.py"}
ULTRALYTICS = {
    "labelling/weights.py",
    "labelling/yolo.py",
    "labelling/yolov5.py",
    "labelling/yolov5_loss.py",
    "training/arguments.py",
    "training/dataset.py",
    "training/trainer.py",
}


def files():
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {".".join(("softlabel", *Path(name).with_suffix("").parts)).removesuffix(".__init__") for name in files()}
    return {name for name in names if not name.startswith("softlabel") or name in modules}


def uses(name, package):
    return any(used == package or used.startswith(package + ".") for used in imports(files()[name]))


@pytest.mark.parametrize("name", files())
def test_libraries_stay_in_their_rooms(name):
    assert not uses(name, "ray") or name in RAY
    assert not uses(name, "ultralytics") or name in ULTRALYTICS
    assert not uses(name, "transformers") or name in TRANSFORMERS
    assert not uses(name, "rasterio") or name.startswith("imagery/")


@pytest.mark.parametrize("name", files())
def test_imports_go_down(name):
    own = {used for used in imports(files()[name]) if used.startswith("softlabel")}
    folder = f"softlabel.{name.split('/')[0]}"
    if "/" not in name:
        allowed = GROUND if f"softlabel.{name.removesuffix('.py')}" not in TOP else None
        assert allowed is None or own <= allowed
    elif name.endswith("run.py"):
        assert not {used for used in own if used.endswith(".run")} and not own & TOP
    elif name not in ("training/trainer.py", "search/groups.py"):  # Ray Train's two loops
        assert all(used in GROUND or used.startswith(folder) for used in own), own


def test_the_rooms_above_exist():
    assert files().keys() >= RAY | ULTRALYTICS | TRANSFORMERS


@pytest.mark.parametrize(
    "modules",
    ["softlabel.labelling.reading, softlabel.imagery.scenes", "softlabel.labelling.run, softlabel.labelling.teachers"],
)
def test_reading_tasks_and_drivers_start_without_torch(modules):
    """They would pay seconds and half a gigabyte each for a model that they never see."""
    code = f"import sys, {modules}; print(sorted({{'torch', 'ultralytics', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
